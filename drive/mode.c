/* nbdferry - who serves the disk
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The journal decides (docs/handover.md).
 */
#include <config.h>

#include <errno.h>

#include "cleanup.h"
#include "drive.h"
#include "load.h"

bool
drive_is_elsewhere (const struct drive *d)
{
  return d->mode == DRIVE_LEAVING || d->mode == DRIVE_GONE ||
         d->mode == DRIVE_FORWARD;
}

const char *
drive_mode_name (enum drive_mode mode)
{
  switch (mode) {
  case DRIVE_ACTIVE: return "active";
  case DRIVE_INCOMING: return "incoming";
  case DRIVE_PREPARED: return "prepared";
  case DRIVE_LEAVING: return "leaving";
  case DRIVE_GONE: return "gone";
  case DRIVE_FORWARD: return "forwarding";
  }
  return "?";
}

/* ---- who is active ---- */

/* Has the coordinator of that handover let go?  Its journal says so as long as
 * any disk is in doubt.  It has not if it is as it was, of the same generation;
 * from anything else nothing can be concluded, and the disk is not served.
 */
static int
coordinator_gone (const struct journal_record *rec, bool *yes,
                  struct error *err)
{
  struct journal_record c;
  bool no;

  *yes = false;
  if (rec->coordinator == NULL)
    return error_set (err, EINVAL, "in doubt, but does not say where to look");
  if (journal_read (rec->coordinator, &c, err) == -1)
    return error_prefix (err, "this disk was handed over together with "
                         "another, whose journal must be read first");
  *yes = c.state == JOURNAL_GONE && c.attempt == rec->attempt &&
         uuid_equal (&c.session, &rec->session);
  no = c.generation == rec->coordinator_generation &&
       uuid_equal (&c.lineage, &rec->coordinator_lineage) &&
       c.state != JOURNAL_INCOMING && c.state != JOURNAL_PREPARED;
  journal_record_free (&c);
  if (*yes || no)
    return 0;
  return error_set (err, EPERM, "this disk was being handed over to %s "
                    "together with another, whose journal, %s, does not tell "
                    "any more whether it was; look over there before this "
                    "one is used (to use it, remove its state directory)",
                    rec->peer ? rec->peer : "?", rec->coordinator);
}

/* Was that handover committed at its coordinator, a destination? */
static int
coordinator_committed (const struct journal_record *rec, bool *yes,
                       struct error *err)
{
  struct journal_record c;

  *yes = false;
  if (rec->coordinator == NULL)
    return 0;
  if (journal_read (rec->coordinator, &c, err) == -1)
    return error_prefix (err, "this disk is coming in together with "
                         "another, whose journal must be read first");
  /* It may have moved on since. */
  *yes = uuid_equal (&c.origin, &rec->session) &&
         (c.attempt == rec->attempt ||
          !uuid_equal (&c.session, &rec->session));
  journal_record_free (&c);
  return 0;
}

int
drive_decide_mode (struct drive *d, struct journal_record *rec, bool incoming,
                   struct error *err)
{
  bool yes, never_moved = uuid_is_zero (&rec->session);

  switch (rec->state) {
  case JOURNAL_DOUBT:
    if (coordinator_gone (rec, &yes, err) == -1)
      return -1;
    rec->state = yes ? JOURNAL_GONE : JOURNAL_ACTIVE;
    break;
  case JOURNAL_PREPARED:
    if (coordinator_committed (rec, &yes, err) == -1)
      return -1;
    if (yes) {
      rec->state = JOURNAL_ACTIVE;
      rec->origin = rec->session;
      rec->generation++;
    }
    break;
  case JOURNAL_INCOMING:
    if (!incoming && never_moved)
      rec->state = JOURNAL_ACTIVE; /* nothing ever came in */
    break;
  case JOURNAL_ACTIVE:
    if (incoming && never_moved)
      rec->state = JOURNAL_INCOMING;
    break;
  case JOURNAL_GONE:
    /* It may come back, but not before the other side is known to be active:
     * until then somebody must repeat COMMIT, or nobody ever serves it.  The
     * journal goes on to say that it is gone until something has come.
     */
    if (incoming && rec->acknowledged) {
      d->mode = DRIVE_INCOMING;
      return 0;
    }
    break;
  }
  switch (rec->state) {
  case JOURNAL_INCOMING: d->mode = DRIVE_INCOMING; break;
  case JOURNAL_PREPARED: d->mode = DRIVE_PREPARED; break;
  case JOURNAL_GONE: d->mode = DRIVE_GONE; break;
  default: d->mode = DRIVE_ACTIVE; break;
  }
  return 0;
}

/* ---- what it is now ---- */

/* What may be served is seen without the control lock, which may be held for
 * long.
 */
enum drive_mode
drive_get_mode (struct drive *d)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  return d->mode;
}

int
drive_may_serve (struct drive *d, struct error *err)
{
  switch (drive_get_mode (d)) {
  case DRIVE_ACTIVE:
  case DRIVE_LEAVING:
  case DRIVE_FORWARD:
    return 0;
  case DRIVE_INCOMING:
    return error_set (err, EPERM, "disk '%s' is the destination of a "
                      "migration that has not completed (state in %s)",
                      d->name, d->state_dir);
  case DRIVE_PREPARED:
    return error_set (err, EPERM, "disk '%s' is the destination of a "
                      "migration; everything has arrived, and it waits for "
                      "the source to hand it over", d->name);
  case DRIVE_GONE:
    break;
  }
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);
  return error_set (err, EPERM, "disk '%s' was handed over to %s; it is "
                    "served there", d->name,
                    journal_get (d->journal)->peer ?: "another server");
}

/* ---- changing it ---- */

void
drive_set_mode (struct drive *d, enum drive_mode mode, struct disk *remote)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  d->mode = mode;
  d->remote = remote;
}

void
drive_record_acknowledged (struct drive *d)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);
  struct journal_record rec = *journal_get (d->journal);

  rec.acknowledged = true;
  journal_write (d->journal, &rec, NULL);
}

int
drive_record (struct drive *d, const struct journal_record *rec,
              struct error *err)
{
  return journal_write (d->journal, rec, err);
}
