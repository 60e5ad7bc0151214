/* nbdferry - the source of a migration: writes that are mirrored
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A write goes its usual way: it marks the ship map, lands in the disk, marks
 * again, leaves the gate.  Then its writer comes here and waits until the
 * destination has the range.  A thread of our own, one more producer, fills
 * urgent packets with what is dirty in such ranges, by the same rules as all
 * others: a chunk is cleared before it is read, and one that is in flight is
 * not taken before it was acknowledged.  So nothing can overtake anything, and
 * it does not matter who sends a chunk.
 *
 * When is a chunk of a range mirrored?  Once a packet was acknowledged that was
 * begun after the write had landed; or when it is neither dirty nor in
 * flight: then somebody took it after the mark.  'cursor' is where the first
 * chunk begins that is not mirrored yet.  A chunk that others write again and
 * again is mirrored all the same at the first packet that counts.
 *
 * What comes while packets are under way goes together into the next one, as
 * soon as one of them has arrived; a packet for each writer, one behind the
 * other, would make each wait for all.
 *
 * Nobody waits for a link that does not move: if nothing at all has been
 * acknowledged for PATIENCE, all writers go on, and new ones do not come here
 * until something is.  What they wrote is dirty, as without us.
 */
#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "mirror.h"
#include "outgoing-impl.h"

#define PATIENCE NS_PER_S

/* So many ranges go into one packet, at most. */
#define MAX_RANGES 64

/* So much is worth a packet of its own, though others are under way. */
#define ENOUGH ENGINE_PAYLOAD_WAY

/* A write that waits; on its thread's stack. */
struct request {
  struct request *next, **link;
  struct shipment *s;
  uint64_t cursor, end;
  uint64_t sequence; /* packets of the shipment after this one count */
  bool released;
  pthread_cond_t cond;
};

/* What a drive knows. */
struct mirror_drive {
  struct drive_mirror hook;
  struct mirror *mirror;
  struct shipment *s;
};

struct mirror {
  struct outgoing *o;
  struct mirror_drive *drives; /* one for each shipment */
  bool attached;               /* drives know of us; the leading thread's */

  pthread_mutex_t lock; /* protects what follows; before a shipment's */
  pthread_cond_t changed; /* for the thread, and who waits for it */
  struct request *first, **last; /* in the order in which they came */
  bool wanted;          /* copy-mode says so */
  bool running, ending; /* the thread */
  bool paused, filling;
  unsigned under_way;   /* packets of ours, from before they are filled */
  bool suspended;       /* the link does not move */
  uint64_t progress;    /* ns: when something was acknowledged last */
  struct mirror_stats stats;
  pthread_t thread;
};

/* Lock held. */
static void
set_hooks (struct mirror *m)
{
  bool on = m->wanted && m->running && !m->paused && !m->suspended;

  for (size_t i = 0; i < m->o->nr; i++)
    atomic_store (&m->drives[i].hook.on, on);
}

/* ---- requests; the lock is held ---- */

static void
add_request (struct mirror *m, struct request *r)
{
  r->next = NULL;
  r->link = m->last;
  *m->last = r;
  m->last = &r->next;
}

/* It need not wait any more. */
static void
release (struct mirror *m, struct request *r)
{
  *r->link = r->next;
  if (r->next)
    r->next->link = r->link;
  else
    m->last = r->link;
  r->released = true;
  pthread_cond_signal (&r->cond);
}

static void
release_all (struct mirror *m)
{
  while (m->first) {
    m->stats.given_up++;
    release (m, m->first);
  }
}

/* Move the cursor over what the destination has.  The shipment's lock is held
 * as well.
 */
static void
advance (struct request *r)
{
  struct range dirty, flying;
  uint64_t next = r->end;

  if (bitmap_next_dirty (r->s->ship, r->cursor, next, &dirty))
    next = dirty.start;
  if (bitmap_next_dirty (r->s->in_flight, r->cursor, next, &flying))
    next = flying.start;
  if (next > r->cursor)
    r->cursor = next;
}

/* The part of it that can be sent now: dirty, and not in flight.  The
 * shipment's lock is held as well.
 */
static bool
can_send (const struct request *r, struct range *range)
{
  uint64_t at = r->cursor;
  struct range dirty, flying;

  while (bitmap_next_dirty (r->s->ship, at, r->end, &dirty)) {
    if (!bitmap_next_dirty (r->s->in_flight, dirty.start, dirty.end,
                            &flying) ||
        flying.start > dirty.start) {
      *range = (struct range){ dirty.start, r->end };
      return true;
    }
    at = flying.end;
  }
  return false;
}

/* Go through all requests: those that are done are released; ranges of the
 * first shipment that has something to send are collected.
 */
static struct shipment *
find_work (struct mirror *m, struct range *ranges, size_t *nr)
{
  struct shipment *s = NULL;
  struct request *r, *next;

  *nr = 0;
  for (r = m->first; r && *nr < MAX_RANGES; r = next) {
    bool send;

    next = r->next;
    pthread_mutex_lock (&r->s->lock);
    advance (r);
    send = r->cursor < r->end && (s == NULL || s == r->s) &&
           can_send (r, &ranges[*nr]);
    pthread_mutex_unlock (&r->s->lock);
    if (send) {
      s = r->s;
      ++*nr;
    }
    if (r->cursor >= r->end)
      release (m, r);
  }
  return s;
}

void
mirror_acked (struct mirror *m, struct buffer *b)
{
  struct shipment *s = b->cargo;
  struct request *r, *next;

  pthread_mutex_lock (&m->lock);
  m->progress = now_ns ();
  if (m->suspended) {
    m->suspended = false;
    set_hooks (m);
  }
  if (b->urgent) {
    m->stats.bytes += b->h.raw_size + b->zero_bytes;
    m->under_way--;
  }
  for (r = m->first; r; r = next) {
    next = r->next;
    if (r->s != s)
      continue;
    for (size_t i = 0; i < b->covers.nr && b->sequence > r->sequence; i++)
      if (b->covers.v[i].start <= r->cursor && b->covers.v[i].end > r->cursor)
        r->cursor = b->covers.v[i].end;
    if (r->cursor < r->end) {
      pthread_mutex_lock (&s->lock);
      advance (r);
      pthread_mutex_unlock (&s->lock);
    }
    if (r->cursor >= r->end)
      release (m, r);
  }
  if (m->first)
    pthread_cond_broadcast (&m->changed);
  pthread_mutex_unlock (&m->lock);
}

/* ---- writers ---- */

/* Wait until the range is mirrored, or the link has not moved for long.  Lock
 * held.
 */
static void
wait_request (struct mirror *m, struct request *r, uint64_t began)
{
  while (!r->released) {
    uint64_t from = m->progress > began ? m->progress : began;
    uint64_t until = from + PATIENCE;
    struct timespec ts = { until / NS_PER_S, until % NS_PER_S };

    if (pthread_cond_timedwait (&r->cond, &m->lock, &ts) == ETIMEDOUT &&
        !r->released && m->progress <= from) {
      m->suspended = true;
      set_hooks (m);
      release_all (m);
    }
  }
}

static void
count_wait (struct mirror *m, uint64_t ns)
{
  m->stats.requests++;
  m->stats.wait_us += ns / 1000;
  if (ns / 1000 > m->stats.longest_us)
    m->stats.longest_us = ns / 1000;
}

/* The gate was left with a reference to the hook. */
static void
written (struct drive_mirror *hook, uint64_t offset, uint64_t len)
{
  struct mirror_drive *md = (struct mirror_drive *) hook;
  struct mirror *m = md->mirror;
  struct request r = { .s = md->s };
  uint64_t began = now_ns (), mask = md->s->granule - 1;

  r.cursor = offset & ~mask;
  r.end = (offset + len + mask) & ~mask;
  if (r.end > md->s->drive->size)
    r.end = md->s->drive->size;
  clock_cond_init (&r.cond);
  pthread_mutex_lock (&m->lock);
  if (atomic_load (&hook->on)) {
    pthread_mutex_lock (&md->s->lock);
    r.sequence = md->s->sequence;
    pthread_mutex_unlock (&md->s->lock);
    add_request (m, &r);
    pthread_cond_broadcast (&m->changed);
    wait_request (m, &r, began);
    count_wait (m, now_ns () - began);
  }
  if (atomic_fetch_sub (&hook->users, 1) == 1)
    pthread_cond_broadcast (&m->changed);
  pthread_mutex_unlock (&m->lock);
  pthread_cond_destroy (&r.cond);
}

/* ---- the thread ---- */

static int
by_start (const void *a, const void *b)
{
  const struct range *x = a, *y = b;

  return x->start < y->start ? -1 : x->start > y->start;
}

/* Only those that came first, so many as the packet holds: it is filled in
 * the order of the disk, and others must not always be there before them.
 */
static size_t
fit (struct range *ranges, size_t nr, size_t room)
{
  for (size_t i = 0; i < nr; i++) {
    uint64_t len = ranges[i].end - ranges[i].start;

    if (len >= room) {
      ranges[i].end = ranges[i].start + room;
      return i + 1;
    }
    room -= len;
  }
  return nr;
}

static int
send_ranges (struct mirror *m, struct shipment *s, struct range *ranges,
             size_t nr, struct compressor *c)
{
  struct outgoing *o = m->o;
  struct buffer *b = engine_get_urgent (o->engine);
  struct error err;
  int r;

  if (b == NULL)
    return -1;
  nr = fit (ranges, nr, b->room);
  qsort (ranges, nr, sizeof ranges[0], by_start);
  r = shipment_fill_ranges (s, b, ranges, nr, o->params.compression, c, &err);
  if (r == 1)
    engine_put (o->engine, b);
  else
    engine_return (o->engine, b);
  if (r == -1)
    engine_fail (o->engine, &err);
  return r;
}

/* Is it time for a packet with these, or do they wait for more?  One that is
 * not acknowledged lets us look again.  Lock held.
 */
static bool
is_time (const struct mirror *m, const struct range *ranges, size_t nr)
{
  unsigned ways = engine_urgent_ways (m->o->engine);
  uint64_t bytes = 0;

  for (size_t i = 0; i < nr; i++)
    bytes += ranges[i].end - ranges[i].start;
  return m->under_way < ways ||
         (m->under_way == ways && (nr == MAX_RANGES || bytes >= ENOUGH));
}

static void *
mirror_thread (void *arg)
{
  struct mirror *m = arg;
  struct compressor c = { 0 };
  struct range ranges[MAX_RANGES];
  size_t nr;

  /* Method and level are those of the start. */
  compressor_set_level (&c, &m->o->params);
  pthread_mutex_lock (&m->lock);
  while (!m->ending) {
    struct shipment *s = m->paused ? NULL : find_work (m, ranges, &nr);
    int r;

    if (s == NULL || !is_time (m, ranges, nr)) {
      pthread_cond_wait (&m->changed, &m->lock);
      continue;
    }
    m->filling = true;
    m->under_way++;
    pthread_mutex_unlock (&m->lock);
    r = send_ranges (m, s, ranges, nr, &c);
    pthread_mutex_lock (&m->lock);
    m->filling = false;
    if (r != 1)
      m->under_way--;
    if (r == -1) { /* it has failed; the leading thread hears of it */
      m->paused = true;
      set_hooks (m);
      release_all (m);
    }
    pthread_cond_broadcast (&m->changed);
  }
  pthread_mutex_unlock (&m->lock);
  compressor_free (&c);
  return NULL;
}

/* ---- from outside ---- */

struct mirror *
mirror_new (struct outgoing *o, struct error *err)
{
  struct mirror *m = calloc (1, sizeof *m);

  if (m == NULL || (m->drives = calloc (o->nr, sizeof *m->drives)) == NULL) {
    free (m);
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  m->o = o;
  m->last = &m->first;
  pthread_mutex_init (&m->lock, NULL);
  pthread_cond_init (&m->changed, NULL);
  for (size_t i = 0; i < o->nr; i++) {
    m->drives[i].hook.written = written;
    m->drives[i].mirror = m;
    m->drives[i].s = &o->shipments[i];
  }
  return m;
}

void
mirror_free (struct mirror *m)
{
  if (m == NULL)
    return;
  pthread_mutex_destroy (&m->lock);
  pthread_cond_destroy (&m->changed);
  free (m->drives);
  free (m);
}

int
mirror_start (struct mirror *m, struct error *err)
{
  int r;

  pthread_mutex_lock (&m->lock);
  m->ending = m->paused = m->suspended = false;
  m->under_way = 0;
  m->progress = now_ns ();
  r = pthread_create (&m->thread, NULL, mirror_thread, m);
  m->running = r == 0;
  set_hooks (m);
  pthread_mutex_unlock (&m->lock);
  if (r != 0)
    return error_set (err, r, "start a thread: %m");
  for (size_t i = 0; i < m->o->nr; i++)
    drive_set_mirror (m->drives[i].s->drive, &m->drives[i].hook);
  m->attached = true;
  return 0;
}

/* Writers are released, and nobody comes any more but those whose gate said
 * so; they leave at once.
 */
void
mirror_pause (struct mirror *m)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&m->lock);

  m->paused = true;
  set_hooks (m);
  release_all (m);
  while (m->filling)
    pthread_cond_wait (&m->changed, &m->lock);
}

void
mirror_go (struct mirror *m)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&m->lock);

  m->paused = false;
  set_hooks (m);
  pthread_cond_broadcast (&m->changed);
}

void
mirror_detach (struct mirror *m)
{
  mirror_pause (m);
  /* Only once: after the handover those who are inside the gate may wait for
   * the destination as long as it likes.
   */
  for (size_t i = 0; m->attached && i < m->o->nr; i++)
    drive_set_mirror (m->drives[i].s->drive, NULL);
  m->attached = false;
  /* Those that have left the gate leave here too, having nothing to wait for. */
  pthread_mutex_lock (&m->lock);
  for (size_t i = 0; i < m->o->nr; i++)
    while (atomic_load (&m->drives[i].hook.users) > 0)
      pthread_cond_wait (&m->changed, &m->lock);
  pthread_mutex_unlock (&m->lock);
}

void
mirror_end (struct mirror *m)
{
  if (!m->running)
    return;
  mirror_detach (m);
  pthread_mutex_lock (&m->lock);
  m->ending = true;
  pthread_cond_broadcast (&m->changed);
  pthread_mutex_unlock (&m->lock);
  pthread_join (m->thread, NULL);
  pthread_mutex_lock (&m->lock);
  m->running = false;
  pthread_mutex_unlock (&m->lock);
}

void
mirror_set_wanted (struct mirror *m, bool wanted)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&m->lock);

  m->wanted = wanted;
  set_hooks (m);
  if (!wanted)
    release_all (m);
}

void
mirror_stats (struct mirror *m, struct mirror_stats *stats)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&m->lock);

  *stats = m->stats;
}
