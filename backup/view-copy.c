/* nbdferry - a view: copying aside what is about to be overwritten
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A granule is copied once, whole, before the first write to it since the
 * instant.  Who comes first notes it in its shard's list, copies it with no
 * lock held, says where it is ('place'), and takes it out of the list; who
 * comes meanwhile waits for that one copy alone.
 *
 * A writer copies BATCH granules at most before it leaves the gate and enters
 * again, so that who shuts the gate does not wait for gigabytes.
 *
 * Nothing that goes wrong here is the writer's business: the view fails, and
 * the write goes on.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "view-impl.h"

#define BATCH 32 /* granules */
#define HOLE_MIN UINT64_C (16) /* granules; of less, holes are just read */

/* With 'slow': once half of the space is used each write that needs some waits,
 * the longer the less is left; when there is none, up to WAIT_LONGEST, and
 * then the view is given up.
 */
#define WAIT_FULLEST (100 * NS_PER_MS)
#define WAIT_SLICE   (5 * NS_PER_MS)
#define WAIT_LONGEST NS_PER_S

enum outcome { COPIED, FULL, FAILED };

/* Will somebody want to read that granule? */
static bool
is_needed (const struct view *v, uint64_t granule)
{
  struct range run;
  uint64_t start = granule << v->shift;

  if (is_released (v, granule))
    return false;
  /* Until it is known what is in the backup, everything may be. */
  if (!v->opt.needed || v->frozen == NULL || !atomic_load (&v->ready))
    return true;
  return bitmap_next_dirty (v->frozen, start, start + granule_len (v, granule),
                            &run);
}

/* Read it and put it where it can be found: that place. */
static enum outcome
save (struct view *v, uint64_t granule, uint32_t *place)
{
  const uint64_t start = granule << v->shift;
  const size_t len = granule_len (v, granule);
  struct disk *disk = v->opt.drive->disk;
  CLEANUP_FREE char *buf = malloc (len);
  uint32_t slot;

  if (buf == NULL || disk->ops->pread (disk, buf, len, start) == -1) {
    view_fail (v, "keeping aside what was at %" PRIu64 ": read %s: %s", start,
               v->opt.drive->path, strerror (errno));
    return FAILED;
  }
  if (disk_is_zero (buf, len)) {
    *place = PLACE_ZERO;
    return COPIED;
  }
  if (!scratch_take (v->scratch, &slot))
    return FULL;
  if (scratch_write (v->scratch, slot, buf, len) == -1) {
    view_fail (v, "keeping aside what was at %" PRIu64 ": write to a scratch "
               "file in %s: %s", start, v->opt.drive->state_dir,
               strerror (errno));
    return FAILED;
  }
  *place = PLACE_SLOT + slot;
  return COPIED;
}

static bool
is_listed (const struct view_shard *shard, uint64_t granule)
{
  for (const struct copying *c = shard->copying; c; c = c->next)
    if (c->granule == granule)
      return true;
  return false;
}

static void
take_out (struct view_shard *shard, struct copying *mine)
{
  struct copying **c = &shard->copying;

  while (*c != mine)
    c = &(*c)->next;
  *c = mine->next;
  pthread_cond_broadcast (&shard->done);
}

/* What was kept of that granule can go. */
static void
forget (struct view *v, uint64_t granule)
{
  uint32_t was = atomic_exchange (&v->place[granule], PLACE_LOST);

  if (was >= PLACE_SLOT)
    scratch_give_back (v->scratch, was - PLACE_SLOT);
}

static void
settle (struct view *v, uint64_t granule, uint32_t place)
{
  uint32_t was = PLACE_DISK;

  /* It may have been found to be zeros meanwhile. */
  if (!atomic_compare_exchange_strong (&v->place[granule], &was, place) &&
      place >= PLACE_SLOT)
    scratch_give_back (v->scratch, place - PLACE_SLOT);
  bitmap_set (v->settled, granule << v->shift, granule_len (v, granule));
  /* Or released: then who did that has seen it settled, or we see that. */
  atomic_thread_fence (memory_order_seq_cst);
  if (place != PLACE_LOST && is_released (v, granule))
    forget (v, granule);
}

/* What is a hole from 'start' on need not be read, so that a guest can discard
 * terabytes.  Returns where it ends, or 'start' itself.
 *
 * Nothing is locked: the disk was asked before a place changes from PLACE_DISK
 * here, and until that has changed nobody has written there.
 */
static uint64_t
settle_hole (struct view *v, uint64_t start, uint64_t end)
{
  struct disk *disk = v->opt.drive->disk;
  uint64_t g = start >> v->shift;

  start = g << v->shift;
  if (!disk->can_extents || disk->ops->next_data == NULL ||
      disk->ops->next_data (disk, start, end, &end) == -1)
    return start;
  for (; g < v->nr && (g << v->shift) + granule_len (v, g) <= end; g++) {
    uint32_t was = PLACE_DISK;

    atomic_compare_exchange_strong (&v->place[g], &was, PLACE_ZERO);
  }
  end = g < v->nr ? g << v->shift : v->size;
  if (end > start)
    bitmap_set (v->settled, start, end - start);
  return end;
}

/* See to it that this granule can be overwritten. */
static enum outcome
copy_aside (struct view *v, uint64_t granule)
{
  struct view_shard *shard = &v->shard[granule % VIEW_SHARDS];
  struct copying mine = { .granule = granule };
  enum outcome r = COPIED;
  uint32_t place = PLACE_LOST;

  pthread_mutex_lock (&shard->lock);
  while (is_listed (shard, granule))
    pthread_cond_wait (&shard->done, &shard->lock);
  if (atomic_load (&v->place[granule]) != PLACE_DISK ||
      atomic_load (&v->over)) {
    pthread_mutex_unlock (&shard->lock);
    /* Who has found it to be a hole may not have come to that yet, and no
     * write comes before it (direct.h).
     */
    bitmap_set (v->settled, granule << v->shift, granule_len (v, granule));
    return COPIED;
  }
  mine.next = shard->copying;
  shard->copying = &mine;
  pthread_mutex_unlock (&shard->lock);

  if (is_needed (v, granule))
    r = save (v, granule, &place);
  if (r == COPIED)
    settle (v, granule, place);
  pthread_mutex_lock (&shard->lock);
  take_out (shard, &mine);
  pthread_mutex_unlock (&shard->lock);
  return r;
}

/* How long to wait, now that there is no space. */
static int64_t
no_space (struct view *v, uint64_t waited)
{
  if (v->opt.slow && waited < WAIT_LONGEST)
    return WAIT_SLICE;
  view_fail (v, "the space for what is overwritten during the backup is used "
             "up (%" PRIu64 " bytes)", scratch_limit (v->scratch));
  return HOOK_GO_ON;
}

/* And how long because there is little left. */
static int64_t
little_space (const struct view *v)
{
  uint64_t used, limit = scratch_limit (v->scratch);
  double part;

  if (!v->opt.slow)
    return 0;
  used = scratch_used (v->scratch);
  if (used <= limit / 2)
    return 0;
  part = 2.0 * (used - limit / 2) / limit;
  return part * part * WAIT_FULLEST;
}

/* What is clean now, and becomes dirty by this write. */
static void
note_fresh (struct view *v, uint64_t offset, uint64_t end)
{
  struct range run;

  for (uint64_t at = offset; bitmap_next_clean (v->bits, at, end, &run);
       at = run.end)
    bitmap_set (v->fresh, run.start, run.end - run.start);
}

int64_t
view_before (struct write_hook *h, uint64_t offset, uint64_t len,
             uint64_t waited)
{
  struct view *v = (struct view *) h;
  uint64_t end = offset + len;
  unsigned copied = 0;
  struct range run;

  if (v->bits && !atomic_load (&v->ready))
    note_fresh (v, offset, end);
  for (uint64_t at = offset; !atomic_load (&v->over) &&
       bitmap_next_clean (v->settled, at, end, &run); ) {
    int64_t wait = copied == 0 && waited == 0 ? little_space (v) : 0;

    if (wait > 0)
      return wait;
    if (run.end - run.start >= HOLE_MIN << v->shift) {
      uint64_t hole_end = settle_hole (v, run.start, run.end);

      if (hole_end > run.start) {
        at = hole_end;
        continue;
      }
    }
    if (copied++ == BATCH)
      return 0;
    if (copy_aside (v, run.start >> v->shift) == FULL)
      return no_space (v, waited);
    at = ((run.start >> v->shift) + 1) << v->shift;
  }
  /* The write comes after: a reader that finds it also finds the place. */
  atomic_thread_fence (memory_order_seq_cst);
  return HOOK_GO_ON;
}

void
view_release (struct view *v, uint64_t offset, uint64_t len)
{
  const uint64_t size = UINT64_C (1) << v->shift;
  uint64_t start, end;
  struct range run;

  if (offset >= v->size)
    return;
  end = len < v->size - offset ? offset + len : v->size;
  start = (offset + size - 1) >> v->shift << v->shift;
  if (end < v->size)
    end = end >> v->shift << v->shift;
  if (start >= end)
    return;
  bitmap_set (v->released, start, end - start);
  atomic_thread_fence (memory_order_seq_cst);
  /* Only what has left the disk is looked at: there may be 2^28 granules. */
  for (uint64_t at = start; bitmap_next_dirty (v->settled, at, end, &run);
       at = run.end)
    for (uint64_t g = run.start >> v->shift; g << v->shift < run.end; g++)
      if (atomic_load (&v->place[g]) != PLACE_DISK)
        forget (v, g);
  bitmap_set (v->settled, start, end - start);
}
