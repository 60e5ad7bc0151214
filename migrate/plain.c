/* nbdferry - a copy to another server: its life
 * SPDX-License-Identifier: BSD-3-Clause
 *
 *   setup ----> active (rounds) ----> device (hold) ----> completed
 *     |              |                   |
 *     +--------------+----- error -------+----> failed, or cancelled
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "guard.h"
#include "identity.h"
#include "log.h"
#include "plain-impl.h"
#include "remote.h"

/* Each has one request under way. */
#define DEFAULT_CHANNELS 4

/* A server that is lost may come back within that time, unless something was
 * being written.
 */
#define PATIENCE_MS 10000
/* In the hold a request takes no longer than the downtime limit and this. */
#define HOLD_EXTRA_MS 5000
/* And all of it, before writes go on and another round is made. */
#define HOLD_MORE_MS 1000
/* Bytes a second, until a round has shown how fast it goes. */
#define ASSUMED_BANDWIDTH (64 << 20)

/* ---- how it goes ---- */

void
plain_info (struct plain *p, struct migrate_info *info)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);
  uint64_t end = p->ended_ns ? p->ended_ns : now_ns ();
  uint64_t ns = end - p->started_ns + 1;

  *info = p->info;
  info->total_ms = ns / NS_PER_MS;
  info->mbps = (double) info->transferred * 8e3 / ns;
  for (size_t i = 0; i < p->nr; i++) {
    struct drive *d = p->disks[i].drive;
    uint64_t held = gate_longest (&d->writes) / 1000;

    migrate_add_throttle (info, d);
    if (held > info->longest_hold_us)
      info->longest_hold_us = held;
  }
  if (info->status == MIGRATE_COMPLETED)
    return;
  info->remaining = plain_dirty (p);
  info->expected_downtime_ms = info->remaining * 1000 /
    (p->bandwidth ? p->bandwidth : ASSUMED_BANDWIDTH);
}

static void
tell (struct plain *p)
{
  struct migrate_info info;

  if (p->changed == NULL)
    return;
  plain_info (p, &info);
  p->changed (p->opaque, &info);
}

static void
set_status (struct plain *p, enum migrate_status status)
{
  pthread_mutex_lock (&p->lock);
  if (p->info.status != MIGRATE_CANCELLING)
    p->info.status = status;
  pthread_mutex_unlock (&p->lock);
  tell (p);
}

/* ---- setting up ---- */

/* Is the target the disk itself?  What was read would be written over what
 * clients have written since, and that is a change again, without end.
 */
static int
refuse_itself (struct plain *p, struct plain_disk *d, struct error *err)
{
  struct drive *drive = d->drive;
  bool remote = remote_is_uri (drive->path), same;
  struct uuid own, there;
  int r = identity_ask (d->uri, NULL, IDENTITY_HOPS, &p->stop, &there, err);

  if (r == -1)
    return -1;
  /* No server of ours; it may be the one that has the disk. */
  same = remote && strcmp (drive->path, d->uri) == 0;
  /* One that has the disk and takes no more clients is none of ours. */
  if (r == 1)
    same |= uuid_equal (&there, &drive->self) ||
            (remote && identity_ask (drive->path, NULL, IDENTITY_HOPS,
                                     &p->stop, &own, NULL) == 1 &&
             uuid_equal (&there, &own));
  return same ? error_set (err, EINVAL, "%s: is the disk itself", d->uri) : 0;
}

static int
open_target (struct plain *p, struct plain_disk *d, struct error *err)
{
  struct remote_options opt = { .connections = p->params.channels,
                                .patience_ms = PATIENCE_MS,
                                .stop = &p->stop };
  struct disk *target;

  if (refuse_itself (p, d, err) == -1)
    return -1;
  target = remote_open (d->uri, &opt, err);
  if (target == NULL)
    return -1;
  /* From here on plain_stop can reach it. */
  pthread_mutex_lock (&p->lock);
  d->target = target;
  pthread_mutex_unlock (&p->lock);
  if (stop_wait (&p->stop, 0))
    return error_set (err, ECANCELED, "cancelled");
  if (d->target->readonly)
    return error_set (err, EROFS, "%s: the server gives it for reading only",
                      d->uri);
  if (d->target->size < d->drive->size)
    return error_set (err, ENOSPC, "%s: has %" PRIu64 " bytes, but disk '%s' "
                      "has %" PRIu64, d->uri, d->target->size, d->drive->name,
                      d->drive->size);
  if (d->target->size > d->drive->size)
    log_message ("%s: is larger than disk '%s'; what lies beyond its %" PRIu64
                 " bytes stays as it is", d->uri, d->drive->name,
                 d->drive->size);
  if (p->params.overwrite)
    return 0;
  return guard_look (d->target, d->drive->name, d->uri, err);
}

static int
setup (struct plain *p, struct error *err)
{
  for (size_t i = 0; i < p->nr; i++)
    if (open_target (p, &p->disks[i], err) == -1)
      return -1;
  if (plain_bitmaps_open (p, err) == -1)
    return -1;
  for (size_t i = 0; i < p->nr; i++)
    if (drive_set_ship (p->disks[i].drive, p->disks[i].ship, err) == -1)
      return -1;
  pthread_mutex_lock (&p->lock);
  p->info.setup_ms = (now_ns () - p->started_ns) / NS_PER_MS;
  pthread_mutex_unlock (&p->lock);
  return stop_wait (&p->stop, 0) ? error_set (err, ECANCELED, "cancelled") : 0;
}

/* ---- rounds and hold ---- */

/* Lock held. */
static uint64_t
link_rate (const struct plain *p)
{
  uint64_t rate = p->bandwidth ? p->bandwidth : ASSUMED_BANDWIDTH;

  if (p->params.max_bandwidth > 0 && p->params.max_bandwidth < rate)
    rate = p->params.max_bandwidth;
  return rate;
}

static void
slow_writers (struct plain *p, uint64_t dirty)
{
  uint64_t link;

  pthread_mutex_lock (&p->lock);
  link = link_rate (p);
  pthread_mutex_unlock (&p->lock);
  brake_round (&p->brake, p->drives, p->nr, dirty, link);
}

static bool
small_enough (struct plain *p, uint64_t dirty)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  return dirty <= link_rate (p) / 1000 * p->params.downtime_limit;
}

static int
flush_targets (struct plain *p, struct error *err)
{
  for (size_t i = 0; i < p->nr; i++) {
    struct disk *t = p->disks[i].target;

    if (t->ops->flush (t) == -1)
      return error_set (err, errno, "flush %s: %m", p->disks[i].uri);
  }
  return 0;
}

static int
rounds (struct plain *p, struct error *err)
{
  for (;;) {
    uint64_t began = now_ns (), dirty;

    if (plain_round (p, err) == -1 || flush_targets (p, err) == -1)
      return -1;
    dirty = plain_dirty (p);
    pthread_mutex_lock (&p->lock);
    p->info.dirty_rate =
      (double) dirty * NS_PER_S / (now_ns () - began + 1);
    pthread_mutex_unlock (&p->lock);
    tell (p);
    if (small_enough (p, dirty))
      return 0;
    slow_writers (p, dirty);
  }
}

static void
limit_requests (struct plain *p, unsigned ms)
{
  for (size_t i = 0; i < p->nr; i++)
    remote_limit (p->disks[i].target, ms);
}

/* The gates are shut.  How fast the rest goes is not known before: each piece
 * of it may take a round trip.  So it ends when writes have waited for long.
 */
static int
send_rest (struct plain *p, uint64_t *left, struct error *err)
{
  uint64_t began = now_ns (), dirty = plain_dirty (p);
  int r;

  pthread_mutex_lock (&p->lock);
  p->hold_until = began + (p->params.downtime_limit + HOLD_MORE_MS) * NS_PER_MS;
  pthread_mutex_unlock (&p->lock);
  r = plain_round (p, err);
  *left = r == 0 ? plain_dirty (p) : 0;
  pthread_mutex_lock (&p->lock);
  p->hold_until = 0;
  if (*left > 0)
    p->bandwidth = 1 + (double) (dirty - *left) * NS_PER_S /
                         (now_ns () - began + 1);
  pthread_mutex_unlock (&p->lock);
  return r;
}

/* The rest, while writes wait: what the server has then is one instant of all
 * disks.  It need not be durable yet for them to go on.  1: it took too long,
 * and they go on.
 */
static int
hold (struct plain *p, struct error *err)
{
  uint64_t held, left;
  int r;

  pthread_mutex_lock (&p->lock);
  p->holding = true;
  pacer_set_rate (&p->pacer, 0);
  limit_requests (p, p->params.downtime_limit + HOLD_EXTRA_MS);
  pthread_mutex_unlock (&p->lock);
  drives_lock (p->drives, p->nr);
  drives_close (p->drives, p->nr, false);
  r = send_rest (p, &left, err);
  if (r == 0)
    r = left > 0 ? 1 : plain_bitmaps_take (p, err);
  held = drives_open (p->drives, p->nr, false);
  drives_unlock (p->drives, p->nr);
  limit_requests (p, 0);
  pthread_mutex_lock (&p->lock);
  p->info.downtime_ms = (held + NS_PER_MS - 1) / NS_PER_MS;
  if (r == 1) {
    p->holding = false;
    pacer_set_rate (&p->pacer, p->params.max_bandwidth);
  }
  pthread_mutex_unlock (&p->lock);
  return r;
}

static int
run (struct plain *p, struct error *err)
{
  int r;

  do {
    set_status (p, MIGRATE_ACTIVE);
    if (rounds (p, err) == -1)
      return -1;
    set_status (p, MIGRATE_DEVICE);
    r = hold (p, err);
    if (r == -1)
      return -1;
  } while (r == 1);
  brake_release (&p->brake, p->drives, p->nr);
  for (size_t i = 0; i < p->nr; i++)
    drive_drop_ship (p->disks[i].drive);
  if (flush_targets (p, err) == -1)
    return -1;
  return plain_bitmaps_write (p, err);
}

/* Its workers do nothing between rounds. */
static int
run_with_workers (struct plain *p, struct error *err)
{
  CLEANUP_FREE pthread_t *threads = calloc (p->workers, sizeof threads[0]);
  unsigned wanted = p->workers, n;
  int r = 0;

  if (threads == NULL)
    return error_set (err, ENOMEM, "%m");
  for (n = 0; n < wanted && r == 0; n++)
    r = pthread_create (&threads[n], NULL, plain_worker, p);
  if (r != 0) {
    n--;
    error_set (err, r, "start a thread: %m");
    r = -1;
  }
  else
    r = run (p, err);
  pthread_mutex_lock (&p->lock);
  p->end = true;
  pthread_cond_broadcast (&p->cond);
  pthread_mutex_unlock (&p->lock);
  while (n > 0)
    pthread_join (threads[--n], NULL);
  return r;
}

static void
disconnect (struct plain *p)
{
  for (size_t i = 0; i < p->nr; i++) {
    struct disk *target;

    pthread_mutex_lock (&p->lock);
    target = p->disks[i].target;
    p->disks[i].target = NULL;
    pthread_mutex_unlock (&p->lock);
    if (target)
      target->ops->close (target);
  }
}

static void
ended (struct plain *p, int r, const struct error *err)
{
  pthread_mutex_lock (&p->lock);
  p->ended_ns = now_ns ();
  if (r == 0)
    p->info.status = MIGRATE_COMPLETED;
  else if (p->cancelled)
    p->info.status = MIGRATE_CANCELLED;
  else {
    p->info.status = MIGRATE_FAILED;
    memcpy (p->info.error, err->msg, sizeof p->info.error);
  }
  pthread_mutex_unlock (&p->lock);
  tell (p);
}

static void *
leading_thread (void *arg)
{
  struct plain *p = arg;
  struct error err = { 0 };
  int r;

  tell (p);
  r = setup (p, &err);
  if (r == 0)
    r = run_with_workers (p, &err);
  brake_release (&p->brake, p->drives, p->nr);
  for (size_t i = 0; i < p->nr; i++)
    drive_drop_ship (p->disks[i].drive);
  plain_bitmaps_close (p, r == 0);
  disconnect (p);
  ended (p, r, &err);
  return NULL;
}

/* ---- from outside ---- */

static void
free_plain (struct plain *p)
{
  for (size_t i = 0; p->disks && i < p->nr; i++) {
    struct plain_disk *d = &p->disks[i];

    bitmap_free (d->ship);
    free (d->uri);
    pthread_mutex_destroy (&d->lock);
  }
  stop_destroy (&p->stop);
  pacer_destroy (&p->pacer);
  pthread_mutex_destroy (&p->lock);
  pthread_cond_destroy (&p->cond);
  free (p->disks);
  free (p->drives);
  free (p->bitmaps_to);
  free (p);
}

static struct plain *
alloc_plain (struct drive *const *drives, size_t nr, const char *bitmaps_to,
             struct error *err)
{
  struct plain *p = calloc (1, sizeof *p);

  if (p == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  pthread_mutex_init (&p->lock, NULL);
  pthread_cond_init (&p->cond, NULL);
  pacer_init (&p->pacer);
  p->stop.fd = p->bitmaps_fd = -1;
  p->drives = calloc (nr, sizeof p->drives[0]);
  p->disks = calloc (nr, sizeof p->disks[0]);
  if (bitmaps_to)
    p->bitmaps_to = strdup (bitmaps_to);
  if (!p->drives || !p->disks || (bitmaps_to && !p->bitmaps_to)) {
    error_set (err, ENOMEM, "%m");
    goto fail;
  }
  p->nr = nr;
  memcpy (p->drives, drives, nr * sizeof p->drives[0]);
  drives_sort (p->drives, nr);
  for (size_t i = 0; i < nr; i++) {
    p->disks[i].drive = drives[i];
    pthread_mutex_init (&p->disks[i].lock, NULL);
  }
  if (stop_init (&p->stop, err) == 0)
    return p;

 fail:
  free_plain (p);
  return NULL;
}

static int
load_disks (struct plain *p, const char *uri, struct error *err)
{
  CLEANUP_FREE char *export = client_uri_export (uri, err);

  if (export == NULL)
    return -1;
  if (export[0] != '\0' && p->nr != 1)
    return error_set (err, EINVAL, "%s names one export, but %zu disks are to "
                      "be copied; name only the server", uri, p->nr);
  if (p->bitmaps_to && p->nr != 1)
    return error_set (err, EINVAL, "%s: the bitmaps of one disk go into a "
                      "file, but %zu disks are to be copied", p->bitmaps_to,
                      p->nr);
  for (size_t i = 0; i < p->nr; i++) {
    struct plain_disk *d = &p->disks[i];

    /* The only disk goes to the default export, if none is named. */
    d->uri = export[0] || p->nr == 1
      ? strdup (uri) : client_uri_with_export (uri, d->drive->name, err);
    if (d->uri == NULL)
      return -1;
    if (plain_disk_init (d, err) == -1)
      return -1;
    p->info.total += d->drive->size;
    gate_reset_longest (&d->drive->writes);
    throttle_reset_longest (&d->drive->throttle);
  }
  return 0;
}

struct plain *
plain_start (struct drive *const *drives, size_t nr, const char *uri,
             const char *bitmaps_to, const struct migrate_params *params,
             void (*changed) (void *opaque, const struct migrate_info *),
             void *opaque, struct error *err)
{
  struct plain *p = alloc_plain (drives, nr, bitmaps_to, err);
  int r;

  if (p == NULL)
    return NULL;
  if (load_disks (p, uri, err) == -1)
    goto fail;
  p->changed = changed;
  p->opaque = opaque;
  p->params = *params;
  pacer_set_rate (&p->pacer, params->max_bandwidth);
  if (p->params.channels == 0)
    p->params.channels = DEFAULT_CHANNELS;
  /* One reads while the other one sends, even over one connection. */
  p->workers = p->params.channels > 1 ? p->params.channels : 2;
  p->started_ns = now_ns ();
  p->info.status = MIGRATE_SETUP;
  r = pthread_create (&p->thread, NULL, leading_thread, p);
  if (r == 0)
    return p;
  error_set (err, r, "start a thread: %m");

 fail:
  free_plain (p);
  return NULL;
}

void
plain_set_params (struct plain *p, const struct migrate_params *params)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  p->params.max_bandwidth = params->max_bandwidth;
  p->params.downtime_limit = params->downtime_limit;
  p->bandwidth = 0; /* measured under the old limit */
  if (!p->holding)
    pacer_set_rate (&p->pacer, params->max_bandwidth);
}

void
plain_stop (struct plain *p)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  stop_throw (&p->stop);
  pacer_stop (&p->pacer);
  for (size_t i = 0; i < p->nr; i++)
    if (p->disks[i].target)
      remote_stop (p->disks[i].target);
}

void
plain_cancel (struct plain *p)
{
  pthread_mutex_lock (&p->lock);
  if (p->ended_ns > 0) {
    pthread_mutex_unlock (&p->lock);
    return;
  }
  p->cancelled = true;
  p->info.status = MIGRATE_CANCELLING;
  pthread_mutex_unlock (&p->lock);
  plain_stop (p);
  tell (p);
}

void
plain_join (struct plain *p)
{
  if (!p->joined)
    pthread_join (p->thread, NULL);
  p->joined = true;
}

void
plain_free (struct plain *p)
{
  plain_join (p);
  free_plain (p);
}

bool
plain_ended (struct plain *p)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  return p->ended_ns != 0;
}
