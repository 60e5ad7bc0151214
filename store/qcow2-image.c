/* nbdferry - bitmaps in a qcow2 image of their own
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Clusters of 64 KiB, one after the other: header, L1 table (all zeros), for
 * each bitmap its bits (where there are any) and then its table, the
 * directory, refcount blocks, refcount table.  The header is written last.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cleanup.h"
#include "fullio.h"
#include "qcow2-image.h"
#include "qcow2-internal.h"

#define BITS    16
#define CLUSTER (UINT64_C (1) << BITS)
/* Of the disk, for each entry of the L1 table. */
#define L1_SPAN (CLUSTER * (CLUSTER / 8))
/* Counts in a refcount block. */
#define REFS    (CLUSTER / 2)
#define MAX_L1  (UINT64_C (32) << 20) /* bytes; QEMU takes no more */

struct image {
  int fd;
  const char *path;
  uint64_t size;
  uint64_t next; /* the first free cluster */
};

static int
put (struct image *img, const void *buf, size_t len, uint64_t offset,
     struct error *err)
{
  if (full_pwrite (img->fd, buf, len, offset) == -1)
    return error_set (err, errno, "%s: write: %m", img->path);
  return 0;
}

/* Room for that many bytes; its offset. */
static uint64_t
allocate (struct image *img, uint64_t len)
{
  uint64_t offset = img->next << BITS;

  img->next += qcow2_div_up (len, CLUSTER);
  return offset;
}

/* The bits of [start, end) of the disk in a cluster; false if none is set. */
static bool
fill_cluster (uint8_t *buf, const struct bitmap *bm, uint64_t start,
              uint64_t end)
{
  const unsigned shift = bitmap_shift (bm);
  struct range run;
  bool any = false;

  memset (buf, 0, CLUSTER);
  for (uint64_t at = start; at < end && bitmap_next_dirty (bm, at, end, &run);
       at = run.end) {
    uint64_t first = (run.start - start) >> shift,
      last = (run.end - start - 1) >> shift;

    for (uint64_t i = first; i <= last; i++)
      buf[i / 8] |= 1 << i % 8;
    any = true;
  }
  return any;
}

/* Its clusters and its table; where the table is, and how many entries. */
static int
write_bits (struct image *img, const struct bitmap *bm, uint64_t *table,
            uint32_t *entries, struct error *err)
{
  const uint64_t span = CLUSTER * 8 << bitmap_shift (bm);
  const uint64_t n = qcow2_div_up (img->size, span);
  CLEANUP_FREE uint64_t *t = calloc (n ? n : 1, sizeof *t);
  CLEANUP_FREE uint8_t *buf = malloc (CLUSTER);

  if (t == NULL || buf == NULL)
    return error_set (err, ENOMEM, "%s: %m", img->path);
  for (uint64_t i = 0; i < n; i++) {
    uint64_t start = i * span;
    uint64_t end = img->size - start < span ? img->size : start + span;
    uint64_t at;

    if (!fill_cluster (buf, bm, start, end))
      continue;
    at = allocate (img, CLUSTER);
    t[i] = htobe64 (at);
    if (put (img, buf, CLUSTER, at, err) == -1)
      return -1;
  }
  *table = allocate (img, n * 8);
  *entries = n;
  return put (img, t, n * 8, *table, err);
}

static size_t
entry_length (const struct qcow2_image_bitmap *b)
{
  return (QCOW2_BITMAP_ENTRY_LENGTH + strlen (b->name) + 7) & ~(size_t) 7;
}

static int
write_bitmaps (struct image *img, const struct qcow2_image_bitmap *list,
               size_t nr, struct qcow2_bitmaps_extension *ext,
               struct error *err)
{
  CLEANUP_FREE uint8_t *dir = NULL;
  size_t len = 0, at = 0;
  uint64_t offset;

  for (size_t i = 0; i < nr; i++)
    len += entry_length (&list[i]);
  dir = calloc (1, len + 1);
  if (dir == NULL)
    return error_set (err, ENOMEM, "%s: %m", img->path);
  for (size_t i = 0; i < nr; i++) {
    struct qcow2_bitmap_entry e = {
      .flags = htobe32 (list[i].recording ? QCOW2_BITMAP_AUTO : 0),
      .type = QCOW2_BITMAP_DIRTY,
      .granularity_bits = bitmap_shift (list[i].bits),
      .name_size = htobe16 (strlen (list[i].name)),
    };
    uint64_t table = 0;
    uint32_t entries = 0;

    if (write_bits (img, list[i].bits, &table, &entries, err) == -1)
      return error_prefix (err, "bitmap '%s'", list[i].name);
    e.table_offset = htobe64 (table);
    e.table_size = htobe32 (entries);
    memcpy (dir + at, &e, sizeof e);
    memcpy (dir + at + sizeof e, list[i].name, strlen (list[i].name));
    at += entry_length (&list[i]);
  }
  offset = allocate (img, len);
  *ext = (struct qcow2_bitmaps_extension){
    .nb_bitmaps = htobe32 (nr),
    .directory_size = htobe64 (len),
    .directory_offset = htobe64 (offset),
  };
  return put (img, dir, len, offset, err);
}

/* Each cluster is used once, those of the refcounts among them. */
static int
write_refcounts (struct image *img, uint64_t *table, uint64_t *nr_table,
                 struct error *err)
{
  CLEANUP_FREE uint16_t *block = calloc (REFS, sizeof *block);
  CLEANUP_FREE uint64_t *t = NULL;
  const uint64_t used = img->next;
  uint64_t blocks = 0, tables = 0, total, first;

  for (;;) {
    uint64_t b = qcow2_div_up (used + blocks + tables, REFS);
    uint64_t n = qcow2_div_up (b * 8, CLUSTER);

    if (b == blocks && n == tables)
      break;
    blocks = b;
    tables = n;
  }
  total = used + blocks + tables;
  first = allocate (img, blocks << BITS);
  *table = allocate (img, tables << BITS);
  *nr_table = tables;
  t = calloc (tables, CLUSTER);
  if (block == NULL || t == NULL)
    return error_set (err, ENOMEM, "%s: %m", img->path);
  for (uint64_t i = 0; i < blocks; i++) {
    t[i] = htobe64 (first + (i << BITS));
    for (uint64_t k = 0; k < REFS; k++)
      block[k] = i * REFS + k < total ? htobe16 (1) : 0;
    if (put (img, block, CLUSTER, first + (i << BITS), err) == -1)
      return -1;
  }
  return put (img, t, tables << BITS, *table, err);
}

static int
write_header (struct image *img, uint64_t l1, uint64_t l1_size,
              uint64_t reftable, uint64_t nr_reftable, bool bitmaps,
              const struct qcow2_bitmaps_extension *ext, struct error *err)
{
  const struct qcow2_header h = {
    .magic = htobe32 (QCOW2_MAGIC),
    .version = htobe32 (3),
    .cluster_bits = htobe32 (BITS),
    .size = htobe64 (img->size),
    .l1_size = htobe32 (l1_size),
    .l1_table_offset = htobe64 (l1),
    .refcount_table_offset = htobe64 (reftable),
    .refcount_table_clusters = htobe32 (nr_reftable),
    .autoclear_features = htobe64 (bitmaps ? QCOW2_AUTOCLEAR_BITMAPS : 0),
    .refcount_order = htobe32 (4),
    .header_length = htobe32 (QCOW2_HEADER_LENGTH),
  };
  uint8_t buf[512] = { 0 };

  memcpy (buf, &h, sizeof h);
  if (bitmaps) {
    put_be32 (buf + sizeof h, QCOW2_EXT_BITMAPS);
    put_be32 (buf + sizeof h + 4, sizeof *ext);
    memcpy (buf + sizeof h + 8, ext, sizeof *ext);
  }
  return put (img, buf, sizeof buf, 0, err);
}

int
qcow2_write_image (int fd, const char *path, uint64_t size,
                   const struct qcow2_image_bitmap *list, size_t nr,
                   struct error *err)
{
  struct image img = { .fd = fd, .path = path, .size = size, .next = 1 };
  struct qcow2_bitmaps_extension ext = { 0 };
  uint64_t l1_size = qcow2_div_up (size, L1_SPAN), l1, reftable, nr_reftable;

  if (l1_size * 8 > MAX_L1)
    return error_set (err, EFBIG, "%s: a disk of %" PRIu64 " bytes is too "
                      "large for a qcow2 image", path, size);
  if (nr > QCOW2_MAX_BITMAPS)
    return error_set (err, E2BIG, "%s: %zu bitmaps are too many for a qcow2 "
                      "image", path, nr);
  l1 = allocate (&img, l1_size ? l1_size * 8 : 8);
  if ((nr > 0 && write_bitmaps (&img, list, nr, &ext, err) == -1) ||
      write_refcounts (&img, &reftable, &nr_reftable, err) == -1)
    return -1;
  if (ftruncate (fd, img.next << BITS) == -1 || fsync (fd) == -1)
    return error_set (err, errno, "%s: write: %m", path);
  if (write_header (&img, l1, l1_size, reftable, nr_reftable, nr > 0, &ext,
                    err) == -1)
    return -1;
  if (fsync (fd) == -1 || sync_directory_of (path) == -1)
    return error_set (err, errno, "%s: fsync: %m", path);
  return 0;
}
