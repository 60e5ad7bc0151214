/* nbdferry - nbdkit's callbacks
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Thin: what an export does is in export-*.c, what a disk does in drive/.
 */
#include <config.h>

#include <errno.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "cleanup.h"
#include "export.h"
#include "house.h"
#include "options.h"
#include "watcher.h"

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

static struct options options; /* the main thread's */

/* ---- the daemon ---- */

static void
ferry_unload (void)
{
  options_free (&options);
  house_free ();
}

static int
ferry_config (const char *key, const char *value)
{
  return options_set (&options, key, value);
}

static int
ferry_config_complete (void)
{
  return options_complete (&options);
}

#define ferry_config_help \
  "[disk=][NAME=]PATH  (required) A raw file, block device or NBD URI; may\n" \
  "                    be repeated.\n" \
  "state=DIR           Where the disk's bitmaps are kept (PATH.ferry).\n" \
  "size=SIZE           Create a file that is missing, with this size.\n" \
  "nbd-timeout=S       How long requests wait for a lost NBD server (30).\n" \
  "import-bitmaps=on|NAMES  Take over the bitmaps that such a server offers.\n" \
  "import-granularity=G  How fine they are to be (64K).\n" \
  "control=SOCKET      Control socket (QMP).\n" \
  "durability=power|process\n" \
  "                    What persistent bitmaps survive (power).\n" \
  "incoming=on|insecure\n" \
  "                    The disks are destinations of a migration; insecure:\n" \
  "                    also for other hosts without TLS."

static int
ferry_get_ready (void)
{
  struct error err;

  house.insecure = options.insecure;
  if (house_open (options.drives, options.nr, options.control, &err) == 0)
    return 0;
  nbdkit_error ("%s", err.msg);
  return -1;
}

static int
ferry_after_fork (void)
{
  struct error err;

  if (house_start (&err) == 0 && watcher_start (&err) == 0)
    return 0;
  nbdkit_error ("%s", err.msg);
  return -1;
}

static void
ferry_cleanup (void)
{
  watcher_join ();
}

/* ---- exports ---- */

static int
ferry_list_exports (int readonly UNUSED, int is_tls UNUSED,
                    struct nbdkit_exports *exports)
{
  for (size_t i = 0; i < house.nr_drives; i++) {
    struct drive *d = house.drives[i];
    int r = 0;

    if (drive_may_serve (d, NULL) == 0)
      r = nbdkit_add_export (exports, d->name, d->path);
    else if (drive_get_mode (d) != DRIVE_GONE)
      r = nbdkit_add_export (
        exports, nbdkit_printf_intern ("%s@incoming", d->name), d->path);
    if (r == -1 || export_list_backups (d, exports) == -1 ||
        export_list_bitmaps (d, exports) == -1)
      return -1;
  }
  return 0;
}

static const char *
ferry_default_export (int readonly UNUSED, int is_tls UNUSED)
{
  return house.drives[0]->name;
}

static void *
ferry_open (int readonly)
{
  const char *name = nbdkit_export_name ();

  return name ? export_open (name, readonly) : NULL;
}

static void
ferry_close (void *handle)
{
  struct export *x = handle;

  x->ops->close (x);
}

static const char *
ferry_export_description (void *handle)
{
  struct export *x = handle;

  return x->ops->description (x);
}

static int64_t
ferry_get_size (void *handle)
{
  struct export *x = handle;

  return x->ops->size (x);
}

static int
ferry_can_write (void *handle)
{
  struct export *x = handle;

  return x->ops->can_write ? x->ops->can_write (x) : x->ops->pwrite != NULL;
}

static int
ferry_is_rotational (void *handle)
{
  struct export *x = handle;

  return x->ops->is_rotational ? x->ops->is_rotational (x) : 0;
}

static int
ferry_can_extents (void *handle)
{
  struct export *x = handle;

  return x->ops->can_extents ? x->ops->can_extents (x)
                             : x->ops->extents != NULL;
}

static int
ferry_can_trim (void *handle)
{
  return ((struct export *) handle)->ops->trim != NULL;
}

static int
ferry_can_zero (void *handle)
{
  return ((struct export *) handle)->ops->zero != NULL;
}

static int
ferry_can_fast_zero (void *handle)
{
  return ((struct export *) handle)->ops->zero != NULL;
}

static int
ferry_can_cache (void *handle)
{
  return ((struct export *) handle)->ops->cache ? NBDKIT_CACHE_NATIVE
                                                : NBDKIT_CACHE_NONE;
}

static int
ferry_can_fua (void *handle UNUSED)
{
  return NBDKIT_FUA_NATIVE;
}

static int
ferry_can_flush (void *handle UNUSED)
{
  return 1;
}

/* Everybody sees one disk, and a flush is for all that was acknowledged. */
static int
ferry_can_multi_conn (void *handle UNUSED)
{
  return 1;
}

/* ---- requests ---- */

static unsigned
disk_flags (uint32_t flags)
{
  unsigned r = 0;

  if (flags & NBDKIT_FLAG_FUA)
    r |= DISK_FUA;
  if (flags & NBDKIT_FLAG_MAY_TRIM)
    r |= DISK_MAY_TRIM;
  if (flags & NBDKIT_FLAG_FAST_ZERO)
    r |= DISK_FAST;
  return r;
}

static int
ferry_pread (void *handle, void *buf, uint32_t count, uint64_t offset,
             uint32_t flags UNUSED)
{
  struct export *x = handle;

  return x->ops->pread (x, buf, count, offset);
}

static int
ferry_pwrite (void *handle, const void *buf, uint32_t count, uint64_t offset,
              uint32_t flags)
{
  struct export *x = handle;

  return x->ops->pwrite (x, buf, count, offset, disk_flags (flags));
}

static int
ferry_flush (void *handle, uint32_t flags UNUSED)
{
  struct export *x = handle;

  return x->ops->flush ? x->ops->flush (x) : 0;
}

static int
ferry_trim (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  struct export *x = handle;

  return x->ops->trim (x, count, offset, disk_flags (flags));
}

static int
ferry_zero (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  struct export *x = handle;

  return x->ops->zero (x, count, offset, disk_flags (flags));
}

static int
ferry_cache (void *handle, uint32_t count, uint64_t offset,
             uint32_t flags UNUSED)
{
  struct export *x = handle;

  return x->ops->cache (x, count, offset);
}

static int
ferry_extents (void *handle, uint32_t count, uint64_t offset, uint32_t flags,
               struct nbdkit_extents *extents)
{
  struct export *x = handle;

  return x->ops->extents (x, count, offset, flags & NBDKIT_FLAG_REQ_ONE,
                          extents);
}

static struct nbdkit_plugin plugin = {
  .name = "ferry",
  .longname = "nbdferry",
  .version = PACKAGE_VERSION,
  .description = "disks with persistent dirty bitmaps that can be moved to "
                 "another server while they are in use",
  .magic_config_key = "disk",
  .errno_is_preserved = 1,
  .unload = ferry_unload,
  .config = ferry_config,
  .config_complete = ferry_config_complete,
  .config_help = ferry_config_help,
  .get_ready = ferry_get_ready,
  .after_fork = ferry_after_fork,
  .cleanup = ferry_cleanup,
  .list_exports = ferry_list_exports,
  .default_export = ferry_default_export,
  .export_description = ferry_export_description,
  .open = ferry_open,
  .close = ferry_close,
  .get_size = ferry_get_size,
  .can_write = ferry_can_write,
  .can_flush = ferry_can_flush,
  .is_rotational = ferry_is_rotational,
  .can_trim = ferry_can_trim,
  .can_zero = ferry_can_zero,
  .can_fast_zero = ferry_can_fast_zero,
  .can_extents = ferry_can_extents,
  .can_fua = ferry_can_fua,
  .can_multi_conn = ferry_can_multi_conn,
  .can_cache = ferry_can_cache,
  .pread = ferry_pread,
  .pwrite = ferry_pwrite,
  .flush = ferry_flush,
  .trim = ferry_trim,
  .zero = ferry_zero,
  .cache = ferry_cache,
  .extents = ferry_extents,
};

NBDKIT_REGISTER_PLUGIN (plugin)
