/* nbdferry - a handover that a process before this one began
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>

#include "departure.h"
#include "finisher.h"

struct finisher {
  struct departure departure;
  struct stop quit;
  pthread_t thread;
};

/* Clients are forwarded from here on; false: it is somewhere else by now. */
static bool
serve (struct departure *p, struct disk *remote)
{
  struct drive *d = p->drive;
  bool r;

  pthread_mutex_lock (&d->control);
  drives_close (&d, 1, true);
  r = departure_serve (p, remote);
  drives_open (&d, 1, true);
  pthread_mutex_unlock (&d->control);
  return r;
}

static void *
finisher_thread (void *arg)
{
  struct finisher *f = arg;
  struct departure *p = &f->departure;

  if (drive_get_mode (p->drive) != DRIVE_FORWARD) {
    struct disk *remote;

    if (departure_commit (p, 1, NULL) == -1)
      return NULL;
    do {
      remote = departure_forward (p);
      if (remote == NULL)
        return NULL;
    } while (!serve (p, remote));
    drive_record_acknowledged (p->drive);
  }
  departure_follow (p);
  return NULL;
}

static void
free_finisher (struct finisher *f)
{
  departure_destroy (&f->departure);
  stop_destroy (&f->quit);
  free (f);
}

struct finisher *
finisher_start (struct drive *d, struct error *err)
{
  struct finisher *f = calloc (1, sizeof *f);
  int r;

  if (f == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  f->quit.fd = -1;
  if (stop_init (&f->quit, err) == -1 ||
      departure_init (&f->departure, d, &f->quit, err) == -1)
    goto fail;
  r = pthread_create (&f->thread, NULL, finisher_thread, f);
  if (r != 0) {
    error_set (err, r, "start a thread: %m");
    goto fail;
  }
  return f;

 fail:
  free_finisher (f);
  return NULL;
}

void
finisher_wake (struct finisher *f)
{
  departure_wake (&f->departure);
}

void
finisher_stop (struct finisher *f)
{
  stop_throw (&f->quit);
  departure_wake (&f->departure);
  pthread_join (f->thread, NULL);
  free_finisher (f);
}
