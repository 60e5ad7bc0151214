/* nbdferry - slowing writers down
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A rate for all writers of a drive together, however many they are and
 * however much each writes at a time.  They go in the order in which they
 * came: each draws a ticket, the number of bytes that were asked for before
 * it, and goes once so many have been let through.  A new rate changes how
 * fast that number grows, and nobody's place.
 */
#ifndef FERRY_THROTTLE_H
#define FERRY_THROTTLE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct throttle {
  atomic_uint_fast64_t rate; /* bytes a second, 0: none.  Written under the
                                lock; without it a look may come late, for one
                                write more or less */
  pthread_mutex_t lock;   /* protects what follows */
  pthread_cond_t changed; /* the rate, or it was stopped */
  uint64_t asked, passed; /* bytes, since it began; passed <= asked */
  uint64_t at;            /* ns: when 'passed' was so */
  uint64_t longest;       /* ns that one has waited */
  bool stopped;
};

void throttle_init (struct throttle *t);
void throttle_destroy (struct throttle *t);

/* Takes effect at once, also for those who wait; 0: all go on. */
void throttle_set (struct throttle *t, uint64_t rate);

/* Nobody waits any more. */
void throttle_stop (struct throttle *t);

/* Wait for the turn of that many bytes. */
void throttle_wait (struct throttle *t, uint64_t bytes);

/* How long a write would wait now, and the longest that one has waited since
 * the reset; ns.
 */
uint64_t throttle_delay (struct throttle *t);
uint64_t throttle_longest (struct throttle *t);
void throttle_reset_longest (struct throttle *t);

#endif /* FERRY_THROTTLE_H */
