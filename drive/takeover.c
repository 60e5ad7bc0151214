/* nbdferry - a disk whose other side is gone for good
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>

#include "takeover.h"

int
takeover_check (const struct journal_record *rec, bool force,
                struct error *err)
{
  switch (rec->state) {
  case JOURNAL_ACTIVE:
    return error_set (err, EALREADY, "the disk is active here; there is "
                      "nothing to take over");
  case JOURNAL_PREPARED:
  case JOURNAL_DOUBT:
    return 0;
  case JOURNAL_GONE:
    if (!rec->acknowledged || force)
      return 0;
    return error_set (err, EPERM, "the handover to %s has completed: what was "
                      "written there since is not here; to go back to the "
                      "state of then all the same, say --force",
                      rec->peer ? rec->peer : "the other side");
  case JOURNAL_INCOMING:
    break;
  }
  if (uuid_is_zero (&rec->session))
    return error_set (err, EPERM, "no data has ever come to this disk; to "
                      "serve it, start the daemon without incoming=on");
  if (force)
    return 0;
  return error_set (err, EPERM, "only a part of the disk has arrived, and a "
                    "disk of which parts are old is of little use; to have "
                    "it all the same, say --force");
}

void
takeover_record (struct journal_record *rec)
{
  rec->taken_from = rec->session;
  uuid_new (&rec->lineage);
  rec->generation++;
  rec->state = JOURNAL_ACTIVE;
  /* One that nobody knows, and not none: it is no disk that never moved, which
   * incoming=on would make a destination.
   */
  uuid_new (&rec->session);
  rec->origin = rec->session;
  rec->attempt = 0;
  rec->acknowledged = rec->stale = false;
  rec->coordinator = rec->peer = NULL;
  rec->together = 0;
}

const char *
takeover_warning (const struct journal_record *rec)
{
  switch (rec->state) {
  case JOURNAL_PREPARED:
    return "All of it has arrived; the source has perhaps not let go of it, "
           "and may have gone on writing to its own disk.";
  case JOURNAL_DOUBT:
  case JOURNAL_GONE:
    if (rec->acknowledged)
      return "The destination has served it since; all that was written "
             "there is lost.";
    return "This side has let go of it; the destination may have become "
           "active, and may have been written to.";
  case JOURNAL_INCOMING:
    return "Only a part of it has arrived: the rest is what was on the disk "
           "before.";
  case JOURNAL_ACTIVE:
    break;
  }
  return "";
}
