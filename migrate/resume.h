/* nbdferry - the source of a migration: pausing, resuming, and restarts
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What can be overcome (a link that is lost, a destination that is started
 * again or is out of space) pauses a migration; it tries again by itself, at
 * growing intervals, or at once when it is told to.  What cannot be overcome
 * ends it: the destination refuses the session as such, the source's disk
 * cannot be read.
 *
 * What survives a restart of the daemon is each drive's ship map and the
 * description (description.h).  Both are made before the first data is sent,
 * the map first; and removed in the other order.  A map without a description
 * that names its session is worth nothing, and a drive without a map is sent
 * as a whole.
 */
#ifndef FERRY_RESUME_H
#define FERRY_RESUME_H

#include "outgoing-impl.h"

/* Before the first data: make the maps, have writes mark them, write the
 * description.
 */
int outgoing_track (struct outgoing *o, struct error *err);

/* The migration has ended for good, or it was handed over ('gone'): remove
 * what would bring it back.
 */
void outgoing_untrack (struct outgoing *o, bool gone);

/* A new connection is about to be made, or a new PREPARE sent: raise the epoch
 * (the attempt), durably.
 */
int outgoing_next_epoch (struct outgoing *o, struct error *err);
int outgoing_next_attempt (struct outgoing *o, struct error *err);

/* After HELLO: what the destination does not hold any more is to be sent. */
int outgoing_check_held (struct outgoing *o, struct error *err);

/* A refusal of a packet of that type: can it be overcome?  If not, this is
 * noted.  'err' may be NULL.
 */
void outgoing_refused (struct outgoing *o, const struct client *c,
                       enum packet_type type, const struct error *err);
/* Some other error that cannot be overcome. */
void outgoing_is_lasting (struct outgoing *o);

/* What an administrator has asked for is not told as an error. */
void outgoing_explain_pause (struct outgoing *o, struct error *err);

/* 'why' has ended a connection.  True: go on, after a wait; false: it is the
 * end.
 */
bool outgoing_pause (struct outgoing *o, const struct error *why);

#endif /* FERRY_RESUME_H */
