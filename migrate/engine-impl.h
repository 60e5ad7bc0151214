/* nbdferry - the engine, among its files
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_ENGINE_IMPL_H
#define FERRY_ENGINE_IMPL_H

#include <pthread.h>

#include "engine.h"
#include "pacer.h"
#include "room.h"

struct channel {
  struct engine *engine;
  struct client *client; /* the thread's own */
  unsigned number;       /* from 1; 0 is the control channel */
  pthread_t thread;
  pid_t tid;             /* protected by the engine's lock, as is the next;
                            0: not there yet */
  bool giving_way;
};

/* Full buffers of one kind, in a ring, and how many are on the wire. */
struct queue {
  struct buffer **ring;
  unsigned first, nr;
  unsigned in_flight;
};

struct engine {
  struct engine_options opt; /* read-only */
  struct channel *channels;  /* the vector is read-only */
  unsigned running;          /* how many threads were started; the owner's */
  struct buffer *buffers;    /* all of them; the vector is read-only */
  unsigned nr_buffers;

  struct pacer pacer; /* has its own lock */

  pthread_mutex_t lock; /* protects what follows */
  pthread_cond_t can_fill; /* a buffer is empty, or it failed */
  pthread_cond_t can_send; /* a buffer is full or to be filled, or it failed,
                              or ends */
  pthread_cond_t lane_can_send; /* the same, for the lane's thread */
  pthread_cond_t drained;  /* nothing is under way or being filled, or it
                              failed */
  struct buffer **empty;   /* stack */
  unsigned nr_empty;
  struct queue ordinary, urgent;
  unsigned urgent_wanted, ordinary_wanted; /* who waits for an empty buffer for
                                              such */
  bool run;               /* opt.fill has something left */
  unsigned filling;       /* threads that are in it */
  bool urgent_got;        /* the last buffer was taken for an urgent one */
  bool limited;           /* the bandwidth is */
  bool give_way, mirrors; /* as engine_give_way was told */
  bool lane;              /* the last channel has only what is urgent, and the
                             others have the rest */
  bool choosing;          /* a channel waits for its turn to send */
  bool turn;              /* it has come */
  bool urgent_last;       /* the last one that was sent was urgent */
  uint64_t urgent_at;     /* ns: when one was wanted last; 0: never */
  uint64_t next_number;
  struct room room;        /* how much goes into a packet */
  struct engine_work work; /* since the start, but for what goes on now */
  struct engine_work seen; /* when the rate was measured last */
  unsigned on_wire;        /* packets */
  uint64_t busy_since;     /* ns, while on_wire > 0 */
  uint64_t deadline;  /* ns, of what is sent from now on; 0: none */
  bool ending;        /* no more will be put */
  bool failed;
  struct error error;
};

/* A channel's thread, from beginning to end. */
void *engine_channel (void *ch);

/* All of them have to look again.  Lock held. */
void engine_wake_channels (struct engine *e);

#endif /* FERRY_ENGINE_IMPL_H */
