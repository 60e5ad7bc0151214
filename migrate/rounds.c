/* nbdferry - the source of a migration: rounds
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A round goes once through all disks and ships what is dirty.  The leading
 * thread opens it and waits for its end; the engine's channels have packets
 * filled and send them.  Between two rounds nothing is in flight: then the
 * leading thread tells the destination about bitmaps that changed without a
 * write.
 */
#include <config.h>

#include <errno.h>

#include "cleanup.h"
#include "clock.h"
#include "flusher.h"
#include "resume.h"

/* ---- packets ---- */

/* A channel's thread has nothing to send. */
int
outgoing_fill (void *opaque, unsigned worker, struct buffer *b,
               struct error *err)
{
  struct outgoing *o = opaque;
  bool clients = false;
  int r = 0;

  /* For the packets to come. */
  engine_expect (o->engine, outgoing_dirty (o));
  for (size_t i = 0; i < o->nr; i++)
    clients |= drive_was_used (o->drives[i]);
  if (clients)
    engine_note_clients (o->engine);
  for (size_t i = 0; i < o->nr && r == 0; i++)
    r = shipment_fill (&o->shipments[i], b, o->params.compression,
                       &o->compressors[worker], err);
  if (r == -1)
    outgoing_is_lasting (o); /* our own disk, or our memory */
  return r;
}

/* A channel's thread: a packet has arrived. */
void
outgoing_acked (void *opaque, struct buffer *b)
{
  struct outgoing *o = opaque;

  if (b->h.type == PACKET_DATA)
    shipment_acked (b->cargo, b);
  flusher_note (o->flusher, b->h.raw_size + 1);
  mirror_acked (o->mirror, b);
  pthread_mutex_lock (&o->lock);
  o->wire_bytes +=
    PACKET_HEADER + (uint64_t) b->h.body_size + b->h.payload_size;
  o->normal_bytes += b->h.raw_size;
  outgoing_count_compression (o, &b->h);
  o->zero_bytes += b->zero_bytes;
  o->bitmap_bytes += b->section_bytes;
  pthread_mutex_unlock (&o->lock);
}

/* Fill packets with what is dirty, once through all disks. */
static int
produce (struct outgoing *o, struct error *err)
{
  for (size_t i = 0; i < o->nr; i++)
    shipment_rewind (&o->shipments[i]);
  pthread_mutex_lock (&o->lock);
  o->round++;
  pthread_mutex_unlock (&o->lock);
  return engine_run (o->engine, outgoing_dirty (o), err);
}

int
outgoing_round (struct outgoing *o, struct error *err)
{
  if (produce (o, err) == -1)
    return -1;
  return engine_drain_ordinary (o->engine, err);
}

/* The same; and what the destination has cached is written now, not in the
 * hold; and it is found out how fast the link is.
 */
static int
round_and_flush (struct outgoing *o, struct error *err)
{
  if (produce (o, err) == -1 || hold_flush_ahead (o, err) == -1 ||
      engine_drain_ordinary (o->engine, err) == -1)
    return -1;
  return hold_flush (o, err) == -1 ? -1 : hold_measure_link (o, err);
}

int
outgoing_sync_bitmaps (struct outgoing *o, struct error *err)
{
  for (size_t i = 0; i < o->nr; i++)
    if (shipment_sync_bitmaps (&o->shipments[i], o->control, o->engine, &o->h,
                               err) == -1) {
      outgoing_refused (o, o->control, PACKET_LIST, err);
      return -1;
    }
  return o->engine ? engine_drain (o->engine, err) : 0;
}

/* ---- rounds ---- */

uint64_t
outgoing_dirty (struct outgoing *o)
{
  uint64_t n = 0;

  for (size_t i = 0; i < o->nr; i++)
    n += shipment_dirty (&o->shipments[i]);
  return n;
}

void
outgoing_give_way (struct outgoing *o)
{
  engine_give_way (o->engine, !o->slowed && o->hold_began == 0,
                   o->params.copy_mode == MIGRATE_WRITE_BLOCKING);
}

static void
slow_writers (struct outgoing *o, uint64_t dirty)
{
  uint64_t link;

  pthread_mutex_lock (&o->lock);
  link = hold_rate (o);
  pthread_mutex_unlock (&o->lock);
  brake_round (&o->brake, o->drives, o->nr, dirty, link);
  /* Writers are not slowed for want of a CPU that others have. */
  pthread_mutex_lock (&o->lock);
  o->slowed = o->brake.rate > 0;
  outgoing_give_way (o);
  pthread_mutex_unlock (&o->lock);
}

/* Has some bitmap changed without a write?  It is not sent in the hold if that
 * can be helped, because it is sent whole.
 */
static bool
bitmaps_pending (struct outgoing *o)
{
  for (size_t i = 0; i < o->nr; i++)
    if (shipment_bitmaps_pending (&o->shipments[i]))
      return true;
  return false;
}

/* Nothing may be in flight then, not even a write that is mirrored. */
static int
sync_if_pending (struct outgoing *o, struct error *err)
{
  int r;

  if (!bitmaps_pending (o))
    return 0;
  mirror_pause (o->mirror);
  r = engine_drain (o->engine, err);
  if (r == 0)
    r = outgoing_sync_bitmaps (o, err);
  mirror_go (o->mirror);
  return r;
}

int
outgoing_rounds (struct outgoing *o, struct error *err)
{
  for (;;) {
    uint64_t began = now_ns (), took, dirty;

    if (sync_if_pending (o, err) == -1 ||
        blobs_send (o->blobs, o->engine, err) == -1 ||
        round_and_flush (o, err) == -1)
      return -1;
    dirty = outgoing_dirty (o) + blobs_pending (o->blobs);
    took = now_ns () - began;
    pthread_mutex_lock (&o->lock);
    o->info.dirty_rate = (double) dirty * NS_PER_S / (took + 1);
    pthread_mutex_unlock (&o->lock);
    outgoing_tell (o);
    if (hold_is_short (o, dirty) && !bitmaps_pending (o)) {
      if (!hold_can_shrink (o, dirty, took))
        return 0;
    }
    else
      slow_writers (o, dirty);
  }
}
