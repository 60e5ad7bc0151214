/* nbdferry - one of two disks that are compared
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A side is a raw file, a block device, an export of an NBD server, or a chain
 * of archives (side-archive.h), and what is asked of it are the hashes of its
 * blocks.  A server of ours computes them itself (its export NAME@hash/SIZE,
 * docs/hash.md), so that no data moves; of any other the data is read, and
 * hashed here.
 */
#ifndef FERRY_SIDE_H
#define FERRY_SIDE_H

#include <stdbool.h>

#include "client.h"
#include "hasher.h"

/* Read-only after side_open. */
struct side {
  const char *where;  /* as the caller has it */
  struct disk *disk;  /* whose data is read, unless by_hash */
  struct archive_side *archive; /* instead: to be read in order, by one thread
                                   alone */
  bool owned;         /* the disk is ours to close */
  bool is_uri;
  bool by_hash;       /* the server has the hashes */
  uint64_t size;      /* bytes */
  uint64_t block;     /* of the hashes */
  char *hash_export;  /* its name, if by_hash */
  const struct stop *stop;
  struct hasher hasher; /* unless by_hash; for what is clipped always */
};

/* 'where' and 'stop' (may be NULL: then nothing ends a wait but time) must
 * outlive the side.  A file is opened for reading, and locked as QEMU locks
 * it.  'connections' is how many threads are going to read.  0, or -1 (then
 * there is nothing to close).
 */
int side_open (struct side *s, const char *where, uint64_t block,
               unsigned connections, const struct stop *stop,
               struct error *err);

/* The same for a disk that is open, and stays the caller's. */
int side_of_disk (struct side *s, const char *where, struct disk *d,
                  uint64_t block, const struct stop *stop, struct error *err);

/* Have the side end at 'size' bytes, which must not be more than it has: a last
 * block that has become shorter by that is read, whoever has the hashes.
 */
void side_clip (struct side *s, uint64_t size);

/* All that was needed of it was read: 0; -1 if something was wrong with it that
 * was not seen before.
 */
int side_finish (struct side *s, struct error *err);

void side_close (struct side *s);

/* What one thread has to ask a side with. */
struct side_reader {
  const struct side *side;
  struct client *client; /* if by_hash */
};

/* 0, or -1.  side_reader_close is allowed after either, and twice. */
int side_reader_open (struct side_reader *r, const struct side *s,
                      struct error *err);
void side_reader_close (struct side_reader *r);

/* The hashes of blocks first to first+nr-1, which must exist; nr at most
 * SIDE_AT_ONCE.  0, or -1.
 */
#define SIDE_AT_ONCE 4096
int side_read_hashes (struct side_reader *r, uint64_t first, uint64_t nr,
                      uint8_t *out, struct error *err);

#endif /* FERRY_SIDE_H */
