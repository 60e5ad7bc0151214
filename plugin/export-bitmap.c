/* nbdferry - the export that is a disk with a bitmap as its allocation map
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * It reads as the disk does now.  What the bitmap does not have as dirty is a
 * hole; what it has, and reads as zeros, is not.  The bitmap is looked up for
 * each request, since it may be removed at any time.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "cleanup.h"
#include "export.h"

struct bitmap_export {
  struct export export;
  struct drive *drive;
  uint64_t id; /* of the bitmap */
};

static int64_t
bitmap_export_size (struct export *e)
{
  return ((struct bitmap_export *) e)->drive->size;
}

static int
bitmap_export_is_rotational (struct export *e)
{
  return ((struct bitmap_export *) e)->drive->disk->rotational;
}

static const char *
bitmap_export_description (struct export *e)
{
  return nbdkit_printf_intern ("disk '%s', of which only what is dirty in a "
                               "bitmap is allocated",
                               ((struct bitmap_export *) e)->drive->name);
}

static int
bitmap_export_pread (struct export *e, void *buf, uint32_t count,
                     uint64_t offset)
{
  struct bitmap_export *x = (struct bitmap_export *) e;
  int r = drive_pread (x->drive, buf, count, offset);

  if (r == -1 && errno != ESHUTDOWN) {
    int saved = errno;

    nbdkit_error ("read %s at %" PRIu64 ": %m", x->drive->path, offset);
    errno = saved;
  }
  return r;
}

/* Where the first dirty run lies, at 'from' or after; run->start = to if there
 * is none.  -1 if there is no such bitmap any more.
 */
static int
next_dirty (struct bitmap_export *x, uint64_t from, uint64_t to,
            struct range *run)
{
  struct drive *d = x->drive;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  for (size_t i = 0; i < d->nr_bitmaps && !drive_is_elsewhere (d); i++)
    if (d->bitmaps[i]->id == x->id && d->bitmaps[i]->bits) {
      if (!bitmap_next_dirty (d->bitmaps[i]->bits, from, to, run))
        *run = (struct range){ to, to };
      return 0;
    }
  return -1;
}

/* What the disk has at 'offset', cut at 'end'.  How far data goes is expensive
 * to find on some file systems (disk/file.c): within one answer it is asked
 * once, and kept in *known.
 */
static int
map_disk (struct drive *d, uint64_t offset, uint64_t end,
          struct extent *known, struct extent *ext)
{
  if (offset < known->start || offset >= known->end) {
    if (drive_extent (d, offset, d->size, ext) == -1)
      return -1;
    if (ext->type == EXTENT_DATA)
      *known = *ext;
  }
  else
    *ext = (struct extent){ offset, known->end, EXTENT_DATA };
  if (ext->end > end)
    ext->end = end;
  return 0;
}

/* What lies at 'offset', cut at 'end'. */
static int
find_extent (struct bitmap_export *x, uint64_t offset, uint64_t end,
             struct extent *known, struct extent *ext)
{
  struct range run;

  if (next_dirty (x, offset, end, &run) == -1) {
    nbdkit_error ("the bitmap that this export of disk '%s' shows is not "
                  "there any more", x->drive->name);
    errno = EIO;
    return -1;
  }
  if (run.start > offset) {
    *ext = (struct extent){ offset, run.start, EXTENT_HOLE };
    return 0;
  }
  if (!x->drive->disk->can_extents) {
    *ext = (struct extent){ offset, run.end, EXTENT_DATA };
    return 0;
  }
  if (map_disk (x->drive, offset, run.end, known, ext) == -1) {
    int saved = errno;

    nbdkit_error ("map %s at %" PRIu64 ": %m", x->drive->path, offset);
    errno = saved;
    return -1;
  }
  if (ext->type == EXTENT_HOLE)
    ext->type = EXTENT_ZERO;
  return 0;
}

static int
bitmap_export_extents (struct export *e, uint32_t count, uint64_t offset,
                       bool one, struct nbdkit_extents *extents)
{
  struct bitmap_export *x = (struct bitmap_export *) e;
  uint64_t end = offset + count;
  struct extent known = { 0, 0, EXTENT_DATA };

  while (offset < end) {
    struct extent ext;

    if (find_extent (x, offset, end, &known, &ext) == -1 ||
        nbdkit_add_extent (extents, ext.start, ext.end - ext.start,
                           export_extent_type (ext.type)) == -1)
      return -1;
    offset = ext.end;
    if (one)
      break;
  }
  return 0;
}

static void
bitmap_export_close (struct export *e)
{
  free (e);
}

static const struct export_ops bitmap_export_ops = {
  .size = bitmap_export_size,
  .is_rotational = bitmap_export_is_rotational,
  .description = bitmap_export_description,
  .pread = bitmap_export_pread,
  .extents = bitmap_export_extents,
  .close = bitmap_export_close,
};

/* The bitmap's id, or 0 if there is none that could be shown. */
static uint64_t
find_id (struct drive *d, const char *name)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);
  const struct named_bitmap *nb = drive_find_bitmap (d, name);

  return nb && nb->bits && !nb->incoming ? nb->id : 0;
}

struct export *
export_open_bitmap (struct drive *d, const char *text)
{
  CLEANUP_FREE char *name = export_decode (text);
  struct bitmap_export *x;
  struct error err;
  uint64_t id;

  if (drive_may_serve (d, &err) == -1) {
    nbdkit_error ("%s", err.msg);
    errno = err.errnum;
    return NULL;
  }
  id = name ? find_id (d, name) : 0;
  if (id == 0) {
    nbdkit_error ("disk '%s' has no bitmap '%s' that could be shown", d->name,
                  name ? name : text);
    errno = ENOENT;
    return NULL;
  }
  x = calloc (1, sizeof *x);
  if (x == NULL) {
    nbdkit_error ("calloc: %m");
    return NULL;
  }
  x->export.ops = &bitmap_export_ops;
  x->drive = d;
  x->id = id;
  return &x->export;
}

int
export_list_bitmaps (struct drive *d, struct nbdkit_exports *exports)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  for (size_t i = 0; i < d->nr_bitmaps && d->mode == DRIVE_ACTIVE; i++) {
    const struct named_bitmap *nb = d->bitmaps[i];
    CLEANUP_FREE char *name = NULL;

    if (nb->bits == NULL || nb->incoming)
      continue;
    name = export_encode (nb->name);
    if (name == NULL ||
        nbdkit_add_export (
          exports, nbdkit_printf_intern ("%s@bitmap/%s", d->name, name),
          "of which only what is dirty in this bitmap is allocated") == -1)
      return -1;
  }
  return 0;
}
