/* nbdferry - what a destination does not overwrite
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_GUARD_H
#define FERRY_GUARD_H

#include "drive.h"

/* May the disk of that lineage be written over what is here, in that session?
 * Not if the system uses the disk (it is mounted, say), whatever was asked
 * for; nor, unless 'overwrite', if something is recognised on it that did not
 * come by a migration.  'others': what has come is of another disk (then it may
 * be that somebody has mistyped a name).  Control held.  0, or -1 with what was
 * found.
 */
int guard_check (struct drive *d, const struct uuid *session,
                 const struct uuid *lineage, bool others, bool overwrite,
                 struct error *err);

/* Is something recognised on a disk?  Then -1 with what it is; 'name' and
 * 'where' are for the message.
 */
int guard_look (struct disk *disk, const char *name, const char *where,
                struct error *err);

/* Data is about to come: from here on nobody may mount the disk or the like.
 * Control held.
 */
int guard_hold (struct drive *d, struct error *err);

#endif /* FERRY_GUARD_H */
