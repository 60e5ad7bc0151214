/* nbdferry - a handover that a process before this one began
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "finisher.h"
#include "outgoing-impl.h"

struct finisher {
  struct drive *drive;
  struct uuid session;
  uint64_t attempt;
  char *peer;
  json_t *disks; /* the name of the disk over there */
  struct stop quit;
  pthread_t thread;
};

static void *
finisher_thread (void *arg)
{
  struct finisher *f = arg;
  struct drive *d = f->drive;
  struct disk *remote = handover_finish (&f->session, f->attempt, f->peer,
                                         f->disks, d->size, &f->quit);

  if (remote == NULL)
    return NULL;
  pthread_mutex_lock (&d->control);
  drives_close (&d, 1, true);
  drive_set_mode (d, DRIVE_FORWARD, remote);
  drives_open (&d, 1, true);
  pthread_mutex_unlock (&d->control);
  drive_record_acknowledged (d);
  return NULL;
}

static void
free_finisher (struct finisher *f)
{
  stop_destroy (&f->quit);
  json_decref (f->disks);
  free (f->peer);
  free (f);
}

struct finisher *
finisher_start (struct drive *d, struct error *err)
{
  const struct journal_record *rec = journal_get (d->journal);
  struct finisher *f = calloc (1, sizeof *f);
  char *name = NULL;
  int r;

  if (f == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  f->quit.fd = -1;
  f->drive = d;
  f->session = rec->session;
  f->attempt = rec->attempt;
  f->peer = strdup (rec->peer ? rec->peer : "");
  if (f->peer == NULL || stop_init (&f->quit, err) == -1)
    goto fail;
  name = client_uri_export (f->peer, err);
  if (name == NULL)
    goto fail;
  f->disks = json_pack ("[s]", name);
  free (name);
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
finisher_stop (struct finisher *f)
{
  stop_throw (&f->quit);
  pthread_join (f->thread, NULL);
  free_finisher (f);
}
