/* nbdferry - the destination's parts, among themselves
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_INCOMING_IMPL_H
#define FERRY_INCOMING_IMPL_H

#include <jansson.h>
#include <pthread.h>
#include <stdatomic.h>

#include "incoming.h"

/* The epoch that turns all packets of a session away; none may use it. */
#define SESSION_CLOSED UINT64_MAX

/* A session whose HELLO is not done is at epoch 0: its drives are being made
 * ready, and nobody may enter.
 */
static inline bool
incoming_is_epoch (uint64_t epoch)
{
  return epoch != 0 && epoch != SESSION_CLOSED;
}

struct session_disk {
  struct uuid lineage;   /* read-only: of the disk that is to come */
  bool held;             /* read-only: the drive holds what an earlier process
                            got of this session */
  atomic_uint_fast64_t failed; /* how many flushes had failed when this epoch
                            began (incoming_sync) */
};

/* One migration that is coming in: some drives that move together. */
struct session {
  struct uuid id;        /* read-only, as are the drives */
  struct drive **drives; /* in the source's order; packets give the index */
  size_t nr;
  struct fence fence;    /* has its own lock */
  struct incoming_blobs *blobs; /* has its own lock */
  unsigned refs;         /* protected by incoming->lock */
  unsigned channels;     /* the same: connections that are there */
  pthread_mutex_t begin; /* taken before a drive's locks; one sets 'begun' */
  atomic_bool begun;     /* the drives' journals name it: data has come; read
                            without the lock, once it has happened */
  struct session_disk *disks; /* what else is known of each drive */
};

struct incoming_drive {
  struct drive *drive;
  struct session *session; /* protected by incoming->lock; or NULL */
  struct fence forward;    /* of forwarded clients; has its own lock */
};

struct incoming {
  struct incoming_drive *drives; /* the vector is read-only */
  size_t nr;
  pthread_mutex_t control; /* one control packet at a time; taken first */
  bool stopped;            /* protected by control */
  pthread_mutex_t lock;    /* short; protects sessions, channels, mapping */
  json_t *mapping;         /* or NULL (mapping.h); replaced, never changed */
};

struct incoming_channel {
  struct incoming *in;
  struct drive *drive; /* whose export it is; read-only */
  /* Protected by in->lock. */
  struct session *session;
  int errnum;
  char error[ERROR_MAX]; /* the last one, for the status block */
};

struct incoming_drive *incoming_find (struct incoming *in, const char *name);
struct session *session_ref (struct incoming *in, struct session *s);
/* The channel is one of that session's (or NULL: of none) from here on, and
 * has its reference.  incoming->lock held; what it had is returned.
 */
struct session *channel_join (struct incoming_channel *ch, struct session *s);
/* That which has that id, with a reference, if it has a drive; or NULL. */
struct session *incoming_session (struct incoming *in, const struct uuid *id);
void session_unref (struct incoming *in, struct session *s);

/* Is the drive a destination that takes data?  0, or -1 with EPROTO.  List or
 * control held.
 */
int incoming_takes_data (const struct drive *d, struct error *err);

/* incoming-data.c: a DATA packet for one of the session's drives. */
int incoming_data (struct session *s, const uint8_t *buf,
                   const struct packet_header *h, struct error *err);

/* incoming-blobs.c: what travels beside the disks.  A BLOB packet; make durable
 * what has come; at PREPARE, is all of the list there (NULL: nothing is)?  And
 * for a drive that is no destination any more, or not yet: publish what that
 * session has brought, forget what anybody has.
 */
struct incoming_blobs *incoming_blobs_new (const char *state_dir);
void incoming_blobs_free (struct incoming_blobs *b); /* NULL is fine */
int incoming_blob (struct session *s, const uint8_t *buf,
                   const struct packet_header *h, struct error *err);
int incoming_blobs_flush (struct incoming_blobs *b, struct error *err);
int incoming_blobs_prepare (struct incoming_blobs *b,
                            const struct uuid *session, json_t *list,
                            struct error *err);
int incoming_blobs_publish (const char *state_dir, const struct uuid *session,
                            struct error *err);
int incoming_blobs_drop (const char *state_dir, struct error *err);

/* incoming-hello.c: before the first data of a session is written, each of
 * its drives' journals says so.  Any thread, inside the session's fence.
 */
int incoming_begin (struct session *s, struct error *err);

/* incoming-resume.c: does the drive, whose journal was read when it was
 * opened, hold what it got of that session?  Control held.
 */
bool incoming_holds (const struct drive *d, const struct uuid *session);

/* May a session that goes on have a drive that is in that state?  0, or -1.
 * Control held.
 */
int incoming_may_resume (const struct drive *d, const struct uuid *session,
                         const struct session *other, struct error *err);

/* The drives of a session that goes on take data again. */
int incoming_unprepare (struct session *s, struct error *err);

/* Make a disk of the session durable.  After a flush of it that failed, all
 * fail until the next epoch, since the kernel may have dropped what it could
 * not write, and says so only once: to whoever asks first, be it an older
 * session.
 */
int incoming_sync (struct session *s, size_t disk, struct error *err);
/* An epoch begins: none has failed since. */
void incoming_expect (struct session *s);

/* For the status block: what the drives of the session hold. */
json_t *incoming_held_json (struct session *s);

/* incoming-hello.c: the drive is a destination without anything.  Control
 * held.
 */
int incoming_take_drive (struct drive *d, const struct uuid *session,
                         struct error *err);

/* incoming-hello.c, and incoming-control.c; in->control is held.  'body' is the
 * packet's JSON.
 */
int incoming_hello (struct incoming_channel *ch,
                    const struct packet_header *h, json_t *body,
                    struct error *err);
int incoming_prepare (struct session *s, json_t *body, struct error *err);
int incoming_commit (struct incoming *in, const struct packet_header *h,
                     json_t *body, struct error *err);
int incoming_cancel (struct session *s, struct error *err);

/* What is on the disk is that session's from here on, durably; 'stale': unless
 * it cannot be relied upon, which is so until the first data.  Control held.
 */
int incoming_record (struct drive *d, const struct uuid *session, bool stale,
                     struct error *err);

/* -1, with the words for a packet whose JSON is not as it must be. */
int incoming_malformed (const char *what, struct error *err);

/* incoming-bitmaps.c: the LIST packet; and forget what an unfinished session
 * brought (control held).
 */
int incoming_list (struct incoming *in, struct session *s,
                   const struct packet_header *h, json_t *body,
                   struct error *err);
int incoming_drop_bitmaps (struct drive *d, struct error *err);

/* The bitmap that comes in under that name, or NULL.  List or control held. */
struct named_bitmap *incoming_find_bitmap (struct drive *d, const char *name,
                                           size_t len);

#endif /* FERRY_INCOMING_IMPL_H */
