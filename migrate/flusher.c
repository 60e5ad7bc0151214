/* nbdferry - a thread that flushes the destination as it goes
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>

#include "cleanup.h"
#include "clock.h"
#include "flusher.h"
#include "held.h"

/* A flush comes when that much, or that long ago, was acknowledged. */
#define FLUSH_BYTES (UINT64_C (256) << 20)
#define FLUSH_NS    NS_PER_S

struct flusher {
  struct outgoing *o;
  struct client *client; /* the thread's */
  pthread_t thread;

  pthread_mutex_t lock; /* protects what follows */
  pthread_cond_t cond;
  uint64_t bytes;       /* acknowledged since the last flush began */
  uint64_t held;
  bool ending;
};

/* Wait until there is something to flush for; false at the end. */
static bool
wait_for_bytes (struct flusher *f)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&f->lock);
  struct timespec until;
  int r = 0;

  while (f->bytes == 0 && !f->ending)
    pthread_cond_wait (&f->cond, &f->lock);
  clock_in (&until, FLUSH_NS);
  while (r == 0 && f->bytes < FLUSH_BYTES && !f->ending)
    r = pthread_cond_timedwait (&f->cond, &f->lock, &until);
  f->bytes = 0;
  return !f->ending;
}

static void *
flush_thread (void *arg)
{
  struct flusher *f = arg;
  struct outgoing *o = f->o;
  struct error err;

  while (wait_for_bytes (f)) {
    uint64_t held = 0;

    for (size_t i = 0; i < o->nr; i++)
      held_flushing (&o->shipments[i]);
    if (send_flush (f->client, &err) == -1) {
      engine_fail (o->engine, &err);
      break;
    }
    for (size_t i = 0; i < o->nr; i++)
      held += held_flushed (&o->shipments[i]);
    pthread_mutex_lock (&f->lock);
    f->held += held;
    pthread_mutex_unlock (&f->lock);
  }
  return NULL;
}

struct flusher *
flusher_start (struct outgoing *o, struct client *c, struct error *err)
{
  struct flusher *f = calloc (1, sizeof *f);
  int r;

  if (f == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  f->o = o;
  f->client = c;
  pthread_mutex_init (&f->lock, NULL);
  clock_cond_init (&f->cond);
  r = pthread_create (&f->thread, NULL, flush_thread, f);
  if (r == 0)
    return f;
  error_set (err, r, "start a thread: %m");
  pthread_mutex_destroy (&f->lock);
  pthread_cond_destroy (&f->cond);
  free (f);
  return NULL;
}

void
flusher_note (struct flusher *f, uint64_t bytes)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&f->lock);

  if (f->bytes == 0 || f->bytes + bytes >= FLUSH_BYTES)
    pthread_cond_signal (&f->cond);
  f->bytes += bytes;
}

uint64_t
flusher_held (struct flusher *f)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&f->lock);

  return f->held;
}

void
flusher_end (struct flusher *f)
{
  if (f == NULL)
    return;
  pthread_mutex_lock (&f->lock);
  f->ending = true;
  pthread_cond_signal (&f->cond);
  pthread_mutex_unlock (&f->lock);
  pthread_join (f->thread, NULL);
}

void
flusher_free (struct flusher *f)
{
  if (f == NULL)
    return;
  client_close (f->client);
  pthread_mutex_destroy (&f->lock);
  pthread_cond_destroy (&f->cond);
  free (f);
}
