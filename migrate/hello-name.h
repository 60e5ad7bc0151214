/* nbdferry - HELLO as part of an export's name
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_HELLO_NAME_H
#define FERRY_HELLO_NAME_H

#include "incoming.h"

/* The export that opens a channel with that packet, which is sealed; the
 * caller's.  NULL: it is too long for a name (or there is no memory), and must
 * be written to the channel.
 */
char *hello_name (const char *disk, const uint8_t *packet, size_t len);

/* The destination: take what stands behind "@incoming/" as the channel's first
 * packet.  0, or -1.
 */
int hello_name_open (struct incoming_channel *ch, const char *text,
                     struct error *err);

#endif /* FERRY_HELLO_NAME_H */
