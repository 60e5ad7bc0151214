/* nbdferry - bringing a standby up to a point in time
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "crew.h"
#include "sync-copy.h"

#define DATA_MAX   (UINT64_C (1) << 20)   /* of one request */
#define ZEROS_MAX  (UINT64_C (256) << 20) /* the same, without data */
#define BATCH_DATA (UINT64_C (256) << 20)
#define BATCH_NR   16384                  /* pieces */
#define TRIES      10

struct piece {
  uint64_t offset, len;
  bool data; /* otherwise zeros */
};

struct sync {
  const struct sync_copy_options *opt;
  struct sync_copied *result;
  uint64_t size;
  struct piece *pieces; /* the batch: 'nr' of them */
  size_t nr;
  uint64_t at;          /* where the next batch begins */
  struct range run;     /* of 'only', that 'at' is in */

  struct crew crew;
  atomic_size_t next;        /* the first piece that nobody has taken */
  atomic_uint_fast64_t done; /* bytes of this batch */
  uint64_t before;           /* bytes of those before it */
  atomic_bool target_failed; /* the first error was the target's */
  atomic_int target_errno;

  pthread_mutex_t lock; /* protects the result, for this batch */
  struct sync_copied batch;
};

/* ---- what is to be done ---- */

static void
add_pieces (struct sync *s, uint64_t offset, uint64_t len, bool data)
{
  const uint64_t most = data ? DATA_MAX : ZEROS_MAX;

  if (s->opt->written)
    bitmap_set (s->opt->written, offset, len);
  while (len > 0 && s->nr < BATCH_NR) {
    uint64_t n = len < most ? len : most;

    s->pieces[s->nr++] = (struct piece){ offset, n, data };
    offset += n;
    len -= n;
  }
  s->at = offset;
}

/* The next range that may have something to copy: [s->at, *end). */
static bool
next_range (struct sync *s, uint64_t *end)
{
  *end = s->size;
  if (s->opt->only) {
    if (s->at >= s->run.end &&
        !bitmap_next_dirty (s->opt->only, s->at, s->size, &s->run))
      return false;
    if (s->at < s->run.start)
      s->at = s->run.start;
    *end = s->run.end;
  }
  return s->at < *end;
}

/* Fill a batch; it is empty at the end of the disk. */
static int
plan (struct sync *s, struct error *err)
{
  struct disk *d = s->opt->source;
  uint64_t data = 0, end;

  s->nr = 0;
  while (s->nr < BATCH_NR && data < BATCH_DATA && next_range (s, &end)) {
    struct extent ext = { s->at, end, EXTENT_DATA };

    if (s->opt->stop && stop_wait (s->opt->stop, 0))
      return error_set (err, ECANCELED, "given up");
    if (d->can_extents && d->ops->extent (d, s->at, end, &ext) == -1)
      return error_set (err, errno, "asking what the backup needs, at %"
                        PRIu64 ": %m", s->at);
    if (ext.type == EXTENT_HOLE && !s->opt->full && s->opt->only == NULL) {
      s->at = ext.end;
      continue;
    }
    if (ext.type == EXTENT_DATA) {
      if (ext.end - ext.start > BATCH_DATA - data)
        ext.end = ext.start + (BATCH_DATA - data);
      data += ext.end - ext.start;
    }
    add_pieces (s, ext.start, ext.end - ext.start, ext.type == EXTENT_DATA);
  }
  return 0;
}

/* ---- doing it ---- */

static int
target_failed (struct sync *s, const char *what, uint64_t offset,
               struct error *err)
{
  atomic_store (&s->target_errno, errno);
  atomic_store (&s->target_failed, true);
  return error_set (err, errno, "%s: %s at %" PRIu64 ": %m",
                    s->opt->target_name, what, offset);
}

static void
sample (struct sync *s, const void *buf, const struct piece *p)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&s->lock);

  sync_sampler_add (&s->batch.sampler, buf, p->len, p->offset);
}

/* Make zeros of what is not zeros there yet. */
static int
put_zeros (struct sync *s, const struct piece *p, struct error *err)
{
  struct disk *t = s->opt->target;
  const uint64_t end = p->offset + p->len;
  uint64_t kept = 0;

  for (uint64_t at = p->offset; at < end; ) {
    struct extent ext = { at, end, EXTENT_DATA };

    if (t->can_extents && t->ops->extent (t, at, end, &ext) == -1)
      return target_failed (s, "map", at, err);
    if (ext.type != EXTENT_DATA)
      kept += ext.end - at;
    else if (t->ops->zero (t, ext.end - at, at, DISK_MAY_TRIM) == -1)
      return target_failed (s, "zero", at, err);
    at = ext.end;
  }
  sample (s, NULL, p);
  pthread_mutex_lock (&s->lock);
  s->batch.kept += kept;
  s->batch.zeros += p->len - kept;
  pthread_mutex_unlock (&s->lock);
  return 0;
}

static int
put_data (struct sync *s, const struct piece *p, char *buf, struct error *err)
{
  struct disk *d = s->opt->source, *t = s->opt->target;

  if (d->ops->pread (d, buf, p->len, p->offset) == -1)
    return error_set (err, errno, "reading the backup at %" PRIu64 ": %m",
                      p->offset);
  if (disk_is_zero (buf, p->len))
    return put_zeros (s, p, err);
  if (t->ops->pwrite (t, buf, p->len, p->offset, 0) == -1)
    return target_failed (s, "write", p->offset, err);
  sample (s, buf, p);
  pthread_mutex_lock (&s->lock);
  s->batch.data += p->len;
  pthread_mutex_unlock (&s->lock);
  return 0;
}

static int
work (void *opaque, struct error *err)
{
  struct sync *s = opaque;
  CLEANUP_FREE char *buf = malloc (DATA_MAX);

  if (buf == NULL)
    return error_set (err, ENOMEM, "%m");
  while (!atomic_load (&s->crew.over)) {
    size_t i = atomic_fetch_add (&s->next, 1);
    const struct piece *p = &s->pieces[i];

    if (i >= s->nr)
      break;
    if (s->opt->stop && stop_wait (s->opt->stop, 0))
      return error_set (err, ECANCELED, "given up");
    if ((p->data ? put_data (s, p, buf, err) : put_zeros (s, p, err)) == -1)
      return -1;
    atomic_fetch_add (&s->done, p->len);
  }
  return 0;
}

static void
tick (void *opaque)
{
  struct sync *s = opaque;

  if (s->opt->progress)
    s->opt->progress (s->opt->opaque, s->before + atomic_load (&s->done));
}

static int
try_batch (struct sync *s, struct error *err)
{
  struct disk *t = s->opt->target;

  s->batch = *s->result;
  atomic_store (&s->next, 0);
  atomic_store (&s->done, 0);
  atomic_store (&s->target_failed, false);
  if (crew_run (&s->crew, err) == -1)
    return -1;
  if (t->ops->flush (t) == -1)
    return target_failed (s, "flush", s->at, err);
  return 0;
}

/* Is there hope for the target after that error? */
static bool
may_try_again (const struct sync *s, uint64_t since_ns, unsigned tries)
{
  int e = atomic_load (&s->target_errno);

  return atomic_load (&s->target_failed) && s->opt->patience_ms > 0 &&
         (e == EIO || e == ESHUTDOWN || e == ECONNRESET || e == EPIPE ||
          e == ENOTCONN || e == ETIMEDOUT) && tries < TRIES &&
         now_ns () - since_ns < s->opt->patience_ms * NS_PER_MS &&
         !(s->opt->stop && stop_wait (s->opt->stop, 0));
}

static int
do_batch (struct sync *s, struct error *err)
{
  uint64_t begin = now_ns (), wait = 50 * NS_PER_MS;
  struct error first;

  for (unsigned tries = 1; try_batch (s, &first) == -1; tries++) {
    if (!may_try_again (s, begin, tries) ||
        (s->opt->stop && stop_wait (s->opt->stop, wait))) {
      *err = first;
      return -1;
    }
    wait = wait * 2 < 5 * NS_PER_S ? wait * 2 : 5 * NS_PER_S;
    s->result->again++;
    if (s->opt->again && s->opt->again (s->opt->opaque, err) == -1)
      return -1;
  }
  s->before += atomic_load (&s->done);
  *s->result = s->batch;
  if (s->opt->confirmed)
    s->opt->confirmed (s->opt->opaque, s->at);
  return 0;
}

int
sync_copy (const struct sync_copy_options *opt, struct sync_copied *result,
           struct error *err)
{
  struct sync s = { .opt = opt, .result = result,
                    .size = opt->source->size,
                    .lock = PTHREAD_MUTEX_INITIALIZER };
  int r = -1;

  *result = (struct sync_copied){ 0 };
  sync_sampler_init (&result->sampler);
  s.crew = (struct crew){ .threads = opt->threads, .work = work, .tick = tick,
                          .opaque = &s };
  s.pieces = calloc (BATCH_NR, sizeof s.pieces[0]);
  if (s.pieces == NULL)
    error_set (err, ENOMEM, "%m");
  else
    while ((r = plan (&s, err)) == 0 && s.nr > 0 &&
           (r = do_batch (&s, err)) == 0)
      ;
  free (s.pieces);
  pthread_mutex_destroy (&s.lock);
  return r;
}
