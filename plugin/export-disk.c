/* nbdferry - the export that is a disk
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "export.h"
#include "house.h"

struct disk_export {
  struct export export;
  struct drive *drive;
  int readonly;
  struct fence *fence; /* NULL for an ordinary client */
  uint64_t epoch;
  struct uuid session;
  atomic_bool committed; /* the disk was handed over by that session */
};

/* A forwarded client's request of an older connection is turned away, so that
 * the source sends it again over a new one; so is one that comes before the
 * disk was handed over.
 */
static int
enter (struct disk_export *x)
{
  if (x->fence && !x->committed) {
    if (!incoming_is_from (x->drive, &x->session)) {
      errno = ESHUTDOWN;
      return -1;
    }
    x->committed = true;
  }
  if (x->fence && fence_enter (x->fence, x->epoch) == -1) {
    errno = ESHUTDOWN;
    return -1;
  }
  return 0;
}

/* The end of each request: one message for what went wrong. */
static int
leave (struct disk_export *x, int r, const char *what, uint64_t offset)
{
  int err = errno;
  bool said = false;

  if (x->fence)
    fence_leave (x->fence, x->epoch);
  /* That the store has failed was said once; it stops no reads. */
  if (err == EIO && drive_failure (x->drive) && strcmp (what, "read") != 0)
    said = true;
  if (r == -1 && !said && err != ESHUTDOWN && err != EOPNOTSUPP) {
    errno = err;
    nbdkit_error ("%s %s at %" PRIu64 ": %m", what, x->drive->path, offset);
  }
  errno = err;
  return r;
}

static int64_t
disk_size (struct export *e)
{
  return ((struct disk_export *) e)->drive->size;
}

static int
disk_can_write (struct export *e)
{
  struct disk_export *x = (struct disk_export *) e;

  return !x->readonly && !x->drive->disk->readonly;
}

static int
disk_is_rotational (struct export *e)
{
  return ((struct disk_export *) e)->drive->disk->rotational;
}

static int
disk_can_extents (struct export *e)
{
  return ((struct disk_export *) e)->drive->disk->can_extents;
}

static const char *
disk_description (struct export *e)
{
  struct disk_export *x = (struct disk_export *) e;
  char boot[37];

  if (x->fence == NULL)
    return nbdkit_strdup_intern (x->drive->path);
  /* Who forwards must know when acknowledged writes may have been lost. */
  journal_boot_id (boot);
  return nbdkit_printf_intern ("%s, boot %s", x->drive->path, boot);
}

static int
disk_pread (struct export *e, void *buf, uint32_t count, uint64_t offset)
{
  struct disk_export *x = (struct disk_export *) e;

  if (enter (x) == -1)
    return -1;
  return leave (x, drive_pread (x->drive, buf, count, offset), "read",
                offset);
}

static int
disk_pwrite (struct export *e, const void *buf, uint32_t count,
             uint64_t offset, unsigned flags)
{
  struct disk_export *x = (struct disk_export *) e;

  if (enter (x) == -1)
    return -1;
  return leave (x, drive_pwrite (x->drive, buf, count, offset, flags),
                "write", offset);
}

static int
disk_flush (struct export *e)
{
  struct disk_export *x = (struct disk_export *) e;

  if (enter (x) == -1)
    return -1;
  return leave (x, drive_flush (x->drive), "flush", 0);
}

static int
disk_trim (struct export *e, uint32_t count, uint64_t offset, unsigned flags)
{
  struct disk_export *x = (struct disk_export *) e;

  if (enter (x) == -1)
    return -1;
  return leave (x, drive_trim (x->drive, count, offset, flags), "trim",
                offset);
}

static int
disk_zero (struct export *e, uint32_t count, uint64_t offset, unsigned flags)
{
  struct disk_export *x = (struct disk_export *) e;

  if (enter (x) == -1)
    return -1;
  return leave (x, drive_zero (x->drive, count, offset, flags), "zero",
                offset);
}

static int
disk_cache (struct export *e, uint32_t count, uint64_t offset)
{
  struct disk_export *x = (struct disk_export *) e;

  if (enter (x) == -1)
    return -1;
  return leave (x, drive_cache (x->drive, count, offset), "cache", offset);
}

uint32_t
export_extent_type (enum extent_type type)
{
  static const uint32_t nbdkit_type[] = {
    [EXTENT_DATA] = 0,
    [EXTENT_ZERO] = NBDKIT_EXTENT_ZERO,
    [EXTENT_HOLE] = NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO,
  };

  return nbdkit_type[type];
}

static int
disk_extents (struct export *e, uint32_t count, uint64_t offset, bool one,
              struct nbdkit_extents *extents)
{
  struct disk_export *x = (struct disk_export *) e;
  uint64_t end = offset + count;
  int r = 0;

  if (enter (x) == -1)
    return -1;
  while (r == 0 && offset < end) {
    struct extent ext;

    r = drive_extent (x->drive, offset, end, &ext);
    if (r == -1)
      break;
    r = nbdkit_add_extent (extents, ext.start, ext.end - ext.start,
                           export_extent_type (ext.type));
    offset = ext.end;
    if (one)
      break;
  }
  return leave (x, r, "map", offset);
}

static void
disk_close (struct export *e)
{
  free (e);
}

static const struct export_ops disk_export_ops = {
  .size = disk_size,
  .can_write = disk_can_write,
  .is_rotational = disk_is_rotational,
  .can_extents = disk_can_extents,
  .description = disk_description,
  .pread = disk_pread,
  .pwrite = disk_pwrite,
  .flush = disk_flush,
  .trim = disk_trim,
  .zero = disk_zero,
  .cache = disk_cache,
  .extents = disk_extents,
  .close = disk_close,
};

static struct disk_export *
new_export (struct drive *d, int readonly)
{
  struct disk_export *x = calloc (1, sizeof *x);

  if (x == NULL) {
    nbdkit_error ("calloc: %m");
    return NULL;
  }
  x->export.ops = &disk_export_ops;
  x->drive = d;
  x->readonly = readonly;
  return x;
}

struct export *
export_open_disk (struct drive *d, int readonly)
{
  struct disk_export *x;
  struct error err;

  if (drive_may_serve (d, &err) == -1) {
    nbdkit_error ("%s", err.msg);
    return NULL;
  }
  x = new_export (d, readonly);
  return x ? &x->export : NULL;
}

struct export *
export_open_forward (struct drive *d, int readonly,
                     const struct uuid *session, uint64_t epoch)
{
  struct disk_export *x = new_export (d, readonly);

  if (x == NULL)
    return NULL;
  x->fence = incoming_fence (house.incoming, d);
  x->epoch = epoch;
  x->session = *session;
  return &x->export;
}
