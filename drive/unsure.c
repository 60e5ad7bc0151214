/* nbdferry - writes that another NBD server may still lose
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A server that dies takes along what it had acknowledged and not flushed.
 * The disk has its older content there then, and a bitmap that was cleared
 * since the write (a backup was made) does not know of it.  So each write is
 * marked in a map, 'now', as in the bitmaps, before it and again after it.  A
 * flush moves what is marked to 'before', and clears that once it has
 * succeeded.  When the server has lost something, both are marked in all that
 * records.
 *
 * That may come late: a bitmap that is cleared after the loss has one mark too
 * many.  But it must come before a bitmap stops to record, or makes way for
 * its successor; hence unsure_settle.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>

#include "cleanup.h"
#include "log.h"
#include "unsure.h"

#define MIN_SHIFT 12
#define MAX_BITS  (UINT64_C (1) << 24)

struct unsure {
  struct bitmap *now, *before;
  atomic_uint seen;      /* of the disk's losses, so many were marked */
  pthread_mutex_t lock;  /* protects what follows, and each step of a flush;
                            not held across I/O */
  bool flushing;         /* somebody has filled 'before' */
};

int
unsure_open (struct drive *d, struct error *err)
{
  unsigned shift = MIN_SHIFT;
  struct unsure *u;

  if (d->disk->ops->losses == NULL || d->disk->readonly)
    return 0;
  while (bitmap_bits_for (d->disk->size, shift) > MAX_BITS)
    shift++;
  u = calloc (1, sizeof *u);
  if (u == NULL)
    return error_set (err, ENOMEM, "%m");
  pthread_mutex_init (&u->lock, NULL);
  d->unsure = u;
  u->seen = d->disk->ops->losses (d->disk);
  u->now = bitmap_new (d->disk->size, shift, err);
  u->before = u->now ? bitmap_new (d->disk->size, shift, err) : NULL;
  return u->before ? 0 : -1;
}

void
unsure_close (struct drive *d)
{
  struct unsure *u = d->unsure;

  if (u == NULL)
    return;
  bitmap_free (u->now);
  bitmap_free (u->before);
  pthread_mutex_destroy (&u->lock);
  free (u);
  d->unsure = NULL;
}

struct bitmap *
unsure_map (const struct drive *d)
{
  return d->unsure ? d->unsure->now : NULL;
}

static unsigned
losses (const struct drive *d)
{
  return d->disk->ops->losses (d->disk);
}

/* ---- flushing ---- */

/* First set, then cleared, so that who looks at one map and then at the other
 * misses nothing.  A write that is under way marks again at its end.
 */
static void
move_marks (struct unsure *u)
{
  struct range run = { 0 };

  while (bitmap_next_dirty (u->now, run.end, bitmap_size (u->now), &run)) {
    bitmap_set (u->before, run.start, run.end - run.start);
    bitmap_clear (u->now, run.start, run.end - run.start);
  }
}

/* False: another flush does it. */
static bool
begin_flush (struct unsure *u)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&u->lock);

  if (u->flushing)
    return false;
  u->flushing = true;
  move_marks (u);
  return true;
}

int
unsure_flush (struct drive *d)
{
  struct unsure *u = d->unsure;
  unsigned n = losses (d);
  bool mine = begin_flush (u);
  int r = d->disk->ops->flush (d->disk), saved = errno;

  if (!mine)
    return r;
  pthread_mutex_lock (&u->lock);
  /* What was lost and is not marked yet stays. */
  if (r == 0 && losses (d) == n && u->seen == n)
    bitmap_clear_all (u->before);
  u->flushing = false;
  pthread_mutex_unlock (&u->lock);
  errno = saved;
  return r;
}

/* ---- a loss ---- */

static void
mark_run (struct drive *d, struct range run)
{
  const struct marks *m = d->marks;

  if (run.end > d->size)
    run.end = d->size;
  for (size_t i = 0; m && i < m->nr && run.start < run.end; i++)
    bitmap_set (m->map[i], run.start, run.end - run.start);
}

void
unsure_settle (struct drive *d)
{
  struct unsure *u = d->unsure;
  struct bitmap *maps[2];
  unsigned n;

  if (u == NULL || (n = losses (d)) == u->seen)
    return;
  maps[0] = u->now;
  maps[1] = u->before;
  for (size_t i = 0; d->mode == DRIVE_ACTIVE && i < 2; i++) {
    struct range run = { 0 };

    while (bitmap_next_dirty (maps[i], run.end, bitmap_size (maps[i]), &run))
      mark_run (d, run);
  }
  u->seen = n;
}

void
unsure_look (struct drive *d)
{
  struct unsure *u = d->unsure;
  int saved = errno;
  unsigned n;

  if (u == NULL || (n = losses (d)) == u->seen)
    return;
  for (size_t i = 0; i < 2; i++) {
    struct bitmap *map = i == 0 ? u->now : u->before;
    struct range run = { 0 };

    while (bitmap_next_dirty (map, run.end, bitmap_size (map), &run)) {
      int token = drive_enter_armed (d, run.start, run.end - run.start);

      if (token == -1) /* the end is near, or the next request tries again */
        goto out;
      if (d->mode == DRIVE_ACTIVE)
        mark_run (d, run);
      gate_leave (&d->writes, token);
    }
  }
  u->seen = n;

 out:
  errno = saved;
}
