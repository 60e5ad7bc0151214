/* nbdferry - the gate that every request passes
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Entering is: add one to my shard, then look whether the door is shut.
 * Shutting is: shut the door, then add up the shards.  Both are sequentially
 * consistent, so at least one of the two sees the other (Dekker's argument):
 * no request is inside without being counted, and none slips past a shut
 * door.  Who finds it shut takes itself out again and sleeps.
 *
 * Leaving is: subtract one, and if that left the counter at 0, look whether
 * somebody watches.  Watching is: say so, then look at the counters.  The same
 * argument: one of the two sees the other, and nobody sleeps for ever.
 *
 * Synchronizing is: wait until each counter was seen at 0 once.  A request
 * that was inside before has kept one counter above 0, from its entry until
 * it left (a token names the counter that was raised, and that same one is
 * lowered), so a counter that is seen at 0 later means that it has left.
 * Nothing more is needed to be right.  But new requests could keep a counter
 * above 0 for ever, so there are two for each shard, and new requests are
 * sent to the one that is not being waited for:
 *
 *   1. wait for side B, which nobody is sent to: those who were there
 *      when the last one flipped, and have left but for a few
 *   2. flip: new requests go to side B
 *   3. wait for side A
 *
 * A request that had read the old side before a flip may still raise it
 * after; that is one request a thread, and the waiting is as right as before.
 * Whoever was not waited for has come to its counter after the look at 0, and
 * so sees what was stored before the call: all of these steps are seq_cst.
 */
#include <config.h>

#include <errno.h>
#include <time.h>

#include "clock.h"
#include "gate.h"

void
gate_init (struct gate *g)
{
  for (size_t i = 0; i < GATE_SHARDS; i++)
    for (size_t side = 0; side < 2; side++)
      atomic_init (&g->shard[i].inside[side], 0);
  atomic_init (&g->shut, false);
  atomic_init (&g->watched, false);
  atomic_init (&g->side, 0);
  pthread_mutex_init (&g->lock, NULL);
  clock_cond_init (&g->opened);
  pthread_cond_init (&g->drained, NULL);
  g->taken = g->synchronizing = g->stopped = g->hold = false;
  g->shut_at = g->empty_at = g->longest = 0;
}

void
gate_destroy (struct gate *g)
{
  pthread_cond_destroy (&g->opened);
  pthread_cond_destroy (&g->drained);
  pthread_mutex_destroy (&g->lock);
}

/* Threads are spread over the shards in the order in which they come. */
static unsigned
my_shard (void)
{
  static atomic_uint next;
  static _Thread_local unsigned mine; /* + 1; 0 is not chosen yet */

  if (mine == 0)
    mine = 1 + atomic_fetch_add_explicit (&next, 1, memory_order_relaxed) %
                 GATE_SHARDS;
  return mine - 1;
}

/* A token is twice the shard, plus the side. */
static atomic_uint *
counter (struct gate *g, int token)
{
  return &g->shard[token / 2].inside[token % 2];
}

void
gate_leave (struct gate *g, int token)
{
  if (atomic_fetch_sub (counter (g, token), 1) == 1 &&
      atomic_load (&g->watched)) {
    /* Under the lock, so that it can't fall between the look and the sleep
     * of who waits.
     */
    pthread_mutex_lock (&g->lock);
    pthread_cond_broadcast (&g->drained);
    pthread_mutex_unlock (&g->lock);
  }
}

int
gate_enter (struct gate *g)
{
  const int shard = my_shard ();

  for (;;) {
    const int token =
      2 * shard + atomic_load_explicit (&g->side, memory_order_relaxed);
    bool stopped;

    atomic_fetch_add (counter (g, token), 1);
    if (!atomic_load (&g->shut))
      return token;
    gate_leave (g, token);

    pthread_mutex_lock (&g->lock);
    while (atomic_load (&g->shut) && !g->stopped)
      pthread_cond_wait (&g->opened, &g->lock);
    stopped = g->stopped;
    pthread_mutex_unlock (&g->lock);
    if (stopped) {
      errno = ESHUTDOWN;
      return -1;
    }
  }
}

static unsigned
count_inside (struct gate *g)
{
  unsigned n = 0;

  for (int token = 0; token < 2 * GATE_SHARDS; token++)
    n += atomic_load (counter (g, token));
  return n;
}

/* Lock held. */
static void
set_watched (struct gate *g)
{
  atomic_store (&g->watched, atomic_load (&g->shut) || g->synchronizing);
}

/* Wait until each counter of that side was 0 once.  Lock held. */
static void
wait_for_side (struct gate *g, unsigned side)
{
  for (int shard = 0; shard < GATE_SHARDS; shard++)
    while (atomic_load (counter (g, 2 * shard + side)) > 0)
      pthread_cond_wait (&g->drained, &g->lock);
}

void
gate_synchronize (struct gate *g)
{
  unsigned side;

  pthread_mutex_lock (&g->lock);
  while (g->synchronizing)
    pthread_cond_wait (&g->drained, &g->lock);
  g->synchronizing = true;
  set_watched (g);
  side = atomic_load (&g->side);
  wait_for_side (g, !side);
  atomic_store (&g->side, !side);
  wait_for_side (g, side);
  g->synchronizing = false;
  set_watched (g);
  pthread_cond_broadcast (&g->drained);
  pthread_mutex_unlock (&g->lock);
}

void
gate_close (struct gate *g)
{
  pthread_mutex_lock (&g->lock);
  while (g->taken)
    pthread_cond_wait (&g->drained, &g->lock);
  g->taken = true;
  g->shut_at = now_ns ();
  atomic_store (&g->shut, true);
  set_watched (g);
  while (count_inside (g) > 0)
    pthread_cond_wait (&g->drained, &g->lock);
  g->empty_at = now_ns ();
  pthread_mutex_unlock (&g->lock);
}

uint64_t
gate_open (struct gate *g)
{
  uint64_t now = now_ns (), ns;

  pthread_mutex_lock (&g->lock);
  ns = now - g->shut_at;
  if (now - g->empty_at > g->longest && !g->hold)
    g->longest = now - g->empty_at;
  g->hold = false;
  g->taken = false;
  if (!g->stopped)
    atomic_store (&g->shut, false);
  set_watched (g);
  pthread_cond_broadcast (&g->opened);
  pthread_cond_broadcast (&g->drained);
  pthread_mutex_unlock (&g->lock);
  return ns;
}

void
gate_stop (struct gate *g)
{
  pthread_mutex_lock (&g->lock);
  g->stopped = true;
  atomic_store (&g->shut, true);
  set_watched (g);
  pthread_cond_broadcast (&g->opened);
  pthread_mutex_unlock (&g->lock);
}

void
gate_delay (struct gate *g, uint64_t ns)
{
  struct timespec ts;
  int r = 0;

  clock_in (&ts, ns);
  pthread_mutex_lock (&g->lock);
  while (r == 0 && !g->stopped)
    r = pthread_cond_timedwait (&g->opened, &g->lock, &ts);
  pthread_mutex_unlock (&g->lock);
}

void
gate_is_hold (struct gate *g)
{
  pthread_mutex_lock (&g->lock);
  g->hold = true;
  pthread_mutex_unlock (&g->lock);
}

uint64_t
gate_longest (struct gate *g)
{
  uint64_t ns;

  pthread_mutex_lock (&g->lock);
  ns = g->longest;
  pthread_mutex_unlock (&g->lock);
  return ns;
}

void
gate_reset_longest (struct gate *g)
{
  pthread_mutex_lock (&g->lock);
  g->longest = 0;
  pthread_mutex_unlock (&g->lock);
}
