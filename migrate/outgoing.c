/* nbdferry - the source of a migration: its threads and rounds
 * SPDX-License-Identifier: BSD-3-Clause
 *
 *   setup ----> active (rounds) ----> device (handover) ----> completed
 *     |              |                   |
 *     +--------------+----- error -------+----> failed, or cancelled
 *
 * One thread leads: it connects, opens rounds, decides when what is left is
 * little enough, and hands over.  Producers fill packets while a round is
 * open; the engine's channels send them.  Bitmaps that changed without a write
 * are told by the leading thread between two rounds.
 */
#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "outgoing-impl.h"

/* Until a round has shown how fast it goes. */
#define ASSUMED_BANDWIDTH (64 << 20)

/* The rate that is shown is that of so long a time. */
#define SAMPLE (500 * NS_PER_MS)

/* Writers are slowed in steps, each twice the one before, once that many
 * rounds have shown that it must be.
 */
#define PATIENT_ROUNDS 3
#define FIRST_DELAY    (UINT64_C (100) * 1000)
#define LAST_DELAY     (250 * NS_PER_MS)

/* ---- status ---- */

/* The rate on the wire, of the last moment, or of all once it has ended.
 * Lock held.
 */
static void
measure_rate (struct outgoing *o, uint64_t now)
{
  if (o->ended_ns) {
    o->sample_ns = o->started_ns;
    o->sample_bytes = 0;
  }
  else if (now - o->sample_ns < SAMPLE)
    return;
  o->info.mbps =
    (double) (o->wire_bytes - o->sample_bytes) * 8e3 / (now - o->sample_ns);
  o->sample_ns = now;
  o->sample_bytes = o->wire_bytes;
}

/* Whatever the lock protects, as the world sees it.  Lock held. */
static void
fill_info (struct outgoing *o, struct migrate_info *info)
{
  uint64_t end = o->ended_ns ? o->ended_ns : now_ns ();

  measure_rate (o, end);
  *info = o->info;
  info->total_ms = (end - o->started_ns) / NS_PER_MS;
  info->transferred = o->wire_bytes;
  info->normal_bytes = o->normal_bytes;
  info->zero_bytes = o->zero_bytes;
  info->bitmap_bytes = o->bitmap_bytes;
  info->round = o->round;
  info->remaining = info->throttle_us = 0;
  for (size_t i = 0; i < o->nr; i++) {
    struct drive *d = o->shipments[i].drive;
    uint64_t held = gate_longest (&d->writes) / 1000;

    if (info->status != MIGRATE_COMPLETED)
      info->remaining += shipment_dirty (&o->shipments[i]) +
                         shipment_in_flight (&o->shipments[i]);
    info->throttle_us = atomic_load (&d->delay_ns) / 1000;
    if (held > info->longest_hold_us)
      info->longest_hold_us = held;
  }
  if (o->info.status == MIGRATE_ACTIVE || o->info.status == MIGRATE_DEVICE)
    info->expected_downtime_ms =
      info->remaining * 1000 /
      (o->bandwidth ? o->bandwidth : ASSUMED_BANDWIDTH);
}

void
outgoing_info (struct outgoing *o, struct migrate_info *info)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  fill_info (o, info);
}

static void
tell (struct outgoing *o)
{
  struct migrate_info info;

  if (o->changed == NULL)
    return;
  outgoing_info (o, &info);
  o->changed (o->opaque, &info);
}

void
outgoing_set_status (struct outgoing *o, enum migrate_status status)
{
  pthread_mutex_lock (&o->lock);
  /* One that was cancelled only ends. */
  if (o->info.status != MIGRATE_CANCELLING || status == MIGRATE_CANCELLED)
    o->info.status = status;
  pthread_mutex_unlock (&o->lock);
  tell (o);
}

/* ---- producers ---- */

static int
produce_round (struct outgoing *o, struct compressor *c)
{
  struct error err;

  for (size_t i = 0; i < o->nr; i++) {
    int r = 1;

    while (r == 1) {
      struct buffer *b = engine_get (o->engine);

      if (b == NULL)
        return -1;
      r = shipment_fill (&o->shipments[i], b, o->params.compression, c, &err);
      if (r == 1)
        engine_put (o->engine, b);
      else
        engine_return (o->engine, b);
    }
    if (r == -1) {
      engine_fail (o->engine, &err);
      return -1;
    }
  }
  return 0;
}

static void *
producer_thread (void *arg)
{
  struct outgoing *o = arg;
  struct compressor c = { 0 };
  unsigned done = 0;

  pthread_mutex_lock (&o->lock);
  for (;;) {
    while (o->round == done && !o->producers_end)
      pthread_cond_wait (&o->cond, &o->lock);
    if (o->producers_end)
      break;
    done = o->round;
    pthread_mutex_unlock (&o->lock);
    produce_round (o, &c); /* an error is the engine's */
    pthread_mutex_lock (&o->lock);
    if (--o->producing == 0)
      pthread_cond_broadcast (&o->cond);
  }
  pthread_mutex_unlock (&o->lock);
  compressor_free (&c);
  return NULL;
}

/* A channel's thread: a packet has arrived. */
static void
acked (void *opaque, struct buffer *b)
{
  struct outgoing *o = opaque;

  shipment_acked (b->cargo, b);
  pthread_mutex_lock (&o->lock);
  o->wire_bytes +=
    PACKET_HEADER + (uint64_t) b->h.body_size + b->h.payload_size;
  o->normal_bytes += b->h.raw_size;
  o->zero_bytes += b->zero_bytes;
  o->bitmap_bytes += b->section_bytes;
  pthread_mutex_unlock (&o->lock);
}

int
outgoing_round (struct outgoing *o, struct error *err)
{
  uint64_t began = now_ns (), bytes, ns;

  for (size_t i = 0; i < o->nr; i++)
    shipment_rewind (&o->shipments[i]);
  pthread_mutex_lock (&o->lock);
  bytes = o->wire_bytes;
  o->round++;
  o->producing = o->producers;
  pthread_cond_broadcast (&o->cond);
  while (o->producing > 0)
    pthread_cond_wait (&o->cond, &o->lock);
  pthread_mutex_unlock (&o->lock);
  if (engine_drain (o->engine, err) == -1)
    return -1;

  pthread_mutex_lock (&o->lock);
  bytes = o->wire_bytes - bytes;
  ns = now_ns () - began + 1;
  /* A short round says little about the link. */
  if (bytes >= ENGINE_PAYLOAD || o->bandwidth == 0)
    o->bandwidth = bytes * NS_PER_S / ns;
  pthread_mutex_unlock (&o->lock);
  return 0;
}

int
outgoing_sync_bitmaps (struct outgoing *o, struct error *err)
{
  uint64_t bytes = 0;

  for (size_t i = 0; i < o->nr; i++)
    if (shipment_sync_bitmaps (&o->shipments[i], o->control, &o->h, &bytes,
                               err) == -1)
      return -1;
  pthread_mutex_lock (&o->lock);
  o->bitmap_bytes += bytes;
  o->wire_bytes += bytes;
  pthread_mutex_unlock (&o->lock);
  return 0;
}

/* ---- rounds ---- */

static uint64_t
dirty_now (struct outgoing *o)
{
  uint64_t n = 0;

  for (size_t i = 0; i < o->nr; i++)
    n += shipment_dirty (&o->shipments[i]);
  return n;
}

static void
set_delay (struct outgoing *o, uint64_t ns)
{
  for (size_t i = 0; i < o->nr; i++)
    atomic_store_explicit (&o->shipments[i].drive->delay_ns, ns,
                           memory_order_relaxed);
}

/* Rounds must get shorter.  One that left more than half of what the round
 * before left has not, and writers are slowed by a step.
 */
static void
slow_writers (struct outgoing *o, uint64_t dirty)
{
  uint64_t delay = atomic_load_explicit (&o->shipments[0].drive->delay_ns,
                                         memory_order_relaxed);

  if (o->round > PATIENT_ROUNDS && dirty > o->dirty_before / 2) {
    delay = delay ? delay * 2 : FIRST_DELAY;
    set_delay (o, delay < LAST_DELAY ? delay : LAST_DELAY);
  }
  o->dirty_before = dirty;
}

/* Is what is left little enough to be sent within the downtime limit? */
static bool
small_enough (struct outgoing *o, uint64_t dirty)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);
  uint64_t rate = o->bandwidth ? o->bandwidth : ASSUMED_BANDWIDTH;

  return dirty <= rate / 1000 * o->params.downtime_limit;
}

static int
rounds (struct outgoing *o, struct error *err)
{
  for (;;) {
    uint64_t began = now_ns (), dirty;

    if (outgoing_sync_bitmaps (o, err) == -1 || outgoing_round (o, err) == -1)
      return -1;
    /* What the destination has cached is written now, not in the hold. */
    if (client_flush (o->control) == -1)
      return error_set (err, errno, "flush the destination: %m");
    dirty = dirty_now (o);
    pthread_mutex_lock (&o->lock);
    o->info.dirty_rate = dirty * NS_PER_S / (now_ns () - began + 1);
    pthread_mutex_unlock (&o->lock);
    tell (o);
    if (small_enough (o, dirty))
      return 0;
    slow_writers (o, dirty);
  }
}

/* ---- setting up ---- */

static json_t *
hello_body (struct outgoing *o)
{
  json_t *disks = json_array ();

  for (size_t i = 0; i < o->nr; i++) {
    struct shipment *s = &o->shipments[i];
    const struct journal_record *rec;
    char lineage[UUID_TEXT];
    uint64_t generation;

    pthread_mutex_lock (&s->drive->control);
    rec = journal_get (s->drive->journal);
    uuid_format (&rec->lineage, lineage);
    generation = rec->generation;
    pthread_mutex_unlock (&s->drive->control);
    json_array_append_new (
      disks, json_pack ("{s:s, s:I, s:s, s:I}", "name", s->name, "size",
                        (json_int_t) s->drive->size, "lineage", lineage,
                        "generation", (json_int_t) generation));
  }
  return json_pack ("{s:o}", "disks", disks);
}

/* A new channel of this session, its handshake done. */
static struct client *
open_channel (struct outgoing *o, uint32_t number, const struct stop *stop,
              struct error *err)
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
  c = client_connect (o->uri, export, stop, CONNECT_TIMEOUT_MS, err);
  if (c == NULL) {
    error_prefix (err, "is it a server with incoming=on, and a disk '%s'?",
                  o->shipments[0].name);
    return NULL;
  }
  if (send_control (c, &h, PACKET_HELLO, body, err) == -1) {
    client_close (c);
    return NULL;
  }
  return c;
}

static int
start_engine (struct outgoing *o, struct error *err)
{
  unsigned n = o->params.channels;
  CLEANUP_FREE struct client **clients = calloc (n, sizeof clients[0]);
  struct engine_options opt = {
    .producers = o->producers,
    .channels = n,
    .session = o->session,
    .epoch = o->epoch,
    .stop = &o->cancel,
    .acked = acked,
    .opaque = o,
  };
  size_t bitmaps = 0;

  if (clients == NULL)
    return error_set (err, ENOMEM, "%m");
  for (unsigned i = 0; i < n; i++) {
    clients[i] = open_channel (o, i + 1, &o->cancel, err);
    if (clients[i] == NULL) {
      error_prefix (err, "channel %u", i + 1);
      goto out;
    }
  }
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
start_producers (struct outgoing *o, struct error *err)
{
  for (unsigned i = 0; i < o->producers; i++) {
    int r = pthread_create (&o->producer[i], NULL, producer_thread, o);

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
  o->control = open_channel (o, 0, &o->cancel, err);
  if (o->control == NULL)
    return -1;
  o->h = (struct packet_header){ .session = o->session, .epoch = o->epoch };
  /* The bitmaps are announced, and may be refused, before data moves. */
  if (outgoing_sync_bitmaps (o, err) == -1 || start_engine (o, err) == -1)
    return -1;
  for (size_t i = 0; i < o->nr; i++)
    if (drive_set_ship (o->shipments[i].drive, o->shipments[i].ship, err) ==
        -1)
      return -1;
  pthread_mutex_lock (&o->lock);
  o->running = true;
  o->info.setup_ms = (now_ns () - o->started_ns) / NS_PER_MS;
  pthread_mutex_unlock (&o->lock);
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

static void
tear_down (struct outgoing *o, unsigned started)
{
  end_producers (o);
  for (unsigned i = 0; i < started; i++)
    pthread_join (o->producer[i], NULL);
  pthread_mutex_lock (&o->lock);
  o->running = false;
  pthread_mutex_unlock (&o->lock);
  engine_free (o->engine);
  o->engine = NULL;
  client_close (o->control);
  o->control = NULL;
  set_delay (o, 0);
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
  c = open_channel (o, 0, &o->quit, NULL);
  if (c == NULL)
    return;
  client_set_timeout (c, 2000);
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
  tell (o);
}

static void *
leading_thread (void *arg)
{
  struct outgoing *o = arg;
  struct error err = { 0 };
  bool connected, cancelled, let_go;
  int r;

  outgoing_set_status (o, MIGRATE_SETUP);
  r = setup (o, &err);
  connected = o->control != NULL;
  if (r == 0) {
    outgoing_set_status (o, MIGRATE_ACTIVE);
    r = rounds (o, &err);
  }
  if (r == 0)
    r = outgoing_handover (o, &err);
  /* The first error is the cause; others follow from it. */
  if (r == -1 && o->engine)
    engine_failed (o->engine, &err);
  tear_down (o, o->running ? o->producers : 0);

  pthread_mutex_lock (&o->lock);
  cancelled = o->cancelled;
  let_go = o->let_go;
  pthread_mutex_unlock (&o->lock);
  if (r == 0) {
    ended (o, MIGRATE_COMPLETED, NULL);
    return NULL;
  }
  if (!let_go) {
    for (size_t i = 0; i < o->nr; i++)
      drive_set_ship (o->shipments[i].drive, NULL, NULL);
    if (connected)
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
  stop_destroy (&o->cancel);
  stop_destroy (&o->quit);
  pthread_mutex_destroy (&o->lock);
  pthread_cond_destroy (&o->cond);
  free (o->shipments);
  free (o->drives);
  free (o->uri);
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
  return o;

 fail:
  free_outgoing (o);
  return NULL;
}

static int
load_shipments (struct outgoing *o, struct drive *const *drives,
                struct error *err)
{
  CLEANUP_FREE char *export = client_uri_export (o->uri, err);

  if (export == NULL)
    return -1;
  if (export[0] != '\0' && o->nr != 1)
    return error_set (err, EINVAL, "%s names one disk, but %zu are to move; "
                      "name only the server", o->uri, o->nr);
  for (size_t i = 0; i < o->nr; i++) {
    if (drives[i]->journal == NULL)
      return error_set (err, EROFS, "disk '%s' is open for reading only, and "
                        "cannot be handed over", drives[i]->name);
    if (shipment_init (&o->shipments[i], drives[i], i, o->uri,
                       export[0] ? export : drives[i]->name, err) == -1)
      return -1;
    shipment_mark_all (&o->shipments[i]);
  }
  return 0;
}

struct outgoing *
outgoing_start (struct drive *const *drives, size_t nr, const char *uri,
                const struct migrate_params *params,
                void (*changed) (void *opaque, const struct migrate_info *),
                void *opaque, struct error *err)
{
  struct outgoing *o = alloc_outgoing (drives, nr, uri, err);
  long cpus = sysconf (_SC_NPROCESSORS_ONLN);
  int r;

  if (o == NULL)
    return NULL;
  if (load_shipments (o, drives, err) == -1)
    goto fail;
  o->changed = changed;
  o->opaque = opaque;
  o->params = *params;
  o->producers = 1;
  if (params->compression != MIGRATE_COMPRESSION_NONE && cpus > 1)
    o->producers = cpus < MAX_PRODUCERS ? cpus : MAX_PRODUCERS;
  uuid_new (&o->session);
  /* Grows with every connection of this session. */
  o->epoch = 1;
  o->started_ns = o->sample_ns = now_ns ();
  o->info.status = MIGRATE_SETUP;
  for (size_t i = 0; i < nr; i++) {
    o->info.total += drives[i]->size;
    gate_reset_longest (&drives[i]->writes);
  }
  r = pthread_create (&o->thread, NULL, leading_thread, o);
  if (r != 0) {
    error_set (err, r, "start a thread: %m");
    goto fail;
  }
  return o;

 fail:
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
  tell (o);
  return 0;
}

void
outgoing_stop (struct outgoing *o)
{
  stop_throw (&o->quit);
  stop_throw (&o->cancel);
}

void
outgoing_free (struct outgoing *o)
{
  pthread_join (o->thread, NULL);
  free_outgoing (o);
}

bool
outgoing_ended (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  return o->ended_ns != 0;
}

const char *
migrate_status_name (enum migrate_status status)
{
  static const char *const names[] = {
    [MIGRATE_NONE] = "none",
    [MIGRATE_SETUP] = "setup",
    [MIGRATE_ACTIVE] = "active",
    [MIGRATE_DEVICE] = "device",
    [MIGRATE_CANCELLING] = "cancelling",
    [MIGRATE_CANCELLED] = "cancelled",
    [MIGRATE_FAILED] = "failed",
    [MIGRATE_COMPLETED] = "completed",
  };

  return names[status];
}

static const char *const compression_names[] = {
  [MIGRATE_COMPRESSION_NONE] = "none",
  [MIGRATE_COMPRESSION_ZLIB] = "zlib",
  [MIGRATE_COMPRESSION_ZSTD] = "zstd",
};

const char *
migrate_compression_name (enum migrate_compression c)
{
  return compression_names[c];
}

int
migrate_compression_parse (const char *name, enum migrate_compression *c)
{
  for (size_t i = 0;
       i < sizeof compression_names / sizeof compression_names[0]; i++)
    if (strcmp (name, compression_names[i]) == 0) {
      *c = i;
      return 0;
    }
  errno = EINVAL;
  return -1;
}
