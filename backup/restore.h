/* nbdferry - writing archives back to a disk
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A chain is gone through as one (archive-merge.h) by one thread; several
 * others write.  Each place is written once.
 */
#ifndef FERRY_RESTORE_H
#define FERRY_RESTORE_H

#include "archive-merge.h"
#include "disk.h"

struct restore_options {
  struct archive_reader **readers; /* as archive_merge_open wants them */
  size_t nr;
  struct disk *target; /* at least as large as the disk */
  bool fresh;          /* it reads as zeros already: holes are left out */
  unsigned threads;    /* that write, 1 to 64 */
};

struct restore;

/* The readers and the target stay the caller's.  NULL on error. */
struct restore *restore_start (const struct restore_options *opt,
                               struct error *err);
uint64_t restore_done (struct restore *r); /* bytes of the disk, any thread */
/* Wait at most that long (ns): true if no thread is at work any more. */
bool restore_wait (struct restore *r, uint64_t ns);
void restore_stop (struct restore *r);
/* Wait for all threads, and free it.  0: all was written (not flushed). */
int restore_end (struct restore *r, struct error *err);

#endif /* FERRY_RESTORE_H */
