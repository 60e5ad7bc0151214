/* nbdferry - a shipment, among its files
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_SHIPMENT_IMPL_H
#define FERRY_SHIPMENT_IMPL_H

#include "shipment.h"

/* Runs up to this are read without a look at what is allocated. */
#define SHORT_RUN (64 << 10)

/* Where its chunk begins. */
uint64_t shipment_chunk (const struct shipment *s, uint64_t offset);

/* Take the next dirty run from *cursor (protected by the lock, or the caller's)
 * up to 'limit': clear its chunks, and note that they are in flight.  It has
 * about 'room' bytes of data, and is no longer than 'longest'.  *data is what
 * is known to be data.  1, 0 at the end, -1.
 */
int shipment_take (struct shipment *s, uint64_t *cursor, uint64_t limit,
                   size_t room, uint64_t longest, struct range *run,
                   struct range *data, struct error *err);

/* What was taken does not fit after all: it is dirty as before, for the next
 * round.  (The cursor stays: what a packet takes only ever ascends.)
 */
void shipment_put_back (struct shipment *s, uint64_t start, uint64_t end);

#endif /* FERRY_SHIPMENT_IMPL_H */
