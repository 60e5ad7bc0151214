/* nbdferry - a disk that an NBD server holds, through a pool of connections
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * States, under the lock:
 *
 *   open     requests take a client from 'idle' and put it back; one that
 *            finds none, while there are fewer than 'nr', connects one
 *   broken   some client died; those out come back one by one; requests wait
 *   mending  all are back; one requester closes them and connects anew
 *   stopped  for good
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "pool.h"

#define BACKOFF_MIN (50 * NS_PER_MS)
#define BACKOFF_MAX (5 * NS_PER_S)

enum pool_state { POOL_OPEN, POOL_BROKEN, POOL_MENDING, POOL_STOPPED };

struct pool {
  struct disk disk;
  /* Read-only after pool_open. */
  char *uri;
  pool_export_name name;
  void *opaque;
  unsigned nr;         /* at most that many clients */
  unsigned timeout_ms; /* of connecting */
  struct stop stop;    /* thrown by pool_stop; every client listens to it */

  pthread_mutex_t lock; /* protects what follows */
  pthread_cond_t changed;
  enum pool_state state;
  uint64_t epoch;
  struct client **idle; /* a stack of nr_idle */
  unsigned nr_idle;
  unsigned nr_open;     /* idle, or out with a request, or being connected */
};

/* ---- connecting ---- */

/* One more client of this epoch; counted by the caller, without the lock. */
static struct client *
connect_one (struct pool *p, uint64_t epoch, const struct stop *stop,
             struct error *err)
{
  char export[4097];
  struct client *c;

  p->name (p->opaque, epoch, export);
  c = client_connect (p->uri, export, stop, p->timeout_ms, err);
  if (c && client_size (c) != p->disk.size) {
    error_set (err, EINVAL, "%s: the export has %" PRIu64 " bytes instead "
               "of %" PRIu64, p->uri, client_size (c), p->disk.size);
    client_close (c);
    c = NULL;
  }
  return c;
}

static void
close_idle (struct pool *p)
{
  while (p->nr_idle > 0) {
    client_close (p->idle[--p->nr_idle]);
    p->nr_open--;
  }
}

/* All clients are back and one is dead: connect anew until it succeeds.  The
 * lock is held on entry and exit, not between; nobody else touches the
 * clients while the state is mending.
 */
static void
mend (struct pool *p)
{
  uint64_t wait = BACKOFF_MIN;
  struct client *c = NULL;

  p->state = POOL_MENDING;
  pthread_mutex_unlock (&p->lock);
  close_idle (p);
  for (;;) {
    p->epoch++;
    c = connect_one (p, p->epoch, &p->stop, NULL);
    if (c || stop_wait (&p->stop, wait))
      break;
    wait = wait * 2 < BACKOFF_MAX ? wait * 2 : BACKOFF_MAX;
  }
  pthread_mutex_lock (&p->lock);
  if (c) {
    p->idle[p->nr_idle++] = c;
    p->nr_open++;
  }
  if (p->state == POOL_MENDING)
    p->state = c ? POOL_OPEN : POOL_STOPPED;
  pthread_cond_broadcast (&p->changed);
}

/* ---- requests ---- */

/* Lock held on entry and exit.  If that fails, the pool is as good as broken:
 * the other clients come back, and then all is mended.
 */
static struct client *
grow (struct pool *p)
{
  uint64_t epoch = p->epoch;
  struct client *c;

  p->nr_open++;
  pthread_mutex_unlock (&p->lock);
  c = connect_one (p, epoch, &p->stop, NULL);
  pthread_mutex_lock (&p->lock);
  if (c == NULL) {
    p->nr_open--;
    if (p->state == POOL_OPEN)
      p->state = POOL_BROKEN;
    pthread_cond_broadcast (&p->changed);
  }
  return c;
}

static struct client *
take (struct pool *p)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);
  struct client *c;

  for (;;) {
    switch (p->state) {
    case POOL_STOPPED:
      errno = ESHUTDOWN;
      return NULL;
    case POOL_OPEN:
      if (p->nr_idle > 0)
        return p->idle[--p->nr_idle];
      if (p->nr_open < p->nr) {
        c = grow (p);
        if (c)
          return c;
        continue;
      }
      break;
    case POOL_BROKEN:
      if (p->nr_idle == p->nr_open) {
        mend (p);
        continue;
      }
      break;
    case POOL_MENDING:
      break;
    }
    pthread_cond_wait (&p->changed, &p->lock);
  }
}

/* Put it back.  True if the request must be sent again. */
static bool
put (struct pool *p, struct client *c, int r, int err)
{
  /* A server that ends, or that has fenced this epoch off, says ESHUTDOWN. */
  bool lost = r == -1 && (client_is_dead (c) || err == ESHUTDOWN);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  p->idle[p->nr_idle++] = c;
  if (lost && p->state == POOL_OPEN)
    p->state = POOL_BROKEN;
  /* Who waits for a client, or for the last one to come back. */
  if (p->state == POOL_OPEN)
    pthread_cond_signal (&p->changed);
  else
    pthread_cond_broadcast (&p->changed);
  return lost;
}

struct request {
  enum { PREAD, PWRITE, ZERO, TRIM, FLUSH, CACHE, EXTENT } type;
  void *in;
  const void *out;
  struct extent *ext;
  uint64_t len, offset;
  unsigned flags;
};

static int
send_request (struct client *c, const struct request *q)
{
  switch (q->type) {
  case PREAD: return client_pread (c, q->in, q->len, q->offset);
  case PWRITE: return client_pwrite (c, q->out, q->len, q->offset, q->flags);
  case ZERO: return client_zero (c, q->len, q->offset, q->flags);
  case TRIM: return client_trim (c, q->len, q->offset, q->flags);
  case FLUSH: return client_flush (c);
  case CACHE: return client_cache (c, q->len, q->offset);
  case EXTENT:
    return client_extent (c, q->offset, q->offset + q->len, q->ext);
  }
  errno = EINVAL;
  return -1;
}

static int
request (struct disk *d, const struct request *q)
{
  struct pool *p = (struct pool *) d;

  for (;;) {
    struct client *c = take (p);
    int r, err;

    if (c == NULL)
      return -1;
    r = send_request (c, q);
    err = errno;
    if (!put (p, c, r, err)) {
      errno = err;
      return r;
    }
  }
}

static int
pool_pread (struct disk *d, void *buf, size_t count, uint64_t offset)
{
  return request (d, &(struct request){ .type = PREAD, .in = buf,
                                        .len = count, .offset = offset });
}

static int
pool_pwrite (struct disk *d, const void *buf, size_t count, uint64_t offset,
             unsigned flags)
{
  return request (d, &(struct request){ .type = PWRITE, .out = buf,
                                        .len = count, .offset = offset,
                                        .flags = flags });
}

static int
pool_zero (struct disk *d, uint64_t len, uint64_t offset, unsigned flags)
{
  return request (d, &(struct request){ .type = ZERO, .len = len,
                                        .offset = offset, .flags = flags });
}

static int
pool_trim (struct disk *d, uint64_t len, uint64_t offset, unsigned flags)
{
  return request (d, &(struct request){ .type = TRIM, .len = len,
                                        .offset = offset, .flags = flags });
}

static int
pool_flush (struct disk *d)
{
  return request (d, &(struct request){ .type = FLUSH });
}

static int
pool_cache (struct disk *d, uint64_t len, uint64_t offset)
{
  return request (d, &(struct request){ .type = CACHE, .len = len,
                                        .offset = offset });
}

static int
pool_extent (struct disk *d, uint64_t offset, uint64_t end,
             struct extent *ext)
{
  return request (d, &(struct request){ .type = EXTENT, .ext = ext,
                                        .len = end - offset,
                                        .offset = offset });
}

/* ---- opening and closing ---- */

void
pool_stop (struct disk *d)
{
  struct pool *p = (struct pool *) d;

  pthread_mutex_lock (&p->lock);
  p->state = POOL_STOPPED;
  pthread_cond_broadcast (&p->changed);
  pthread_mutex_unlock (&p->lock);
  stop_throw (&p->stop);
}

static void
pool_close (struct disk *d)
{
  struct pool *p = (struct pool *) d;

  close_idle (p);
  stop_destroy (&p->stop);
  pthread_mutex_destroy (&p->lock);
  pthread_cond_destroy (&p->changed);
  free (p->idle);
  free (p->opaque);
  free (p->uri);
  free (p);
}

static const struct disk_ops pool_ops = {
  .pread = pool_pread,
  .pwrite = pool_pwrite,
  .zero = pool_zero,
  .trim = pool_trim,
  .flush = pool_flush,
  .cache = pool_cache,
  .extent = pool_extent,
  .close = pool_close,
};

struct disk *
pool_open (const char *uri, pool_export_name name, void *opaque, unsigned nr,
           uint64_t size, uint64_t epoch, const struct stop *stop,
           unsigned timeout_ms, struct error *err)
{
  struct pool *p = calloc (1, sizeof *p);

  if (p == NULL) {
    free (opaque);
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  pthread_mutex_init (&p->lock, NULL);
  pthread_cond_init (&p->changed, NULL);
  p->stop.fd = -1;
  p->disk.ops = &pool_ops;
  p->disk.size = size;
  p->name = name;
  p->opaque = opaque;
  p->nr = nr;
  p->epoch = epoch;
  p->timeout_ms = timeout_ms;
  p->uri = strdup (uri);
  p->idle = calloc (nr, sizeof p->idle[0]);
  if (p->uri == NULL || p->idle == NULL) {
    error_set (err, ENOMEM, "%m");
    goto fail;
  }
  if (stop_init (&p->stop, err) == -1)
    goto fail;
  p->idle[0] = connect_one (p, p->epoch, stop, err);
  if (p->idle[0] == NULL)
    goto fail;
  p->nr_idle = p->nr_open = 1;
  p->disk.can_extents = client_can_extents (p->idle[0]);
  client_set_stop (p->idle[0], &p->stop);
  return &p->disk;

 fail:
  pool_close (&p->disk);
  return NULL;
}
