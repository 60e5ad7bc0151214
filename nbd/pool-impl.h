/* nbdferry - the pool's parts, among themselves
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_POOL_IMPL_H
#define FERRY_POOL_IMPL_H

#include <pthread.h>
#include <stdatomic.h>

#include "pool.h"

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

/* ---- pool-clients.c; the lock is held where it says so ---- */

/* One more client of this epoch; counted by the caller, without the lock. */
struct client *pool_connect (struct pool *p, uint64_t epoch,
                             const struct stop *stop, struct error *err);

/* An idle client, as soon as there is one.  NULL with errno: the request fails.
 * Without the lock.
 */
struct client *pool_take (struct pool *p);

/* A foreign server has died, or hung up.  Lock held. */
void pool_server_lost (struct pool *p);

/* Wait until 'when' or until something changes.  Lock held. */
void pool_wait_until (struct pool *p, uint64_t when);

/* At the end: nobody else uses it. */
void pool_close_idle (struct pool *p);
void pool_join_growers (struct pool *p);

#endif /* FERRY_POOL_IMPL_H */
