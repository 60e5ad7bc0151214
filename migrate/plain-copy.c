/* nbdferry - a copy to another server: rounds
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A round goes once through all disks; each worker takes the next dirty run,
 * clears its chunks, and only then looks at what is there and reads it: as in
 * shipment.h, whatever a writer does meanwhile is dirty again.  Between two
 * rounds nothing is under way, and so no chunk is ever sent by two workers at
 * a time.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "plain-impl.h"
#include "remote.h"

/* As in shipment-fill.c. */
#define MIN_SHIFT 12
#define MAX_CHUNKS (UINT64_C (1) << 26)

/* A worker takes no more of a hole at a time. */
#define MAX_HOLE (UINT64_C (16) << 30)

/* Runs up to this are read without a look at what is allocated. */
#define SHORT_RUN (64 << 10)

/* However low the bandwidth's limit. */
#define MIN_PIECE (16 << 10)

/* Zeros are looked for in units of this size. */
#define ZERO_UNIT (64 << 10)

int
plain_disk_init (struct plain_disk *d, struct error *err)
{
  unsigned shift = MIN_SHIFT;

  while (bitmap_bits_for (d->drive->size, shift) > MAX_CHUNKS)
    shift++;
  d->granule = UINT64_C (1) << shift;
  d->ship = bitmap_new (d->drive->size, shift, err);
  if (d->ship == NULL)
    return -1;
  bitmap_set (d->ship, 0, d->drive->size);
  return 0;
}

uint64_t
plain_dirty (const struct plain *p)
{
  uint64_t n = 0;

  for (size_t i = 0; i < p->nr; i++) {
    uint64_t dirty = bitmap_count (p->disks[i].ship);

    n += dirty < p->disks[i].drive->size ? dirty : p->disks[i].drive->size;
  }
  return n;
}

/* ---- choosing ---- */

/* How far the run goes that begins there: a piece of data, or a hole.  A guess,
 * since it may be written to until its chunks are cleared.
 */
static int
guess_end (struct plain_disk *d, struct range *run, struct error *err)
{
  struct disk *disk = d->drive->disk;
  struct extent ext;

  if (run->end - run->start > SHORT_RUN &&
      (run->start < d->data.start || run->start >= d->data.end)) {
    if (disk->ops->extent (disk, run->start, run->end, &ext) == -1)
      return error_set (err, errno, "%s: what is allocated at %" PRIu64
                        " cannot be found out: %m", d->drive->path,
                        run->start);
    if (ext.type == EXTENT_DATA)
      d->data = (struct range){ ext.start, ext.end };
    else {
      uint64_t end = ext.end < run->end ? ext.end & ~(d->granule - 1)
                                        : run->end;

      if (end > run->start) {
        run->end = end - run->start > MAX_HOLE ? run->start + MAX_HOLE : end;
        return 0;
      }
    }
  }
  if (run->end - run->start > PLAIN_PIECE)
    run->end = run->start + PLAIN_PIECE;
  return 0;
}

/* The next dirty run of this round, its chunks cleared: 1, 0 or -1. */
static int
take_run (struct plain_disk *d, struct range *run, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->lock);

  if (!bitmap_next_dirty (d->ship, d->cursor, d->drive->size, run)) {
    d->cursor = d->drive->size;
    return 0;
  }
  if (guess_end (d, run, err) == -1)
    return -1;
  bitmap_clear (d->ship, run->start, run->end - run->start);
  d->cursor = run->end;
  return 1;
}

/* ---- sending ---- */

static void
count (struct plain *p, uint64_t data, uint64_t zeros)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  p->info.transferred += data;
  p->info.normal_bytes += data;
  p->info.zero_bytes += zeros;
}

/* Data, in pieces as the limit of the bandwidth wants them. */
static int
send_paced (struct plain *p, struct plain_disk *d, const char *buf,
            uint64_t start, uint64_t end, struct error *err)
{
  while (start < end) {
    size_t n = pacer_piece (&p->pacer, 0, p->workers) & ~(size_t) 4095;

    if (n < MIN_PIECE)
      n = MIN_PIECE;
    if (n > end - start)
      n = end - start;
    pacer_wait (&p->pacer, n);
    if (stop_wait (&p->stop, 0))
      return error_set (err, ECANCELED, "cancelled");
    if (d->target->ops->pwrite (d->target, buf, n, start, 0) == -1)
      return error_set (err, errno, "write %s at %" PRIu64 ": %m", d->uri,
                        start);
    count (p, n, 0);
    buf += n;
    start += n;
  }
  return 0;
}

/* The same of one request for zeros, so that a cancel is heeded. */
#define MAX_ZERO (UINT64_C (1) << 30)

/* From so many zeros on the server is asked first whether they are there. */
#define ASK_ZERO (1 << 20)

/* Zeros.  Where the server has no request for that, they would cross the
 * network; and to ask about a large hole is cheaper than to make it.
 */
static int
send_zeros (struct plain *p, struct plain_disk *d, uint64_t start,
            uint64_t end, unsigned flags, struct error *err)
{
  struct disk *t = d->target;
  const bool can_zero = remote_abilities (t)->zero;
  const uint64_t most = can_zero ? MAX_ZERO : PLAIN_PIECE;

  while (start < end) {
    struct extent ext = { start, end, EXTENT_DATA };

    if (stop_wait (&p->stop, 0))
      return error_set (err, ECANCELED, "cancelled");
    if ((!can_zero || ((flags & DISK_MAY_TRIM) && end - start >= ASK_ZERO)) &&
        t->can_extents && t->ops->extent (t, start, end, &ext) == -1)
      goto fail;
    if (ext.type == EXTENT_DATA && ext.end - start > most)
      ext.end = start + most;
    if (ext.type == EXTENT_DATA &&
        t->ops->zero (t, ext.end - start, start, flags) == -1)
      goto fail;
    count (p, 0, ext.end - start);
    start = ext.end;
  }
  return 0;

 fail:
  return error_set (err, errno, "write %s at %" PRIu64 ": %m", d->uri, start);
}

/* What was read, without the zeros in it. */
static int
send_data (struct plain *p, struct plain_disk *d, const char *buf,
           uint64_t start, uint64_t end, struct error *err)
{
  while (start < end) {
    uint64_t to = start;
    bool zero = false;

    /* As far as it is all zeros, or all not. */
    while (to < end) {
      uint64_t unit = (to | (ZERO_UNIT - 1)) + 1;
      size_t n = (unit < end ? unit : end) - to;
      bool z = disk_is_zero (buf + (to - start), n);

      if (to > start && z != zero)
        break;
      zero = z;
      to += n;
    }
    if (zero && send_zeros (p, d, start, to, DISK_MAY_TRIM, err) == -1)
      return -1;
    if (!zero && send_paced (p, d, buf, start, to, err) == -1)
      return -1;
    buf += to - start;
    start = to;
  }
  return 0;
}

static int
copy_run (struct plain *p, struct plain_disk *d, const struct range *run,
          char *buf, struct error *err)
{
  struct disk *disk = d->drive->disk;

  for (uint64_t at = run->start; at < run->end; ) {
    struct extent ext = { at, run->end, EXTENT_DATA };

    if (run->end - run->start > SHORT_RUN &&
        disk->ops->extent (disk, at, run->end, &ext) == -1)
      return error_set (err, errno, "%s: what is allocated at %" PRIu64
                        " cannot be found out: %m", d->drive->path, at);
    if (ext.type != EXTENT_DATA) {
      if (send_zeros (p, d, at, ext.end,
                      ext.type == EXTENT_HOLE ? DISK_MAY_TRIM : 0, err) == -1)
        return -1;
    }
    else {
      if (ext.end - at > PLAIN_PIECE)
        ext.end = at + PLAIN_PIECE;
      if (disk->ops->pread (disk, buf, ext.end - at, at) == -1)
        return error_set (err, errno, "read %s at %" PRIu64 ": %m",
                          d->drive->path, at);
      if (send_data (p, d, buf, at, ext.end, err) == -1)
        return -1;
    }
    at = ext.end;
  }
  return 0;
}

/* ---- rounds ---- */

/* The first error counts, and ends the round for all. */
static void
fail (struct plain *p, const struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  if (!p->failed)
    p->err = *err;
  p->failed = true;
}

static bool
has_failed (struct plain *p)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  return p->failed;
}

static bool
hold_is_over (struct plain *p)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  return p->hold_until > 0 && now_ns () > p->hold_until;
}

static void
work (struct plain *p, char *buf)
{
  for (size_t i = 0; i < p->nr; i++) {
    struct error err;
    struct range run;
    int r = 0;

    while (!has_failed (p) && !hold_is_over (p) &&
           (r = take_run (&p->disks[i], &run, &err)) == 1)
      if (copy_run (p, &p->disks[i], &run, buf, &err) == -1) {
        r = -1;
        break;
      }
    if (r == -1)
      fail (p, &err);
  }
}

void *
plain_worker (void *arg)
{
  struct plain *p = arg;
  CLEANUP_FREE char *buf = malloc (PLAIN_PIECE);
  unsigned done = 0;

  if (buf == NULL) {
    struct error err;

    error_set (&err, ENOMEM, "%m");
    fail (p, &err);
  }
  pthread_mutex_lock (&p->lock);
  for (;;) {
    while (p->round == done && !p->end)
      pthread_cond_wait (&p->cond, &p->lock);
    if (p->end)
      break;
    done = p->round;
    pthread_mutex_unlock (&p->lock);
    if (buf)
      work (p, buf);
    pthread_mutex_lock (&p->lock);
    if (--p->busy == 0)
      pthread_cond_broadcast (&p->cond);
  }
  pthread_mutex_unlock (&p->lock);
  return NULL;
}

int
plain_round (struct plain *p, struct error *err)
{
  uint64_t began = now_ns (), bytes, ns;

  for (size_t i = 0; i < p->nr; i++) {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->disks[i].lock);

    p->disks[i].cursor = 0;
  }
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);
  bytes = p->info.transferred;
  p->info.round = ++p->round;
  p->busy = p->workers;
  pthread_cond_broadcast (&p->cond);
  while (p->busy > 0)
    pthread_cond_wait (&p->cond, &p->lock);
  bytes = p->info.transferred - bytes;
  ns = now_ns () - began + 1;
  /* A short round says little about the link. */
  if (bytes >= PLAIN_PIECE || p->bandwidth == 0)
    p->bandwidth = (double) bytes * NS_PER_S / ns;
  if (!p->failed)
    return 0;
  *err = p->err;
  return -1;
}
