/* nbdferry - the engine: its beginning and its end
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine-impl.h"

static size_t
buffer_bytes (const struct buffer *b)
{
  return b->head + ENGINE_PAYLOAD_MAX;
}

static int
make_buffers (struct engine *e, struct error *err)
{
  size_t page = sysconf (_SC_PAGESIZE);
  size_t head = PACKET_HEADER + (size_t) PACKET_MAX_EXTENTS * PACKET_EXTENT +
                e->opt.sections;

  e->nr_buffers = e->opt.producers + e->opt.channels;
  e->room.channels = e->opt.channels;
  e->room.buffers = e->nr_buffers;
  e->buffers = calloc (e->nr_buffers, sizeof e->buffers[0]);
  e->empty = calloc (e->nr_buffers, sizeof e->empty[0]);
  e->ordinary.ring = calloc (e->nr_buffers, sizeof e->empty[0]);
  e->urgent.ring = calloc (e->nr_buffers, sizeof e->empty[0]);
  if (!e->buffers || !e->empty || !e->ordinary.ring || !e->urgent.ring)
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
  pthread_cond_init (&e->lane_can_send, NULL);
  pthread_cond_init (&e->drained, NULL);
  pacer_init (&e->pacer);
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
    r = pthread_create (&ch->thread, NULL, engine_channel, ch);
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
  engine_wake_channels (e);
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
  pthread_cond_destroy (&e->lane_can_send);
  pthread_cond_destroy (&e->drained);
  pacer_destroy (&e->pacer);
  free (e->channels);
  free (e->buffers);
  free (e->empty);
  free (e->ordinary.ring);
  free (e->urgent.ring);
  free (e);
}
