/* nbdferry - writing archives back to a disk
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The reader fills packs, the writers empty them:
 *
 *   FREE --reader--> FILLING --> READY --a writer--> WRITING --> FREE
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "archive-pack.h"
#include "cleanup.h"
#include "clock.h"
#include "pack-disk.h"
#include "restore.h"

enum load_state { FREE, FILLING, READY, WRITING };

struct load {
  struct pack pack;
  enum load_state state; /* under the lock; the pack is whose state it is */
};

struct restore {
  /* Read-only after restore_start. */
  struct restore_options opt;
  struct archive_merge *merge; /* of the reader's thread */
  struct load *loads;
  size_t nr_loads;
  pthread_t *threads;          /* the reader, then the writers */
  size_t nr_threads;           /* that were started */

  atomic_uint_fast64_t done;

  pthread_mutex_t lock;        /* protects what follows */
  pthread_cond_t changed;
  unsigned running;
  bool all_read, failed;
  struct error err;            /* the first */
};

static void
fail (struct restore *r, const struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);

  if (!r->failed)
    r->err = *err;
  r->failed = true;
  pthread_cond_broadcast (&r->changed);
}

/* A load in 'from', which becomes 'to'; NULL if there is none to come. */
static struct load *
take (struct restore *r, enum load_state from, enum load_state to)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);

  while (!r->failed) {
    for (size_t i = 0; i < r->nr_loads; i++)
      if (r->loads[i].state == from) {
        r->loads[i].state = to;
        return &r->loads[i];
      }
    if (from == READY && r->all_read)
      return NULL;
    pthread_cond_wait (&r->changed, &r->lock);
  }
  return NULL;
}

static void
put (struct restore *r, struct load *l, enum load_state state)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);

  l->state = state;
  pthread_cond_broadcast (&r->changed);
}

/* ---- the reader ---- */

/* Put a piece into *l, and into those that follow as it fills up.  *l is NULL
 * in the end if all was given up.
 */
static void
add_piece (struct restore *r, struct load **l, struct merge_piece p)
{
  while (*l && p.length > 0) {
    uint64_t n = pack_room (&(*l)->pack, p.type);
    uint8_t *at;

    if (n == 0) {
      put (r, *l, READY);
      *l = take (r, FREE, FILLING);
      if (*l)
        pack_clear (&(*l)->pack);
      continue;
    }
    n = n < p.length ? n : p.length;
    at = pack_add (&(*l)->pack, p.offset, n, p.type);
    if (p.type == EXTENT_DATA) {
      memcpy (at, p.data, n);
      p.data += n;
    }
    p.offset += n;
    p.length -= n;
  }
}

static void
read_all (struct restore *r)
{
  struct load *l = take (r, FREE, FILLING);
  struct merge_piece piece;
  struct error err;
  int n = 0;

  if (l)
    pack_clear (&l->pack);
  while (l && (n = archive_merge_next (r->merge, &piece, &err)) == 1) {
    if (r->opt.fresh && piece.type != EXTENT_DATA)
      r->done += piece.length;
    else
      add_piece (r, &l, piece);
  }
  if (n == -1)
    fail (r, &err);
  else if (l)
    put (r, l, READY);
}

static void
thread_ends (struct restore *r, bool reader)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);

  if (reader)
    r->all_read = true;
  r->running--;
  pthread_cond_broadcast (&r->changed);
}

static void *
reader_thread (void *opaque)
{
  read_all (opaque);
  thread_ends (opaque, true);
  return NULL;
}

static void *
writer_thread (void *opaque)
{
  struct restore *r = opaque;
  struct load *l;
  struct error err;

  while ((l = take (r, READY, WRITING)) != NULL) {
    if (pack_write (&l->pack, r->opt.target, &err) == -1)
      fail (r, &err);
    else
      r->done += pack_length (&l->pack);
    put (r, l, FREE);
  }
  thread_ends (r, false);
  return NULL;
}

/* ---- beginning and end ---- */

static void
restore_free (struct restore *r)
{
  archive_merge_free (r->merge);
  for (size_t i = 0; r->loads && i < r->nr_loads; i++)
    pack_destroy (&r->loads[i].pack);
  pthread_mutex_destroy (&r->lock);
  pthread_cond_destroy (&r->changed);
  free (r->loads);
  free (r->threads);
  free (r);
}

/* All of them, or as many as there were and a failure. */
static void
start_threads (struct restore *r)
{
  unsigned all = 1 + r->opt.threads;
  struct error err;

  r->running = all;
  for (unsigned i = 0; i < all; i++) {
    int e = pthread_create (&r->threads[i], NULL,
                            i == 0 ? reader_thread : writer_thread, r);

    if (e != 0) {
      error_set (&err, e, "cannot start a thread: %m");
      fail (r, &err);
      pthread_mutex_lock (&r->lock);
      r->running -= all - i;
      pthread_mutex_unlock (&r->lock);
      return;
    }
    r->nr_threads++;
  }
}

struct restore *
restore_start (const struct restore_options *opt, struct error *err)
{
  struct restore *r = calloc (1, sizeof *r);

  if (r == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  r->opt = *opt;
  pthread_mutex_init (&r->lock, NULL);
  clock_cond_init (&r->changed);
  r->nr_loads = 2 * opt->threads;
  r->loads = calloc (r->nr_loads, sizeof r->loads[0]);
  r->threads = calloc (1 + opt->threads, sizeof r->threads[0]);
  r->merge = archive_merge_open (opt->readers, opt->nr, err);
  if (r->loads == NULL || r->threads == NULL || r->merge == NULL) {
    if (r->merge)
      error_set (err, ENOMEM, "%m");
    goto fail;
  }
  for (size_t i = 0; i < r->nr_loads; i++)
    if (pack_init (&r->loads[i].pack, err) == -1)
      goto fail;
  start_threads (r);
  return r;

 fail:
  restore_free (r);
  return NULL;
}

uint64_t
restore_done (struct restore *r)
{
  return r->done;
}

bool
restore_wait (struct restore *r, uint64_t ns)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&r->lock);
  struct timespec until;

  clock_in (&until, ns);
  while (r->running > 0)
    if (pthread_cond_timedwait (&r->changed, &r->lock, &until) == ETIMEDOUT)
      break;
  return r->running == 0;
}

void
restore_stop (struct restore *r)
{
  struct error err;

  error_set (&err, ECANCELED, "given up");
  fail (r, &err);
}

int
restore_end (struct restore *r, struct error *err)
{
  int n = 0;

  for (size_t i = 0; i < r->nr_threads; i++)
    pthread_join (r->threads[i], NULL);
  if (r->failed)
    n = error_set (err, r->err.errnum, "%s", r->err.msg);
  restore_free (r);
  return n;
}
