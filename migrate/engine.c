/* nbdferry - the engine: buffers go round, channels empty them
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <jansson.h>

#include "cleanup.h"
#include "clock.h"
#include "engine.h"

struct channel {
  struct engine *engine;
  struct client *client; /* the thread's own */
  unsigned number;       /* from 1; 0 is the control channel */
  pthread_t thread;
};

struct engine {
  struct engine_options opt; /* read-only */
  struct channel *channels;  /* the vector is read-only */
  unsigned running;          /* how many threads were started; the owner's */
  struct buffer *buffers;    /* all of them; the vector is read-only */
  unsigned nr_buffers;

  pthread_mutex_t lock; /* protects what follows */
  pthread_cond_t can_fill; /* a buffer is empty, or it failed */
  pthread_cond_t can_send; /* a buffer is full, or it failed, or ends */
  pthread_cond_t drained;  /* nothing is under way, or it failed */
  pthread_cond_t paced;    /* the limit changed, or it failed */
  struct buffer **empty, **full; /* stack; ring */
  unsigned nr_empty, nr_full, first_full;
  unsigned in_flight;
  uint64_t next_number;
  uint64_t bandwidth; /* bytes a second, 0: no limit */
  unsigned limits;    /* how often it was changed */
  uint64_t deadline;  /* ns, of what is sent from now on; 0: none */
  uint64_t next_send; /* ns: when the limit allows the next packet */
  bool ending;        /* no more will be put */
  bool failed;
  struct error error;
};

/* ---- errors ---- */

static void
fail_locked (struct engine *e, const struct error *why)
{
  if (!e->failed) {
    e->failed = true;
    e->error = *why;
    stop_throw (e->opt.stop);
  }
  pthread_cond_broadcast (&e->can_fill);
  pthread_cond_broadcast (&e->can_send);
  pthread_cond_broadcast (&e->drained);
  pthread_cond_broadcast (&e->paced);
}

void
engine_fail (struct engine *e, const struct error *why)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  fail_locked (e, why);
}

bool
engine_failed (struct engine *e, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  if (e->failed && err)
    *err = e->error;
  return e->failed;
}

/* ---- sending ---- */

/* The status block, the caller's; NULL if there is none. */
static json_t *
read_status (struct client *c)
{
  CLEANUP_FREE char *status = malloc (PACKET_STATUS + 1);

  if (status == NULL || client_size (c) < PACKET_STATUS ||
      client_pread (c, status, PACKET_STATUS, 0) == -1)
    return NULL;
  status[PACKET_STATUS] = '\0';
  return json_loads (status, 0, NULL);
}

int
check_destination (struct client *c, struct error *err)
{
  json_auto_t *o = read_status (c);
  json_t *version = json_object_get (o, "version");

  if (!json_is_integer (version))
    return error_set (err, EPROTO, "the server is not an nbdferry "
                      "destination (its export does not have a status block); "
                      "a server of another kind gets a copy of the data with "
                      "--data-only (x-ferry-data-only)");
  if (json_integer_value (version) != PACKET_VERSION)
    return error_set (err, EPROTONOSUPPORT,
                      "the destination speaks version %ju of the protocol, "
                      "this side version %d; use the same release on both "
                      "sides", (uintmax_t) json_integer_value (version),
                      PACKET_VERSION);
  return 0;
}

int
check_session (struct client *c, const struct uuid *session,
               struct error *err)
{
  json_auto_t *o = read_status (c);
  const char *text = json_string_value (json_object_get (o, "session"));
  struct uuid there;

  if (text && uuid_parse (text, &there) && uuid_equal (&there, session))
    return 0;
  return error_set (err, EPROTO, "the server acknowledged the handshake, but "
                    "its status block does not name the session: it is not "
                    "an nbdferry destination");
}

/* The destination's own words, if it has any. */
static int
refused (struct client *c, int errnum, struct error *err)
{
  json_auto_t *o = NULL;
  const char *msg;

  if (client_is_dead (c))
    return error_set (err, errnum, "the connection to the destination was "
                      "lost: %s", strerror (errnum));
  o = read_status (c);
  msg = json_string_value (json_object_get (o, "error"));
  return error_set (err, errnum, "the destination refused: %s",
                    msg ? msg : strerror (errnum));
}

int
send_packet (struct client *c, uint8_t *packet, const struct packet_header *h,
             const uint8_t *payload, struct error *err)
{
  size_t len = PACKET_HEADER + (size_t) h->body_size + h->payload_size;

  packet_seal (packet, h, payload);
  if (client_pwrite (c, packet, len, 0, 0) == 0)
    return 0;
  return refused (c, errno, err);
}

/* Each packet reserves the time that it takes at the limit, and waits until
 * its turn has come; when the limit changes, it reserves again.  Who was idle
 * has no credit.  Returns the deadline.
 */
static uint64_t
wait_turn (struct engine *e, size_t len)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);
  struct timespec until;
  unsigned limits;
  uint64_t now;
  int r;

  do {
    now = now_ns ();
    limits = e->limits;
    if (e->next_send < now)
      e->next_send = now;
    clock_in (&until, e->next_send - now);
    if (e->bandwidth > 0)
      e->next_send += len * NS_PER_S / e->bandwidth;
    r = 0;
    while (r == 0 && !e->failed && limits == e->limits)
      r = pthread_cond_timedwait (&e->paced, &e->lock, &until);
  } while (!e->failed && limits != e->limits);
  return e->deadline;
}

static int
send_buffer (struct channel *ch, struct buffer *b)
{
  struct engine *e = ch->engine;
  struct error err;

  b->h.session = e->opt.session;
  b->h.epoch = e->opt.epoch;
  b->h.channel = ch->number;
  client_set_deadline (ch->client,
                       wait_turn (e, PACKET_HEADER + b->h.body_size +
                                       b->h.payload_size));
  if (send_packet (ch->client,
                   b->payload - b->h.body_size - PACKET_HEADER, &b->h,
                   b->payload, &err) == 0)
    return 0;
  error_prefix (&err, "channel %u", ch->number);
  engine_fail (e, &err);
  return -1;
}

static struct buffer *
next_full (struct engine *e)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);
  struct buffer *b;

  while (e->nr_full == 0 && !e->failed && !e->ending)
    pthread_cond_wait (&e->can_send, &e->lock);
  if (e->failed || e->nr_full == 0)
    return NULL;
  b = e->full[e->first_full];
  e->first_full = (e->first_full + 1) % e->nr_buffers;
  e->nr_full--;
  e->in_flight++;
  return b;
}

/* Lock held. */
static void
put_empty (struct engine *e, struct buffer *b)
{
  e->empty[e->nr_empty++] = b;
  pthread_cond_signal (&e->can_fill);
  if (e->nr_full == 0 && e->in_flight == 0)
    pthread_cond_broadcast (&e->drained);
}

static void *
channel_thread (void *arg)
{
  struct channel *ch = arg;
  struct engine *e = ch->engine;
  struct buffer *b;

  while ((b = next_full (e)) != NULL) {
    int r = send_buffer (ch, b);

    if (r == 0)
      e->opt.acked (e->opt.opaque, b);
    pthread_mutex_lock (&e->lock);
    e->in_flight--;
    put_empty (e, b);
    pthread_mutex_unlock (&e->lock);
  }
  return NULL;
}

/* ---- what producers use ---- */

struct buffer *
engine_get (struct engine *e)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);
  struct buffer *b;

  while (e->nr_empty == 0 && !e->failed)
    pthread_cond_wait (&e->can_fill, &e->lock);
  if (e->failed)
    return NULL;
  b = e->empty[--e->nr_empty];
  memset (&b->h, 0, sizeof b->h);
  b->h.type = PACKET_DATA;
  b->h.number = e->next_number++;
  b->covers.nr = 0;
  b->zero_bytes = b->section_bytes = 0;
  b->cargo = NULL;
  return b;
}

void
engine_put (struct engine *e, struct buffer *b)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  e->full[(e->first_full + e->nr_full) % e->nr_buffers] = b;
  e->nr_full++;
  pthread_cond_signal (&e->can_send);
}

void
engine_return (struct engine *e, struct buffer *b)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  put_empty (e, b);
}

int
engine_drain (struct engine *e, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  while (!e->failed && (e->nr_full > 0 || e->in_flight > 0))
    pthread_cond_wait (&e->drained, &e->lock);
  if (!e->failed)
    return 0;
  if (err)
    *err = e->error;
  return -1;
}

void
engine_set_deadline (struct engine *e, uint64_t deadline)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  e->deadline = deadline;
}

void
engine_set_bandwidth (struct engine *e, uint64_t bytes_s)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&e->lock);

  e->bandwidth = bytes_s;
  e->next_send = 0;
  e->limits++;
  pthread_cond_broadcast (&e->paced);
}

/* ---- starting and ending ---- */

static size_t
buffer_bytes (const struct buffer *b)
{
  return b->head + ENGINE_PAYLOAD;
}

static int
make_buffers (struct engine *e, struct error *err)
{
  size_t page = sysconf (_SC_PAGESIZE);
  size_t head = PACKET_HEADER + (size_t) PACKET_MAX_EXTENTS * PACKET_EXTENT +
                e->opt.sections;

  e->nr_buffers = e->opt.producers + e->opt.channels;
  e->buffers = calloc (e->nr_buffers, sizeof e->buffers[0]);
  e->empty = calloc (e->nr_buffers, sizeof e->empty[0]);
  e->full = calloc (e->nr_buffers, sizeof e->full[0]);
  if (!e->buffers || !e->empty || !e->full)
    return error_set (err, ENOMEM, "%m");
  for (unsigned i = 0; i < e->nr_buffers; i++) {
    struct buffer *b = &e->buffers[i];

    b->head = (head + page - 1) & ~(page - 1);
    b->mem = mmap (NULL, buffer_bytes (b), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b->mem == MAP_FAILED) {
      b->mem = NULL;
      return error_set (err, errno, "buffers: %m");
    }
    b->payload = b->mem + b->head;
    b->covers.max = PACKET_MAX_EXTENTS;
    b->covers.v = calloc (b->covers.max, sizeof b->covers.v[0]);
    if (b->covers.v == NULL)
      return error_set (err, ENOMEM, "%m");
    e->empty[e->nr_empty++] = b;
  }
  return 0;
}

struct engine *
engine_start (const struct engine_options *opt, struct client **clients,
              struct error *err)
{
  struct engine *e = calloc (1, sizeof *e);

  if (e == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  e->opt = *opt;
  pthread_mutex_init (&e->lock, NULL);
  pthread_cond_init (&e->can_fill, NULL);
  pthread_cond_init (&e->can_send, NULL);
  pthread_cond_init (&e->drained, NULL);
  clock_cond_init (&e->paced);
  e->channels = calloc (opt->channels, sizeof e->channels[0]);
  if (e->channels == NULL) {
    error_set (err, ENOMEM, "%m");
    goto fail;
  }
  if (make_buffers (e, err) == -1)
    goto fail;
  for (unsigned i = 0; i < opt->channels; i++) {
    struct channel *ch = &e->channels[i];
    int r;

    ch->engine = e;
    ch->number = i + 1;
    ch->client = clients[i];
    r = pthread_create (&ch->thread, NULL, channel_thread, ch);
    if (r != 0) {
      error_set (err, r, "start a thread: %m");
      goto fail;
    }
    e->running++;
  }
  for (unsigned i = 0; i < opt->channels; i++)
    clients[i] = NULL;
  return e;

 fail:
  for (unsigned i = 0; e->channels && i < opt->channels; i++)
    e->channels[i].client = NULL; /* still the caller's */
  engine_free (e);
  return NULL;
}

void
engine_free (struct engine *e)
{
  if (e == NULL)
    return;
  pthread_mutex_lock (&e->lock);
  e->ending = true;
  pthread_cond_broadcast (&e->can_send);
  pthread_mutex_unlock (&e->lock);
  for (unsigned i = 0; i < e->running; i++)
    pthread_join (e->channels[i].thread, NULL);
  for (unsigned i = 0; e->channels && i < e->opt.channels; i++)
    client_close (e->channels[i].client);
  for (unsigned i = 0; e->buffers && i < e->nr_buffers; i++) {
    if (e->buffers[i].mem)
      munmap (e->buffers[i].mem, buffer_bytes (&e->buffers[i]));
    free (e->buffers[i].covers.v);
  }
  pthread_mutex_destroy (&e->lock);
  pthread_cond_destroy (&e->can_fill);
  pthread_cond_destroy (&e->can_send);
  pthread_cond_destroy (&e->drained);
  pthread_cond_destroy (&e->paced);
  free (e->channels);
  free (e->buffers);
  free (e->empty);
  free (e->full);
  free (e);
}
