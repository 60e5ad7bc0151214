/* nbdferry - writes that another NBD server may still lose
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_UNSURE_H
#define FERRY_UNSURE_H

#include "drive.h"

/* For a drive whose disk counts its losses; others have none: 0, with
 * d->unsure NULL.  0 or -1.
 */
int unsure_open (struct drive *d, struct error *err);
void unsure_close (struct drive *d);

/* What is marked by each write, or NULL. */
struct bitmap *unsure_map (const struct drive *d);

/* Flush the disk; what was written before is sure then. */
int unsure_flush (struct drive *d);

/* Has the server lost something since the last look?  Then all that was not
 * sure is marked in what records now.  Outside any gate; after a request, and
 * costs next to nothing if nothing was lost.
 */
void unsure_look (struct drive *d);

/* The same while 'writes' is shut, before what records is changed. */
void unsure_settle (struct drive *d);

#endif /* FERRY_UNSURE_H */
