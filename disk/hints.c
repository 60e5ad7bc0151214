/* nbdferry - partitions and file systems of a disk
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * libblkid reads from a file descriptor.  So that every kind of disk can be
 * looked at, it is given a sparse file in memory that has the disk's size and
 * the places where it looks: both ends of the disk, the chain of extended
 * partition tables, and the start of each partition.
 *
 * What overlaps is not believed, none of it: what is free in one file system
 * may be another's data.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <blkid.h>

#include "cleanup.h"
#include "hints.h"

#define SECTOR    512
#define ENDS      (1 << 20)   /* of the disk */
#define HEAD      (256 << 10) /* of a partition */
#define STEP      (64 << 10)
#define MAX_CHAIN 128         /* extended partition tables */

struct look {
  struct disk *disk;
  int fd; /* the copy */
  unsigned sector;
  struct hints *h;
};

/* ---- the copy ---- */

static int
copy (struct look *l, uint64_t from, uint64_t len, struct error *err)
{
  CLEANUP_FREE char *buf = malloc (STEP);
  uint64_t end, n;

  if (buf == NULL)
    return error_set (err, ENOMEM, "%m");
  if (from > l->disk->size)
    return 0;
  end = len < l->disk->size - from ? from + len : l->disk->size;
  for (; from < end; from += n) {
    n = end - from < STEP ? end - from : STEP;
    if (l->disk->ops->pread (l->disk, buf, n, from) == -1)
      return error_set (err, errno, "read at %" PRIu64 ": %m", from);
    if (!disk_is_zero (buf, n) &&
        pwrite (l->fd, buf, n, from) != (ssize_t) n)
      return error_set (err, errno ? errno : EIO, "copy to memory: %m");
  }
  return 0;
}

static uint32_t
le32 (const uint8_t *p)
{
  return p[0] | p[1] << 8 | p[2] << 16 | (uint32_t) p[3] << 24;
}

/* The start of the first extended partition of a table, in sectors; 0: none. */
static uint32_t
extended (const uint8_t *table)
{
  if (table[510] != 0x55 || table[511] != 0xaa)
    return 0;
  for (const uint8_t *e = table + 446; e < table + 510; e += 16)
    if (e[4] == 0x05 || e[4] == 0x0f || e[4] == 0x85)
      return le32 (e + 8);
  return 0;
}

/* Logical partitions are a chain of tables, each of which has the next one's
 * place from the extended partition's start.
 */
static int
copy_chain (struct look *l, struct error *err)
{
  uint8_t table[SECTOR];
  uint64_t base = 0, at = 0;
  uint32_t next;

  for (unsigned i = 0; i < MAX_CHAIN; i++) {
    if (at > l->disk->size - SECTOR)
      return 0;
    if (l->disk->ops->pread (l->disk, table, SECTOR, at) == -1)
      return error_set (err, errno, "read at %" PRIu64 ": %m", at);
    if (copy (l, at, SECTOR, err) == -1)
      return -1;
    next = extended (table);
    if (next == 0)
      return 0;
    at = base + (uint64_t) next * SECTOR;
    if (base == 0)
      base = at;
  }
  return 0;
}

/* ---- what libblkid says ---- */

static const char *
value (blkid_probe pr, const char *name)
{
  const char *data;

  return blkid_probe_lookup_value (pr, name, &data, NULL) == 0 ? data : NULL;
}

static struct hints_fs *
add (struct look *l, uint64_t offset, uint64_t size, const char *type)
{
  struct hints_fs *fs;

  if (l->h->nr == HINTS_MAX_FS)
    return NULL;
  fs = &l->h->fs[l->h->nr++];
  *fs = (struct hints_fs){ .offset = offset, .size = size };
  snprintf (fs->type, sizeof fs->type, "%s", type ? type : "unknown");
  return fs;
}

static void __attribute__ ((format (printf, 2, 3)))
refuse (struct hints_fs *fs, const char *fmt, ...)
{
  va_list args;

  if (fs == NULL || fs->reason[0] != '\0')
    return; /* the first is told */
  va_start (args, fmt);
  vsnprintf (fs->reason, sizeof fs->reason, fmt, args);
  va_end (args);
}

static blkid_probe
probe (struct look *l, uint64_t offset, uint64_t size, bool tables)
{
  blkid_probe pr = blkid_new_probe ();

  if (pr == NULL)
    return NULL;
  if (blkid_probe_set_device (pr, l->fd, offset, size) == -1) {
    blkid_free_probe (pr);
    return NULL;
  }
  blkid_probe_set_sectorsize (pr, l->sector);
  blkid_probe_enable_superblocks (pr, 1);
  blkid_probe_set_superblocks_flags (pr, BLKID_SUBLKS_TYPE |
                                     BLKID_SUBLKS_USAGE);
  blkid_probe_enable_partitions (pr, tables);
  return pr;
}

static bool
is_ext (const char *type)
{
  return strcmp (type, "ext2") == 0 || strcmp (type, "ext3") == 0 ||
         strcmp (type, "ext4") == 0;
}

/* What is in one place, which has no table of partitions. */
static struct hints_fs *
add_found (struct look *l, uint64_t offset, uint64_t size, int found,
           const char *type)
{
  struct hints_fs *fs = add (l, offset, size, found == 0 ? type : NULL);

  if (found == -2)
    refuse (fs, "it has several signatures: shipped whole");
  else if (found != 0 || type == NULL)
    refuse (fs, "no file system was found in it: shipped whole");
  else if (!is_ext (type))
    refuse (fs, "%s is not known: shipped whole", type);
  return fs;
}

static int
look_at_partition (struct look *l, uint64_t offset, uint64_t size,
                   struct error *err)
{
  blkid_probe pr;
  int found;

  if (copy (l, offset, size < HEAD ? size : HEAD, err) == -1)
    return -1;
  pr = probe (l, offset, size, false);
  if (pr == NULL)
    return error_set (err, ENOMEM, "libblkid cannot look at it");
  found = blkid_do_safeprobe (pr);
  add_found (l, offset, size, found, value (pr, "TYPE"));
  blkid_free_probe (pr);
  return 0;
}

static int
look_at_partitions (struct look *l, blkid_probe pr, struct error *err)
{
  blkid_partlist list = blkid_probe_get_partitions (pr);
  int n = list ? blkid_partlist_numof_partitions (list) : 0;

  for (int i = 0; i < n && i < HINTS_MAX_FS; i++) {
    blkid_partition p = blkid_partlist_get_partition (list, i);
    uint64_t start = blkid_partition_get_start (p);
    uint64_t size = blkid_partition_get_size (p);

    if (blkid_partition_is_extended (p))
      continue;
    if (size == 0 || start >= l->disk->size / SECTOR ||
        size > l->disk->size / SECTOR - start) {
      refuse (add (l, start * SECTOR, size * SECTOR, NULL),
              "it is not all on the disk: shipped whole");
      continue;
    }
    if (look_at_partition (l, start * SECTOR, size * SECTOR, err) == -1)
      return -1;
  }
  return 0;
}

/* The disk itself.  1: something was found; 0; -1. */
static int
look_at_disk (struct look *l, struct error *err)
{
  blkid_probe pr = probe (l, 0, l->disk->size, true);
  const char *table;
  struct hints_fs *fs;
  int found, r = 1;

  if (pr == NULL)
    return error_set (err, ENOMEM, "libblkid cannot look at it");
  found = blkid_do_safeprobe (pr);
  table = value (pr, "PTTYPE");
  if (found != 0 && found != -2)
    r = 0;
  else if (found == 0 && table && value (pr, "TYPE") == NULL)
    r = look_at_partitions (l, pr, err) == -1 ? -1 : 1;
  else {
    fs = add_found (l, 0, l->disk->size, found, value (pr, "TYPE"));
    if (table)
      refuse (fs, "there is also a table of partitions (%s): shipped whole",
              table);
  }
  blkid_free_probe (pr);
  return r;
}

/* ---- all of it ---- */

static void
refuse_overlaps (struct hints *h)
{
  for (size_t i = 0; i < h->nr; i++)
    for (size_t k = 0; k < h->nr; k++) {
      struct hints_fs *a = &h->fs[i];
      const struct hints_fs *b = &h->fs[k];

      if (i != k && a->offset < b->offset + b->size &&
          b->offset < a->offset + a->size)
        refuse (a, "it overlaps another partition: shipped whole");
    }
}

static int
look_everywhere (struct look *l, struct error *err)
{
  static const unsigned sectors[] = { 512, 4096 }; /* for a GPT */
  uint64_t tail = l->disk->size < ENDS ? 0 : l->disk->size - ENDS;
  int r = 0;

  if (ftruncate (l->fd, l->disk->size) == -1)
    return error_set (err, errno, "a file of its size in memory: %m");
  if (copy (l, 0, ENDS, err) == -1 || copy (l, tail, ENDS, err) == -1 ||
      copy_chain (l, err) == -1)
    return -1;
  for (size_t i = 0; r == 0 && i < sizeof sectors / sizeof sectors[0]; i++) {
    l->sector = sectors[i];
    r = look_at_disk (l, err);
  }
  if (r == 0)
    add_found (l, 0, l->disk->size, 1, NULL);
  return r == -1 ? -1 : 0;
}

int
hints_read (struct disk *d, struct bitmap *vacant, struct hints *h,
            bool (*stop) (void *opaque), void *opaque, struct error *err)
{
  struct look l = { .disk = d, .h = h };
  CLEANUP_CLOSE int fd = memfd_create ("hints", MFD_CLOEXEC);

  h->nr = 0;
  if (d->size < SECTOR)
    return 0;
  if (fd == -1)
    return error_set (err, errno, "a file in memory: %m");
  l.fd = fd;
  if (look_everywhere (&l, err) == -1)
    return -1;
  refuse_overlaps (h);
  for (size_t i = 0; i < h->nr; i++) {
    int r;

    if (h->fs[i].reason[0] != '\0')
      continue;
    r = hints_ext (d, vacant, &h->fs[i], stop, opaque);
    if (r == -1)
      return error_set (err, ECANCELED, "cancelled");
    h->fs[i].known = r == 1;
  }
  return 0;
}
