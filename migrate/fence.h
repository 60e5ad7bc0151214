/* nbdferry - a fence against the late work of dead connections
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * When a connection dies, a worker of the server may still be about to write
 * what it had received.  So all that comes from one peer carries an epoch,
 * which grows with each (re)connection.  Raising the epoch turns older work
 * away and waits for what of it is still running; only then may the peer send
 * again what it does not know to have arrived.
 */
#ifndef FERRY_FENCE_H
#define FERRY_FENCE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct fence {
  pthread_mutex_t lock; /* protects what follows */
  pthread_cond_t idle;  /* older + current may have become 0 */
  uint64_t epoch;
  unsigned older;   /* handlers that run for an older epoch */
  unsigned current; /* handlers that run for 'epoch' */
};

void fence_init (struct fence *f);
void fence_destroy (struct fence *f);

/* Before, and after, the work of a handler.  fence_enter returns -1 with
 * ESTALE if the epoch is not the present one.
 */
int fence_enter (struct fence *f, uint64_t epoch);
void fence_leave (struct fence *f, uint64_t epoch);

/* Make 'epoch' the present one, if it is not older (-1, ESTALE), and wait
 * until no older handler runs.
 */
int fence_raise (struct fence *f, uint64_t epoch);

/* Is that the present epoch? */
bool fence_is_at (struct fence *f, uint64_t epoch);

/* Wait until no handler at all runs.  The caller keeps new ones from coming
 * by sending nothing.
 */
void fence_drain (struct fence *f);

#endif /* FERRY_FENCE_H */
