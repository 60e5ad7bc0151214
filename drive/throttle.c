/* nbdferry - slowing writers down
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include "cleanup.h"
#include "clock.h"
#include "throttle.h"

/* Nobody waits longer than that for one write: a guest's driver has less
 * patience than we.
 */
#define LONGEST (10 * NS_PER_S)

void
throttle_init (struct throttle *t)
{
  atomic_init (&t->rate, 0);
  pthread_mutex_init (&t->lock, NULL);
  clock_cond_init (&t->changed);
  t->asked = t->passed = t->at = t->longest = 0;
  t->stopped = false;
}

void
throttle_destroy (struct throttle *t)
{
  pthread_mutex_destroy (&t->lock);
  pthread_cond_destroy (&t->changed);
}

/* Lock held. */
static void
advance (struct throttle *t)
{
  uint64_t now = now_ns (), rate = atomic_load (&t->rate);
  double bytes = (double) (now - t->at) * rate / NS_PER_S;

  if (rate == 0 || bytes >= t->asked - t->passed)
    t->passed = t->asked;
  else
    t->passed += bytes;
  t->at = now;
}

void
throttle_set (struct throttle *t, uint64_t rate)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&t->lock);

  advance (t);
  atomic_store (&t->rate, rate);
  pthread_cond_broadcast (&t->changed);
}

void
throttle_stop (struct throttle *t)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&t->lock);

  t->stopped = true;
  pthread_cond_broadcast (&t->changed);
}

/* How long that ticket has to wait; ns.  Lock held, there is a rate. */
static uint64_t
time_for (const struct throttle *t, uint64_t ticket)
{
  if (t->passed >= ticket)
    return 0;
  return (double) (ticket - t->passed) * NS_PER_S / atomic_load (&t->rate) + 1;
}

void
throttle_wait (struct throttle *t, uint64_t bytes)
{
  uint64_t began, waited, ticket, ns;

  if (atomic_load_explicit (&t->rate, memory_order_relaxed) == 0)
    return;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&t->lock);
  advance (t);
  began = t->at;
  ticket = t->asked;
  t->asked += bytes;
  while (atomic_load (&t->rate) > 0 && !t->stopped &&
         (ns = time_for (t, ticket)) > 0 && t->at - began < LONGEST) {
    struct timespec until;

    if (ns > LONGEST - (t->at - began))
      ns = LONGEST - (t->at - began);
    clock_in (&until, ns);
    pthread_cond_timedwait (&t->changed, &t->lock, &until);
    advance (t);
  }
  waited = t->at - began;
  if (waited > t->longest)
    t->longest = waited;
}

uint64_t
throttle_delay (struct throttle *t)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&t->lock);
  uint64_t ns;

  advance (t);
  if (atomic_load (&t->rate) == 0)
    return 0;
  ns = time_for (t, t->asked);
  return ns < LONGEST ? ns : LONGEST;
}

uint64_t
throttle_longest (struct throttle *t)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&t->lock);

  return t->longest;
}

void
throttle_reset_longest (struct throttle *t)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&t->lock);

  t->longest = 0;
}
