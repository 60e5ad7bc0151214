/* nbdferry - some threads that share a piece of work
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * All run one function, and take what there is to do from something that they
 * share.  The first error wins.  Meanwhile the caller's thread shows progress.
 */
#ifndef FERRY_CREW_H
#define FERRY_CREW_H

#include <stdatomic.h>
#include <stdbool.h>

#include "error.h"

struct crew {
  unsigned threads;
  /* Do as much as there is; 0, or -1.  Any of the threads. */
  int (*work) (void *opaque, struct error *err);
  /* A few times a second, in the caller's thread; may be NULL. */
  void (*tick) (void *opaque);
  void *opaque;
  atomic_bool over; /* one has failed: the others are to return soon */
};

/* Returns when all threads have ended: 0, or -1 with the first error. */
int crew_run (struct crew *c, struct error *err);

#endif /* FERRY_CREW_H */
