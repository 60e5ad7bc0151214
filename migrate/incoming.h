/* nbdferry - the destination of migrations
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * One struct incoming serves all incoming migrations of a daemon.  Each
 * connection to an export NAME@incoming is a channel; each write to it is a
 * packet (packet.h), whose reply is the acknowledgement; a read of it gives
 * the status block; a flush makes durable what the session's disks have got.
 * docs/protocol.md and docs/handover.md say what is sent when.
 */
#ifndef FERRY_INCOMING_H
#define FERRY_INCOMING_H

#include <jansson.h>

#include "drive.h"
#include "fence.h"
#include "packet.h"

struct incoming;
struct incoming_channel;

/* The drives are borrowed and outlive it. */
struct incoming *incoming_new (struct drive *const *drives, size_t nr,
                               struct error *err);
void incoming_free (struct incoming *in);

/* The daemon ends: turn everything away, and wait for what is running.  The
 * drives are not touched after this.
 */
void incoming_stop (struct incoming *in);

/* A new connection; NULL on ENOMEM. */
struct incoming_channel *incoming_open (struct incoming *in, struct drive *d);
void incoming_close (struct incoming_channel *ch);

/* A packet has arrived, whole.  0: done, it may be acknowledged.  -1 with
 * errno: the reason stands in the status block of this channel (and in 'err',
 * for the log).  Any thread.
 */
int incoming_packet (struct incoming_channel *ch, const void *buf, size_t len,
                     struct error *err);

/* Make durable all that was acknowledged before. */
int incoming_flush (struct incoming_channel *ch, struct error *err);

/* The status block: JSON, padded with zeros to PACKET_STATUS bytes. */
void incoming_status (struct incoming_channel *ch, char status[PACKET_STATUS]);

/* From here on bitmaps that come are called as that mapping says (mapping.h;
 * borrowed), and what it does not know is refused.
 */
void incoming_set_mapping (struct incoming *in, json_t *mapping);

/* ---- clients that are forwarded by the source after the handover ---- */

/* May a connection of that session and epoch be made?  Raises the drive's
 * fence.  0, or -1.  It may be made while the disk is still coming; requests
 * wait for nothing, but are to be refused until incoming_is_from.  Each is then
 * between fence_enter and fence_leave of incoming_fence.
 */
int incoming_forward (struct incoming *in, struct drive *d,
                      const struct uuid *session, uint64_t epoch,
                      struct error *err);
struct fence *incoming_fence (struct incoming *in, struct drive *d);

/* Was the disk handed over by that session, for good? */
bool incoming_is_from (struct drive *d, const struct uuid *session);

#endif /* FERRY_INCOMING_H */
