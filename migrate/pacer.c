/* nbdferry - pacing: so many bytes a second, and no more
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include "cleanup.h"
#include "pacer.h"

/* A piece is worth so much time at the limit; up to the second if round trips
 * are long.  With the credit that makes less than 5 % of a second.
 */
#define PIECE     (8 * NS_PER_MS)
#define MAX_PIECE (32 * NS_PER_MS)

void
pacer_init (struct pacer *p)
{
  pthread_mutex_init (&p->lock, NULL);
  clock_cond_init (&p->changed);
  p->rate = p->next = p->loan = p->deadline = 0;
  p->changes = 0;
  p->stopped = false;
}

void
pacer_destroy (struct pacer *p)
{
  pthread_mutex_destroy (&p->lock);
  pthread_cond_destroy (&p->changed);
}

void
pacer_set_rate (struct pacer *p, uint64_t rate)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  if (rate == p->rate)
    return;
  p->rate = rate;
  p->next = now_ns ();
  p->changes++;
  pthread_cond_broadcast (&p->changed);
}

/* The time that bytes take.  Lock held, with a limit. */
static uint64_t
duration (const struct pacer *p, uint64_t bytes)
{
  return (double) bytes * NS_PER_S / p->rate;
}

void
pacer_lend (struct pacer *p, uint64_t bytes)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  p->loan = bytes;
  p->next = now_ns ();
  p->changes++;
  pthread_cond_broadcast (&p->changed);
}

void
pacer_wait (struct pacer *p, size_t len)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);
  unsigned changes;

  do {
    uint64_t now = now_ns (), turn;
    struct timespec until;
    int r = 0;

    changes = p->changes;
    if (p->rate == 0 || p->stopped)
      return;
    if (p->loan >= len) {
      p->loan -= len;
      return;
    }
    if (p->next + PACER_CREDIT < now)
      p->next = now - PACER_CREDIT;
    turn = p->next;
    p->next += duration (p, len);
    until.tv_sec = turn / NS_PER_S;
    until.tv_nsec = turn % NS_PER_S;
    while (r == 0 && turn > now && !p->stopped && changes == p->changes)
      r = pthread_cond_timedwait (&p->changed, &p->lock, &until);
    /* At a change all who wait reserve again. */
  } while (changes != p->changes);
}

void
pacer_set_deadline (struct pacer *p, uint64_t deadline)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  p->deadline = deadline;
  pthread_cond_broadcast (&p->changed);
}

/* Lock held. */
static uint64_t
turn_of (const struct pacer *p)
{
  return p->deadline && p->deadline < p->next ? p->deadline : p->next;
}

void
pacer_turn (struct pacer *p)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);
  uint64_t turn;

  while (p->rate > 0 && !p->stopped && p->loan == 0 &&
         now_ns () < (turn = turn_of (p))) {
    struct timespec until = { turn / NS_PER_S, turn % NS_PER_S };

    pthread_cond_timedwait (&p->changed, &p->lock, &until);
  }
}

void
pacer_take (struct pacer *p, size_t len)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);
  uint64_t now = now_ns ();
  size_t lent = p->loan < len ? p->loan : len;

  if (p->rate == 0)
    return;
  p->loan -= lent;
  if (p->next + PACER_CREDIT < now)
    p->next = now - PACER_CREDIT;
  p->next += duration (p, len - lent);
}

void
pacer_stop (struct pacer *p)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  p->stopped = true;
  pthread_cond_broadcast (&p->changed);
}

size_t
pacer_piece (struct pacer *p, uint64_t rtt, unsigned lanes)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);
  uint64_t time = PIECE;

  if (p->rate == 0)
    return SIZE_MAX;
  if (rtt * 2 / lanes > time)
    time = rtt * 2 / lanes;
  if (time > MAX_PIECE)
    time = MAX_PIECE;
  return (double) p->rate * time / NS_PER_S;
}
