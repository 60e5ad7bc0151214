/* nbdferry - copying what a backup needs out of a daemon
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A job is one pack: extents, in order, with at most PACK_DATA bytes of data.
 * A worker takes the next job by walking the source's extents (copy-walk.h)
 * under a lock for that, and reads the data without it.
 *
 * Servers and devices take several writes at once, so there each worker writes
 * what it has read.  A file takes one at a time: to wait for it in the kernel
 * would cost as much as to write; and an archive must be in order.  So there a
 * worker leaves its job in the job's slot of a ring:
 *
 *   slot of job n: free -> TAKEN -> READY -> free
 *
 * and, unless another worker writes, writes what is ready, in order, until the
 * next one is not; so nobody is woken to write.  Job n has slot n % nr_slots,
 * and is taken only when job n - nr_slots has been written; so memory is
 * bounded, however slow the writing is.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "copy-walk.h"
#include "copy.h"
#include "pack-disk.h"

#define CONNECT_MS 30000
#define MIN_SLOTS 8 /* so many that who writes seldom waits */

struct slot {
  struct pack pack;
  bool ready;
};

struct worker {
  struct copy *copy;
  struct client *client; /* its thread's; NULL: not needed so far */
  pthread_t thread;
  bool started;
  uint64_t reading; /* where its job begins, under the lock; NOTHING: all of it
                       has been read */
};

#define NOTHING UINT64_MAX

struct copy {
  /* Read-only after copy_start. */
  struct copy_options opt;
  struct stop stop;
  struct worker *workers;
  struct slot *slots;        /* a slot belongs to its worker, then to who
                                writes; 'ready' is under the lock */
  size_t nr_slots;           /* 0: each worker has a pack of its own */

  atomic_uint_fast64_t done; /* bytes */

  pthread_mutex_t lock;      /* protects what follows */
  pthread_cond_t ended;      /* running is 0, or 'copied' is set */
  pthread_cond_t room;       /* there are free slots again, or 'approved' */
  unsigned running;          /* threads */
  unsigned working;          /* of them: those that have not done all yet */
  bool failed;
  bool copied, approved;     /* an archive has all but its END; it may get it */
  struct error err;          /* the first */
  uint64_t next_job, written; /* jobs */
  bool writing;              /* a worker writes slots */
  bool waiting;              /* for room */
  bool all_taken;            /* there are no more jobs */

  uint64_t untaken;          /* nothing before it is in a job to come */

  pthread_mutex_t walk;      /* one takes a job at a time; before 'lock', and
                                held while the server is asked; protects: */
  struct copy_walk source;
};

/* ---- errors ---- */

static void
fail_locked (struct copy *c, const struct error *err)
{
  if (!c->failed)
    c->err = *err;
  c->failed = true;
  stop_throw (&c->stop);
  pthread_cond_broadcast (&c->room);
}

static void
fail (struct copy *c, const struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);

  fail_locked (c, err);
}

/* ---- taking a job ---- */

/* False: there is nothing more to do. */
static bool
wait_for_slot (struct copy *c)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);

  while (!c->failed && !c->all_taken && c->nr_slots > 0 &&
         c->next_job - c->written >= c->nr_slots) {
    c->waiting = true;
    pthread_cond_wait (&c->room, &c->lock);
  }
  return !c->failed && !c->all_taken;
}

/* The next job, with its number: 1; 0: there is none, -1. */
static int
take_job (struct worker *w, struct pack **pack, uint64_t *job,
          struct error *err)
{
  struct copy *c = w->copy;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->walk);

  if (!wait_for_slot (c))
    return 0;
  /* Only who has the walk's lock changes next_job. */
  if (c->nr_slots > 0)
    *pack = &c->slots[c->next_job % c->nr_slots].pack;
  if (copy_walk_take (&c->source, *pack, err) == -1)
    return -1;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);
  c->untaken = copy_walk_untaken (&c->source);
  if ((*pack)->nr == 0) {
    c->all_taken = true;
    return 0;
  }
  w->reading = (*pack)->extents[0].offset;
  *job = c->next_job++;
  return 1;
}

/* ---- a job ---- */

static struct client *connect_source (struct copy *c, struct error *err);

static int
read_source (struct worker *w, void *to, uint64_t len, uint64_t offset,
             struct error *err)
{
  if (w->client == NULL &&
      (w->client = connect_source (w->copy, err)) == NULL)
    return -1;
  if (client_pread (w->client, to, len, offset) == -1)
    return error_set (err, errno, "read %" PRIu64 " bytes at %" PRIu64 ": %m",
                      len, offset);
  return 0;
}

/* From the disk itself; what is not as it was any more, from the source. */
static int
read_disk (struct worker *w, uint8_t *to, uint64_t len, uint64_t offset,
           struct error *err)
{
  struct direct *direct = w->copy->opt.direct;
  struct range run;

  if (direct_pread (direct, to, len, offset) == -1)
    return error_set (err, errno, "read %" PRIu64 " bytes of the disk at %"
                      PRIu64 ": %m", len, offset);
  for (uint64_t at = offset;
       direct_next_gone (direct, at, offset + len, &run); at = run.end)
    if (read_source (w, to + (run.start - offset), run.end - run.start,
                     run.start, err) == -1)
      return -1;
  return 0;
}

/* Many small pieces: let the system read them all at once. */
static void
expect_data (struct direct *direct, const struct pack *p)
{
  for (size_t i = 0; p->nr > 1 && i < p->nr; i++)
    if (p->extents[i].type == EXTENT_DATA)
      direct_expect (direct, p->extents[i].offset, p->extents[i].length);
}

static int
read_data (struct worker *w, struct pack *p, struct error *err)
{
  uint8_t *to = p->raw;

  if (w->copy->opt.direct)
    expect_data (w->copy->opt.direct, p);
  for (size_t i = 0; i < p->nr; i++) {
    const struct packet_extent *e = &p->extents[i];

    if (e->type != EXTENT_DATA)
      continue;
    if (w->copy->opt.direct
        ? read_disk (w, to, e->length, e->offset, err) == -1
        : read_source (w, to, e->length, e->offset, err) == -1)
      return -1;
    to += e->length;
  }
  return 0;
}

static int
write_pack (struct copy *c, const struct pack *p, struct error *err)
{
  int r = c->opt.writer ? archive_write (c->opt.writer, p, err)
                        : pack_write (p, c->opt.target, err);

  if (r == 0)
    c->done += pack_length (p);
  return r;
}

/* The slot to be written now, by us; NULL: there is none.  The last one that we
 * had, if any, is free.
 */
static struct slot *
next_slot (struct copy *c, struct slot *last)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);
  struct slot *s;

  if (last) {
    c->writing = last->ready = false;
    c->written++;
    /* Who reads is woken for several jobs. */
    if (c->waiting && c->next_job - c->written <= c->nr_slots / 2) {
      c->waiting = false;
      pthread_cond_signal (&c->room);
    }
  }
  s = &c->slots[c->written % c->nr_slots];
  if (c->failed || c->writing || c->written == c->next_job || !s->ready)
    return NULL;
  c->writing = true;
  return s;
}

/* To be written, in order: all that can be by now, unless somebody else is at
 * it; who will find this one, too.
 */
static int
hand_over (struct copy *c, uint64_t job, struct error *err)
{
  struct slot *s = &c->slots[job % c->nr_slots];

  if (c->opt.writer && pack_seal (&s->pack, &c->opt.id, job + 1,
                                  &c->opt.compression, err) == -1)
    return -1;
  pthread_mutex_lock (&c->lock);
  s->ready = true;
  pthread_mutex_unlock (&c->lock);
  s = NULL;
  while ((s = next_slot (c, s)) != NULL)
    if (write_pack (c, &s->pack, err) == -1)
      return -1;
  return 0;
}

static void
has_read (struct worker *w)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&w->copy->lock);

  w->reading = NOTHING;
}

static int
do_job (struct worker *w, struct pack *p, uint64_t job, struct error *err)
{
  struct copy *c = w->copy;

  if (read_data (w, p, err) == -1)
    return -1;
  has_read (w);
  if (pack_find_zeros (p, err) == -1)
    return -1;
  return c->nr_slots > 0 ? hand_over (c, job, err) : write_pack (c, p, err);
}

/* ---- threads ---- */

/* All is written, and it is the last thread.  A thread of ours ends the
 * archive, and not the caller, because a pipe that nobody reads blocks it.
 */
static void
end_archive (struct copy *c)
{
  struct error err;
  bool end;

  pthread_mutex_lock (&c->lock);
  c->copied = true;
  pthread_cond_broadcast (&c->ended);
  while (!c->approved && !c->failed)
    pthread_cond_wait (&c->room, &c->lock);
  end = !c->failed;
  pthread_mutex_unlock (&c->lock);
  if (end && archive_writer_end (c->opt.writer, &err) == -1)
    fail (c, &err);
}

static void
thread_ends (struct copy *c)
{
  bool last;

  pthread_mutex_lock (&c->lock);
  last = --c->working == 0;
  pthread_mutex_unlock (&c->lock);
  if (last && c->opt.writer)
    end_archive (c);
  pthread_mutex_lock (&c->lock);
  if (--c->running == 0)
    pthread_cond_broadcast (&c->ended);
  pthread_mutex_unlock (&c->lock);
}

static void
work (struct worker *w)
{
  struct copy *c = w->copy;
  struct pack own = { 0 }, *p = &own;
  struct error err = { 0 };
  uint64_t job;
  int r = 0;

  if (c->nr_slots == 0)
    r = pack_init (&own, &err);
  while (r == 0 && (r = take_job (w, &p, &job, &err)) == 1)
    r = do_job (w, p, job, &err);
  if (r == -1)
    fail (c, &err);
  pack_destroy (&own);
}

static void *
worker_thread (void *opaque)
{
  struct worker *w = opaque;

  work (w);
  thread_ends (w->copy);
  return NULL;
}

/* ---- beginning and end ---- */

static struct client *
connect_source (struct copy *c, struct error *err)
{
  struct client *client = client_connect (c->opt.uri, c->opt.export,
                                          &c->stop, CONNECT_MS, err);

  if (client == NULL)
    return NULL;
  if (client_size (client) == c->opt.size && client_can_extents (client))
    return client;
  error_set (err, EPROTO, "%s: not the export of this backup", c->opt.uri);
  client_close (client);
  return NULL;
}

static int
connect_all (struct copy *c, struct error *err)
{
  c->source = (struct copy_walk){ .client = connect_source (c, err),
                                  .size = c->opt.size, .full = c->opt.full };
  if (c->source.client == NULL)
    return -1;
  for (unsigned i = 0; i < c->opt.connections; i++) {
    c->workers[i].copy = c;
    c->workers[i].reading = NOTHING;
    if (c->opt.direct) /* then it may never need one */
      continue;
    c->workers[i].client = connect_source (c, err);
    if (c->workers[i].client == NULL)
      return -1;
  }
  return 0;
}

static void
copy_free (struct copy *c)
{
  for (unsigned i = 0; c->workers && i < c->opt.connections; i++)
    client_close (c->workers[i].client);
  copy_walk_destroy (&c->source);
  for (size_t i = 0; c->slots && i < c->nr_slots; i++)
    pack_destroy (&c->slots[i].pack);
  stop_destroy (&c->stop);
  pthread_mutex_destroy (&c->lock);
  pthread_mutex_destroy (&c->walk);
  pthread_cond_destroy (&c->ended);
  pthread_cond_destroy (&c->room);
  free (c->slots);
  free (c->workers);
  free (c);
}

/* A thread that cannot be started is an error like others. */
static bool
start_thread (struct copy *c, pthread_t *thread, void *(*f) (void *),
              void *opaque)
{
  struct error err;
  int e;

  e = pthread_create (thread, NULL, f, opaque);
  if (e == 0)
    return true;
  error_set (&err, e, "cannot start a thread: %m");
  fail (c, &err);
  thread_ends (c);
  return false;
}

static int
prepare (struct copy *c, struct error *err)
{
  c->workers = calloc (c->opt.connections, sizeof c->workers[0]);
  if (c->opt.writer || !c->opt.target->fixed_size) {
    c->nr_slots = 2 * c->opt.connections;
    if (c->nr_slots < MIN_SLOTS)
      c->nr_slots = MIN_SLOTS;
    c->slots = calloc (c->nr_slots, sizeof c->slots[0]);
  }
  if (c->workers == NULL || (c->nr_slots > 0 && c->slots == NULL))
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < c->nr_slots; i++)
    if (pack_init (&c->slots[i].pack, err) == -1)
      return -1;
  if (stop_init (&c->stop, err) == -1)
    return -1;
  return connect_all (c, err);
}

struct copy *
copy_start (const struct copy_options *opt, struct error *err)
{
  struct copy *c = calloc (1, sizeof *c);

  if (c == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  c->opt = *opt;
  c->stop.fd = -1;
  pthread_mutex_init (&c->lock, NULL);
  pthread_mutex_init (&c->walk, NULL);
  clock_cond_init (&c->ended);
  pthread_cond_init (&c->room, NULL);
  if (prepare (c, err) == -1) {
    copy_free (c);
    return NULL;
  }
  c->running = c->working = opt->connections;
  for (unsigned i = 0; i < opt->connections; i++)
    c->workers[i].started = start_thread (c, &c->workers[i].thread,
                                          worker_thread, &c->workers[i]);
  return c;
}

uint64_t
copy_done (struct copy *c)
{
  return c->done;
}

uint64_t
copy_read_up_to (struct copy *c)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);
  uint64_t least = c->untaken;

  for (unsigned i = 0; i < c->opt.connections; i++)
    if (c->workers[i].reading < least)
      least = c->workers[i].reading;
  return least;
}

/* Lock held. */
static bool
is_busy (const struct copy *c)
{
  return c->running > 0 && (!c->copied || c->approved || c->failed);
}

bool
copy_wait (struct copy *c, uint64_t ns)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);
  struct timespec until;

  clock_in (&until, ns);
  while (is_busy (c))
    if (pthread_cond_timedwait (&c->ended, &c->lock, &until) == ETIMEDOUT)
      break;
  return !is_busy (c);
}

void
copy_approve (struct copy *c)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);

  c->approved = true;
  pthread_cond_broadcast (&c->room);
}

void
copy_stop (struct copy *c, const struct error *why)
{
  struct error given_up;

  error_set (&given_up, ECANCELED, "given up");
  fail (c, why ? why : &given_up);
}

int
copy_end (struct copy *c, struct error *err)
{
  int r = 0;

  for (unsigned i = 0; i < c->opt.connections; i++)
    if (c->workers[i].started)
      pthread_join (c->workers[i].thread, NULL);
  if (c->failed)
    r = error_set (err, c->err.errnum, "%s", c->err.msg);
  copy_free (c);
  return r;
}
