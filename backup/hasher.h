/* nbdferry - a disk's content as hashes of its blocks
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Two disks that are far apart are compared by hashes, so that their data
 * need not move.  The hash of a block is XXH3 with 128 bits and seed 0 over
 * its bytes, in canonical form (big-endian).  It depends on the bytes alone:
 * zeros have the same hash whether they are data or a hole.
 */
#ifndef FERRY_HASHER_H
#define FERRY_HASHER_H

#include <stddef.h>
#include <stdint.h>

#include "disk.h"
#include "error.h"

#define HASH_SIZE          16
#define HASH_BLOCK_MIN     (UINT64_C (4) << 10)
#define HASH_BLOCK_MAX     (UINT64_C (64) << 20)
#define HASH_BLOCK_DEFAULT (UINT64_C (64) << 10)

/* What is hashed.  The functions are as in disk.h, and are called by whoever
 * asks for hashes.
 */
struct hash_source {
  uint64_t size; /* bytes */
  void *opaque;
  int (*pread) (void *opaque, void *buf, size_t count, uint64_t offset);
  int (*extent) (void *opaque, uint64_t offset, uint64_t end,
                 struct extent *ext); /* NULL: all is data */
};

/* Read-only after hasher_init: any number of threads may use it. */
struct hasher {
  struct hash_source source;
  uint64_t block; /* bytes; the last block of the disk may be shorter */
  uint64_t nr;    /* blocks */
  uint8_t zeros[HASH_SIZE];      /* the hash of a block of zeros */
  uint8_t last_zeros[HASH_SIZE]; /* if the last block is zeros */
};

/* 'block' must be one that hash_block_ok allows. */
void hasher_init (struct hasher *h, const struct hash_source *source,
                  uint64_t block);

/* A power of two within the limits? */
int hash_block_ok (uint64_t block, struct error *err);

/* How many blocks a disk has. */
uint64_t hash_blocks (uint64_t size, uint64_t block);

/* The hashes of blocks first to first+nr-1, which must exist, into 'out'.
 * Holes and zeros are not read.  Memory is bounded whatever 'nr' is.  0, or
 * -1 with errno.
 */
int hasher_read (const struct hasher *h, uint64_t first, uint64_t nr,
                 uint8_t *out);

#endif /* FERRY_HASHER_H */
