/* nbdferry - copying what a backup needs out of a daemon
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A job is one pack: extents, in order, with at most PACK_DATA bytes of data.
 * A worker takes the next job by walking the source's extents under a lock for
 * that (through a connection that is used for nothing else), reads the data
 * without it, and either writes it to the target, or leaves it in its slot of the ring
 * for the one thread that writes the archive:
 *
 *   slot of job n: free -> TAKEN -> READY -> free
 *
 * Job n has slot n % nr_slots, and is taken only when job n - nr_slots has been
 * written; so memory is bounded, however slow the archive is.
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
#include "copy.h"
#include "pack-disk.h"

#define CONNECT_MS 30000
#define STATUS_BYTES (UINT64_C (1) << 30) /* asked about at a time */

struct slot {
  struct pack pack;
  bool ready;
};

struct worker {
  struct copy *copy;
  struct client *client;
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
  pthread_t writer;
  bool writer_started;
  struct slot *slots;        /* a slot belongs to its worker, then to the
                                writer; 'ready' is under the lock */
  size_t nr_slots;

  atomic_uint_fast64_t done; /* bytes */

  pthread_mutex_t lock;      /* protects what follows */
  pthread_cond_t changed;
  unsigned running;          /* threads */
  bool failed;
  struct error err;          /* the first */
  uint64_t next_job, written; /* jobs */
  bool all_taken;            /* there are no more jobs */

  uint64_t untaken;          /* nothing before it is in a job to come */

  pthread_mutex_t walk;      /* one takes a job at a time; before 'lock', and
                                held while the server is asked; protects: */
  struct client *walker;
  struct extent *found;      /* of the last answer */
  size_t nr_found, at_found, max_found;
  uint64_t asked;            /* up to here */
};

/* ---- errors ---- */

static void
fail_locked (struct copy *c, const struct error *err)
{
  if (!c->failed)
    c->err = *err;
  c->failed = true;
  stop_throw (&c->stop);
  pthread_cond_broadcast (&c->changed);
}

static void
fail (struct copy *c, const struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);

  fail_locked (c, err);
}

/* ---- walking (the lock for that held) ---- */

static void
found_one (void *opaque, const struct extent *ext)
{
  struct copy *c = opaque;
  uint64_t at = c->nr_found ? c->found[c->nr_found - 1].end : c->asked;

  /* What is not taken now, and all behind it, is asked for again. */
  if (ext->start != at)
    return;
  if (c->nr_found == c->max_found) {
    size_t max = c->max_found ? c->max_found * 2 : 1024;
    struct extent *more = realloc (c->found, max * sizeof more[0]);

    if (more == NULL)
      return;
    c->found = more;
    c->max_found = max;
  }
  c->found[c->nr_found++] = *ext;
}

static int
ask (struct copy *c, struct error *err)
{
  uint64_t end = c->opt.size, next;

  c->nr_found = c->at_found = 0;
  if (end - c->asked > STATUS_BYTES)
    end = c->asked + STATUS_BYTES;
  if (client_extents (c->walker, c->asked, end, found_one, c, &next) == -1)
    return error_set (err, errno, "ask for the extents at %" PRIu64 ": %m",
                      c->asked);
  if (c->nr_found == 0)
    return error_set (err, ENOMEM, "%m");
  c->asked = c->found[c->nr_found - 1].end;
  return 0;
}

/* Fill 'p' with the next extents; its data is not there yet. */
static int
take_extents (struct copy *c, struct pack *p, struct error *err)
{
  pack_clear (p);
  for (;;) {
    struct extent *e;
    uint64_t room, n;

    if (c->at_found == c->nr_found) {
      if (c->asked == c->opt.size)
        return 0;
      if (ask (c, err) == -1)
        return -1;
      continue;
    }
    e = &c->found[c->at_found];
    n = e->end - e->start;
    if (e->type != EXTENT_HOLE || c->opt.full) {
      room = pack_room (p, e->type);
      if (room == 0)
        return 0;
      n = n < room ? n : room;
      pack_add (p, e->start, n, e->type);
    }
    e->start += n;
    if (e->start == e->end)
      c->at_found++;
  }
}

/* False: there is nothing more to do. */
static bool
wait_for_slot (struct copy *c)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);

  while (!c->failed && !c->all_taken && c->opt.writer &&
         c->next_job - c->written >= c->nr_slots)
    pthread_cond_wait (&c->changed, &c->lock);
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
  if (c->opt.writer)
    *pack = &c->slots[c->next_job % c->nr_slots].pack;
  if (take_extents (c, *pack, err) == -1)
    return -1;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);
  c->untaken = c->at_found < c->nr_found ? c->found[c->at_found].start
                                         : c->asked;
  if ((*pack)->nr == 0) {
    c->all_taken = true;
    pthread_cond_broadcast (&c->changed);
    return 0;
  }
  w->reading = (*pack)->extents[0].offset;
  *job = c->next_job++;
  return 1;
}

/* ---- a job ---- */

static int
read_data (struct client *client, struct pack *p, struct error *err)
{
  uint8_t *to = p->raw;

  for (size_t i = 0; i < p->nr; i++) {
    const struct packet_extent *e = &p->extents[i];

    if (e->type != EXTENT_DATA)
      continue;
    if (client_pread (client, to, e->length, e->offset) == -1)
      return error_set (err, errno, "read %" PRIu64 " bytes at %" PRIu64
                        ": %m", e->length, e->offset);
    to += e->length;
  }
  return 0;
}

/* For the thread that writes the archive. */
static int
hand_over (struct copy *c, uint64_t job, struct error *err)
{
  struct slot *s = &c->slots[job % c->nr_slots];

  if (pack_seal (&s->pack, &c->opt.id, job + 1, &c->opt.compression, err) ==
      -1)
    return -1;
  pthread_mutex_lock (&c->lock);
  s->ready = true;
  pthread_cond_broadcast (&c->changed);
  pthread_mutex_unlock (&c->lock);
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

  if (read_data (w->client, p, err) == -1)
    return -1;
  has_read (w);
  if (pack_find_zeros (p, err) == -1)
    return -1;
  if (c->opt.writer)
    return hand_over (c, job, err);
  if (pack_write (p, c->opt.target, err) == -1)
    return -1;
  c->done += pack_length (p);
  return 0;
}

/* ---- threads ---- */

static void
thread_ends (struct copy *c)
{
  pthread_mutex_lock (&c->lock);
  c->running--;
  pthread_cond_broadcast (&c->changed);
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

  if (c->opt.target)
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

/* The next slot to be written, when it is ready; NULL: there is none. */
static struct slot *
next_slot (struct copy *c)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);
  struct slot *s = &c->slots[c->written % c->nr_slots];

  while (!c->failed && !(c->written < c->next_job && s->ready)) {
    if (c->all_taken && c->written == c->next_job)
      return NULL;
    pthread_cond_wait (&c->changed, &c->lock);
  }
  return c->failed ? NULL : s;
}

static void
give_back (struct copy *c, struct slot *s)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);

  s->ready = false;
  c->written++;
  pthread_cond_broadcast (&c->changed);
}

static bool
has_failed (struct copy *c)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);

  return c->failed;
}

static void *
writer_thread (void *opaque)
{
  struct copy *c = opaque;
  struct error err = { 0 };
  struct slot *s;
  int r = 0;

  while (r == 0 && (s = next_slot (c)) != NULL) {
    r = archive_write (c->opt.writer, &s->pack, &err);
    c->done += pack_length (&s->pack);
    give_back (c, s);
  }
  if (r == 0 && !has_failed (c))
    r = archive_writer_end (c->opt.writer, &err);
  if (r == -1)
    fail (c, &err);
  thread_ends (c);
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
  c->walker = connect_source (c, err);
  if (c->walker == NULL)
    return -1;
  for (unsigned i = 0; i < c->opt.connections; i++) {
    c->workers[i].copy = c;
    c->workers[i].reading = NOTHING;
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
  client_close (c->walker);
  for (size_t i = 0; c->slots && i < c->nr_slots; i++)
    pack_destroy (&c->slots[i].pack);
  stop_destroy (&c->stop);
  pthread_mutex_destroy (&c->lock);
  pthread_mutex_destroy (&c->walk);
  pthread_cond_destroy (&c->changed);
  free (c->found);
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

  pthread_mutex_lock (&c->lock);
  c->running++;
  pthread_mutex_unlock (&c->lock);
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
  if (c->opt.writer) {
    c->nr_slots = 2 * c->opt.connections;
    c->slots = calloc (c->nr_slots, sizeof c->slots[0]);
  }
  if (c->workers == NULL || (c->opt.writer && c->slots == NULL))
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
  clock_cond_init (&c->changed);
  if (prepare (c, err) == -1) {
    copy_free (c);
    return NULL;
  }
  for (unsigned i = 0; i < opt->connections; i++)
    c->workers[i].started = start_thread (c, &c->workers[i].thread,
                                          worker_thread, &c->workers[i]);
  if (opt->writer)
    c->writer_started = start_thread (c, &c->writer, writer_thread, c);
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

bool
copy_wait (struct copy *c, uint64_t ns)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);
  struct timespec until;

  clock_in (&until, ns);
  while (c->running > 0)
    if (pthread_cond_timedwait (&c->changed, &c->lock, &until) == ETIMEDOUT)
      break;
  return c->running == 0;
}

void
copy_stop (struct copy *c)
{
  struct error err;

  error_set (&err, ECANCELED, "given up");
  fail (c, &err);
}

int
copy_end (struct copy *c, struct error *err)
{
  int r = 0;

  for (unsigned i = 0; i < c->opt.connections; i++)
    if (c->workers[i].started)
      pthread_join (c->workers[i].thread, NULL);
  if (c->writer_started)
    pthread_join (c->writer, NULL);
  if (c->failed)
    r = error_set (err, c->err.errnum, "%s", c->err.msg);
  copy_free (c);
  return r;
}
