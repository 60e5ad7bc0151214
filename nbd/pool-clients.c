/* nbdferry - the connections of a pool
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
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "log.h"
#include "pool-impl.h"

#define BACKOFF_MIN (50 * NS_PER_MS)
#define BACKOFF_MAX (5 * NS_PER_S)

/* ---- connecting ---- */

struct client *
pool_connect (struct pool *p, uint64_t epoch, const struct stop *stop,
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
  /* A write to a foreign one that is lost is not sent again. */
  if (c && !p->foreign)
    client_notice_silence (c);
  return c;
}

void
pool_close_idle (struct pool *p)
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
  pool_close_idle (p);
  settle_move (p);
  for (;;) {
    p->epoch++;
    c = pool_connect (p, p->epoch, &p->stop, NULL);
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

/* ---- a foreign server ---- */

void
pool_server_lost (struct pool *p)
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
  pool_close_idle (p);
  c = pool_connect (p, 0, &p->stop, err);
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

void
pool_wait_until (struct pool *p, uint64_t when)
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

  pool_server_lost (p);
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
    pool_wait_until (p, p->next_try_ns);
    return 0;
  }
  if (!p->complained && err.msg[0]) {
    log_message ("%s; requests fail until it is back", err.msg);
    p->complained = true;
  }
  errno = EIO;
  return -1;
}

/* ---- one for a request ---- */

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
  c = pool_connect (p, epoch, &p->stop, NULL);
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

void
pool_join_growers (struct pool *p)
{
  for (unsigned i = 0; i < p->nr_growers; i++)
    if (p->growers[i].started)
      pthread_join (p->growers[i].thread, NULL);
}

struct client *
pool_take (struct pool *p)
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
