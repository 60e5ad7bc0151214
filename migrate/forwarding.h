/* nbdferry - the source: forwarding clients to where their disk went
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A connection takes many round trips, and clients wait meanwhile.  So the
 * first one of each disk is made long before, while data is sent; the
 * destination answers its requests only once the handover was committed.
 */
#ifndef FERRY_FORWARDING_H
#define FERRY_FORWARDING_H

#include "outgoing-impl.h"

/* Begin to connect for all disks of a migration, while data is sent.  NULL: no
 * memory.
 */
struct forwarding *forwarding_begin (struct outgoing *o);

/* After COMMIT: all drives are forwarded from here on.  -1: the daemon ends. */
int forwarding_finish (struct forwarding *f);

/* Close what is still its own; o->cancel was thrown, or it has finished.  NULL
 * is allowed.
 */
void forwarding_free (struct forwarding *f);

#endif /* FERRY_FORWARDING_H */
