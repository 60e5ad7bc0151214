/* nbdferry - what the destination holds durably
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A chunk's way:
 *
 *           filled           acknowledged       a flush begins
 *   ship ----------> in flight ----------> acked ----------> flushing
 *    ^                                                          |
 *    | a write sets both                                        | it succeeds
 *   unheld <------------------------------------------- cleared in unheld
 *
 * 'unheld' (the drive's, persistent) has every chunk that is in one of the
 * four others, and those of connections that were lost; only a chunk that is
 * in none of ship, in flight and acked loses its bit when a flush succeeds
 * that was sent after its acknowledgement.  So when a connection is lost, all
 * that is to be done is: ship := unheld.
 *
 * What a write W does:  w1 ship, w2 unheld, w3 the data, w4 ship, w5 unheld.
 * What clearing does, after the flush has succeeded:
 *
 *   c0  wait for all writes that are under way (gate_synchronize)
 *   c1  note the range (ship_map_clearing)
 *   c2  is the chunk in ship, in flight, or acked?  then leave it alone
 *   c3  clear it in unheld
 *   c4  fence; is it in ship?  then set it in unheld again
 *   c5  strike out the note
 *
 * c2 to c4 are under the shipment's lock, so that nobody takes anything out of
 * ship meanwhile.  Every way in which they can meet:
 *
 * - W had done w1 before the chunk was taken to be sent (ship was cleared), and
 *   is still not at w3 when the packet, with the old data, is acknowledged and
 *   flushed.  c0 waits for W, so w4 comes before c2: left alone.
 * - W comes after c0 has begun.  w1 before c2: left alone.  (If the chunk was
 *   taken again since then, it is in flight or acked, and not flushed.)
 *   w1 after c2, w2 after c3: W sets it.  w1 after c2, w2 before c3: w1 is
 *   before c4, which sets it again.
 * - Killed between c3 and c4, or anywhere else: what was noted is dirty at the
 *   next start.
 * - Power lost: W has armed its region before w1.  The keeper of the activity
 *   log disarms a region with the drive's control lock held, after a sync of
 *   the bits; clearing has the same lock from c1 to c5.  So a region that was
 *   armed between c2 and c4 is disarmed after c4, with the bit that c4 set.
 */
#ifndef FERRY_HELD_H
#define FERRY_HELD_H

#include "shipment.h"

/* A flush is about to be sent: what was acknowledged so far is what it is for.
 * One at a time.
 */
void held_flushing (struct shipment *s);

/* It has succeeded.  Takes control.  Returns how many bytes are held now that
 * were not.
 */
uint64_t held_flushed (struct shipment *s);

/* The connection is gone, and nobody fills or sends any more: what is not held
 * is to be sent.
 */
void held_lost (struct shipment *s);

/* The destination holds nothing any more.  Durable when it returns. */
int held_nothing (struct shipment *s, struct error *err);

/* Bytes that the destination does not hold durably. */
uint64_t held_missing (const struct shipment *s);

#endif /* FERRY_HELD_H */
