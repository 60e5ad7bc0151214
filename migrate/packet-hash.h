/* nbdferry - the checksum of packets: XXH3, 64 bits, seed 0
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_PACKET_HASH_H
#define FERRY_PACKET_HASH_H

#include <stddef.h>
#include <stdint.h>

uint64_t packet_hash (const void *data, size_t len);

#endif /* FERRY_PACKET_HASH_H */
