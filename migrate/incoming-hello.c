/* nbdferry - the destination: HELLO, and the sessions that it begins
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The first HELLO of a session takes the drives; all checks come before the
 * first change.  The other control packets are in incoming-control.c.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "guard.h"
#include "incoming-impl.h"

/* ---- may it? ---- */

/* Whose is what the session before this one brings for a drive? */
enum before {
  NOBODYS, /* or that of the same disk */
  LEFT,    /* another disk's, which has gone */
  COMING,  /* another disk's, which has a connection */
};

/* May this drive be the destination of that disk, of the lineage 'l'? */
static int
check_drive (struct drive *d, const struct uuid *session, json_t *disk,
             const struct uuid *l, enum before before, struct error *err)
{
  const struct journal_record *rec = journal_get (d->journal);
  json_int_t size = -1, generation = -1;

  if (json_unpack (disk, "{s:I, s:I}", "size", &size, "generation",
                   &generation) == -1)
    return incoming_malformed ("HELLO", err);
  switch (d->mode) {
  case DRIVE_INCOMING:
    if (before == COMING)
      return error_set (err, EBUSY, "another disk is just coming in as disk "
                        "'%s' at the destination; if that is not to be, "
                        "cancel that migration at its source", d->name);
    break;
  case DRIVE_PREPARED:
    /* Its source may have let go of it, unless it is that very disk which
     * asks again: it would not if it had.
     */
    if (!uuid_equal (&rec->session, session) &&
        !(uuid_equal (&rec->lineage, l) &&
          rec->generation == (uint64_t) generation))
      return error_set (err, EBUSY, "disk '%s' at the destination waits for "
                        "another migration to hand it over (if its source is "
                        "gone for good: nbdferry takeover)", d->name);
    break;
  default:
    return error_set (err, EBUSY, "disk '%s' is %s at the destination; only "
                      "a server started with incoming=on, for a disk that "
                      "is not in use there, can receive it", d->name,
                      drive_mode_name (d->mode));
  }
  if ((uint64_t) size > d->disk->size)
    return error_set (err, ENOSPC, "disk '%s' is too small at the "
                      "destination: %" PRIu64 " bytes instead of %" PRIu64,
                      d->name, d->disk->size, (uint64_t) size);
  /* A file can be made the right size. */
  if ((uint64_t) size < d->disk->size && !d->disk->fixed_size)
    return error_set (err, EINVAL, "disk '%s' has %" PRIu64 " bytes at the "
                      "destination instead of %" PRIu64, d->name,
                      d->disk->size, (uint64_t) size);
  if (size % 512 != 0)
    return incoming_malformed ("HELLO", err);
  return guard_check (d, session, l, before != NOBODYS,
                      json_is_true (json_object_get (disk, "overwrite")),
                      err);
}

int
incoming_record (struct drive *d, const struct uuid *session, bool stale,
                 struct error *err)
{
  struct journal_record rec = *journal_get (d->journal);

  rec.state = JOURNAL_INCOMING;
  rec.session = *session;
  rec.attempt = 0;
  rec.acknowledged = false;
  rec.stale = stale;
  rec.coordinator = rec.peer = NULL;
  rec.served_size = d->size < d->disk->size ? d->size : 0;
  return drive_record (d, &rec, err);
}

/* The drive is a destination without anything.  As long as no data has come,
 * its journal does not say so: a migration that was refused leaves the disk
 * as it was.  But one that was prepared must not stay so; and one that belonged
 * to another session belongs to this one, which could not go on otherwise after
 * a restart.  Control held.
 */
int
incoming_take_drive (struct drive *d, const struct uuid *session,
                     struct error *err)
{
  const struct journal_record *rec = journal_get (d->journal);
  bool others = !uuid_is_zero (&rec->session) &&
                !uuid_equal (&rec->session, session);

  if ((rec->state == JOURNAL_PREPARED ||
       (rec->state == JOURNAL_INCOMING && others)) &&
      incoming_record (d, session, rec->stale || others, err) == -1)
    return -1;
  if (incoming_drop_bitmaps (d, err) == -1 ||
      incoming_blobs_drop (d->state_dir, err) == -1)
    return -1;
  drives_close (&d, 1, true);
  drive_set_mode (d, DRIVE_INCOMING, NULL);
  drives_open (&d, 1, true);
  return 0;
}

int
incoming_begin (struct session *s, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&s->begin);

  for (size_t i = 0; !s->begun && i < s->nr; i++) {
    struct drive *d = s->drives[i];
    int r;

    pthread_mutex_lock (&d->control);
    r = incoming_takes_data (d, err);
    if (r == 0)
      r = guard_hold (d, err);
    if (r == 0)
      r = incoming_record (d, &s->id, false, err);
    pthread_mutex_unlock (&d->control);
    if (r == -1)
      return -1;
  }
  s->begun = true;
  return 0;
}

static struct session *
new_session (const struct uuid *id, size_t nr, struct error *err)
{
  struct session *s = calloc (1, sizeof *s);

  if (s == NULL || (s->drives = calloc (nr, sizeof *s->drives)) == NULL ||
      (s->disks = calloc (nr, sizeof *s->disks)) == NULL) {
    if (s)
      free (s->drives);
    free (s);
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  s->id = *id;
  s->nr = nr;
  s->refs = 1;
  fence_init (&s->fence);
  pthread_mutex_init (&s->begin, NULL);
  return s;
}

/* Put the session in place of those that had its drives, and wait until
 * nothing of those runs any more.
 */
static void
displace (struct incoming *in, struct session *s)
{
  for (size_t i = 0; i < s->nr; i++) {
    struct incoming_drive *id = incoming_find (in, s->drives[i]->name);
    struct session *old;

    pthread_mutex_lock (&in->lock);
    old = id->session;
    id->session = s;
    s->refs++;
    pthread_mutex_unlock (&in->lock);
    if (old && old != s)
      fence_raise (&old->fence, SESSION_CLOSED);
    session_unref (in, old);
  }
}

/* The session could not take all of its drives: it is none. */
static void
forsake (struct incoming *in, struct session *s)
{
  for (size_t i = 0; i < in->nr; i++) {
    struct session *had = NULL;

    pthread_mutex_lock (&in->lock);
    if (in->drives[i].session == s) {
      had = s;
      in->drives[i].session = NULL;
    }
    pthread_mutex_unlock (&in->lock);
    session_unref (in, had);
  }
  session_unref (in, s);
}

static uint64_t
hello_size (json_t *disks, size_t i)
{
  return json_integer_value (json_object_get (json_array_get (disks, i),
                                              "size"));
}

/* One that comes anew takes the place of its own last attempt, and of whoever
 * has gone.
 */
static enum before
look_before (struct incoming *in, const struct incoming_drive *d,
             const struct uuid *lineage)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&in->lock);
  const struct session *s = d->session;

  for (size_t i = 0; s && i < s->nr; i++)
    if (s->drives[i] == d->drive &&
        !uuid_equal (&s->disks[i].lineage, lineage))
      return s->channels > 0 ? COMING : LEFT;
  return NOBODYS;
}

/* Find the drive for a disk of the new session, and check whether it may be. */
static int
find_drive (struct incoming *in, struct session *s, size_t i, json_t *disk,
            bool resume, struct error *err)
{
  const char *name = json_string_value (json_object_get (disk, "name"));
  const char *text = json_string_value (json_object_get (disk, "lineage"));
  struct incoming_drive *id = name ? incoming_find (in, name) : NULL;
  struct uuid *lineage = &s->disks[i].lineage;
  enum before before;
  struct drive *d;
  int r;

  if (id == NULL)
    return error_set (err, ENOENT, "the destination has no disk '%s'",
                      name ? name : "");
  d = id->drive;
  for (size_t k = 0; k < i; k++)
    if (s->drives[k] == d)
      return incoming_malformed ("HELLO", err);
  s->drives[i] = d;
  if (text == NULL || !uuid_parse (text, lineage))
    return incoming_malformed ("HELLO", err);
  before = look_before (in, id, lineage);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);
  r = d->store ? check_drive (d, &s->id, disk, lineage, before, err)
               : error_set (err, EROFS, "disk '%s' cannot be written at the "
                            "destination", name);
  if (r == 0 && resume)
    r = incoming_may_resume (d, &s->id, id->session, err);
  s->disks[i].held = r == 0 && incoming_holds (d, &s->id);
  return r;
}

/* Find the drives of a session; all checks come before the first change. */
static struct session *
begin_session (struct incoming *in, const struct uuid *id, json_t *disks,
               bool resume, struct error *err)
{
  size_t nr = json_array_size (disks);
  struct session *s;

  if (nr == 0 || nr > in->nr) {
    error_set (err, EINVAL, "%zu disks are to come, this server has %zu", nr,
               in->nr);
    return NULL;
  }
  s = new_session (id, nr, err);
  if (s == NULL)
    return NULL;
  for (size_t i = 0; i < nr; i++)
    if (find_drive (in, s, i, json_array_get (disks, i), resume, err) == -1)
      goto fail;
  s->blobs = incoming_blobs_new (s->drives[0]->state_dir);
  if (s->blobs == NULL) {
    error_set (err, ENOMEM, "%m");
    goto fail;
  }
  displace (in, s);
  for (size_t i = 0; i < nr; i++) {
    struct drive *d = s->drives[i];
    int r;

    pthread_mutex_lock (&d->control);
    r = incoming_take_drive (d, id, err);
    pthread_mutex_unlock (&d->control);
    if (r == 0)
      r = drive_resize (d, hello_size (disks, i), err);
    if (r == -1)
      goto fail;
  }
  return s;

 fail:
  forsake (in, s);
  return NULL;
}

/* The source's disk may have grown while its server was down. */
static int
check_sizes (const struct session *s, json_t *disks, struct error *err)
{
  if (json_array_size (disks) != s->nr)
    return incoming_malformed ("HELLO", err);
  for (size_t i = 0; i < s->nr; i++)
    if (hello_size (disks, i) != s->drives[i]->size)
      return error_set (err, EINVAL, "disk '%s' had %" PRIu64 " bytes when the "
                        "migration began, and has %" PRIu64 " now; begin anew",
                        s->drives[i]->name, s->drives[i]->size,
                        hello_size (disks, i));
  return 0;
}

/* What LIST would bring. */
static int
take_lists (struct incoming *in, struct session *s, json_t *disks,
            struct error *err)
{
  struct packet_header h = { .disk = 0 };

  for (; h.disk < s->nr; h.disk++) {
    json_t *disk = json_array_get (disks, h.disk);

    if (json_object_get (disk, "bitmaps") &&
        incoming_list (in, s, &h, disk, err) == -1)
      return -1;
  }
  return 0;
}

int
incoming_hello (struct incoming_channel *ch, const struct packet_header *h,
                json_t *body, struct error *err)
{
  json_t *disks = json_object_get (body, "disks");
  bool resume = json_is_true (json_object_get (body, "resume")), again;
  struct session *s, *old;

  if (!json_is_array (disks) || !incoming_is_epoch (h->epoch))
    return incoming_malformed ("HELLO", err);
  s = incoming_session (ch->in, &h->session);
  if (s == NULL) {
    s = begin_session (ch->in, &h->session, disks, resume, err);
    if (s == NULL)
      return -1;
  }
  again = fence_is_at (&s->fence, h->epoch); /* one more channel */
  if (fence_raise (&s->fence, h->epoch) == -1) {
    bool closed = fence_is_at (&s->fence, SESSION_CLOSED);

    session_unref (ch->in, s);
    return closed ? error_set (err, EBUSY, "another migration has taken a disk "
                               "of this one at the destination")
                  : error_set (err, ESTALE, "handshake of an older connection");
  }
  if (!again)
    incoming_expect (s);
  /* It was prepared, but the source has not let go: it would not ask. */
  if (resume && (check_sizes (s, disks, err) == -1 ||
                 incoming_unprepare (s, err) == -1)) {
    session_unref (ch->in, s);
    return -1;
  }
  if (take_lists (ch->in, s, disks, err) == -1) {
    session_unref (ch->in, s);
    return -1;
  }
  pthread_mutex_lock (&ch->in->lock);
  old = channel_join (ch, s);
  pthread_mutex_unlock (&ch->in->lock);
  session_unref (ch->in, old);
  return 0;
}
