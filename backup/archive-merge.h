/* nbdferry - a chain of archives as one
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Each archive is in order of offsets, so that all of them are gone through
 * side by side; where several speak of the same place the last one is right,
 * and the others' data is not even read.  Memory is bounded: the extents of
 * one packet of each archive, and the data of a few packets.
 */
#ifndef FERRY_ARCHIVE_MERGE_H
#define FERRY_ARCHIVE_MERGE_H

#include "archive.h"
#include "disk.h"

struct archive_merge;

struct merge_piece {
  uint64_t offset, length; /* bytes of the disk */
  enum extent_type type;
  const uint8_t *data;     /* 'length' bytes of EXTENT_DATA, until the next
                              call; at most ARCHIVE_MAX_RAW */
};

/* The readers, in the order of the chain (archive_chain_check) and all at
 * their beginning, stay the caller's; if there are several they must be lazy.
 * NULL on error.
 */
struct archive_merge *archive_merge_open (struct archive_reader **readers,
                                          size_t nr, struct error *err);
void archive_merge_free (struct archive_merge *m); /* NULL is allowed */

/* The next piece, in order of offsets: 1; 0: that was all, and every archive
 * was read to its end; -1.  The size of the disk is that of the last archive.
 * If the first is full there is no gap between the pieces.
 */
int archive_merge_next (struct archive_merge *m, struct merge_piece *piece,
                        struct error *err);

#endif /* FERRY_ARCHIVE_MERGE_H */
