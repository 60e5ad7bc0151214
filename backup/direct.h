/* nbdferry - reading the disk of a backup without asking the daemon
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Whoever copies a backup on the daemon's own machine can get two descriptors
 * from it: the disk, for reading, and the map of what is not as it was any
 * more.  So what nobody has overwritten needs no trip through the daemon.
 *
 * The map is memory that both have; the daemon alone can change it.  It sets a
 * granule's bit before the first write to it; so who has read a granule, and
 * then finds its bit clear, has read the old content.  What has its bit set is
 * to be read from the daemon.  When the backup has failed, or ended, 'over' is
 * set before the first write that sets no bit any more.
 *
 * When the daemon has died, nobody sets anything: what was read counts only
 * once the daemon has answered a command on the connection on which the backup
 * was begun.
 */
#ifndef FERRY_DIRECT_H
#define FERRY_DIRECT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bitmap.h"
#include "error.h"

/* What the map begins with; bit i % 8 of byte i / 8 behind it is granule i. */
struct direct_head {
  char magic[8];
  uint64_t size; /* of the disk, bytes */
  uint64_t shift; /* log2 of a granule */
  atomic_uint over;
};

#define DIRECT_MAGIC "ferrymap"
#define DIRECT_BITS  4096 /* where they begin */

/* Bytes of the map of a disk. */
static inline uint64_t
direct_map_len (uint64_t size, unsigned shift)
{
  return DIRECT_BITS + bitmap_words_for (size, shift) * sizeof (uint64_t);
}

struct direct;

/* Both descriptors are taken over, also on error. */
struct direct *direct_open (int disk_fd, int map_fd, uint64_t size,
                            struct error *err);
void direct_close (struct direct *d); /* NULL is allowed */

/* Advice: that will be read soon. */
void direct_expect (struct direct *d, uint64_t offset, uint64_t len);

/* Read what is there now.  0, or -1 with errno. */
int direct_pread (struct direct *d, void *buf, size_t count, uint64_t offset);

/* After that: the first run in [from, to) whose old content may not be what was
 * read; once all is over, that is everything.  False if there is none.
 */
bool direct_next_gone (struct direct *d, uint64_t from, uint64_t to,
                       struct range *run);

#endif /* FERRY_DIRECT_H */
