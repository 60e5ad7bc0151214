/* nbdferry - what a pack holds, written to a disk
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>

#include "disk.h"
#include "pack-disk.h"

uint64_t
pack_length (const struct pack *p)
{
  uint64_t sum = 0;

  for (size_t i = 0; i < p->nr; i++)
    sum += p->extents[i].length;
  return sum;
}

int
pack_write (const struct pack *p, struct disk *d, struct error *err)
{
  const uint8_t *from = p->raw;
  int r;

  for (size_t i = 0; i < p->nr; i++) {
    const struct packet_extent *e = &p->extents[i];

    if (e->type == EXTENT_DATA) {
      r = d->ops->pwrite (d, from, e->length, e->offset, 0);
      from += e->length;
    }
    else
      r = d->ops->zero (d, e->length, e->offset, DISK_MAY_TRIM);
    if (r == -1)
      return error_set (err, errno, "%s %" PRIu64 " bytes at %" PRIu64
                        ": %m", e->type == EXTENT_DATA ? "write" : "zero",
                        e->length, e->offset);
  }
  return 0;
}
