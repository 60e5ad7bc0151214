/* nbdferry - copying what a backup needs out of a daemon
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The source is an export whose allocation map says what is needed: data,
 * zeros, and holes, which mean "not in this backup" unless it is a full one.
 * Several threads read, each through a connection of its own, or the disk
 * itself (direct.h) as far as it is as it was; what they read goes to an
 * archive, in order, or to a disk, in any order.
 */
#ifndef FERRY_COPY_H
#define FERRY_COPY_H

#include "archive-write.h"
#include "client.h"
#include "direct.h"
#include "disk.h"

struct copy_options {
  const char *uri, *export;  /* the source; export as in client_connect */
  uint64_t size;             /* of it, bytes */
  bool full;                 /* holes are part of it */
  unsigned connections;      /* 1 to COPY_MAX_CONNECTIONS */

  struct direct *direct;     /* the caller's; NULL: read all from the source.
                                Who uses it must ask the daemon before
                                copy_approve */

  /* One of these, which stays the caller's. */
  struct archive_writer *writer;
  struct disk *target;       /* at least as large; all of its range is written,
                                holes too */
  /* For an archive. */
  struct uuid id;
  struct pack_compression compression;
};

#define COPY_MAX_CONNECTIONS 64

struct copy;

/* Connect, and begin.  The options' strings must stay.  NULL on error. */
struct copy *copy_start (const struct copy_options *opt, struct error *err);

/* Any thread: bytes of the disk dealt with so far. */
uint64_t copy_done (struct copy *c);

/* Any thread: everything before this offset has been read, and will not be
 * read again.
 */
uint64_t copy_read_up_to (struct copy *c);

/* Wait at most that long (ns): true if no thread is at work any more.  An
 * archive has no END then: it gets it after copy_approve, and is to be waited
 * for once more.
 */
bool copy_wait (struct copy *c, uint64_t ns);

/* What was copied is the disk as it was: an archive may say that it is
 * complete, to whoever reads it from a pipe.
 */
void copy_approve (struct copy *c);

/* Give up; copy_end will say 'why' (NULL: ECANCELED), unless something has
 * failed before.  Any thread.
 */
void copy_stop (struct copy *c, const struct error *why);

/* Wait for all threads, and free it.  0: all was copied (not flushed; an
 * archive has its END), -1: the first error.
 */
int copy_end (struct copy *c, struct error *err);

#endif /* FERRY_COPY_H */
