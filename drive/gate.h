/* nbdferry - the gate that every request passes
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Requests enter on the shared side, which costs two atomic operations on a
 * cache line of their own.  Who needs a point in time takes the exclusive
 * side: new requests are held at the door, those inside are waited for, and
 * then nothing is in flight.  How long the door was shut is measured.  Who
 * only must know that everybody inside has seen a change synchronizes, which
 * holds nobody back.
 */
#ifndef FERRY_GATE_H
#define FERRY_GATE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define GATE_SHARDS 32

struct gate_shard {
  /* Requests inside through this shard, by the side that they took. */
  _Alignas (64) atomic_uint inside[2];
};

struct gate {
  struct gate_shard shard[GATE_SHARDS];
  atomic_bool shut;    /* the door; written under the lock, as the next two */
  atomic_bool watched; /* who leaves last wakes somebody */
  atomic_uint side;    /* 0 or 1: which counters new requests take */

  pthread_mutex_t lock; /* protects what follows */
  pthread_cond_t opened;  /* 'shut' became false, or 'stopped' true */
  pthread_cond_t drained; /* a counter became 0 while it was watched */
  bool taken;             /* somebody has the exclusive side */
  bool synchronizing;     /* somebody is in gate_synchronize */
  bool stopped;           /* for good: everybody is turned away */
  uint64_t shut_at;       /* ns, CLOCK_MONOTONIC */
  uint64_t empty_at;      /* ns, when nobody was inside any more */
  uint64_t longest;       /* ns, the longest time that the door stayed shut
                             after that: what went before was I/O that had
                             been submitted */
  bool hold;              /* it is shut for a handover: does not count */
};

void gate_init (struct gate *g);
void gate_destroy (struct gate *g);

/* The shared side.  gate_enter waits while the door is shut; it returns a
 * token for gate_leave (in any thread), or -1 with ESHUTDOWN once the gate was
 * stopped.
 */
int gate_enter (struct gate *g);
void gate_leave (struct gate *g, int token);

/* The exclusive side: shut the door and wait until nobody is inside.  One at
 * a time; others wait.  gate_close may be left by gate_open in another
 * thread.  gate_open returns for how long the door was shut, in ns.
 */
void gate_close (struct gate *g);
uint64_t gate_open (struct gate *g);

/* Wait until everybody has left who is inside now, and hold nobody back.  Who
 * enters after this was called sees all that was stored (seq_cst) before.
 */
void gate_synchronize (struct gate *g);

/* Wake everybody who waits at the door, and turn everybody away from now on,
 * with ESHUTDOWN.  Those inside go on; gate_close still works.
 */
void gate_stop (struct gate *g);

/* Wait that long (ns) on the way in, to slow a writer down; ends early if
 * the gate is stopped.
 */
void gate_delay (struct gate *g, uint64_t ns);

/* It is shut now for a handover, whose time is not to count in gate_longest. */
void gate_is_hold (struct gate *g);

uint64_t gate_longest (struct gate *g);
void gate_reset_longest (struct gate *g);

#endif /* FERRY_GATE_H */
