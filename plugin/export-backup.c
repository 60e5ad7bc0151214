/* nbdferry - the export that is a disk as it was when a backup began
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "cleanup.h"
#include "export.h"
#include "views.h"

struct backup_export {
  struct export export;
  struct view *view;
};

static struct drive *
drive_of (struct export *e)
{
  return view_options (((struct backup_export *) e)->view)->drive;
}

/* One message for each request that fails; nothing else is reported. */
static int
fail (struct export *e, const char *what, uint64_t offset,
      const struct error *err)
{
  nbdkit_error ("%s the backup of disk '%s' at %" PRIu64 ": %s", what,
                drive_of (e)->name, offset, err->msg);
  errno = err->errnum;
  return -1;
}

static int64_t
backup_size (struct export *e)
{
  return drive_of (e)->size;
}

static int
backup_is_rotational (struct export *e)
{
  return drive_of (e)->disk->rotational;
}

static const char *
backup_description (struct export *e)
{
  return nbdkit_printf_intern ("disk '%s' as it was when a backup began",
                               drive_of (e)->name);
}

static int
backup_pread (struct export *e, void *buf, uint32_t count, uint64_t offset)
{
  struct backup_export *x = (struct backup_export *) e;
  struct error err;

  if (view_pread (x->view, buf, count, offset, &err) == 0)
    return 0;
  return fail (e, "read", offset, &err);
}

static int
backup_extents (struct export *e, uint32_t count, uint64_t offset, bool one,
                struct nbdkit_extents *extents)
{
  struct backup_export *x = (struct backup_export *) e;
  uint64_t end = offset + count;

  while (offset < end) {
    struct extent ext;
    struct error err;

    if (view_extent (x->view, offset, end, &ext, &err) == -1)
      return fail (e, "map", offset, &err);
    if (nbdkit_add_extent (extents, ext.start, ext.end - ext.start,
                           export_extent_type (ext.type)) == -1)
      return -1;
    offset = ext.end;
    if (one)
      break;
  }
  return 0;
}

static void
backup_close (struct export *e)
{
  view_unref (((struct backup_export *) e)->view);
  free (e);
}

static const struct export_ops backup_export_ops = {
  .size = backup_size,
  .is_rotational = backup_is_rotational,
  .description = backup_description,
  .pread = backup_pread,
  .extents = backup_extents,
  .close = backup_close,
};

struct export *
export_open_backup (struct drive *d, const char *text)
{
  CLEANUP_FREE char *decoded = export_decode (text);
  struct backup_export *x = calloc (1, sizeof *x);
  struct uuid id;

  if (x && decoded && uuid_parse (decoded, &id))
    x->view = views_find (d, &id);
  if (x == NULL || x->view == NULL) {
    nbdkit_error ("disk '%s' has no backup '%s'", d->name, text);
    errno = ENOENT;
    free (x);
    return NULL;
  }
  x->export.ops = &backup_export_ops;
  return &x->export;
}

int
export_list_backups (struct drive *d, struct nbdkit_exports *exports)
{
  CLEANUP_FREE struct view **views = NULL;
  size_t nr;
  int r = 0;

  views = views_all (&nr);
  for (size_t i = 0; i < nr; i++) {
    const struct view_options *opt = view_options (views[i]);
    char id[UUID_TEXT];

    uuid_format (&opt->id, id);
    if (opt->drive == d && r == 0)
      r = nbdkit_add_export (
        exports, nbdkit_printf_intern ("%s@backup/%s", d->name, id),
        "as it was when this backup began");
    view_unref (views[i]);
  }
  return r;
}
