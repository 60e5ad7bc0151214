/* nbdferry - what a pack holds, written to a disk
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_PACK_DISK_H
#define FERRY_PACK_DISK_H

#include "archive-pack.h"

/* Write its data, and zeros and holes as zeros, with holes where they can be.
 * Any thread; the pack is only read.
 */
int pack_write (const struct pack *p, struct disk *d, struct error *err);

/* Bytes of the disk that its extents speak of. */
uint64_t pack_length (const struct pack *p);

#endif /* FERRY_PACK_DISK_H */
