/* nbdferry - what a destination does not overwrite
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Two questions are asked before anything moves:
 *
 * Is the disk in use?  Then nothing helps.  That the answer is still right
 * when the first data comes is seen to by guard_hold.
 *
 * Is there something on it?  What came by a migration that did not end, or is
 * the old copy of the very disk that comes back, may be overwritten: it is
 * worth nothing.  But only if nobody has written to it since, as far as its
 * times tell (docs/trust.md); except that a session may always go on.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>

#include "cleanup.h"
#include "guard.h"
#include "probe.h"

static bool
is_ours (const struct drive *d, const struct uuid *session,
         const struct uuid *lineage)
{
  const struct journal_record *rec = journal_get (d->journal);

  switch (rec->state) {
  case JOURNAL_PREPARED: /* the same source asks again, or it was refused */
  case JOURNAL_INCOMING:
    if (uuid_is_zero (&rec->session)) /* nothing has come yet */
      return false;
    return uuid_equal (&rec->session, session) || !rec->stale;
  case JOURNAL_GONE:
    return rec->acknowledged && uuid_equal (&rec->lineage, lineage) &&
           !rec->stale;
  default:
    return false;
  }
}

int
guard_look (struct disk *disk, const char *name, const char *where,
            struct error *err)
{
  CLEANUP_FREE char *found = NULL;
  int r = disk_probe (disk, &found, err);

  if (r == 1)
    return error_set (err, EEXIST, "disk '%s' at the destination (%s) bears "
                      "%s; if that may be lost, migrate with --overwrite",
                      name, where, found);
  if (r == -1)
    return error_prefix (err, "disk '%s' at the destination (%s): cannot see "
                         "what is on it; if it may be lost, migrate with "
                         "--overwrite", name, where);
  return 0;
}

int
guard_check (struct drive *d, const struct uuid *session,
             const struct uuid *lineage, bool others, bool overwrite,
             struct error *err)
{
  struct disk *disk = d->disk;
  int held = disk->ops->claim ? disk->ops->claim (disk, err) : 1;
  int r = 0;

  if (held == -1)
    return error_prefix (err, "disk '%s' at the destination", d->name);
  if (!overwrite && (others || !is_ours (d, session, lineage)))
    r = guard_look (disk, d->name, d->path, err);
  if (held == 0)
    disk->ops->release (disk);
  return r;
}

int
guard_hold (struct drive *d, struct error *err)
{
  struct disk *disk = d->disk;

  if (disk->ops->claim && disk->ops->claim (disk, err) == -1)
    return error_prefix (err, "disk '%s' at the destination", d->name);
  return 0;
}
