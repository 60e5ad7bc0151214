/* nbdferry - what the destination holds durably
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <stdatomic.h>

#include "cleanup.h"
#include "held.h"
#include "ship-map.h"

/* That many runs are cleared under one note, as long as they lie within that
 * many bytes, or within that part of a large disk: should we be killed in that
 * moment, all of it is sent again.
 */
#define MAX_RUNS 256
#define MAX_SPAN (UINT64_C (256) << 20)
#define MAX_PART 4096

void
held_flushing (struct shipment *s)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&s->lock);
  struct bitmap *acked = s->acked;

  s->acked = s->flushing; /* empty */
  s->flushing = acked;
}

/* The first part of [from, to) that is in none of the three maps. */
static bool
next_settled (const struct shipment *s, uint64_t from, uint64_t to,
              struct range *r)
{
  const struct bitmap *map[] = { s->ship, s->in_flight, s->acked };

  while (from < to) {
    struct range clean;
    size_t i;

    *r = (struct range){ from, to };
    for (i = 0; i < 3; i++) {
      if (!bitmap_next_clean (map[i], from, r->end, &clean) ||
          clean.start > from)
        break;
      r->end = clean.end;
    }
    if (i == 3)
      return true;
    if (!bitmap_next_clean (map[i], from, to, &clean))
      return false;
    from = clean.start;
  }
  return false;
}

/* c2 to c4.  s->lock is held. */
static uint64_t
clear_run (struct shipment *s, const struct range *run)
{
  struct bitmap *unheld = s->drive->unheld->bits;
  struct range r, again;
  uint64_t n = 0;

  for (uint64_t at = run->start; next_settled (s, at, run->end, &r);
       at = r.end) {
    bitmap_clear (unheld, r.start, r.end - r.start);
    n += r.end - r.start;
    atomic_thread_fence (memory_order_seq_cst);
    for (uint64_t from = r.start;
         bitmap_next_dirty (s->ship, from, r.end, &again); from = again.end)
      bitmap_set (unheld, again.start, again.end - again.start);
  }
  return n;
}

/* Some runs from 'at' on; it moves on to behind them. */
static size_t
collect (const struct shipment *s, uint64_t *at, struct range *runs)
{
  const uint64_t size = s->drive->size;
  const uint64_t span = size / MAX_PART > MAX_SPAN ? size / MAX_PART
                                                   : MAX_SPAN;
  size_t n = 0;

  while (n < MAX_RUNS &&
         bitmap_next_dirty (s->flushing, *at, size, &runs[n])) {
    if (n > 0 && runs[n].start - runs[0].start > span)
      break;
    if (runs[n].end - runs[0].start > span)
      runs[n].end = runs[0].start + span;
    *at = runs[n++].end;
  }
  return n;
}

/* Control held. */
static uint64_t
clear_flushed (struct shipment *s)
{
  struct range runs[MAX_RUNS];
  uint64_t at = 0, held = 0;
  size_t n;

  if (s->drive->unheld == NULL || s->drive->unheld->bits == NULL)
    return 0;
  while ((n = collect (s, &at, runs)) > 0) {
    if (ship_map_clearing (s->drive, runs[0].start, runs[n - 1].end) == -1)
      return held; /* it is sent again one day, which does no harm */
    pthread_mutex_lock (&s->lock);
    for (size_t i = 0; i < n; i++)
      held += clear_run (s, &runs[i]);
    pthread_mutex_unlock (&s->lock);
    ship_map_cleared (s->drive);
  }
  return held;
}

uint64_t
held_flushed (struct shipment *s)
{
  uint64_t held = 0;

  if (bitmap_count_bits (s->flushing) > 0) {
    gate_synchronize (&s->drive->writes);
    pthread_mutex_lock (&s->drive->control);
    held = clear_flushed (s);
    pthread_mutex_unlock (&s->drive->control);
  }
  bitmap_clear_alone (s->flushing, 0, s->drive->size);
  return held;
}

void
held_lost (struct shipment *s)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&s->drive->control);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&s->lock);

  bitmap_clear_alone (s->in_flight, 0, s->drive->size);
  bitmap_clear_alone (s->acked, 0, s->drive->size);
  bitmap_clear_alone (s->flushing, 0, s->drive->size);
  if (s->drive->unheld && s->drive->unheld->bits)
    bitmap_merge (s->ship, s->drive->unheld->bits);
  else
    bitmap_set (s->ship, 0, s->drive->size);
  s->resumed = true;
  s->listed = false;
  s->nr_told = 0;
}

int
held_nothing (struct shipment *s, struct error *err)
{
  if (ship_map_fill (s->drive, err) == -1)
    return -1;
  bitmap_set (s->ship, 0, s->drive->size);
  return 0;
}

uint64_t
held_missing (const struct shipment *s)
{
  uint64_t n = bitmap_count (s->ship) + bitmap_count (s->in_flight) +
               bitmap_count (s->acked) + bitmap_count (s->flushing);

  return n < s->drive->size ? n : s->drive->size;
}
