/* nbdferry - the source's parts, among themselves
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_OUTGOING_IMPL_H
#define FERRY_OUTGOING_IMPL_H

#include <pthread.h>

#include "blobs.h"
#include "brake.h"
#include "departure.h"
#include "mirror.h"
#include "hints.h"
#include "outgoing.h"
#include "shipment.h"


/* Forwarded clients share that many connections. */
#define FORWARD_CONNECTIONS 16

/* Bytes a second, until a round has shown how fast it goes. */
#define OUTGOING_ASSUMED_BANDWIDTH (64 << 20)

#define CONNECT_TIMEOUT_MS 10000
/* The hold up to the destination's answer to PREPARE may take so much longer
 * than the downtime limit; then it is given up.
 */
#define HOLD_EXTRA_MS 5000
/* Telling the destination of a cancel is a courtesy. */
#define CANCEL_TIMEOUT_MS 2000
/* Each try of COMMIT. */
#define COMMIT_TIMEOUT_MS 5000

/* What the hold is made of (hold.c); ns, 0: not known. */
struct outgoing_cost {
  uint64_t rtt;               /* the shortest round trip */
  uint64_t flush, best_flush; /* of the destination: the last, the shortest */
  bool ahead;                 /* the last one was short, and went ahead */
  uint64_t seen;              /* the fixed time of a hold, once there was one */
  struct engine_work work;    /* when the rate was measured last */
};

struct outgoing {
  /* Read-only once the threads run. */
  struct drive **drives;       /* sorted, as drives_lock wants them */
  struct shipment *shipments;  /* in the order of the command */
  struct departure *departures; /* of each shipment, for the end */
  size_t nr;
  struct uuid session;
  void (*changed) (void *opaque, const struct migrate_info *info);
  void *opaque;
  struct mirror *mirror;
  struct stop cancel; /* cancelled, failed, or the daemon ends */
  struct stop quit;   /* the daemon ends */
  pthread_t thread;
  bool joined;           /* the owner's */
  bool restored;         /* read-only: it began before this process */

  /* Protects what migration.json says, across I/O, while it says it; before
   * 'lock'.  What is marked (w) changes with it held, by the migration thread
   * alone; so the thread may read that without.
   */
  pthread_mutex_t writing;

  /* The migration thread's own. */
  char *uri;               /* (w) */
  struct client *control;
  struct engine *engine;   /* also used by the mirror, while it runs */
  struct compressor *compressors; /* one for each channel of the engine */
  unsigned nr_compressors;
  struct packet_header h;  /* for control packets */
  struct flusher *flusher; /* also used by channels, while they run */
  struct forwarding *forwarding;
  uint64_t epoch;          /* of this connection (w) */
  uint64_t attempt;        /* (w) */
  struct blobs *blobs;     /* or NULL */
  uint64_t reserved;       /* attempts that the description allows for; also
                              changed by who holds 'writing' */
  uint64_t wait;           /* ns, before the next connection */
  bool described;          /* migration.json is there (description.h) (w) */
  bool other_uri;          /* that of migrate-recover, and no connection yet */
  bool ending;             /* it only says that it ends */
  bool connected;          /* the destination may know the session */
  bool progress;           /* the last connection made something durable */
  struct brake brake;      /* of writers */

  pthread_mutex_t lock; /* protects what follows */
  pthread_cond_t cond;
  struct migrate_params params;
  struct migrate_info info;
  uint64_t started_ns, ended_ns; /* 0: not yet */
  bool let_go;          /* past the point of no return */
  bool cancelled;
  bool tracked;         /* data may have gone: it can be paused */
  bool lasting;         /* the error cannot be overcome */
  bool pause_asked;     /* by an administrator, until recover; changes with
                           'writing' held as well */
  bool recover_asked;
  char *new_uri;        /* then; or NULL; changes like pause_asked */
  bool running;         /* the engine may be used */
  unsigned round;
  uint64_t sample_ns, sample_bytes; /* when the rate was measured last */
  uint64_t wire_bytes, normal_bytes, zero_bytes, bitmap_bytes;
  uint64_t bandwidth;   /* bytes a second on the wire, as measured; 0: not */
  struct outgoing_cost cost; /* written by the migration thread alone */
  bool slowed;          /* the brake is on */
  uint64_t hold_began, hold_drained, hold_sent; /* ns: the gates were shut,
                              what was under way had arrived, all had */
  struct migrate_compressed compressed;
  json_t *hints;        /* see outgoing_hints */
};

/* ---- outgoing-info.c ---- */

void outgoing_set_status (struct outgoing *o, enum migrate_status status);

/* A packet was acknowledged.  Lock held. */
void outgoing_count_compression (struct outgoing *o,
                                 const struct packet_header *h);

/* Call o->changed. */
void outgoing_tell (struct outgoing *o);

/* ---- rounds.c ---- */

/* The engine's callbacks: a packet is to be filled, and has arrived. */
int outgoing_fill (void *o, unsigned worker, struct buffer *b,
                   struct error *err);
void outgoing_acked (void *o, struct buffer *b);

/* Ship what is dirty, once through all disks, until it is acknowledged. */
int outgoing_round (struct outgoing *o, struct error *err);

/* The engine gives way to those who serve clients, unless somebody waits for
 * what it sends.  The lock is held, and it is running.
 */
void outgoing_give_way (struct outgoing *o);

/* Round after round, until what is left can be sent in the hold. */
int outgoing_rounds (struct outgoing *o, struct error *err);

/* Bytes that are dirty now. */
uint64_t outgoing_dirty (struct outgoing *o);

/* The bitmaps that changed without a write, of all disks. */
int outgoing_sync_bitmaps (struct outgoing *o, struct error *err);

/* ---- channels.c ---- */

/* The connections of a session, and the round trip as it was seen, ns. */
struct channels {
  struct client *control, *flushes;
  struct client *data[MIGRATE_MAX_CHANNELS];
  unsigned nr;
  uint64_t round_trip;
};

/* Open them, all at once; those for control packets and for flushes say HELLO,
 * the first with the bitmaps, unless the session goes on.
 */
int outgoing_connect (struct outgoing *o, struct channels *c,
                      struct error *err);
void channels_close (struct channels *c);

/* One more channel of this session, HELLO said. */
struct client *outgoing_open_channel (struct outgoing *o,
                                      const struct stop *stop,
                                      unsigned timeout_ms, struct error *err);

/* ---- hold.c ---- */

/* A connection was made, and the engine runs; its round trip, ns. */
int hold_connected (struct outgoing *o, uint64_t round_trip,
                    struct error *err);

/* Between rounds: find out how fast the link is. */
int hold_measure_link (struct outgoing *o, struct error *err);

/* While the last packets of a round are on their way: on a long link a flush is
 * sent behind them, rather than a round trip later.
 */
int hold_flush_ahead (struct outgoing *o, struct error *err);

/* Have the destination write what it has cached, until a flush is short. */
int hold_flush (struct outgoing *o, struct error *err);

/* How long the hold lasts beside what the bytes need that are left, ns ('left':
 * there are any); bytes a second of that.  Lock held.
 */
uint64_t hold_fixed_cost (const struct outgoing *o, bool left);
uint64_t hold_rate (const struct outgoing *o);

/* Can that much be sent within the downtime limit? */
bool hold_is_short (struct outgoing *o, uint64_t dirty);

/* Would one more round, after one that took 'took' ns, make the hold shorter
 * by more than it costs?
 */
bool hold_can_shrink (struct outgoing *o, uint64_t dirty, uint64_t took);

/* The gates have been shut; what was under way has arrived; all has been sent;
 * requests go on.
 */
void hold_begins (struct outgoing *o);
void hold_has_drained (struct outgoing *o);
void hold_has_sent (struct outgoing *o);
void hold_ends (struct outgoing *o);
/* ---- hints.c ---- */

/* With hints=fs: clear from the ship maps what need not be sent.  They are
 * complete, and writes mark them; nothing is sent yet.
 */
int outgoing_use_hints (struct outgoing *o, struct error *err);

/* For tests: clear from 'ship' what is set in 'vacant' in the place of that
 * file system, but for what is set in 'watch'.  Returns how many bytes it was.
 */
uint64_t hints_clear (struct bitmap *ship, const struct bitmap *watch,
                      const struct bitmap *vacant, struct hints_fs *fs);

/* ---- handover.c, too ---- */

/* Wait before the next try, and say what is wrong, unless that was said; *wait
 * is 0 at first.  False: it is the end.
 */
bool handover_try_again (uint64_t *wait, struct error *said,
                         const struct error *now, const char *what,
                         const struct stop *quit);

/* ---- outgoing.c ---- */

/* The leading thread, from beginning to end. */
void *outgoing_lead (void *o);

/* End this connection, if there is one, and what waits for it or for its turn
 * to send.
 */
void outgoing_interrupt (struct outgoing *o);

/* One that a process before this one began.  'fresh': of that drive nothing is
 * known to be held.  Otherwise as outgoing_start.
 */
struct description;
struct outgoing *
outgoing_go_on (struct drive *const *drives, const bool *fresh,
                const struct description *d,
                void (*changed) (void *opaque, const struct migrate_info *),
                void *opaque, struct error *err);

/* ---- handover.c ---- */

/* Hold, PREPARE, let go, COMMIT, forward.  -1: nothing has
 * happened, and the drives are as before; or, with let_go, the daemon ends.
 */
int outgoing_handover (struct outgoing *o, struct error *err);

#endif /* FERRY_OUTGOING_IMPL_H */
