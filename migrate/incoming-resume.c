/* nbdferry - the destination: sessions that go on
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What a disk has got and flushed is still there when its daemon is started
 * again: the journal names the session, durably, before any data of it is
 * written, and nobody else writes to the disk.  The source knows by itself what
 * was flushed; all that this side has to say is whether that still stands.
 *
 * It does while the session lives in this process, once data of it has come
 * (before, the source may know of a disk that had nothing).  In a later one it
 * does if the journal names the session and the disk is as our last write left
 * it (trust.h).
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>

#include "cleanup.h"
#include "incoming-impl.h"

bool
incoming_holds (const struct drive *d, const struct uuid *session)
{
  const struct journal_record *rec = journal_get (d->journal);

  return (rec->state == JOURNAL_INCOMING || rec->state == JOURNAL_PREPARED) &&
         uuid_equal (&rec->session, session) && !rec->stale;
}

/* A session that goes on does not take a drive from another one, be it here or
 * only in the journal: that one began later.
 */
int
incoming_may_resume (const struct drive *d, const struct uuid *session,
                     const struct session *other, struct error *err)
{
  const struct journal_record *rec = journal_get (d->journal);

  if ((other == NULL || uuid_equal (&other->id, session)) &&
      (rec->state == JOURNAL_ACTIVE || uuid_is_zero (&rec->session) ||
       uuid_equal (&rec->session, session)))
    return 0;
  /* It was handed over from here once, and nothing has come since. */
  if (other == NULL && rec->state == JOURNAL_GONE)
    return 0;
  return error_set (err, EBUSY, "disk '%s' at the destination belongs to "
                    "another migration by now", d->name);
}

int
incoming_unprepare (struct session *s, struct error *err)
{
  for (size_t i = 0; i < s->nr; i++) {
    struct drive *d = s->drives[i];
    int r = 0;

    pthread_mutex_lock (&d->control);
    if (d->mode == DRIVE_PREPARED) {
      r = incoming_record (d, &s->id, journal_get (d->journal)->stale, err);
      if (r == 0) {
        drives_close (&d, 1, true);
        drive_set_mode (d, DRIVE_INCOMING, NULL);
        drives_open (&d, 1, true);
      }
    }
    else if (d->mode != DRIVE_INCOMING)
      r = error_set (err, EBUSY, "disk '%s' is %s at the destination; it takes "
                     "no data any more", d->name, drive_mode_name (d->mode));
    pthread_mutex_unlock (&d->control);
    if (r == -1)
      return -1;
  }
  return 0;
}

int
incoming_sync (struct session *s, size_t disk, struct error *err)
{
  struct drive *d = s->drives[disk];

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->flush);
  if (d->disk->ops->flush (d->disk) == -1) {
    error_set (err, errno, "flush %s: %m", d->path);
    d->failed_flushes++;
    return -1;
  }
  if (d->failed_flushes != s->disks[disk].failed)
    return error_set (err, EIO, "flush %s: one has failed before; what came "
                      "since the last good one must be sent again", d->path);
  return 0;
}

void
incoming_expect (struct session *s)
{
  /* Without the lock, which a flush may hold for long.  One that fails from
   * now on counts against the new epoch, too, though it may be of the old one:
   * what has come meanwhile may be lost.
   */
  for (size_t i = 0; i < s->nr; i++)
    s->disks[i].failed = s->drives[i]->failed_flushes;
}

json_t *
incoming_held_json (struct session *s)
{
  json_t *list = json_array ();

  for (size_t i = 0; i < s->nr; i++)
    json_array_append_new (list, json_boolean (s->begun || s->disks[i].held));
  return list;
}
