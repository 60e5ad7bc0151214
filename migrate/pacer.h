/* nbdferry - pacing: so many bytes a second, and no more
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A queue in front of the wire.  Who wants to send reserves the time that its
 * bytes take at the limit, and sleeps until its turn has come: an exact time,
 * so nobody looks at the clock again and again.  Who comes late (a thread is
 * never woken to the microsecond) keeps a little of what it has missed, so
 * that the rate is held; who was idle has no more credit than that.
 *
 * In any second at most the limit, plus PACER_CREDIT's worth, plus one piece
 * goes out; how large pieces may be is what pacer_piece says.
 */
#ifndef FERRY_PACER_H
#define FERRY_PACER_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "clock.h"

#define PACER_CREDIT (10 * NS_PER_MS)

struct pacer {
  pthread_mutex_t lock; /* protects what follows */
  pthread_cond_t changed; /* the rate, or it was stopped */
  uint64_t rate;        /* bytes a second, 0: no limit */
  uint64_t next;        /* ns: when the next bytes may go */
  uint64_t loan;        /* bytes that may go without waiting */
  unsigned changes;     /* of the rate */
  uint64_t deadline;    /* ns: nobody waits for a turn after that; 0: none */
  bool stopped;
};

void pacer_init (struct pacer *p);
void pacer_destroy (struct pacer *p);

/* Takes effect at once, also for those who wait. */
void pacer_set_rate (struct pacer *p, uint64_t rate);

/* Those bytes more may go at once: somebody waits for them. */
void pacer_lend (struct pacer *p, uint64_t bytes);

/* Wait for the turn of that many bytes. */
void pacer_wait (struct pacer *p, size_t len);

/* The same for who chooses what to send only when the turn has come: wait for
 * it, one at a time, and then say how many bytes it is.
 */
void pacer_turn (struct pacer *p);
void pacer_set_deadline (struct pacer *p, uint64_t deadline); /* ns; 0: none */
void pacer_take (struct pacer *p, size_t len);

/* Nobody waits any more. */
void pacer_stop (struct pacer *p);

/* How many bytes should go out in one piece, so that the limit is held over
 * any second, and yet 'lanes' connections with that round trip (ns), one piece
 * under way on each, reach it if they can.  SIZE_MAX if there is no limit.
 */
size_t pacer_piece (struct pacer *p, uint64_t rtt, unsigned lanes);

#endif /* FERRY_PACER_H */
