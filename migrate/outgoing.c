/* nbdferry - the source of a migration: its life
 * SPDX-License-Identifier: BSD-3-Clause
 *
 *   setup ----> active (rounds) ----> device (handover) ----> completed
 *     |            |  ^  |                  |
 *     |            v  |  |                  |
 *     |           paused |                  |
 *     +------------+-----+----- error ------+----> failed, or cancelled
 *
 * One thread leads: it connects, goes through the rounds (rounds.c) until
 * what is left is little enough, and hands over (handover.c).  When a
 * connection is lost before that, it pauses and begins anew with the next one
 * (resume.c).
 */
#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "description.h"
#include "flusher.h"
#include "held.h"
#include "mapping.h"
#include "resume.h"
#include "ship-map.h"

/* ---- setting up ---- */

static json_t *
hello_body (struct outgoing *o)
{
  json_t *disks = json_array ();

  for (size_t i = 0; i < o->nr; i++) {
    struct shipment *s = &o->shipments[i];
    char lineage[UUID_TEXT];

    uuid_format (&s->lineage, lineage);
    json_array_append_new (
      disks, json_pack ("{s:s, s:I, s:s, s:I}", "name", s->name, "size",
                        (json_int_t) s->drive->size, "lineage", lineage,
                        "generation", (json_int_t) s->generation));
    if (o->params.overwrite)
      json_object_set_new (json_array_get (disks, i), "overwrite",
                           json_true ());
  }
  return json_pack ("{s:o, s:b}", "disks", disks, "resume", o->tracked);
}

struct client *
outgoing_open_channel (struct outgoing *o, uint32_t number, const struct stop *stop,
              unsigned timeout_ms, struct error *err)
{
  CLEANUP_FREE char *export = NULL;
  json_auto_t *body = hello_body (o);
  struct packet_header h = { .session = o->session,
                             .epoch = o->epoch,
                             .channel = number };
  struct client *c;

  if (body == NULL ||
      asprintf (&export, "%s@incoming", o->shipments[0].name) == -1) {
    export = NULL;
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  c = client_connect (o->uri, export, stop, timeout_ms, err);
  if (c == NULL) {
    error_prefix (err, "is it a server with incoming=on, with a disk '%s', and "
                  "reached with TLS if it is on another host? (one of another "
                  "kind gets a copy of the data with --data-only)",
                  o->shipments[0].name);
    return NULL;
  }
  client_set_timeout (c, timeout_ms);
  if (check_destination (c, err) == -1 ||
      send_control (c, &h, PACKET_HELLO, body, err) == -1 ||
      check_session (c, &o->session, err) == -1) {
    outgoing_refused (o, c, PACKET_HELLO, err);
    client_close (c);
    return NULL;
  }
  client_set_timeout (c, 0);
  return c;
}

static struct client *
open_data_channel (struct outgoing *o, uint32_t number, struct error *err)
{
  return outgoing_open_channel (o, number, &o->cancel, CONNECT_TIMEOUT_MS,
                                err);
}

static int
start_engine (struct outgoing *o, struct error *err)
{
  unsigned n = o->params.channels;
  CLEANUP_FREE struct client **clients = calloc (n, sizeof clients[0]);
  struct engine_options opt = {
    .producers = o->max_producers,
    .channels = n,
    .session = o->session,
    .epoch = o->epoch,
    .stop = &o->cancel,
    .acked = outgoing_acked,
    .opaque = o,
  };
  size_t bitmaps = 0;

  if (clients == NULL)
    return error_set (err, ENOMEM, "%m");
  if (outgoing_open_channels (o, open_data_channel, clients, n, err) == -1)
    goto out;
  for (size_t i = 0; i < o->nr; i++) {
    pthread_mutex_lock (&o->shipments[i].drive->list);
    if (o->shipments[i].drive->nr_bitmaps > bitmaps)
      bitmaps = o->shipments[i].drive->nr_bitmaps;
    pthread_mutex_unlock (&o->shipments[i].drive->list);
  }
  opt.sections = 256 * 1024 + bitmaps * 4096;
  o->engine = engine_start (&opt, clients, err);
 out:
  for (unsigned i = 0; i < n; i++)
    client_close (clients[i]); /* those that the engine did not take */
  if (o->engine == NULL)
    return -1;
  engine_set_bandwidth (o->engine, o->params.max_bandwidth);
  return 0;
}

static int
start_flusher (struct outgoing *o, struct error *err)
{
  struct client *c = outgoing_open_channel (o, 0, &o->cancel,
                                            CONNECT_TIMEOUT_MS, err);

  if (c == NULL)
    return -1;
  o->flusher = flusher_start (o, c, err);
  if (o->flusher == NULL)
    client_close (c);
  return o->flusher ? 0 : -1;
}

static int
start_producers (struct outgoing *o, struct error *err)
{
  for (unsigned i = 0; i < o->producers; i++) {
    int r = pthread_create (&o->producer[i], NULL, outgoing_producer, o);

    if (r != 0) {
      o->producers = i;
      return error_set (err, r, "start a thread: %m");
    }
  }
  return 0;
}

static int
setup (struct outgoing *o, struct error *err)
{
  uint64_t began = now_ns ();
  bool first = !o->tracked;

  if (outgoing_next_epoch (o, err) == -1)
    return -1;
  o->control = outgoing_open_channel (o, 0, &o->cancel, CONNECT_TIMEOUT_MS,
                                      err);
  if (o->control == NULL)
    return -1;
  hold_connected (o, now_ns () - began);
  blobs_forget (o->blobs);
  /* Also above those of a process before this one. */
  blobs_raise (o->blobs, o->epoch << 32);
  o->connected = true;
  o->h = (struct packet_header){ .session = o->session, .epoch = o->epoch };
  if (o->tracked && outgoing_check_held (o, err) == -1)
    return -1;
  /* The bitmaps are announced, and may be refused, before data moves. */
  if (outgoing_sync_bitmaps (o, err) == -1 || start_engine (o, err) == -1 ||
      start_flusher (o, err) == -1 || hold_measure_link (o, err) == -1)
    return -1;
  if (first && outgoing_track (o, err) == -1)
    return -1;
  if (first && outgoing_use_hints (o, err) == -1)
    return -1;
  pthread_mutex_lock (&o->lock);
  o->running = true;
  if (o->info.setup_ms == 0)
    o->info.setup_ms = (now_ns () - o->started_ns) / NS_PER_MS;
  mirror_set_wanted (o->mirror, o->params.copy_mode == MIGRATE_WRITE_BLOCKING);
  o->producers = o->max_producers;
  o->first_round = o->round;
  o->producers_end = false;
  pthread_mutex_unlock (&o->lock);
  if (mirror_start (o->mirror, err) == -1)
    return -1;
  return start_producers (o, err);
}

/* ---- ending ---- */

static void
end_producers (struct outgoing *o)
{
  pthread_mutex_lock (&o->lock);
  o->producers_end = true;
  pthread_cond_broadcast (&o->cond);
  pthread_mutex_unlock (&o->lock);
}

/* The connection has ended, well or not: nobody sends or waits any more. */
static void
tear_down (struct outgoing *o, unsigned started)
{
  struct error err;

  stop_throw (&o->cancel);
  if (o->engine) { /* whoever fills or waits to send */
    error_set (&err, ECANCELED, "the connection is given up");
    engine_fail (o->engine, &err);
  }
  end_producers (o);
  mirror_end (o->mirror);
  for (unsigned i = 0; i < started; i++)
    pthread_join (o->producer[i], NULL);
  pthread_mutex_lock (&o->lock);
  o->running = false;
  pthread_mutex_unlock (&o->lock);
  flusher_end (o->flusher);
  engine_free (o->engine);
  o->engine = NULL;
  o->progress = o->flusher && flusher_held (o->flusher) > 0;
  flusher_free (o->flusher);
  o->flusher = NULL;
  client_close (o->control);
  o->control = NULL;
  outgoing_set_delay (o, 0);
}

/* Tell the destination that what it got is worth nothing.  It would find out
 * by itself at the next attempt, so nothing depends on it.
 */
static void
send_cancel (struct outgoing *o)
{
  struct packet_header h;
  struct client *c;

  o->epoch++; /* fences off what may still be under way */
  c = outgoing_open_channel (o, 0, &o->quit, CANCEL_TIMEOUT_MS, NULL);
  if (c == NULL)
    return;
  client_set_timeout (c, CANCEL_TIMEOUT_MS);
  h = (struct packet_header){ .session = o->session, .epoch = o->epoch };
  send_control (c, &h, PACKET_CANCEL, NULL, NULL);
  client_close (c);
}

static void
ended (struct outgoing *o, enum migrate_status status,
       const struct error *why)
{
  pthread_mutex_lock (&o->lock);
  o->ended_ns = now_ns ();
  if (why)
    memcpy (o->info.error, why->msg, sizeof o->info.error);
  o->info.status = status;
  pthread_cond_broadcast (&o->cond);
  pthread_mutex_unlock (&o->lock);
  outgoing_tell (o);
}

/* It goes on: no reason stands any more. */
static void
set_active (struct outgoing *o)
{
  pthread_mutex_lock (&o->lock);
  o->info.error[0] = '\0';
  pthread_mutex_unlock (&o->lock);
  outgoing_set_status (o, MIGRATE_ACTIVE);
}

/* What an administrator has asked for is not told as an error. */
static void
explain_pause (struct outgoing *o, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  if (o->pause_asked)
    error_set (err, ECANCELED, "paused by migrate-pause, until "
               "migrate-recover");
}

/* All that one connection can do. */
static int
run_connection (struct outgoing *o, struct error *err)
{
  int r = setup (o, err);

  if (r == 0) {
    set_active (o);
    r = outgoing_rounds (o, err);
  }
  if (r == 0)
    r = outgoing_handover (o, err);
  /* The first error is the cause; others follow from it. */
  if (r == -1 && o->engine)
    engine_failed (o->engine, err);
  if (r == -1)
    explain_pause (o, err);
  tear_down (o, o->running ? o->producers : 0);
  return r;
}

/* Until it is handed over, or cannot go on. */
static int
run_connections (struct outgoing *o, struct error *err)
{
  int r = -1;

  if (o->restored)
    error_set (err, ESHUTDOWN, "the server was started again");
  else {
    outgoing_set_status (o, MIGRATE_SETUP);
    r = run_connection (o, err);
  }
  while (r == -1 && outgoing_pause (o, err))
    r = run_connection (o, err);
  return r;
}

/* The daemon ends: what is there stays, for the next one.  The ship map in
 * memory goes.
 */
static void
leave (struct outgoing *o, const struct error *why)
{
  for (size_t i = 0; i < o->nr; i++)
    drive_drop_ship (o->shipments[i].drive);
  ended (o, MIGRATE_FAILED, why);
}

static void *
leading_thread (void *arg)
{
  struct outgoing *o = arg;
  struct error err = { 0 };
  int r = run_connections (o, &err);
  bool cancelled, let_go;

  pthread_mutex_lock (&o->lock);
  cancelled = o->cancelled;
  let_go = o->let_go;
  pthread_mutex_unlock (&o->lock);
  if (r == 0) {
    outgoing_untrack (o, true);
    ended (o, MIGRATE_COMPLETED, NULL);
    return NULL;
  }
  if (o->tracked && !let_go && !cancelled && stop_wait (&o->quit, 0)) {
    leave (o, &err);
    return NULL;
  }
  if (!let_go) {
    outgoing_untrack (o, false);
    if (o->connected)
      send_cancel (o);
  }
  if (cancelled)
    ended (o, MIGRATE_CANCELLED, NULL);
  else
    ended (o, MIGRATE_FAILED, &err);
  return NULL;
}

/* ---- from outside ---- */

static void
free_outgoing (struct outgoing *o)
{
  for (size_t i = 0; o->shipments && i < o->nr; i++)
    if (o->shipments[i].drive)
      shipment_destroy (&o->shipments[i]);
  mirror_free (o->mirror);
  blobs_free (o->blobs);
  stop_destroy (&o->cancel);
  stop_destroy (&o->quit);
  pthread_mutex_destroy (&o->lock);
  pthread_cond_destroy (&o->cond);
  json_decref (o->hints);
  free (o->shipments);
  free (o->drives);
  free (o->uri);
  free (o->new_uri);
  free (o);
}

static struct outgoing *
alloc_outgoing (struct drive *const *drives, size_t nr, const char *uri,
                struct error *err)
{
  struct outgoing *o = calloc (1, sizeof *o);

  if (o == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  pthread_mutex_init (&o->lock, NULL);
  pthread_cond_init (&o->cond, NULL);
  o->cancel.fd = o->quit.fd = -1;
  o->nr = nr;
  o->uri = strdup (uri);
  o->drives = calloc (nr, sizeof o->drives[0]);
  o->shipments = calloc (nr, sizeof o->shipments[0]);
  if (!o->uri || !o->drives || !o->shipments) {
    error_set (err, ENOMEM, "%m");
    goto fail;
  }
  if (stop_init (&o->cancel, err) == -1 || stop_init (&o->quit, err) == -1)
    goto fail;
  memcpy (o->drives, drives, nr * sizeof o->drives[0]);
  drives_sort (o->drives, nr);
  o->mirror = mirror_new (o, err);
  if (o->mirror == NULL)
    goto fail;
  return o;

 fail:
  free_outgoing (o);
  return NULL;
}

/* What the drive is called over there; NULL: the URI and the mapping do not
 * agree.
 */
static const char *
name_there (const struct outgoing *o, const struct drive *d,
            const char *export, const json_t *mapping, struct error *err)
{
  const char *alias = mapping_disk (mapping, d->name);

  if (export[0] && alias && strcmp (export, alias) != 0) {
    error_set (err, EINVAL, "%s names the disk '%s', but block-bitmap-mapping "
               "calls it '%s'", o->uri, export, alias);
    return NULL;
  }
  return export[0] ? export : alias ? alias : d->name;
}

static int
load_shipments (struct outgoing *o, struct drive *const *drives,
                json_t *mapping, struct error *err)
{
  CLEANUP_FREE char *export = client_uri_export (o->uri, err);

  if (export == NULL)
    return -1;
  if (export[0] != '\0' && o->nr != 1)
    return error_set (err, EINVAL, "%s names one disk, but %zu are to move; "
                      "name only the server", o->uri, o->nr);
  for (size_t i = 0; i < o->nr; i++) {
    const char *name = name_there (o, drives[i], export, mapping, err);

    if (name == NULL)
      return -1;
    for (size_t k = 0; k < i; k++)
      if (strcmp (o->shipments[k].name, name) == 0)
        return error_set (err, EINVAL, "two disks would be called '%s' at "
                          "the destination", name);
    if (atomic_load (&drives[i]->store_failed))
      return error_set (err, EIO, "disk '%s' has lost bits of its bitmaps to "
                        "an error of the storage under %s; restart the server "
                        "before it is moved", drives[i]->name,
                        drives[i]->state_dir);
    if (drives[i]->journal == NULL)
      return error_set (err, EROFS, "disk '%s' is open for reading only, and "
                        "cannot be handed over", drives[i]->name);
    if (shipment_init (&o->shipments[i], drives[i], i, o->uri, name, err) ==
        -1)
      return -1;
    o->shipments[i].mapping = json_incref (mapping);
    shipment_mark_all (&o->shipments[i]);
  }
  return 0;
}

/* Begin to work: the shipments are there. */
static int
start (struct outgoing *o, const struct migrate_params *params,
       void (*changed) (void *opaque, const struct migrate_info *),
       void *opaque, struct error *err)
{
  long cpus = sysconf (_SC_NPROCESSORS_ONLN);
  int r;

  o->changed = changed;
  o->opaque = opaque;
  o->params = *params;
  o->params.mapping = NULL; /* the shipments have it */
  o->params.blobs = NULL;   /* o->blobs */
  o->max_producers = 1;
  if (params->compression != MIGRATE_COMPRESSION_NONE && cpus > 1)
    o->max_producers = cpus < MAX_PRODUCERS ? cpus : MAX_PRODUCERS;
  o->started_ns = o->sample_ns = now_ns ();
  for (size_t i = 0; i < o->nr; i++) {
    o->info.total += o->drives[i]->size;
    gate_reset_longest (&o->drives[i]->writes);
  }
  r = pthread_create (&o->thread, NULL, leading_thread, o);
  return r == 0 ? 0 : error_set (err, r, "start a thread: %m");
}

struct outgoing *
outgoing_start (struct drive *const *drives, size_t nr, const char *uri,
                const struct migrate_params *params,
                void (*changed) (void *opaque, const struct migrate_info *),
                void *opaque, struct error *err)
{
  struct outgoing *o = alloc_outgoing (drives, nr, uri, err);

  if (o == NULL)
    return NULL;
  uuid_new (&o->session);
  o->blobs = params->blobs;
  o->info.status = MIGRATE_SETUP;
  if (load_shipments (o, drives, params->mapping, err) == 0 &&
      start (o, params, changed, opaque, err) == 0)
    return o;
  o->blobs = NULL; /* still the caller's */
  free_outgoing (o);
  return NULL;
}

/* What is known to be held stands in the drive's map, unless it is another's
 * or none.
 */
static int
restore_shipment (struct shipment *s, struct drive *d, uint32_t index,
                  const struct description *all, bool fresh,
                  struct error *err)
{
  unsigned shift;

  if (shipment_init (s, d, index, all->uri, all->disks[index].target, err) ==
      -1)
    return -1;
  s->mapping = json_incref (all->params.mapping);
  shift = bitmap_shift (s->ship);
  if ((fresh || d->unheld == NULL || d->unheld->bits == NULL ||
       d->unheld->shift != shift) && ship_map_make (d, shift, err) == -1)
    return -1;
  held_lost (s);
  return drive_set_ship (d, s->ship, err);
}

struct outgoing *
outgoing_go_on (struct drive *const *drives, const bool *fresh,
                const struct description *d,
                void (*changed) (void *opaque, const struct migrate_info *),
                void *opaque, struct error *err)
{
  struct outgoing *o = alloc_outgoing (drives, d->nr, d->uri, err);

  if (o == NULL)
    return NULL;
  o->session = d->session;
  o->epoch = d->epoch;
  o->attempt = o->reserved = d->attempt;
  o->restored = o->tracked = o->described = o->connected = true;
  o->pause_asked = d->paused;
  o->blobs = d->params.blobs;
  o->info.status = MIGRATE_PAUSED;
  for (size_t i = 0; i < d->nr; i++)
    if (restore_shipment (&o->shipments[i], drives[i], i, d, fresh[i], err) ==
        -1)
      goto fail;
  if (start (o, &d->params, changed, opaque, err) == 0)
    return o;

 fail:
  for (size_t i = 0; i < d->nr; i++)
    drive_drop_ship (drives[i]);
  o->blobs = NULL; /* still the description's */
  free_outgoing (o);
  return NULL;
}

void
outgoing_set_params (struct outgoing *o, const struct migrate_params *params)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  /* Channels and compression are those of the start. */
  o->params.max_bandwidth = params->max_bandwidth;
  o->params.downtime_limit = params->downtime_limit;
  o->params.copy_mode = params->copy_mode;
  mirror_set_wanted (o->mirror, params->copy_mode == MIGRATE_WRITE_BLOCKING);
  if (o->running)
    engine_set_bandwidth (o->engine, params->max_bandwidth);
}

int
outgoing_cancel (struct outgoing *o, struct error *err)
{
  pthread_mutex_lock (&o->lock);
  if (o->let_go) {
    pthread_mutex_unlock (&o->lock);
    return error_set (err, EBUSY, "the disk has been handed over already; it "
                      "cannot be taken back by a cancel");
  }
  if (o->ended_ns == 0) {
    o->cancelled = true;
    o->info.status = MIGRATE_CANCELLING;
  }
  pthread_mutex_unlock (&o->lock);
  stop_throw (&o->cancel);
  outgoing_tell (o);
  return 0;
}

void
outgoing_stop (struct outgoing *o)
{
  stop_throw (&o->quit);
  stop_throw (&o->cancel);
}

void
outgoing_join (struct outgoing *o)
{
  if (!o->joined)
    pthread_join (o->thread, NULL);
  o->joined = true;
}

void
outgoing_free (struct outgoing *o)
{
  outgoing_join (o);
  free_outgoing (o);
}

bool
outgoing_ended (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  return o->ended_ns != 0;
}
