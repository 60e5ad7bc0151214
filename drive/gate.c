/* nbdferry - the gate that every request passes
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Entering is: add one to my shard, then look whether the door is shut.
 * Shutting is: shut the door, then add up the shards.  Both are sequentially
 * consistent, so at least one of the two sees the other (Dekker's argument):
 * no request is inside without being counted, and none slips past a shut
 * door.  Who finds it shut takes itself out again and sleeps.
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
    atomic_init (&g->shard[i].inside, 0);
  atomic_init (&g->shut, false);
  pthread_mutex_init (&g->lock, NULL);
  clock_cond_init (&g->opened);
  pthread_cond_init (&g->drained, NULL);
  g->taken = g->stopped = false;
  g->shut_at = g->longest = 0;
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

void
gate_leave (struct gate *g, int token)
{
  atomic_fetch_sub (&g->shard[token].inside, 1);
  if (atomic_load (&g->shut)) {
    /* Under the lock, so that it can't fall between the look and the sleep
     * of who waits in gate_close.
     */
    pthread_mutex_lock (&g->lock);
    pthread_cond_broadcast (&g->drained);
    pthread_mutex_unlock (&g->lock);
  }
}

int
gate_enter (struct gate *g)
{
  int token = my_shard ();

  for (;;) {
    bool stopped;

    atomic_fetch_add (&g->shard[token].inside, 1);
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

  for (size_t i = 0; i < GATE_SHARDS; i++)
    n += atomic_load (&g->shard[i].inside);
  return n;
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
  while (count_inside (g) > 0)
    pthread_cond_wait (&g->drained, &g->lock);
  pthread_mutex_unlock (&g->lock);
}

uint64_t
gate_open (struct gate *g)
{
  uint64_t ns;

  pthread_mutex_lock (&g->lock);
  ns = now_ns () - g->shut_at;
  if (ns > g->longest)
    g->longest = ns;
  g->taken = false;
  if (!g->stopped)
    atomic_store (&g->shut, false);
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
