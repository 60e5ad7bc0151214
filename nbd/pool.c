/* nbdferry - a disk that an NBD server holds, through a pool of connections
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * States, under the lock:
 *
 *   open     requests take a client from 'idle' and put it back; for one that
 *            finds none, while there are fewer than 'nr', a thread connects
 *            one: on a long link another comes back long before
 *   broken   some client died; those out come back one by one; requests wait
 *   mending  all are back; one requester closes them and connects anew
 *   stopped  for good
 *
 * A server that is not ours knows no fence: an old connection's worker may
 * still be about to write.  So a write that got no answer is not sent again;
 * it fails with EIO, and whoever sent it decides.  So does the next flush
 * after a loss, if writes were acknowledged since the last one: a new
 * connection cannot make durable what the server before it may have lost.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "log.h"
#include "pool.h"

#define BACKOFF_MIN (50 * NS_PER_MS)
#define BACKOFF_MAX (5 * NS_PER_S)

enum pool_state { POOL_OPEN, POOL_BROKEN, POOL_MENDING, POOL_STOPPED };

/* A thread that connects one more client. */
struct grower {
  struct pool *pool;
  pthread_t thread;
  bool started, ended; /* to be joined; that takes no time */
};

struct pool {
  struct disk disk;
  /* Read-only after pool_open. */
  pool_export_name name;
  unsigned timeout_ms; /* of connecting */
  struct stop stop;    /* thrown by pool_stop and pool_move; every client
                          listens to it */
  bool foreign;        /* not a server of ours */
  uint64_t patience;   /* ns; of a foreign one: requests fail once it has been
                          away for so long */
  struct client_abilities abilities; /* the same, of the first connection */

  pthread_mutex_t lock; /* protects what follows */
  pthread_cond_t changed;
  enum pool_state state;
  char *uri;
  void *opaque;         /* of 'name' */
  bool moved;           /* 'stop' was thrown for that; clients are of before */
  uint64_t epoch;
  struct client **idle; /* a stack of nr_idle */
  unsigned nr_idle;
  unsigned nr_open;     /* idle, or out with a request, or being connected */
  unsigned waiting;     /* requests that wait for a client */
  unsigned growing;     /* threads that connect one more */
  struct grower *growers; /* 'nr' of them, as it was at first */
  unsigned nr_growers;
  unsigned nr;          /* at most that many clients */
  uint64_t written;     /* writes that were acknowledged, in all */
  uint64_t flushed;     /* of these, how many a flush was for */
  bool lost_writes;     /* others were lost with the server, perhaps */
  uint64_t lost_written; /* what 'written' was at the last of these losses */
  atomic_uint losses;   /* how often; read without the lock */

  char *machine; /* what a server of ours has said of itself, or NULL; of who
                    connects first, or anew */

  /* The same as under the lock; of a foreign server only. */
  bool hurried;         /* nobody waits for a connection any more */
  unsigned request_ms;  /* a request takes no longer; 0: no limit */
  uint64_t lost_ns;     /* since when it is away; 0: it is not */
  uint64_t next_try_ns; /* not before, once patience has ended */
  bool complained;      /* that patience has ended */
};

/* ---- connecting ---- */

/* One more client of this epoch; counted by the caller, without the lock. */
static struct client *
connect_one (struct pool *p, uint64_t epoch, const struct stop *stop,
             struct error *err)
{
  CLEANUP_FREE char *uri = NULL;
  char export[4097];
  struct client *c;

  pthread_mutex_lock (&p->lock);
  uri = strdup (p->uri);
  if (p->name)
    p->name (p->opaque, epoch, export);
  pthread_mutex_unlock (&p->lock);
  if (uri == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  c = client_connect (uri, p->name ? export : NULL, stop, p->timeout_ms, err);
  if (c && client_size (c) != p->disk.size) {
    error_set (err, EINVAL, "%s: the export has %" PRIu64 " bytes instead "
               "of %" PRIu64, uri, client_size (c), p->disk.size);
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

/* Lock held.  Is it another machine, or was it started again?  Then it does
 * not have what it had not written yet.
 */
static void
look_at_machine (struct pool *p, struct client *c)
{
  char *machine = client_description (c);

  if ((machine == NULL || p->machine == NULL ||
       strcmp (machine, p->machine) != 0) && p->written > p->flushed) {
    p->lost_writes = true;
    log_message ("%s: the server's machine was started again; what was written "
                 "since the last flush may be lost with it, and the next flush "
                 "fails", p->uri);
  }
  free (p->machine);
  p->machine = machine;
}

/* Has it moved?  Then nobody is left who was to be stopped by that. */
static bool
settle_move (struct pool *p)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->lock);
  bool moved = p->moved && p->state != POOL_STOPPED;

  if (moved)
    stop_rearm (&p->stop);
  p->moved = false;
  return moved;
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
  settle_move (p);
  for (;;) {
    p->epoch++;
    c = connect_one (p, p->epoch, &p->stop, NULL);
    if (c)
      break;
    if (!stop_wait (&p->stop, wait))
      wait = wait * 2 < BACKOFF_MAX ? wait * 2 : BACKOFF_MAX;
    else if (settle_move (p))
      wait = BACKOFF_MIN;
    else
      break;
  }
  pthread_mutex_lock (&p->lock);
  if (c) {
    look_at_machine (p, c);
    p->idle[p->nr_idle++] = c;
    p->nr_open++;
  }
  if (p->state == POOL_MENDING)
    p->state = p->moved ? POOL_BROKEN : c ? POOL_OPEN : POOL_STOPPED;
  pthread_cond_broadcast (&p->changed);
}

struct request {
  enum { PREAD, PWRITE, ZERO, TRIM, FLUSH, CACHE, EXTENT } type;
  void *in;
  const void *out;
  struct extent *ext;
  uint64_t len, offset;
  unsigned flags;
};

/* ---- a foreign server ---- */

/* Lock held. */
static void
server_lost (struct pool *p)
{
  bool unflushed = p->written > p->flushed;

  if (unflushed && (p->lost_ns == 0 || p->written > p->lost_written)) {
    atomic_fetch_add (&p->losses, 1);
    p->lost_written = p->written;
  }
  p->lost_writes |= unflushed;
  if (p->lost_ns > 0 || p->state == POOL_STOPPED)
    return;
  p->lost_ns = now_ns ();
  log_message ("%s: the connection is lost%s", p->uri, unflushed
               ? "; what was written since the last flush may be lost with "
               "it, and the next flush fails" : "");
}

/* One try to connect anew, as mend has it; lock held on entry and exit. */
static bool
reconnect (struct pool *p, struct error *err)
{
  struct client *c;

  p->state = POOL_MENDING;
  pthread_mutex_unlock (&p->lock);
  close_idle (p);
  c = connect_one (p, 0, &p->stop, err);
  pthread_mutex_lock (&p->lock);
  if (c) {
    p->idle[p->nr_idle++] = c;
    p->nr_open++;
    log_message ("%s: connected again", p->uri);
    p->lost_ns = 0;
    p->complained = false;
  }
  if (p->state == POOL_MENDING)
    p->state = c ? POOL_OPEN : POOL_BROKEN;
  pthread_cond_broadcast (&p->changed);
  return c != NULL;
}

/* Wait until 'when' or until something changes; lock held. */
static void
wait_until (struct pool *p, uint64_t when)
{
  struct timespec ts = { when / NS_PER_S, when % NS_PER_S };

  pthread_cond_timedwait (&p->changed, &p->lock, &ts);
}

/* All clients are back and one is dead.  Try, with back-off, while there is
 * patience; after that once in a while, and nobody waits for it.  0, or -1:
 * the request fails.  Lock held on entry and exit.
 */
static int
mend_foreign (struct pool *p)
{
  uint64_t now = now_ns (), wait;
  struct error err = { 0 };

  server_lost (p);
  if (now >= p->next_try_ns) {
    if (reconnect (p, &err) || p->state == POOL_STOPPED)
      return 0; /* the caller looks at the state */
    now = now_ns ();
    wait = (now - p->lost_ns) / 4;
    if (wait < BACKOFF_MIN)
      wait = BACKOFF_MIN;
    p->next_try_ns = now + (wait < BACKOFF_MAX / 5 ? wait : BACKOFF_MAX / 5);
  }
  if (!p->hurried && now < p->lost_ns + p->patience) {
    wait_until (p, p->next_try_ns);
    return 0;
  }
  if (!p->complained && err.msg[0]) {
    log_message ("%s; requests fail until it is back", err.msg);
    p->complained = true;
  }
  errno = EIO;
  return -1;
}

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
    server_lost (p);
    return true;
  }
  if (!dead) {
    if (*r == -1 && *e == ESHUTDOWN)
      return true; /* it was refused, and not done */
    return false;
  }
  server_lost (p);
  if (!changes_data (q))
    return !p->hurried;
  *r = -1;
  *e = EIO;
  return false;
}

/* ---- requests ---- */

/* Lock held on entry and exit; the client is counted in nr_open.  If that
 * fails, the pool is as good as broken: the other clients come back, and then
 * all is mended.
 */
static struct client *
grow (struct pool *p)
{
  uint64_t epoch = p->epoch;
  struct client *c;

  pthread_mutex_unlock (&p->lock);
  c = connect_one (p, epoch, &p->stop, NULL);
  pthread_mutex_lock (&p->lock);
  if (c == NULL) {
    p->nr_open--;
    /* A foreign server may have enough of us. */
    if (p->foreign && p->nr_open > 0)
      p->nr = p->nr_open;
    else if (p->state == POOL_OPEN)
      p->state = POOL_BROKEN;
    pthread_cond_broadcast (&p->changed);
  }
  return c;
}

static void *
grow_thread (void *arg)
{
  struct grower *g = arg;
  struct pool *p = g->pool;
  struct client *c;

  pthread_mutex_lock (&p->lock);
  c = grow (p);
  if (c)
    p->idle[p->nr_idle++] = c;
  p->growing--;
  g->ended = true;
  pthread_cond_broadcast (&p->changed);
  pthread_mutex_unlock (&p->lock);
  return NULL;
}

/* Lock held.  False: there is no thread for it. */
static bool
grow_beside (struct pool *p)
{
  struct grower *g = p->growers;

  while (g->started && !g->ended)
    g++; /* each of them is one of nr_open */
  if (g->started)
    pthread_join (g->thread, NULL);
  g->pool = p;
  g->ended = false;
  g->started = pthread_create (&g->thread, NULL, grow_thread, g) == 0;
  if (!g->started)
    return false;
  p->nr_open++;
  p->growing++;
  return true;
}

static void
join_growers (struct pool *p)
{
  for (unsigned i = 0; i < p->nr_growers; i++)
    if (p->growers[i].started)
      pthread_join (p->growers[i].thread, NULL);
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
      if (p->nr_open >= p->nr || p->growing > p->waiting)
        break;
      if (p->nr_open > 0 && grow_beside (p))
        break;
      p->nr_open++;
      c = grow (p);
      if (c)
        return c;
      continue;
    case POOL_BROKEN:
      if (p->nr_idle == p->nr_open) {
        if (!p->foreign)
          mend (p);
        else if (mend_foreign (p) == -1)
          return NULL;
        continue;
      }
      break;
    case POOL_MENDING:
      break;
    }
    p->waiting++;
    pthread_cond_wait (&p->changed, &p->lock);
    p->waiting--;
  }
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
    struct client *c = take (p);
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
    wait_until (p, deadline);
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
  join_growers (p);
  close_idle (p);
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
  c = connect_one (p, p->epoch, stop, err);
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
