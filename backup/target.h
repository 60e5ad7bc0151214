/* nbdferry - what a backup or a restore is written to
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_TARGET_H
#define FERRY_TARGET_H

#include "disk.h"
#include "partial.h"

struct target_options {
  const char *where;    /* a file, a block device, or an NBD URI */
  uint64_t size;        /* of what will be written, bytes */
  unsigned connections; /* to an NBD server */
  bool in_place;        /* it has the disk as it was before: a file must be
                           there, and have that size */
  bool overwrite;       /* what it holds is of no value */
};

struct target {
  struct disk *disk;
  char *path;           /* of a file or device; NULL: an NBD server */
  struct partial partial; /* of a file that is made anew; or dropped */
  bool fresh;           /* reads as zeros */
  bool to_empty;        /* a file that is there: target_begin does it */
  uint64_t size;        /* of what will be written */
};

/* A file that does not exist is made under the name PATH.partial.  One that
 * exists is refused unless 'in_place', or 'overwrite', which empties it later.
 * A device or server may be larger than 'size'; without 'in_place' it is
 * refused if anything is found on it, unless 'overwrite'.  On error there is
 * nothing to close.
 */
int target_open (struct target *t, const struct target_options *opt,
                 struct error *err);

/* From here on it is not what it was: it is emptied, if it is to be. */
int target_begin (struct target *t, struct error *err);

/* Make all of it durable, and give a file its name. */
int target_commit (struct target *t, struct error *err);

/* Without a commit, a file that was made is removed. */
void target_close (struct target *t);

#endif /* FERRY_TARGET_H */
