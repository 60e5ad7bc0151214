/* nbdferry - bringing a standby up to a point in time
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Copies what a view says is needed to any disk, in batches: a batch counts
 * only when the target has been flushed after it, and is done again as a whole
 * if the connection to the target was lost in between, because a server that
 * was lost may have lost what it had acknowledged.  The view does not change,
 * so that doing something twice does no harm.
 */
#ifndef FERRY_SYNC_COPY_H
#define FERRY_SYNC_COPY_H

#include "bitmap.h"
#include "client.h"
#include "disk.h"
#include "sync-record.h"

struct sync_copy_options {
  struct disk *source;       /* the view */
  struct disk *target;       /* not smaller */
  const char *target_name;   /* for messages */
  bool full;                 /* the source's holes are zeros to be written;
                                otherwise they are not in the backup */
  const struct bitmap *only; /* copy that, holes as zeros; NULL: see 'full' */
  struct bitmap *written;    /* what is copied is marked in it; may be NULL */
  unsigned threads;
  unsigned patience_ms;      /* for how long a lost target is tried again; 0:
                                it cannot be lost */
  const struct stop *stop;   /* gives it up */

  /* In the caller's thread.  'progress': bytes dealt with.  'again' is asked
   * before a batch is done again: 0, or -1 to give up.
   */
  void (*progress) (void *opaque, uint64_t done);
  /* All before that offset is durable over there, and is not read again; may
   * be NULL.
   */
  void (*confirmed) (void *opaque, uint64_t end);
  int (*again) (void *opaque, struct error *err);
  void *opaque;
};

struct sync_copied {
  uint64_t data, zeros; /* bytes written, and made zero */
  uint64_t kept;        /* bytes of zeros that were zeros there already */
  unsigned again;       /* batches that had to be done again */
  struct sync_sampler sampler;
};

/* 0 (all is durable over there), or -1. */
int sync_copy (const struct sync_copy_options *opt, struct sync_copied *result,
               struct error *err);

#endif /* FERRY_SYNC_COPY_H */
