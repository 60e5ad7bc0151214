/* nbdferry - the export that is the hashes of a disk
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Nothing is kept: each read computes the hashes of the blocks that it asks
 * for (docs/hash.md).
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
#include "hasher.h"
#include "views.h"

/* How many hashes are computed at once: 16 KiB of them. */
#define AT_ONCE 1024

struct hash_export {
  struct export export;
  struct drive *drive;
  struct view *view; /* of a backup; NULL: the disk itself */
  struct hasher hasher;
};

static int64_t
hash_size (struct export *e)
{
  return ((struct hash_export *) e)->hasher.nr * HASH_SIZE;
}

static const char *
hash_description (struct export *e)
{
  struct hash_export *x = (struct hash_export *) e;

  return nbdkit_printf_intern ("XXH3-128 of each %" PRIu64 " bytes of %s",
                               x->hasher.block, x->drive->path);
}

static int
hash_pread (struct export *e, void *buf, uint32_t count, uint64_t offset)
{
  struct hash_export *x = (struct hash_export *) e;
  uint8_t hashes[AT_ONCE * HASH_SIZE], *out = buf;

  while (count > 0) {
    uint64_t first = offset / HASH_SIZE, skip = offset % HASH_SIZE;
    uint64_t nr = (skip + count + HASH_SIZE - 1) / HASH_SIZE;
    size_t n;

    if (nr > AT_ONCE)
      nr = AT_ONCE;
    if (hasher_read (&x->hasher, first, nr, hashes) == -1) {
      if (errno != ESHUTDOWN)
        nbdkit_error ("hash %s at %" PRIu64 ": %m", x->drive->path,
                      first * x->hasher.block);
      return -1;
    }
    n = nr * HASH_SIZE - skip;
    if (n > count)
      n = count;
    memcpy (out, hashes + skip, n);
    out += n;
    offset += n;
    count -= n;
  }
  return 0;
}

static void
hash_close (struct export *e)
{
  view_unref (((struct hash_export *) e)->view);
  free (e);
}

static const struct export_ops hash_export_ops = {
  .size = hash_size,
  .description = hash_description,
  .pread = hash_pread,
  .close = hash_close,
};

/* The block's size as the export's name has it; 0, reported, if it is none. */
static uint64_t
parse_block (const char *text)
{
  int64_t block = nbdkit_parse_size (text);
  struct error err;

  if (block == -1)
    return 0;
  if (hash_block_ok (block, &err) == 0)
    return block;
  nbdkit_error ("%s", err.msg);
  errno = EINVAL;
  return 0;
}

/* 'view' is taken over. */
static struct export *
open_source (const struct hash_source *source, struct drive *d,
             struct view *view, const char *block_text)
{
  uint64_t block = parse_block (block_text);
  struct hash_export *x = NULL;

  if (block > 0) {
    x = calloc (1, sizeof *x);
    if (x == NULL)
      nbdkit_error ("calloc: %m");
  }
  if (x == NULL) {
    view_unref (view);
    return NULL;
  }
  x->export.ops = &hash_export_ops;
  x->drive = d;
  x->view = view;
  hasher_init (&x->hasher, source, block);
  return &x->export;
}

/* ---- of a disk ---- */

static int
read_drive (void *opaque, void *buf, size_t count, uint64_t offset)
{
  return drive_pread (opaque, buf, count, offset);
}

static int
drive_map (void *opaque, uint64_t offset, uint64_t end, struct extent *ext)
{
  return drive_extent (opaque, offset, end, ext);
}

struct export *
export_open_hash (struct drive *d, const char *block)
{
  struct hash_source source = {
    .size = d->size, .opaque = d, .pread = read_drive,
    .extent = d->disk->can_extents ? drive_map : NULL,
  };
  struct error err;

  if (drive_may_serve (d, &err) == 0)
    return open_source (&source, d, NULL, block);
  nbdkit_error ("%s", err.msg);
  return NULL;
}

/* ---- of a backup ---- */

static int
read_view (void *opaque, void *buf, size_t count, uint64_t offset)
{
  struct error err;

  if (view_pread (opaque, buf, count, offset, &err) == 0)
    return 0;
  errno = err.errnum;
  return -1;
}

static int
view_map (void *opaque, uint64_t offset, uint64_t end, struct extent *ext)
{
  struct error err;

  if (view_extent (opaque, offset, end, ext, &err) == 0)
    return 0;
  errno = err.errnum;
  return -1;
}

struct export *
export_open_backup_hash (struct drive *d, const char *id_text,
                         const char *block)
{
  CLEANUP_FREE char *decoded = export_decode (id_text);
  struct hash_source source = { .size = d->size, .pread = read_view };
  const struct view_options *opt;
  struct view *v = NULL;
  struct uuid id;

  if (decoded && uuid_parse (decoded, &id))
    v = views_find (d, &id);
  if (v == NULL) {
    nbdkit_error ("disk '%s' has no backup '%s'", d->name, id_text);
    errno = ENOENT;
    return NULL;
  }
  opt = view_options (v);
  source.opaque = v;
  /* A hole in an incremental one only means that it is not in the backup. */
  if (opt->full || opt->bitmap == NULL)
    source.extent = view_map;
  return open_source (&source, d, v, block);
}
