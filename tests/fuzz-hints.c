/* nbdferry - fuzz what is read of file systems and partition tables
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The input describes a disk: its size in units of 16 KiB (two bytes, big-
 * endian), then pieces of it, each its offset (four bytes), its length (two)
 * and its bytes; all else is zeros.  Whatever is on it, only granules within
 * a file system that is believed may be vacant, and nothing is written.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "hints.h"

#define UNIT     16384
#define MAX_SIZE (64 << 20)

struct memory {
  struct disk disk;
  uint8_t *data;
};

int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

static void
must (bool ok)
{
  if (!ok)
    abort ();
}

static int
memory_pread (struct disk *d, void *buf, size_t count, uint64_t offset)
{
  const struct memory *m = (struct memory *) d;

  must (offset <= d->size && count <= d->size - offset);
  memcpy (buf, m->data + offset, count);
  return 0;
}

/* All other operations would be a bug: they are NULL. */
static const struct disk_ops memory_ops = { .pread = memory_pread };

static void
place (struct memory *m, const uint8_t *p, size_t size)
{
  while (size >= 6) {
    uint64_t at = (uint32_t) p[0] << 24 | p[1] << 16 | p[2] << 8 | p[3];
    size_t len = p[4] << 8 | p[5];

    p += 6;
    size -= 6;
    if (len > size)
      len = size;
    if (at < m->disk.size)
      memcpy (m->data + at, p,
              len < m->disk.size - at ? len : m->disk.size - at);
    p += len;
    size -= len;
  }
}

static void
check (const struct hints *h, const struct bitmap *vacant)
{
  struct range run = { 0, 0 };
  size_t i;

  must (h->nr <= HINTS_MAX_FS);
  for (i = 0; i < h->nr; i++)
    must (h->fs[i].known == (h->fs[i].reason[0] == '\0'));
  while (bitmap_next_dirty (vacant, run.end, UINT64_MAX, &run)) {
    for (i = 0; i < h->nr; i++)
      if (h->fs[i].known && run.start >= h->fs[i].offset &&
          run.start < h->fs[i].offset + h->fs[i].size)
        break;
    must (i < h->nr);
    if (run.end > h->fs[i].offset + h->fs[i].size)
      run.end = h->fs[i].offset + h->fs[i].size;
  }
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  struct memory m = { .disk = { .ops = &memory_ops } };
  static struct hints h;
  struct bitmap *vacant;
  struct error err;

  if (size < 2)
    return 0;
  m.disk.size = (uint64_t) (data[0] << 8 | data[1]) * UNIT;
  if (m.disk.size > MAX_SIZE || m.disk.size == 0)
    return 0;
  m.data = calloc (1, m.disk.size);
  vacant = bitmap_new (m.disk.size, 12, NULL);
  must (m.data && vacant);
  place (&m, data + 2, size - 2);
  if (hints_read (&m.disk, vacant, &h, NULL, NULL, &err) == 0)
    check (&h, vacant);
  bitmap_free (vacant);
  free (m.data);
  return 0;
}
