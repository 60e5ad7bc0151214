/* nbdferry - a disk as it was: the view of a backup
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * This file has a view's life; view-copy.c copies old granules aside, and
 * view-read.c reads.
 *
 *   view_new   -->  prepare  -->  (instant)  -->  begun  -->  (instant)  ended
 *                                     |  before each write: view_before  |
 *
 * What is in the backup is what was dirty at the instant.  Copying the bitmap
 * at the instant would take long, and after it the bitmap goes on recording.
 * So until the copy is made ('ready'), each write, before it marks the bitmap,
 * notes in 'fresh' which granules are clean there: what is dirty because of
 * such a write alone is in 'fresh' before it is in the bitmap.  The copy, less
 * what is in 'fresh' when it was made, is what was dirty at the instant.
 */
#include <config.h>

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "cleanup.h"
#include "view-impl.h"

#define MIN_SHIFT 12 /* of granules that are copied: 4 KiB, */
#define MAX_SHIFT 16 /* 64 KiB, */
#define MAX_NR (UINT64_C (1) << 28) /* or more, on disks with more than that */

/* ---- its life ---- */

static const struct hook_ops view_hook_ops;

struct view *
view_new (const struct view_options *opt, struct error *err)
{
  struct view *v = aligned_alloc (_Alignof (struct view), sizeof *v);

  if (v == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  memset (v, 0, sizeof *v);
  v->hook.ops = &view_hook_ops;
  v->opt = *opt;
  v->size = opt->drive->size;
  v->map_fd = -1;
  atomic_init (&v->refs, 1);
  pthread_mutex_init (&v->lock, NULL);
  for (size_t i = 0; i < VIEW_SHARDS; i++) {
    pthread_mutex_init (&v->shard[i].lock, NULL);
    pthread_cond_init (&v->shard[i].done, NULL);
  }
  if (opt->bitmap && (v->opt.bitmap = strdup (opt->bitmap)) == NULL) {
    error_set (err, ENOMEM, "%m");
    view_unref (v);
    return NULL;
  }
  return v;
}

struct view *
view_ref (struct view *v)
{
  atomic_fetch_add (&v->refs, 1);
  return v;
}

static size_t
places_len (const struct view *v)
{
  return (v->nr ? v->nr : 1) * sizeof v->place[0];
}

void
view_unref (struct view *v)
{
  if (v == NULL || atomic_fetch_sub (&v->refs, 1) > 1)
    return;
  if (v->place)
    munmap (v->place, places_len (v));
  view_free_settled (v);
  bitmap_free (v->released);
  bitmap_free (v->frozen);
  bitmap_free (v->fresh);
  scratch_close (v->scratch);
  for (size_t i = 0; i < VIEW_SHARDS; i++) {
    pthread_mutex_destroy (&v->shard[i].lock);
    pthread_cond_destroy (&v->shard[i].done);
  }
  pthread_mutex_destroy (&v->lock);
  free ((char *) v->opt.bitmap);
  free (v);
}

struct write_hook *
view_hook (struct view *v)
{
  return &v->hook;
}

bool
view_has_begun (const struct view *v)
{
  return atomic_load (&v->ready);
}

bool
view_has_ended (const struct view *v)
{
  return atomic_load (&v->ended);
}

const struct view_options *
view_options (const struct view *v)
{
  return &v->opt;
}

void
view_fail (struct view *v, const char *fmt, ...)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&v->lock);
  va_list args;

  if (v->failed)
    return;
  va_start (args, fmt);
  vsnprintf (v->error, sizeof v->error, fmt, args);
  va_end (args);
  v->failed = true;
  view_set_over (v);
  if (v->scratch)
    scratch_drop (v->scratch);
}

void
view_info (struct view *v, struct view_info *info)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&v->lock);

  *info = v->about;
  info->failed = v->failed;
  memcpy (info->error, v->error, sizeof info->error);
  if (v->scratch) {
    info->scratch_used = v->failed ? 0 : scratch_used (v->scratch);
    info->scratch_limit = scratch_limit (v->scratch);
  }
}

/* ---- the hook ---- */

static void
identify (struct view *v)
{
  const struct drive *d = v->opt.drive;

  if (d->journal == NULL) /* a disk that cannot be written */
    return;
  v->about.lineage = journal_get (d->journal)->lineage;
  v->about.generation = journal_get (d->journal)->generation;
}

static int
make_maps (struct view *v, const struct named_bitmap *nb, struct error *err)
{
  v->shift = nb ? nb->shift : MAX_SHIFT;
  if (v->shift < MIN_SHIFT)
    v->shift = MIN_SHIFT;
  if (v->shift > MAX_SHIFT)
    v->shift = MAX_SHIFT;
  while (bitmap_bits_for (v->size, v->shift) > MAX_NR && v->shift < 20)
    v->shift++;
  v->nr = bitmap_bits_for (v->size, v->shift);
  v->released = bitmap_new (v->size, v->shift, err);
  if (v->released == NULL || view_make_settled (v, err) == -1)
    return -1;
  if (nb && !v->opt.full) {
    v->frozen = bitmap_new (v->size, nb->shift, err);
    v->fresh = bitmap_new (v->size, nb->shift, err);
    if (v->frozen == NULL || v->fresh == NULL)
      return -1;
  }
  v->place = mmap (NULL, places_len (v), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (v->place != MAP_FAILED)
    return 0;
  v->place = NULL;
  return error_set (err, errno, "memory for a backup: %m");
}

static int
view_prepare (struct write_hook *h, const struct named_bitmap *nb,
              const struct point *parent, struct error *err)
{
  struct view *v = (struct view *) h;
  const struct drive *d = v->opt.drive;

  /* Two points of one name are more than who follows a chain can bear. */
  if (parent && uuid_equal (&parent->id, &v->opt.id))
    return error_set (err, EEXIST, "Bitmap '%s' follows a backup of that id "
                      "already", nb->name);
  if (make_maps (v, nb, err) == -1)
    return -1;
  identify (v);
  v->bits = nb && !v->opt.full ? nb->bits : NULL;
  v->about.granularity = UINT64_C (1) << (nb ? nb->shift : v->shift);
  if (parent)
    v->about.parent = *parent;
  if (d->disk->readonly)
    return 0;
  v->scratch = scratch_open (d->state_dir, 1 << v->shift,
                             v->opt.scratch_limit, err);
  return v->scratch ? 0 : -1;
}

static void
freeze (struct view *v)
{
  struct range run;

  bitmap_merge (v->frozen, v->bits);
  for (uint64_t at = 0; bitmap_next_dirty (v->fresh, at, v->size, &run);
       at = run.end)
    bitmap_clear (v->frozen, run.start, run.end - run.start);
}

static void
view_begun (struct write_hook *h)
{
  struct view *v = (struct view *) h;

  if (v->frozen)
    freeze (v);
  v->about.dirty = v->frozen ? bitmap_count (v->frozen) : v->size;
  v->about.time = time (NULL);
  atomic_store (&v->ready, true);
}

static void
view_ended (struct write_hook *h, const char *why)
{
  struct view *v = (struct view *) h;

  if (why)
    view_fail (v, "%s", why);
  view_set_over (v);
  atomic_store (&v->ended, true);
}

static const struct hook_ops view_hook_ops = {
  .prepare = view_prepare,
  .before = view_before,
  .begun = view_begun,
  .ended = view_ended,
};
