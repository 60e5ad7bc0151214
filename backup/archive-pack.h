/* nbdferry - one packet of an archive, as it is filled
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A pack collects extents, with room for the data of those that have any; then
 * it is sealed.  Sealing (finding zeros, compressing, checksums) is the work of
 * whoever owns the pack; packs are independent of each other, so several
 * threads can do it at once.
 */
#ifndef FERRY_ARCHIVE_PACK_H
#define FERRY_ARCHIVE_PACK_H

#include "archive.h"
#include "compress.h"
#include "disk.h"
#include "outgoing.h"

#define PACK_DATA    (1 << 20) /* bytes that a pack takes */
#define PACK_EXTENTS 2000      /* and extents; finding zeros makes more */

struct pack_compression {
  enum migrate_compression how;
  int level; /* 0: the fastest that is any good */
};

struct pack {
  struct packet_extent *extents; /* PACKET_MAX_EXTENTS */
  size_t nr;
  uint8_t *raw;          /* PACK_DATA bytes: the data of the extents */
  size_t raw_size;
  uint8_t *packet;       /* header and extents, once sealed */
  size_t packet_size;
  const uint8_t *payload; /* raw, or compressed */
  size_t payload_size;
  uint8_t *compressed;   /* PACK_DATA bytes; NULL before the first use */
  struct compressor compressor;
};

int pack_init (struct pack *p, struct error *err);
void pack_destroy (struct pack *p);

void pack_clear (struct pack *p);

/* How many bytes of an extent of that type still fit; 0: seal it first. */
uint64_t pack_room (const struct pack *p, enum extent_type type);

/* Append an extent that fits, behind those that are there.  For data, returns
 * where the caller is to put it.
 */
uint8_t *pack_add (struct pack *p, uint64_t offset, uint64_t length,
                   enum extent_type type);

/* Data that is all zeros becomes zeros.  Before sealing. */
int pack_find_zeros (struct pack *p, struct error *err);

/* Packet 'number' of the archive 'id'. */
int pack_seal (struct pack *p, const struct uuid *id, uint64_t number,
               const struct pack_compression *c, struct error *err);

#endif /* FERRY_ARCHIVE_PACK_H */
