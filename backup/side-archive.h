/* nbdferry - a chain of archives as one of two disks that are compared
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What is in archives comes in the order of offsets, and is had only once: it
 * is hashed by one thread, from the beginning to the end.
 */
#ifndef FERRY_SIDE_ARCHIVE_H
#define FERRY_SIDE_ARCHIVE_H

#include <stdbool.h>

#include "hasher.h"

struct archive_side;

/* Is it an archive, or archives with commas between their paths? */
bool archive_side_is (const char *where);

/* The archives, of which the first must be a full one, in the order in which
 * they were made.  NULL on error.
 */
struct archive_side *archive_side_open (const char *where, struct error *err);
void archive_side_close (struct archive_side *s);

/* To be read in order of offsets. */
void archive_side_source (struct archive_side *s, struct hash_source *source);

/* Read what is left, so that all checksums were seen: 0; -1, also for what
 * went wrong before.
 */
int archive_side_finish (struct archive_side *s, struct error *err);

#endif /* FERRY_SIDE_ARCHIVE_H */
