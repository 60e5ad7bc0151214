/* nbdferry - the engine: buffers go round, channels empty them
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "engine-impl.h"
#include "giveway.h"

/* Bytes that say how fast the link is, and how many round trips they must have
 * taken: acknowledgements come in bursts.
 */
#define RATE_SAMPLE (4 << 20)
#define RATE_TRIPS  4
#define RATE_DECAY  32

/* So long after an urgent packet others are kept small. */
#define URGENT_PERIOD NS_PER_S

/* With longer round trips there is no lane. */
#define LANE_TRIP NS_PER_MS

/* ---- who gives way, and the lane ---- */

void
engine_wake_channels (struct engine *e)
{
  pthread_cond_broadcast (&e->can_send);
  pthread_cond_broadcast (&e->lane_can_send);
}

static bool
is_lane (const struct engine *e, const struct channel *ch)
{
  return e->lane && ch->number == e->opt.channels;
}

/* Lock held. */
static void
set_way (struct engine *e, struct channel *ch)
{
  bool yes = e->room.giving_way && !is_lane (e, ch);

  if (ch->tid == 0 || yes == ch->giving_way)
    return;
  ch->giving_way = yes;
  thread_give_way (ch->tid, yes);
}

/* Something has changed that decides on them.  Lock held. */
static void
set_ways (struct engine *e)
{
  bool lane = e->mirrors && e->give_way && !e->limited &&
              e->opt.channels > 1 && e->room.rtt > 0 &&
              e->room.rtt < LANE_TRIP;

  if (lane != e->lane)
    engine_wake_channels (e);
  e->lane = lane;
  e->room.giving_way = e->give_way && (!e->mirrors || lane);
  for (unsigned i = 0; i < e->opt.channels; i++)
    set_way (e, &e->channels[i]);
}

void
engine_give_way (struct engine *e, bool yes, bool mirrors)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  e->give_way = yes;
  e->mirrors = mirrors;
  set_ways (e);
}

/* ---- errors ---- */

static void
fail_locked (struct engine *e, const struct error *why)
{
  if (!e->failed) {
    e->failed = true;
    e->error = *why;
    stop_throw (e->opt.stop);
  }
  pthread_cond_broadcast (&e->can_fill);
  engine_wake_channels (e);
  pthread_cond_broadcast (&e->drained);
  pacer_stop (&e->pacer);
}

void
engine_fail (struct engine *e, const struct error *why)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  fail_locked (e, why);
}

bool
engine_failed (struct engine *e, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  if (e->failed && err)
    *err = e->error;
  return e->failed;
}

/* ---- sending ---- */

/* NBD's own header of a write */
#define NBD_HEADER 28

static size_t
wire_len (const struct buffer *b)
{
  return PACKET_HEADER + (size_t) b->h.body_size + b->h.payload_size +
         NBD_HEADER;
}

/* The packet goes; returns the deadline. */
static uint64_t
begin_sending (struct engine *e, struct buffer *b)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  if (e->room.giving_way && !b->urgent && b->h.type == PACKET_DATA)
    b->h.flags |= PACKET_PROGRESS;
  if (e->on_wire++ == 0) {
    e->busy_since = now_ns ();
    e->work.periods++;
  }
  return e->deadline;
}

static void
count_busy (struct engine *e, struct engine_work *w)
{
  *w = e->work;
  if (e->on_wire > 0)
    w->busy_ns += now_ns () - e->busy_since;
}

/* It was acknowledged. */
static void
end_sending (struct engine *e, size_t len)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);
  struct engine_work w;
  uint64_t rate;

  e->work.bytes += len;
  if (--e->on_wire == 0)
    e->work.busy_ns += now_ns () - e->busy_since;
  if (e->work.bytes - e->seen.bytes < RATE_SAMPLE)
    return;
  count_busy (e, &w);
  if (w.busy_ns - e->seen.busy_ns < RATE_TRIPS * e->room.rtt)
    return;
  rate = (double) (w.bytes - e->seen.bytes) * NS_PER_S /
         (w.busy_ns - e->seen.busy_ns + 1);
  e->room.rate -= e->room.rate / RATE_DECAY;
  if (rate > e->room.rate)
    e->room.rate = rate;
  e->seen = w;
}

static int
send_buffer (struct channel *ch, struct buffer *b)
{
  struct engine *e = ch->engine;
  size_t len = wire_len (b);
  struct error err;

  b->h.session = e->opt.session;
  b->h.epoch = e->opt.epoch;
  b->h.channel = ch->number;
  client_set_deadline (ch->client, begin_sending (e, b));
  if (send_packet (ch->client,
                   b->payload - b->h.body_size - PACKET_HEADER, &b->h,
                   b->payload, &err) == 0) {
    end_sending (e, len);
    return 0;
  }
  error_prefix (&err, "channel %u", ch->number);
  engine_fail (e, &err);
  return -1;
}

static struct queue *
queue_of (struct engine *e, const struct buffer *b)
{
  return b->urgent ? &e->urgent : &e->ordinary;
}

static bool
is_idle (const struct queue *q)
{
  return q->nr == 0 && q->in_flight == 0;
}

/* Lock held. */
static void
put_empty (struct engine *e, struct buffer *b)
{
  e->empty[e->nr_empty++] = b;
  if (e->urgent_wanted > 0) /* not everybody who waits may have it */
    pthread_cond_broadcast (&e->can_fill);
  else
    pthread_cond_signal (&e->can_fill);
  if (e->run)
    pthread_cond_signal (&e->can_send);
  if (is_idle (queue_of (e, b)))
    pthread_cond_broadcast (&e->drained);
}

/* Lock held. */
static void
put_full (struct engine *e, struct buffer *b)
{
  struct queue *q = queue_of (e, b);

  q->ring[(q->first + q->nr) % e->nr_buffers] = b;
  q->nr++;
  pthread_cond_signal (e->lane && b->urgent ? &e->lane_can_send
                                            : &e->can_send);
}

/* ---- empty buffers ---- */

/* Was an urgent packet wanted lately?  Lock held. */
static bool
is_urgent_time (const struct engine *e)
{
  return e->urgent_at > 0 && now_ns () - e->urgent_at < URGENT_PERIOD;
}

/* Lock held. */
static size_t
choose_room (struct engine *e)
{
  size_t piece = pacer_piece (&e->pacer, e->room.rtt, e->opt.channels);

  return room_choose (&e->room, is_urgent_time (e) && !e->lane, piece,
                      now_ns ());
}

/* Lock held. */
static struct buffer *
take_empty (struct engine *e, bool urgent)
{
  struct buffer *b = e->empty[--e->nr_empty];

  memset (&b->h, 0, sizeof b->h);
  b->h.type = PACKET_DATA;
  b->h.number = e->next_number++;
  b->covers.nr = 0;
  b->zero_bytes = b->section_bytes = 0;
  b->cargo = NULL;
  b->urgent = urgent;
  b->room = choose_room (e);
  e->urgent_got = urgent;
  /* Whose turn it is may have changed. */
  if (e->nr_empty > 0 && e->urgent_wanted + e->ordinary_wanted > 0)
    pthread_cond_broadcast (&e->can_fill);
  return b;
}

/* Is there one for this kind?  While both are wanted they take turns.  Lock
 * held.
 */
static bool
may_take (const struct engine *e, bool urgent)
{
  unsigned others = urgent ? e->ordinary_wanted : e->urgent_wanted;

  if (others > 0)
    return e->nr_empty > 0 && e->urgent_got != urgent;
  /* One is kept for the next urgent one. */
  return e->nr_empty > (urgent || e->urgent_got ? 0 : is_urgent_time (e));
}

/* ---- channels ---- */

/* Has that channel anything to send?  Lock held. */
static bool
has_full (const struct engine *e, const struct channel *ch)
{
  if (e->lane)
    return (is_lane (e, ch) ? &e->urgent : &e->ordinary)->nr > 0;
  return e->ordinary.nr + e->urgent.nr > 0;
}

/* It has.  Lock held. */
static struct buffer *
take_full (struct engine *e, const struct channel *ch)
{
  bool urgent = e->lane ? is_lane (e, ch)
                        : e->urgent.nr > 0 &&
                            (e->ordinary.nr == 0 || !e->urgent_last);
  struct queue *q = urgent ? &e->urgent : &e->ordinary;
  struct buffer *b = q->ring[q->first];

  e->urgent_last = urgent;
  q->first = (q->first + 1) % e->nr_buffers;
  q->nr--;
  q->in_flight++;
  return b;
}

/* Have an empty buffer filled by this thread.  The lock is dropped meanwhile. */
static void
fill_one (struct engine *e, unsigned worker)
{
  struct buffer *b = take_empty (e, false);
  struct error err;
  int r;

  e->filling++;
  pthread_mutex_unlock (&e->lock);
  r = e->opt.fill (e->opt.opaque, worker, b, &err);
  pthread_mutex_lock (&e->lock);
  e->filling--;
  if (r == 1)
    put_full (e, b);
  else {
    e->run = false;
    put_empty (e, b);
  }
  if (r == -1)
    fail_locked (e, &err);
  if ((!e->run || e->failed) && e->filling == 0)
    pthread_cond_broadcast (&e->drained);
}

/* Should this channel have one filled now?  If there is nothing to send; or
 * only urgent ones are there, and the last one was urgent.  Lock held.
 */
static bool
should_fill (const struct engine *e, const struct channel *ch)
{
  if (!e->run || is_lane (e, ch) || !may_take (e, false))
    return false;
  return !has_full (e, ch) || (!e->lane && e->ordinary.nr == 0 &&
                               e->urgent_last && e->filling == 0);
}

/* Wait until there is something to send; false: it failed, or ends.  Whoever
 * waits for a turn has what is to be sent then.  Lock held.
 */
static bool
wait_full (struct engine *e, const struct channel *ch)
{
  while (!e->failed) {
    bool full = has_full (e, ch);

    if (should_fill (e, ch))
      fill_one (e, ch->number - 1);
    else if (full && !e->choosing)
      return true;
    else if (!full && e->ending)
      return false;
    else
      pthread_cond_wait (is_lane (e, ch) ? &e->lane_can_send : &e->can_send,
                         &e->lock);
  }
  return false;
}

/* With a limit, one thread at a time waits until something may go; only then it
 * is chosen what, so that what is urgent does not wait behind the others.
 */
static struct buffer *
next_full (struct engine *e, const struct channel *ch)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  while (wait_full (e, ch)) {
    struct buffer *b;

    if (e->limited && !e->turn) {
      e->choosing = true;
      pthread_mutex_unlock (&e->lock);
      pacer_turn (&e->pacer);
      pthread_mutex_lock (&e->lock);
      e->choosing = false;
      e->turn = true;
      engine_wake_channels (e);
      continue;
    }
    b = take_full (e, ch);
    e->turn = false;
    pacer_take (&e->pacer, wire_len (b));
    return b;
  }
  return NULL;
}

void *
engine_channel (void *arg)
{
  struct channel *ch = arg;
  struct engine *e = ch->engine;
  struct buffer *b;

  pthread_mutex_lock (&e->lock);
  ch->tid = thread_number ();
  set_way (e, ch);
  pthread_mutex_unlock (&e->lock);
  while ((b = next_full (e, ch)) != NULL) {
    int r = send_buffer (ch, b);

    if (r == 0)
      e->opt.acked (e->opt.opaque, b);
    pthread_mutex_lock (&e->lock);
    queue_of (e, b)->in_flight--;
    put_empty (e, b);
    pthread_mutex_unlock (&e->lock);
  }
  pthread_mutex_lock (&e->lock);
  ch->tid = 0; /* it may be another's soon */
  pthread_mutex_unlock (&e->lock);
  return NULL;
}

/* ---- what producers use ---- */

struct buffer *
engine_get (struct engine *e)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  e->ordinary_wanted++;
  while (!may_take (e, false) && !e->failed)
    pthread_cond_wait (&e->can_fill, &e->lock);
  e->ordinary_wanted--;
  return e->failed ? NULL : take_empty (e, false);
}

struct buffer *
engine_get_urgent (struct engine *e)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  e->urgent_at = now_ns ();
  e->urgent_wanted++;
  while (!may_take (e, true) && !e->failed)
    pthread_cond_wait (&e->can_fill, &e->lock);
  e->urgent_wanted--;
  return e->failed ? NULL : take_empty (e, true);
}

unsigned
engine_urgent_ways (struct engine *e)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  return e->lane ? 1 : e->opt.channels;
}

void
engine_put (struct engine *e, struct buffer *b)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  put_full (e, b);
}

void
engine_return (struct engine *e, struct buffer *b)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  put_empty (e, b);
}

int
engine_run (struct engine *e, uint64_t left, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  e->room.left = e->room.round = left;
  e->run = true;
  pthread_cond_broadcast (&e->can_send);
  while ((e->run && !e->failed) || e->filling > 0)
    pthread_cond_wait (&e->drained, &e->lock);
  e->run = false;
  e->room.round = 0;
  if (!e->failed)
    return 0;
  *err = e->error;
  return -1;
}

static int
drain (struct engine *e, bool all, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  while (!e->failed &&
         !(is_idle (&e->ordinary) && (!all || is_idle (&e->urgent))))
    pthread_cond_wait (&e->drained, &e->lock);
  if (!e->failed)
    return 0;
  if (err)
    *err = e->error;
  return -1;
}

bool
engine_is_idle (struct engine *e)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  return is_idle (&e->ordinary);
}

int
engine_drain (struct engine *e, struct error *err)
{
  return drain (e, true, err);
}

int
engine_drain_ordinary (struct engine *e, struct error *err)
{
  return drain (e, false, err);
}

void
engine_expect (struct engine *e, uint64_t left)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  e->room.left = left;
}

void
engine_set_deadline (struct engine *e, uint64_t deadline)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  e->deadline = deadline;
  pacer_set_deadline (&e->pacer, deadline);
}

void
engine_note_clients (struct engine *e)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  e->room.clients_ns = now_ns ();
}

void
engine_set_bandwidth (struct engine *e, uint64_t bytes_s)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  e->limited = bytes_s > 0;
  set_ways (e);
  pacer_set_rate (&e->pacer, bytes_s);
}

void
engine_lend (struct engine *e, uint64_t bytes)
{
  pacer_lend (&e->pacer, bytes);
}

void
engine_work (struct engine *e, struct engine_work *work)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  count_busy (e, work);
}

void
engine_set_round_trip (struct engine *e, uint64_t rtt)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  e->room.rtt = rtt;
  set_ways (e);
}
