/* nbdferry - the source of a migration: opening the channels
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * On a long link each round trip costs megabytes, so all channels are opened at
 * once, each by a thread of its own: four round trips, whatever their number.
 * Only two of them say HELLO, that of control packets (with the list of
 * bitmaps) and that of flushes.  Data channels are connected meanwhile, and
 * send only when HELLO was answered.
 *
 * How many data channels there are is the user's choice, or depends on how long
 * it takes to reach the other side.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>

#include "cleanup.h"
#include "clock.h"
#include "hello-name.h"
#include "resume.h"

/* When the other side is not reached for so long, it is far away: as many are
 * opened as may be of use, before it is known how far.  So it is when somebody
 * near is reached (a tunnel's end) and no server answers.
 */
#define SOON        (2 * NS_PER_MS)
#define ANSWER_SOON (10 * NS_PER_MS)
#define MANY        32

unsigned
migrate_near_channels (void)
{
  long cpus = sysconf (_SC_NPROCESSORS_ONLN);

  return cpus <= 2 ? 3 : 4;
}

/* A channel has one packet in flight, and TCP begins each slowly.  So where
 * round trips are long it takes more of them; where they are not, more are of
 * no use than there are processors to work on packets.
 */
static unsigned
channels_for (uint64_t round_trip, unsigned near)
{
  if (round_trip < SOON)
    return near;
  return round_trip < 8 * NS_PER_MS ? 8 : round_trip < 32 * NS_PER_MS ? 16
                                                                      : MANY;
}

/* Mirrored writes have one of their own (engine.h). */
static unsigned
near_channels (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  return migrate_near_channels () +
         (o->params.copy_mode == MIGRATE_WRITE_BLOCKING);
}

/* ---- HELLO ---- */

/* Only a migration that begins may take disks from another one: not one that
 * goes on, nor one that ends, and says so.
 */
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
  return json_pack ("{s:o, s:b}", "disks", disks, "resume",
                    o->tracked || o->ending);
}

/* The lists of bitmaps go along, unless they are too long for that. */
#define MAX_LISTS (256 << 10)

static int
add_lists (struct outgoing *o, json_t *body, struct shipment_list *lists,
           struct error *err)
{
  json_t *disks = json_object_get (body, "disks");
  size_t bytes = 0;

  for (size_t i = 0; i < o->nr; i++) {
    if (shipment_list (&o->shipments[i], &lists[i], err) == -1)
      return -1;
    bytes += json_dumpb (lists[i].json, NULL, 0, JSON_COMPACT);
  }
  for (size_t i = 0; i < o->nr && bytes <= MAX_LISTS; i++)
    json_object_set (json_array_get (disks, i), "bitmaps", lists[i].json);
  for (size_t i = 0; i < o->nr && bytes > MAX_LISTS; i++)
    shipment_list_free (&lists[i]);
  return 0;
}

/* Of which the name says HELLO with that body, if it is short enough for that,
 * and there is one.
 */
static char *
export_name (struct outgoing *o, json_t *hello)
{
  struct packet_header h = { .session = o->session, .epoch = o->epoch };
  CLEANUP_FREE uint8_t *packet = NULL;
  char *name = NULL;

  if (hello)
    packet = make_control (&h, PACKET_HELLO, hello, NULL);
  if (packet) {
    packet_seal (packet, &h, packet + PACKET_HEADER + h.body_size);
    name = hello_name (o->shipments[0].name, packet,
                       PACKET_HEADER + h.body_size);
  }
  if (name == NULL &&
      asprintf (&name, "%s@incoming", o->shipments[0].name) == -1)
    name = NULL;
  return name;
}

static struct client *
begin_channel (struct outgoing *o, json_t *hello, const struct stop *stop,
               unsigned timeout_ms, struct error *err)
{
  CLEANUP_FREE char *export = export_name (o, hello);

  if (export)
    return client_begin (o->uri, export, stop, timeout_ms, err);
  error_set (err, ENOMEM, "%m");
  return NULL;
}

static void
explain (struct outgoing *o, struct error *err)
{
  error_prefix (err, "is it a server with incoming=on, with a disk '%s', and "
                "reached with TLS if it is on another host? (one of another "
                "kind gets a copy of the data with --data-only)",
                o->shipments[0].name);
}

static int
say_hello (struct outgoing *o, struct client *c, json_t *body,
           struct error *err)
{
  struct packet_header h = { .session = o->session, .epoch = o->epoch };

  return send_control (c, &h, PACKET_HELLO, body, err);
}

/* It was begun: up to where packets may be sent.  A server that refuses a HELLO
 * in the name cannot say why there; so it is asked again.
 */
static int
finish_channel (struct outgoing *o, struct client *c, json_t *hello,
                unsigned timeout_ms, bool *let_in, struct error *err)
{
  CLEANUP_FREE char *plain = export_name (o, NULL);
  bool said = hello && !client_is_for (c, plain);
  int sure;

  if (plain == NULL)
    return error_set (err, ENOMEM, "%m");
  if (client_open (c, o->uri, err) == -1) {
    if (!said || client_is_dead (c) ||
        client_reopen (c, o->uri, plain, err) == -1) {
      explain (o, err);
      return -1;
    }
    said = false;
  }
  *let_in = true;
  client_notice_silence (c);
  client_set_timeout (c, timeout_ms);
  sure = check_destination (c, err);
  if (sure == -1 || (hello && !said && say_hello (o, c, hello, err) == -1) ||
      (hello && sure == 0 && check_session (c, &o->session, err) == -1))
    return -1;
  client_set_timeout (c, 0);
  return 0;
}

struct client *
outgoing_open_channel (struct outgoing *o, const struct stop *stop,
                       unsigned timeout_ms, struct error *err)
{
  json_auto_t *hello = hello_body (o);
  struct client *c = begin_channel (o, hello, stop, timeout_ms, err);
  bool let_in;

  if (c && client_hear (c, o->uri, err) == -1)
    explain (o, err);
  else if (c && finish_channel (o, c, hello, timeout_ms, &let_in, err) == 0)
    return c;
  client_close (c);
  return NULL;
}

/* ---- all at once ---- */

enum kind { CONTROL, FLUSHES, DATA };

struct opening {
  struct wave *wave;
  enum kind kind;
  pthread_t thread;
  struct client *client;
  uint64_t round_trip; /* ns, or more */
  bool let_in, failed; /* the server has given it the export; it has failed */
  struct error err;
};

/* All that are being opened. */
struct wave {
  struct outgoing *o;
  bool few;             /* the server does not take many */
  unsigned near;        /* data channels to one that is near */
  json_t *hello;        /* read-only, as is the next */
  json_t *hello_lists;  /* with the lists of bitmaps */
  struct opening v[2 + MIGRATE_MAX_CHANNELS];
  unsigned nr;

  pthread_mutex_t lock; /* protects what follows */
  pthread_cond_t changed;
  uint64_t began;       /* ns: the control channel knows the address */
  bool reached;         /* it has, or will not have, reached the other side */
  bool answered;        /* the same, heard a server there */
};

static void
note_begin (struct wave *w)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&w->lock);

  w->began = now_ns ();
  pthread_cond_signal (&w->changed);
}

static void
note (struct wave *w, bool answered)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&w->lock);

  w->reached = true;
  w->answered = answered;
  pthread_cond_signal (&w->changed);
}

/* As far as a server's answer. */
static int
reach (struct opening *p)
{
  const char *uri = p->wave->o->uri;

  if (client_reach (p->client, uri, &p->err) == -1)
    return -1;
  if (p->kind == CONTROL)
    note (p->wave, false);
  if (client_hear (p->client, uri, &p->err) == -1)
    return -1;
  if (p->kind == CONTROL)
    note (p->wave, true);
  return 0;
}

static int
open_one (struct opening *p)
{
  struct wave *w = p->wave;
  struct outgoing *o = w->o;
  json_t *hello = p->kind == CONTROL   ? w->hello_lists
                  : p->kind == FLUSHES ? w->hello
                                       : NULL;
  uint64_t began;

  p->client = begin_channel (o, hello, &o->cancel, CONNECT_TIMEOUT_MS,
                             &p->err);
  if (p->client && p->kind == CONTROL)
    note_begin (w);
  if (p->client == NULL || reach (p) == -1) {
    explain (o, &p->err);
    return -1;
  }
  began = now_ns ();
  if (finish_channel (o, p->client, hello, CONNECT_TIMEOUT_MS, &p->let_in,
                      &p->err) == -1)
    return -1;
  p->round_trip = now_ns () - began;
  return 0;
}

static void *
opening_thread (void *arg)
{
  struct opening *p = arg;

  p->failed = open_one (p) == -1;
  if (p->kind == CONTROL && p->failed)
    note (p->wave, true);
  return NULL;
}

static int
add (struct wave *w, enum kind kind, struct error *err)
{
  struct opening *p = &w->v[w->nr];
  int r;

  *p = (struct opening){ .wave = w, .kind = kind };
  r = pthread_create (&p->thread, NULL, opening_thread, p);
  if (r != 0)
    return error_set (err, r, "start a thread: %m");
  w->nr++;
  return 0;
}

/* Is it so within that time?  Lock held. */
static bool
is_soon (struct wave *w, const bool *what, uint64_t ns)
{
  uint64_t until = w->began + ns;
  struct timespec ts = { until / NS_PER_S, until % NS_PER_S };
  int r = 0;

  while (r == 0 && !*what)
    r = pthread_cond_timedwait (&w->changed, &w->lock, &ts);
  return *what;
}

static bool
is_far (struct wave *w)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&w->lock);

  while (w->began == 0 && !w->answered)
    pthread_cond_wait (&w->changed, &w->lock);
  return !is_soon (w, &w->reached, SOON) ||
         !is_soon (w, &w->answered, ANSWER_SOON);
}

static int
add_data (struct wave *w, unsigned *nr, unsigned wanted, struct error *err)
{
  for (; *nr < wanted; ++*nr)
    if (add (w, DATA, err) == -1)
      return -1;
  return 0;
}

static int
begin_all (struct wave *w, unsigned *needed, struct error *err)
{
  unsigned nr = 0, given = w->o->params.channels;

  *needed = given ? given : 1;
  if (add (w, CONTROL, err) == -1 || add (w, FLUSHES, err) == -1 ||
      add_data (w, &nr, given ? given : w->near, err) == -1)
    return -1;
  if (given > 0 || w->few || !is_far (w))
    return 0;
  return add_data (w, &nr, MANY, err);
}

/* All have ended: what has come of it?  'r' is how it began.  *crowded: only
 * some were let in, and not the ones that matter.
 */
static int
gather (struct wave *w, struct channels *c, unsigned needed, int r,
        bool *crowded, struct error *err)
{
  unsigned data = 0, let_in = 0;
  bool out = false;

  for (unsigned i = 0; i < w->nr; i++) {
    struct opening *p = &w->v[i];

    pthread_join (p->thread, NULL);
    if (p->kind == DATA)
      data++;
    let_in += p->let_in;
    out |= !p->let_in && data <= needed;
    if (!p->failed) {
      if (c->round_trip == 0 || p->round_trip < c->round_trip)
        c->round_trip = p->round_trip;
      if (p->kind == CONTROL)
        c->control = p->client;
      else if (p->kind == FLUSHES)
        c->flushes = p->client;
      else
        c->data[c->nr++] = p->client;
      continue;
    }
    /* The first one's error is the cause.  A server need not take as many as
     * we should like.
     */
    if (r == 0 && (p->kind != DATA || data <= needed)) {
      *err = p->err;
      if (p->kind == CONTROL && p->let_in)
        outgoing_refused (w->o, p->client, PACKET_HELLO, err);
      else if (p->kind == DATA)
        error_prefix (err, "channel %u", data);
      r = -1;
    }
    client_close (p->client);
  }
  *crowded = out && let_in > 0;
  /* Those that forward clients must get in as well. */
  for (size_t i = 0; i < w->o->nr && let_in < w->nr && c->nr > 1; i++)
    client_close (c->data[--c->nr]);
  return r;
}

static int
open_wave (struct outgoing *o, struct channels *c, bool few, bool *crowded,
           struct error *err)
{
  CLEANUP_FREE struct shipment_list *lists = calloc (o->nr, sizeof lists[0]);
  CLEANUP_FREE struct wave *w = calloc (1, sizeof *w);
  unsigned needed = 0;
  int r = 0;

  *c = (struct channels){ 0 };
  if (w == NULL || lists == NULL)
    return error_set (err, ENOMEM, "%m");
  w->o = o;
  w->few = few;
  w->near = near_channels (o);
  pthread_mutex_init (&w->lock, NULL);
  clock_cond_init (&w->changed);
  w->hello = hello_body (o);
  w->hello_lists = hello_body (o);
  if (w->hello == NULL || w->hello_lists == NULL)
    r = error_set (err, ENOMEM, "%m");
  /* Of a session that goes on, more has to be found out first. */
  if (r == 0 && !o->tracked)
    r = add_lists (o, w->hello_lists, lists, err);
  if (r == 0)
    r = begin_all (w, &needed, err);
  r = gather (w, c, needed, r, crowded, err);
  while (o->params.channels == 0 &&
         c->nr > channels_for (c->round_trip, w->near))
    client_close (c->data[--c->nr]);
  for (size_t i = 0; i < o->nr; i++) {
    if (r == 0 && lists[i].told)
      shipment_listed (&o->shipments[i], &lists[i]);
    shipment_list_free (&lists[i]);
  }
  if (r == -1)
    channels_close (c);
  json_decref (w->hello);
  json_decref (w->hello_lists);
  pthread_mutex_destroy (&w->lock);
  pthread_cond_destroy (&w->changed);
  return r;
}

int
outgoing_connect (struct outgoing *o, struct channels *c, struct error *err)
{
  bool crowded = false;
  int r = open_wave (o, c, false, &crowded, err);

  /* A server may be told to take no more than so many; and it takes a moment
   * until it knows that those have gone.
   */
  for (uint64_t wait = NS_PER_S / 20;
       r == -1 && crowded && o->params.channels == 0 && wait < NS_PER_S;
       wait *= 2) {
    if (stop_wait (&o->cancel, wait))
      return -1;
    r = open_wave (o, c, true, &crowded, err);
  }
  return r;
}

void
channels_close (struct channels *c)
{
  client_close (c->control);
  client_close (c->flushes);
  for (unsigned i = 0; i < c->nr; i++)
    client_close (c->data[i]);
  *c = (struct channels){ 0 };
}
