/* nbdferry - the source of a migration: what the hold will cost
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The hold lasts as long as the bytes need that are left, and beside that a
 * fixed time: a round trip for them, however few they are, and PREPARE and
 * COMMIT (a round trip each, and syncs at the destination), and the record here
 * (a sync).  What the bytes need is bounded by the downtime limit; the fixed
 * time is measured beforehand, and shown, but no reason not to finish.
 *
 *   rate of the link   bytes that were acknowledged, by the time in which any
 *                      were under way, less one round trip for each time that
 *                      this began: small packets say little otherwise
 *   round trip         the shortest seen of a read that does nothing
 *   a sync             the shortest flush of the destination, less that
 */
#include <config.h>

#include <errno.h>

#include "cleanup.h"
#include "clock.h"
#include "outgoing-impl.h"

/* Bytes that say how fast the link is. */
#define SAMPLE (256 << 10)

/* PREPARE syncs the disk, the bitmaps and the journal, COMMIT the journal once
 * more, and so does this side.
 */
#define SYNCS 5

/* Round trips so long count. */
#define FAR (5 * NS_PER_MS)

/* See hold_can_shrink. */
#define SMALL_PART 8

/* A flush that took long is followed by another, but not for ever. */
#define MAX_FLUSHES 4

static void
learn_round_trip (struct outgoing *o, uint64_t ns)
{
  pthread_mutex_lock (&o->lock);
  if (o->cost.rtt == 0 || ns < o->cost.rtt)
    o->cost.rtt = ns;
  ns = o->cost.rtt;
  pthread_mutex_unlock (&o->lock);
  engine_set_round_trip (o->engine, ns);
}

/* Round trips of that length are saved where others do for them. */
static bool
is_far (const struct outgoing *o)
{
  return o->cost.rtt >= FAR;
}

int
hold_measure_link (struct outgoing *o, struct error *err)
{
  struct engine_work w, *last = &o->cost.work;
  int64_t rtt = is_far (o) ? (int64_t) o->cost.flush
                           : engine_round_trip (o->control);
  uint64_t bytes, ns, waits;

  if (rtt == -1)
    return error_set (err, errno, "the connection to the destination: %m");
  learn_round_trip (o, rtt);
  engine_work (o->engine, &w);
  bytes = w.bytes - last->bytes;
  if (bytes < SAMPLE)
    return 0;
  ns = w.busy_ns - last->busy_ns;
  waits = (w.periods - last->periods) * o->cost.rtt;
  /* Never more than twice what was seen: round trips vary. */
  ns = waits < ns / 2 ? ns - waits : ns / 2;
  *last = w;
  pthread_mutex_lock (&o->lock);
  o->bandwidth = (double) bytes * NS_PER_S / (ns + 1);
  pthread_mutex_unlock (&o->lock);
  return 0;
}

int
hold_connected (struct outgoing *o, uint64_t round_trip, struct error *err)
{
  pthread_mutex_lock (&o->lock);
  o->cost.work = (struct engine_work){ 0 }; /* the engine is a new one */
  pthread_mutex_unlock (&o->lock);
  learn_round_trip (o, round_trip);
  /* A short one was mostly the other side's work. */
  return is_far (o) ? 0 : hold_measure_link (o, err);
}

static int
flush (struct outgoing *o, struct error *err)
{
  uint64_t began = now_ns (), ns;

  if (send_flush (o->control, err) == -1)
    return -1;
  ns = now_ns () - began;
  pthread_mutex_lock (&o->lock);
  o->cost.flush = ns;
  if (o->cost.best_flush == 0 || ns < o->cost.best_flush)
    o->cost.best_flush = ns;
  pthread_mutex_unlock (&o->lock);
  return 0;
}

/* Did the last flush take longer than it must and than the hold may?  Then the
 * one within PREPARE might as well.
 */
static bool
flush_was_long (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);
  const struct outgoing_cost *c = &o->cost;

  return c->flush - c->best_flush > c->best_flush &&
         c->flush - c->best_flush > o->params.downtime_limit * NS_PER_MS;
}

int
hold_flush_ahead (struct outgoing *o, struct error *err)
{
  struct outgoing_cost *c = &o->cost;

  c->ahead = false;
  if (!is_far (o))
    return 0;
  if (flush (o, err) == -1)
    return -1;
  /* If all that had come before took little time, or packets that were sent
   * before it are still on their way, what comes now will not take more.
   */
  pthread_mutex_lock (&o->lock);
  c->ahead = c->flush < c->rtt + o->params.downtime_limit * NS_PER_MS ||
             !engine_is_idle (o->engine);
  pthread_mutex_unlock (&o->lock);
  return 0;
}

int
hold_flush (struct outgoing *o, struct error *err)
{
  bool known = o->cost.best_flush > 0;

  if (o->cost.ahead)
    return 0;
  if (flush (o, err) == -1)
    return -1;
  /* The first one had much to write.  What one costs that has nothing to do,
   * the second shows.
   */
  if (!known && flush (o, err) == -1)
    return -1;
  for (unsigned i = 1; i < MAX_FLUSHES && flush_was_long (o); i++)
    if (flush (o, err) == -1)
      return -1;
  return 0;
}

uint64_t
hold_fixed_cost (const struct outgoing *o, bool left)
{
  const struct outgoing_cost *c = &o->cost;
  uint64_t sync = c->best_flush > c->rtt ? c->best_flush - c->rtt : 0;

  if (c->seen)
    return c->seen;
  return (2 + left) * c->rtt + o->nr * SYNCS * sync;
}

uint64_t
hold_rate (const struct outgoing *o)
{
  uint64_t rate = o->bandwidth ? o->bandwidth : OUTGOING_ASSUMED_BANDWIDTH;

  if (o->params.max_bandwidth > 0 && o->params.max_bandwidth < rate)
    rate = o->params.max_bandwidth;
  return rate;
}

bool
hold_is_short (struct outgoing *o, uint64_t dirty)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  return dirty <= hold_rate (o) / 1000 * o->params.downtime_limit;
}

/* What is left after a round was dirtied while it ran.  If it takes but a small
 * part of that time to send, then as small a part of it is left after the next
 * round.  That pays until it is less than what a round costs at any rate.
 */
bool
hold_can_shrink (struct outgoing *o, uint64_t dirty, uint64_t took)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);
  uint64_t ns = (double) dirty * NS_PER_S / (hold_rate (o) + 1);

  return ns > 2 * (o->cost.rtt + o->cost.best_flush) && ns < took / SMALL_PART;
}

/* ---- the hold itself ---- */

void
hold_begins (struct outgoing *o)
{
  for (size_t i = 0; i < o->nr; i++)
    gate_is_hold (&o->drives[i]->writes);
  pthread_mutex_lock (&o->lock);
  o->hold_began = now_ns ();
  o->hold_drained = o->hold_sent = 0;
  outgoing_give_way (o);
  pthread_mutex_unlock (&o->lock);
}

void
hold_has_drained (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  o->hold_drained = now_ns ();
}

void
hold_has_sent (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  o->hold_sent = now_ns ();
}

/* What of that time is no more than a round trip.  Lock held. */
static uint64_t
trip_of (const struct outgoing *o, uint64_t ns)
{
  return ns < o->cost.rtt ? ns : o->cost.rtt;
}

void
hold_ends (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);
  uint64_t now = now_ns ();

  o->info.hold_us = (now - o->hold_began) / 1000;
  /* Writes that are mirrored may have been under way. */
  if (o->hold_sent > 0)
    o->cost.seen = trip_of (o, o->hold_drained - o->hold_began) +
                   trip_of (o, o->hold_sent - o->hold_drained) +
                   now - o->hold_sent;
  o->hold_began = 0;
}
