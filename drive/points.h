/* nbdferry - the points of bitmaps, on disk
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Which backup was the last one by a bitmap is kept in the file points.json of
 * the state directory (docs/backup.md has its form), so that a chain goes on
 * after a restart.  The file is replaced as a whole, durably, before anything
 * that relies upon it: before bits go because a backup is complete; and a
 * point is out of the file before the bits that it speaks of are.
 */
#ifndef FERRY_POINTS_H
#define FERRY_POINTS_H

#include "drive.h"

/* Make the file say what these have ('point' of those that are persistent);
 * costs nothing if it does already.  Control lock held.
 */
int points_write (struct drive *d, const struct drive_entry *entries,
                  size_t nr, struct error *err);

/* The same for the list as it stands. */
int points_write_list (struct drive *d, struct error *err);

/* Give the bitmaps of the list the points that the file has.  With 'forget'
 * none are taken over, and the file is removed: somebody else has changed the
 * bitmaps, perhaps.  A file that cannot be read or understood counts as none.
 */
int points_load (struct drive *d, bool forget, struct error *err);

/* Parse the text of such a file: an object of names with their points.  NULL
 * if it is none.
 */
json_t *points_parse (const char *text, size_t len);

static inline bool
point_is_none (const struct point *p)
{
  return uuid_is_zero (&p->id);
}

#endif /* FERRY_POINTS_H */
