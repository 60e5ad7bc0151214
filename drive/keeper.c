/* nbdferry - the thread that disarms regions of the activity log
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A region that was quiet since the last look is disarmed in this order:
 *
 *   1. it is no longer armed for requests that look from now on
 *   2. all requests that may have seen it armed have left the gate, so their
 *      bits are set; new ones are not held back meanwhile, but who writes to
 *      that region arms it again, which ends its disarming
 *   3. the sidecar is synced: those bits are durable
 *   4. the log is written without it; not synced, because a region that stays
 *      armed on disk costs nothing but accuracy
 *
 * From 3 on the control lock is held: a clear or merge that walks a bitmap
 * has its bits elsewhere for moments.  The thread sleeps as long as nothing
 * is armed.
 */
#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "keeper.h"

#define PERIOD (3 * NS_PER_S)

struct keeper {
  pthread_t thread;
};

int
keeper_look (struct drive *d)
{
  struct error err;
  int r = 0;

  if (activity_begin_disarm (d->activity) == 0)
    return 0;
  gate_synchronize (&d->writes);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);
  if (d->store == NULL || atomic_load (&d->store_failed)) {
    activity_cancel_disarm (d->activity);
    return d->store ? -1 : 0;
  }
  if (qcow2_sync (d->store, &err) == -1) {
    activity_cancel_disarm (d->activity);
    drive_store_failed (d, err.msg);
    return -1;
  }
  /* A page may have been lost while it was synced. */
  if (atomic_load (&d->store_failed)) {
    activity_cancel_disarm (d->activity);
    return -1;
  }
  /* On error it is written again by who arms next, and told by them. */
  activity_end_disarm (d->activity, NULL);
  return r;
}

static void *
keep (void *arg)
{
  struct drive *d = arg;

  while (activity_wait (d->activity, PERIOD))
    keeper_look (d);
  return NULL;
}

int
drive_start (struct drive *d, struct error *err)
{
  struct keeper *k;
  int r;

  if (d->activity == NULL || d->durability != DURABILITY_POWER)
    return 0;
  k = malloc (sizeof *k);
  if (k == NULL)
    return error_set (err, ENOMEM, "%m");
  r = pthread_create (&k->thread, NULL, keep, d);
  if (r != 0) {
    free (k);
    return error_set (err, r, "start a thread: %m");
  }
  d->keeper = k;
  return 0;
}

void
keeper_stop (struct drive *d)
{
  if (d->keeper == NULL)
    return;
  activity_wake_up (d->activity);
  pthread_join (d->keeper->thread, NULL);
  free (d->keeper);
  d->keeper = NULL;
}

/* ---- what it has to say ---- */

static void (*log_function) (const char *fmt, ...); /* set before threads */

void
drive_set_log (void (*log) (const char *fmt, ...))
{
  log_function = log;
}

void
drive_log (const char *fmt, ...)
{
  char text[ERROR_MAX];
  va_list args;

  if (log_function == NULL)
    return;
  va_start (args, fmt);
  vsnprintf (text, sizeof text, fmt, args);
  va_end (args);
  log_function ("%s", text);
}

void
drive_store_failed (struct drive *d, const char *reason)
{
  char *none = NULL, *copy;

  atomic_store (&d->store_failed, true);
  trust_note_failure (d->trust);
  if (atomic_load (&d->store_reason) != NULL)
    return;
  copy = strdup (reason);
  if (copy == NULL)
    return; /* the next one may have better luck */
  if (!atomic_compare_exchange_strong (&d->store_reason, &none, copy)) {
    free (copy);
    return;
  }
  if (d->activity)
    activity_flag (d->activity, ACTIVITY_FAILED, 0, true, NULL);
  drive_log ("disk '%s': writes fail from now on, because its bitmaps in %s "
             "can no longer be kept: %s", d->name, d->sidecar, reason);
}

const char *
drive_failure (struct drive *d)
{
  const char *why = atomic_load (&d->store_reason);

  if (why == NULL && atomic_load (&d->store_failed))
    return "the pages of bitmaps.qcow2 cannot be had";
  return why;
}
