/* nbdferry - a disk that an NBD server holds, through a pool of connections
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A server that is not ours knows no fence: an old connection's worker may
 * still be about to write.  So a write that got no answer is not sent again;
 * it fails with EIO, and whoever sent it decides.  So does the next flush
 * after a loss, if writes were acknowledged since the last one: a new
 * connection cannot make durable what the server before it may have lost.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "pool-impl.h"

/* ---- requests ---- */

struct request {
  enum { PREAD, PWRITE, ZERO, TRIM, FLUSH, CACHE, EXTENT } type;
  void *in;
  const void *out;
  struct extent *ext;
  uint64_t len, offset;
  unsigned flags;
};

static bool
changes_data (const struct request *q)
{
  return q->type == PWRITE || q->type == ZERO || q->type == TRIM;
}

/* A request of a foreign server has ended; lock held.  Returns true if it may
 * be sent again, with *r and *e changed if its answer has.
 */
static bool
settle_foreign (struct pool *p, const struct request *q, bool sent, bool dead,
                int *r, int *e)
{
  if (!sent) {
    pool_server_lost (p);
    return true;
  }
  if (!dead) {
    if (*r == -1 && *e == ESHUTDOWN)
      return true; /* it was refused, and not done */
    return false;
  }
  pool_server_lost (p);
  if (!changes_data (q))
    return !p->hurried;
  *r = -1;
  *e = EIO;
  return false;
}

/* Put it back, with how it ended.  True if the request must be sent again. */
static bool
put (struct pool *p, struct client *c, const struct request *q, bool sent,
     int *r, int *err)
{
  /* A server that ends, or that has fenced this epoch off, says ESHUTDOWN. */
  bool dead = *r == -1 && client_is_dead (c), again;
  bool lost = dead || (*r == -1 && *err == ESHUTDOWN);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  p->idle[p->nr_idle++] = c;
  if (lost && p->state == POOL_OPEN)
    p->state = POOL_BROKEN;
  again = lost;
  if (*r == 0 && changes_data (q) && !(q->flags & DISK_FUA))
    p->written++;
  if (p->foreign)
    again = settle_foreign (p, q, sent, dead, r, err);
  /* Who waits for a client, or for the last one to come back. */
  if (p->state == POOL_OPEN && !p->hurried)
    pthread_cond_signal (&p->changed);
  else
    pthread_cond_broadcast (&p->changed);
  return again;
}

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

static unsigned
request_limit (struct pool *p)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  return p->request_ms;
}

static int
request (struct disk *d, const struct request *q)
{
  struct pool *p = (struct pool *) d;

  for (;;) {
    struct client *c = pool_take (p);
    bool sent = true;
    int r = -1, err = EIO;

    if (c == NULL)
      return -1;
    if (p->foreign) {
      client_set_timeout (c, request_limit (p));
      sent = !client_has_died (c);
    }
    if (sent) {
      r = send_request (c, q);
      err = errno;
    }
    if (!put (p, c, q, sent, &r, &err)) {
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

/* A flush that was for that many writes has succeeded.  0, or -1: some of them
 * were lost with the server that had them; that is said once, as the kernel
 * does.
 */
static int
end_flush (struct pool *p, uint64_t written)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  if (written > p->flushed)
    p->flushed = written;
  if (!p->lost_writes)
    return 0;
  p->lost_writes = false;
  errno = EIO;
  return -1;
}

static uint64_t
count_written (struct pool *p)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  return p->written;
}

static int
pool_flush (struct disk *d)
{
  struct pool *p = (struct pool *) d;
  uint64_t written = count_written (p);

  if (request (d, &(struct request){ .type = FLUSH }) == -1)
    return -1;
  return end_flush (p, written);
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

int
pool_move (struct disk *d, const char *uri, void *opaque)
{
  struct pool *p = (struct pool *) d;
  char *copy = strdup (uri);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  if (copy == NULL || p->state == POOL_STOPPED) {
    errno = copy ? ESHUTDOWN : ENOMEM;
    free (copy);
    free (opaque);
    return -1;
  }
  free (p->uri);
  free (p->opaque);
  p->uri = copy;
  p->opaque = opaque;
  if (p->state == POOL_OPEN)
    p->state = POOL_BROKEN;
  /* Who waits for the old one, which may never say a word, comes back. */
  p->moved = true;
  stop_throw (&p->stop);
  pthread_cond_broadcast (&p->changed);
  return 0;
}

/* Lock held. */
static bool
is_busy (const struct pool *p)
{
  /* The numbers are of who mends, as long as that goes on. */
  return p->state == POOL_MENDING || p->nr_idle < p->nr_open;
}

void
pool_hurry (struct disk *d, uint64_t deadline)
{
  struct pool *p = (struct pool *) d;
  uint64_t now = now_ns (), left = deadline > now ? deadline - now : 0;

  pthread_mutex_lock (&p->lock);
  p->hurried = true;
  p->request_ms = left / NS_PER_MS > HURRY_MS ? left / NS_PER_MS : HURRY_MS;
  pthread_cond_broadcast (&p->changed);
  while (is_busy (p) && now_ns () < deadline)
    pool_wait_until (p, deadline);
  if (is_busy (p))
    stop_throw (&p->stop);
  pthread_mutex_unlock (&p->lock);
}

void
pool_limit (struct disk *d, unsigned timeout_ms)
{
  struct pool *p = (struct pool *) d;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);

  p->request_ms = timeout_ms;
}

unsigned
pool_losses (const struct disk *d)
{
  return atomic_load (&((const struct pool *) d)->losses);
}

const struct client_abilities *
pool_abilities (const struct disk *d)
{
  return &((const struct pool *) d)->abilities;
}

static void
pool_close (struct disk *d)
{
  struct pool *p = (struct pool *) d;

  if (p->stop.fd != -1)
    stop_throw (&p->stop);
  pool_join_growers (p);
  pool_close_idle (p);
  stop_destroy (&p->stop);
  pthread_mutex_destroy (&p->lock);
  pthread_cond_destroy (&p->changed);
  free (p->growers);
  free (p->idle);
  free (p->machine);
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

static struct pool *
alloc_pool (const char *uri, unsigned nr, unsigned timeout_ms,
            struct error *err)
{
  struct pool *p = calloc (1, sizeof *p);

  if (p == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  pthread_mutex_init (&p->lock, NULL);
  clock_cond_init (&p->changed);
  p->stop.fd = -1;
  p->disk.ops = &pool_ops;
  p->nr = nr;
  p->timeout_ms = timeout_ms;
  p->uri = strdup (uri);
  p->idle = calloc (nr, sizeof p->idle[0]);
  p->growers = calloc (nr, sizeof p->growers[0]);
  p->nr_growers = p->growers ? nr : 0;
  if (p->uri == NULL || p->idle == NULL || p->growers == NULL)
    error_set (err, ENOMEM, "%m");
  else if (stop_init (&p->stop, err) == 0)
    return p;
  pool_close (&p->disk);
  return NULL;
}

/* It is connected for the first time. */
static void
first_client (struct pool *p, struct client *c)
{
  p->idle[0] = c;
  p->nr_idle = p->nr_open = 1;
  client_get_abilities (c, &p->abilities);
  p->disk.can_extents = p->abilities.extents;
  client_set_stop (c, &p->stop);
}

struct disk *
pool_open (const char *uri, pool_export_name name, void *opaque, unsigned nr,
           uint64_t size, uint64_t epoch, const struct stop *stop,
           unsigned timeout_ms, struct error *err)
{
  struct pool *p = alloc_pool (uri, nr, timeout_ms, err);
  struct client *c;

  if (p == NULL) {
    free (opaque);
    return NULL;
  }
  p->disk.size = size;
  p->name = name;
  p->opaque = opaque;
  p->epoch = epoch;
  c = pool_connect (p, p->epoch, stop, err);
  if (c == NULL) {
    pool_close (&p->disk);
    return NULL;
  }
  p->machine = client_description (c);
  first_client (p, c);
  return &p->disk;
}

struct disk *
pool_open_foreign (const char *uri, unsigned nr, unsigned patience_ms,
                   const struct stop *stop, unsigned timeout_ms,
                   struct error *err)
{
  struct pool *p = alloc_pool (uri, nr, timeout_ms, err);
  struct client *c;

  if (p == NULL)
    return NULL;
  p->foreign = true;
  p->patience = patience_ms * NS_PER_MS;
  c = client_connect (uri, NULL, stop, timeout_ms, err);
  if (c == NULL) {
    pool_close (&p->disk);
    return NULL;
  }
  p->disk.size = client_size (c);
  first_client (p, c);
  p->disk.readonly = p->abilities.readonly;
  p->disk.rotational = p->abilities.rotational;
  /* Without its word for it, a flush is only for its own connection. */
  if (!p->abilities.multi_conn)
    p->nr = 1;
  return &p->disk;
}
