/* nbdferry - the source: forwarding clients to where their disk went
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "forwarding.h"

struct forwarding_disk {
  struct forwarding *f;
  struct shipment *s;
  struct departure *departure;
  pthread_t thread;
  bool started;
  struct disk *remote; /* the thread's, until it was joined; NULL: none */
};

struct forwarding {
  struct outgoing *o;
  struct forwarding_disk *v;
};

/* Ahead of time, once: if that fails, it is made when it is needed. */
static void *
ahead_thread (void *arg)
{
  struct forwarding_disk *d = arg;
  struct outgoing *o = d->f->o;

  d->remote = departure_ahead (d->departure, d->s->peer, &o->session,
                               &o->cancel);
  return NULL;
}

/* When it is needed, until it succeeds or the daemon ends. */
static void *
needed_thread (void *arg)
{
  struct forwarding_disk *d = arg;

  d->remote = departure_forward (d->departure);
  return NULL;
}

static void
start_threads (struct forwarding *f, void *(*thread) (void *))
{
  for (size_t i = 0; i < f->o->nr; i++)
    f->v[i].started =
      f->v[i].remote == NULL &&
      pthread_create (&f->v[i].thread, NULL, thread, &f->v[i]) == 0;
}

static void
join_threads (struct forwarding *f)
{
  for (size_t i = 0; i < f->o->nr; i++) {
    if (f->v[i].started)
      pthread_join (f->v[i].thread, NULL);
    f->v[i].started = false;
  }
}

static void
close_remote (struct forwarding_disk *d)
{
  if (d->remote)
    d->remote->ops->close (d->remote);
  d->remote = NULL;
}

struct forwarding *
forwarding_begin (struct outgoing *o)
{
  struct forwarding *f = calloc (1, sizeof *f);

  if (f == NULL || (f->v = calloc (o->nr, sizeof f->v[0])) == NULL) {
    free (f);
    return NULL;
  }
  f->o = o;
  for (size_t i = 0; i < o->nr; i++)
    f->v[i] = (struct forwarding_disk){ .f = f,
                                        .s = &o->shipments[i],
                                        .departure = &o->departures[i] };
  start_threads (f, ahead_thread);
  return f;
}

void
forwarding_free (struct forwarding *f)
{
  if (f == NULL)
    return;
  join_threads (f);
  for (size_t i = 0; i < f->o->nr; i++)
    close_remote (&f->v[i]);
  free (f->v);
  free (f);
}

/* It goes on over there. */
static bool
serve (struct forwarding_disk *d)
{
  struct departure *p = d->departure;
  bool done = false;

  while (d->remote && !done) {
    pthread_mutex_lock (&p->drive->control);
    done = departure_serve (p, take_ptr (&d->remote));
    pthread_mutex_unlock (&p->drive->control);
    if (!done) /* it is somewhere else by now */
      d->remote = departure_forward (p);
  }
  return done;
}

int
forwarding_finish (struct forwarding *f)
{
  struct outgoing *o = f->o;
  bool all = true;

  join_threads (f);
  for (size_t i = 0; i < o->nr; i++)
    if (strcmp (f->v[i].departure->at, f->v[i].s->peer) != 0)
      close_remote (&f->v[i]); /* it was committed elsewhere */
  start_threads (f, needed_thread);
  join_threads (f);
  for (size_t i = 0; i < o->nr; i++) {
    if (f->v[i].remote == NULL)
      needed_thread (&f->v[i]); /* no thread could be started */
    all &= f->v[i].remote != NULL;
  }
  for (size_t i = 0; i < o->nr && all; i++)
    all = serve (&f->v[i]);
  return all ? 0 : -1;
}
