/* nbdferry - a shipment: one drive's blocks and bitmaps on their way
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The ship map says which chunks the destination does not hold: all at first;
 * writes set bits in it, and who fills a packet clears those of the chunks
 * that it is about to read.  The order is what makes it right: clear the
 * chunk, then read its data and its bits of the bitmaps.  A write sets the
 * bits of the bitmaps, then the chunk, then writes, then sets them again; so
 * whatever the reader missed is dirty once more.
 *
 * Bits travel with the chunks that they belong to, and are only ever set at
 * the destination by that.  Bits that change without a write (clear, merge,
 * a bitmap that comes or goes) are told between two rounds, when nothing is
 * in flight: the list of bitmaps, and whole bitmaps that replace what is
 * there.
 */
#ifndef FERRY_SHIPMENT_H
#define FERRY_SHIPMENT_H

#include <jansson.h>

#include "compress.h"
#include "drive.h"
#include "engine.h"

struct shipment_bitmap {
  uint64_t id;      /* of the struct named_bitmap */
  uint64_t version; /* that was sent whole, or when it began empty */
  const char *alias; /* over there, the mapping's; NULL: its own name */
};

struct shipment {
  /* Read-only. */
  struct drive *drive;
  uint32_t index;   /* in the HELLO's list */
  char *name;       /* of the disk at the destination; changes in a pause */
  char *peer;       /* its URI; the same */
  uint64_t granule; /* bytes of a chunk */
  json_t *mapping;  /* of the bitmaps' names (mapping.h), or NULL */
  struct uuid lineage; /* the drive's, as it is until the handover */
  uint64_t generation; /* the same */
  struct bitmap *ship;      /* set by writes, cleared under the lock */
  /* Changed under the lock; held.h says what they are. */
  struct bitmap *in_flight, *acked;
  struct bitmap *flushing; /* whoever flushes has it */

  pthread_mutex_t lock; /* protects what follows */
  uint64_t cursor;      /* of this round */
  uint64_t sequence;    /* + 1 at each packet that is begun */
  struct range data;    /* the last run of data that was found on the disk */

  /* What the destination has been told; changes only between rounds. */
  struct shipment_bitmap *told;
  size_t nr_told;
  uint64_t list_version;
  bool listed; /* the list was sent at all, over this connection */
  bool resumed; /* a connection came before: bitmaps must be sent whole */
};

int shipment_init (struct shipment *s, struct drive *d, uint32_t index,
                   const char *uri, const char *name, struct error *err);
void shipment_destroy (struct shipment *s);

/* Everything is to be shipped. */
void shipment_mark_all (struct shipment *s);

/* Begin a round: from the start of the disk. */
void shipment_rewind (struct shipment *s);

/* Fill a packet with what is dirty from the cursor on.  1: it is to be sent;
 * 0: nothing is left in this round; -1 with 'err'.  Any number of producers.
 */
int shipment_fill (struct shipment *s, struct buffer *b,
                   enum migrate_compression how, struct compressor *c,
                   struct error *err);

/* The same, for what is dirty in these ranges, which are in order (they may
 * overlap), whatever the round.
 */
int shipment_fill_ranges (struct shipment *s, struct buffer *b,
                          const struct range *ranges, size_t nr,
                          enum migrate_compression how, struct compressor *c,
                          struct error *err);

/* The packet was acknowledged (held.h: it is not durable yet). */
void shipment_acked (struct shipment *s, const struct buffer *b);

/* Bytes that are dirty, and those in flight. */
uint64_t shipment_dirty (const struct shipment *s);
uint64_t shipment_in_flight (const struct shipment *s);

/* Between rounds, nothing in flight: tell the destination, over the control
 * channel, which bitmaps there are now, and replace, through the engine, those
 * that changed without a write; that is to be drained before a round begins.
 * 'h' has session, epoch, and is otherwise scratch.  Before there is an
 * engine (NULL) only the first.
 */
int shipment_sync_bitmaps (struct shipment *s, struct client *control,
                           struct engine *e, struct packet_header *h,
                           struct error *err);

/* The list of bitmaps alone: as it is now; and the destination has got it. */
struct shipment_list {
  json_t *json;
  struct shipment_bitmap *told;
  size_t nr;
  uint64_t version;
};

int shipment_list (struct shipment *s, struct shipment_list *l,
                   struct error *err);
void shipment_listed (struct shipment *s, struct shipment_list *l);
void shipment_list_free (struct shipment_list *l);

/* Is there something that shipment_sync_bitmaps would send? */
bool shipment_bitmaps_pending (struct shipment *s);

/* A control packet with that JSON body (borrowed): make it, up to its seal (the
 * caller's; NULL: an error); make and send it.
 */
uint8_t *make_control (struct packet_header *h, enum packet_type type,
                       json_t *body, struct error *err);
int send_control (struct client *c, struct packet_header *h,
                  enum packet_type type, json_t *body, struct error *err);

/* The bitmaps that the destination knows are all to be sent whole: chunks with
 * bits were taken out of the ship map.  The migration's thread, between
 * rounds.
 */
void shipment_send_whole (struct shipment *s);

/* For PREPARE: the drive's bitmaps and how many bits they have. */
json_t *shipment_counts (struct shipment *s);

#endif /* FERRY_SHIPMENT_H */
