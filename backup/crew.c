/* nbdferry - some threads that share a piece of work
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include "cleanup.h"
#include "clock.h"
#include "crew.h"

#define TICK (200 * NS_PER_MS)

struct run {
  struct crew *crew;
  pthread_mutex_t lock; /* protects what follows */
  pthread_cond_t changed;
  unsigned running;
  struct error err;     /* the first one */
};

static void *
worker (void *arg)
{
  struct run *run = arg;
  struct error err = { 0 };
  int r = run->crew->work (run->crew->opaque, &err);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&run->lock);

  if (r == -1 && !atomic_exchange (&run->crew->over, true))
    run->err = err;
  run->running--;
  pthread_cond_signal (&run->changed);
  return NULL;
}

static unsigned
start (struct run *run, pthread_t *threads)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&run->lock);

  while (run->running < run->crew->threads &&
         pthread_create (&threads[run->running], NULL, worker, run) == 0)
    run->running++;
  return run->running;
}

static void
wait_for_all (struct run *run)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&run->lock);

  while (run->running > 0) {
    struct timespec ts;

    clock_in (&ts, TICK);
    pthread_cond_timedwait (&run->changed, &run->lock, &ts);
    if (run->crew->tick) {
      pthread_mutex_unlock (&run->lock);
      run->crew->tick (run->crew->opaque);
      pthread_mutex_lock (&run->lock);
    }
  }
}

int
crew_run (struct crew *c, struct error *err)
{
  CLEANUP_FREE pthread_t *threads = calloc (c->threads, sizeof *threads);
  struct run run = { .crew = c, .lock = PTHREAD_MUTEX_INITIALIZER };
  unsigned n = 0;

  atomic_store (&c->over, false);
  clock_cond_init (&run.changed);
  if (threads)
    n = start (&run, threads);
  wait_for_all (&run);
  for (unsigned i = 0; i < n; i++)
    pthread_join (threads[i], NULL);
  pthread_cond_destroy (&run.changed);
  pthread_mutex_destroy (&run.lock);
  if (n == 0)
    return error_set (err, EAGAIN, "cannot start a thread");
  if (!atomic_load (&c->over))
    return 0;
  if (err)
    *err = run.err;
  return -1;
}
