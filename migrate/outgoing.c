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
#include "flusher.h"
#include "forwarding.h"
#include "other-server.h"
#include "resume.h"

/* ---- setting up ---- */

/* Takes the channels of data. */
static int
make_compressors (struct outgoing *o, unsigned n)
{
  o->compressors = calloc (n, sizeof o->compressors[0]);
  if (o->compressors == NULL)
    return -1;
  o->nr_compressors = n;
  for (unsigned i = 0; i < n; i++)
    compressor_set_level (&o->compressors[i], &o->params);
  return 0;
}

static void
free_compressors (struct outgoing *o)
{
  for (unsigned i = 0; i < o->nr_compressors; i++)
    compressor_free (&o->compressors[i]);
  free (o->compressors);
  o->compressors = NULL;
  o->nr_compressors = 0;
}

static int
start_engine (struct outgoing *o, struct channels *c, struct error *err)
{
  struct engine_options opt = {
    .producers = 2, /* the leading thread, and the mirror */
    .channels = c->nr,
    .session = o->session,
    .epoch = o->epoch,
    .stop = &o->cancel,
    .fill = outgoing_fill,
    .acked = outgoing_acked,
    .opaque = o,
  };
  size_t bitmaps = 0;

  if (make_compressors (o, c->nr) == -1)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < o->nr; i++) {
    pthread_mutex_lock (&o->shipments[i].drive->list);
    if (o->shipments[i].drive->nr_bitmaps > bitmaps)
      bitmaps = o->shipments[i].drive->nr_bitmaps;
    pthread_mutex_unlock (&o->shipments[i].drive->list);
  }
  opt.sections = 256 * 1024 + bitmaps * 4096;
  o->engine = engine_start (&opt, c->data, err);
  if (o->engine == NULL)
    return -1;
  pthread_mutex_lock (&o->lock);
  o->info.channels = c->nr;
  pthread_mutex_unlock (&o->lock);
  c->nr = 0;
  return 0;
}

static int
start_flusher (struct outgoing *o, struct channels *c, struct error *err)
{
  o->flusher = flusher_start (o, c->flushes, err);
  if (o->flusher == NULL)
    return -1;
  c->flushes = NULL;
  return 0;
}

/* Connect, and begin the session or go on with it. */
static int
connect (struct outgoing *o, struct error *err)
{
  struct channels c;
  int r;

  if (outgoing_next_epoch (o, err) == -1 ||
      outgoing_connect (o, &c, err) == -1)
    return -1;
  o->connected = true;
  o->control = take_ptr (&c.control);
  o->h = (struct packet_header){ .session = o->session, .epoch = o->epoch };
  blobs_forget (o->blobs);
  /* Also above those of a process before this one. */
  blobs_raise (o->blobs, o->epoch << 32);
  /* The bitmaps are announced, and may be refused, before data moves; most
   * often that came with HELLO.
   */
  r = o->tracked ? outgoing_check_held (o, err) : 0;
  if (r == 0)
    r = outgoing_sync_bitmaps (o, err);
  if (r == 0)
    r = start_engine (o, &c, err);
  if (r == 0)
    r = start_flusher (o, &c, err);
  if (r == 0)
    r = hold_connected (o, c.round_trip, err);
  channels_close (&c);
  return r;
}

static int
setup (struct outgoing *o, struct error *err)
{
  bool first = !o->tracked;

  if (connect (o, err) == -1)
    return -1;
  o->forwarding = forwarding_begin (o);
  if (o->forwarding == NULL)
    return error_set (err, ENOMEM, "%m");
  if (first && outgoing_track (o, err) == -1)
    return -1;
  if (first && outgoing_use_hints (o, err) == -1)
    return -1;
  pthread_mutex_lock (&o->lock);
  o->running = true;
  /* From here on it changes with the parameter (outgoing_set_params). */
  engine_set_bandwidth (o->engine, o->params.max_bandwidth);
  if (o->info.setup_ms == 0)
    o->info.setup_ms = (now_ns () - o->started_ns) / NS_PER_MS;
  mirror_set_wanted (o->mirror, o->params.copy_mode == MIGRATE_WRITE_BLOCKING);
  o->slowed = false;
  outgoing_give_way (o);
  pthread_mutex_unlock (&o->lock);
  return mirror_start (o->mirror, err);
}

/* ---- ending ---- */

/* The connection has ended, well or not: nobody sends or waits any more. */
static void
tear_down (struct outgoing *o)
{
  struct error err;

  stop_throw (&o->cancel);
  if (o->engine) { /* whoever fills or waits to send */
    error_set (&err, ECANCELED, "the connection is given up");
    engine_fail (o->engine, &err);
  }
  mirror_end (o->mirror);
  pthread_mutex_lock (&o->lock);
  o->running = false;
  pthread_mutex_unlock (&o->lock);
  flusher_end (o->flusher);
  engine_free (o->engine);
  o->engine = NULL;
  free_compressors (o);
  o->progress = o->flusher && flusher_held (o->flusher) > 0;
  flusher_free (o->flusher);
  o->flusher = NULL;
  forwarding_free (o->forwarding);
  o->forwarding = NULL;
  client_close (o->control);
  o->control = NULL;
  brake_release (&o->brake, o->drives, o->nr);
}

/* Tell the destination that what it got is worth nothing.  It would find out
 * by itself at the next attempt, so nothing depends on it.
 */
static void
send_cancel (struct outgoing *o)
{
  struct packet_header h;
  struct client *c;

  o->ending = true;
  outgoing_next_epoch (o, NULL); /* fences off what may still be under way */
  c = outgoing_open_channel (o, &o->quit, CANCEL_TIMEOUT_MS, NULL);
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
  o->other_uri = false;
  outgoing_set_status (o, MIGRATE_ACTIVE);
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
    outgoing_explain_pause (o, err);
  tear_down (o);
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

/* It has failed before anything was taken over there. */
static void
look_who_it_was (struct outgoing *o)
{
  bool cancelled, other;

  pthread_mutex_lock (&o->lock);
  cancelled = o->cancelled;
  pthread_mutex_unlock (&o->lock);
  if (cancelled || o->connected || stop_wait (&o->quit, 0))
    return;
  other = is_other_server (o->uri, o->shipments[0].name, o->nr == 1,
                           &o->cancel);
  pthread_mutex_lock (&o->lock);
  o->info.other_server = other && !o->cancelled;
  pthread_mutex_unlock (&o->lock);
}

void *
outgoing_lead (void *arg)
{
  struct outgoing *o = arg;
  struct error err = { 0 };
  int r = run_connections (o, &err);
  bool cancelled, let_go;

  if (r == -1)
    look_who_it_was (o);
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
