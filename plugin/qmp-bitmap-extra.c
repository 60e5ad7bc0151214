/* nbdferry - the control socket: commands on bitmaps that QEMU does not have
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * They run in their client's thread for as long as they take, and end early
 * when the daemon does.
 */
#include <config.h>

#include <errno.h>
#include <string.h>

#include "audit.h"
#include "cleanup.h"
#include "client.h"
#include "house.h"
#include "import.h"
#include "qmp.h"
#include "qmp-dispatch.h"
#include "remote.h"

static const char *
string (json_t *args, const char *name)
{
  return json_string_value (json_object_get (args, name));
}

static struct drive *
find_node (json_t *args, struct error *err)
{
  const char *name = string (args, "node");
  struct drive *d = house_drive (name);

  if (d == NULL)
    error_set (err, ENOENT, "Node '%s' not found", name);
  return d;
}

/* ---- import ---- */

static const struct qmp_param import_params[] = {
  { .name = "node", .type = QMP_STRING },
  { .name = "file", .type = QMP_STRING },
  { .name = "name", .type = QMP_STRING, .optional = true },
  { .name = "new-name", .type = QMP_STRING, .optional = true },
  { .name = "granularity", .type = QMP_UINT64, .optional = true },
  { .name = NULL },
};

static json_t *
describe_import (const struct import *im)
{
  json_t *list = json_array ();

  for (size_t i = 0; i < im->nr; i++) {
    const struct imported *b = &im->list[i];

    json_array_append_new (list,
      json_pack ("{s:o, s:I, s:b, s:I}", "name", qmp_string (b->name),
                 "granularity", (json_int_t) 1 << b->shift, "recording",
                 b->recording, "count", (json_int_t) bitmap_count (b->bits)));
  }
  return json_pack ("{s:o}", "bitmaps", list);
}

static int
check_import (const struct import_options *opt, struct error *err)
{
  const bool server = remote_is_uri (opt->path);
  const uint64_t g = opt->granularity;

  if (!server && opt->path[0] != '/')
    return error_set (err, EINVAL, "Parameter 'file' must be an absolute path "
                      "or an NBD URI");
  if (opt->new_name && opt->name == NULL)
    return error_set (err, EINVAL, "Parameter 'new-name' needs 'name'");
  if (g == 0)
    return 0;
  if (!server)
    return error_set (err, EINVAL, "Parameter 'granularity' is for an NBD URI; "
                      "an image says itself what it has");
  if (g < 512 || g > UINT64_C (1) << BITMAP_MAX_SHIFT || (g & (g - 1)) != 0)
    return error_set (err, EINVAL, "Granularity must be a power of 2 from 512 "
                      "to 2 GiB");
  return 0;
}

static int
import (struct import *im, const struct import_options *opt, struct drive *d,
        struct error *err)
{
  if (remote_is_uri (opt->path))
    return import_from_server (im, opt, d, err);
  return import_read (im, opt, err) == 0 ? import_add (im, d, err) : -1;
}

static json_t *
run_import (json_t *args, struct error *err)
{
  struct stop stop = { .fd = qmp_stop_fd () };
  struct import_options opt = {
    .path = string (args, "file"),
    .name = string (args, "name"),
    .new_name = string (args, "new-name"),
    .stop = &stop,
  };
  struct import im = { 0 };
  struct drive *d = find_node (args, err);
  json_t *result = NULL;

  if (d == NULL)
    return NULL;
  opt.size = d->size;
  qmp_uint64 (json_object_get (args, "granularity"), &opt.granularity);
  if (check_import (&opt, err) == 0 && import (&im, &opt, d, err) == 0)
    result = describe_import (&im);
  import_free (&im);
  return result;
}

/* ---- audit ---- */

static const struct qmp_param audit_params[] = {
  { .name = "node", .type = QMP_STRING },
  { .name = "name", .type = QMP_STRING },
  { .name = "reference", .type = QMP_STRING },
  { .name = "offset", .type = QMP_UINT64, .optional = true },
  { .name = "length", .type = QMP_UINT64, .optional = true },
  { .name = NULL },
};

static json_t *
describe_audit (const struct audit *a)
{
  json_t *list = json_array ();

  for (size_t i = 0; i < a->nr; i++)
    json_array_append_new (list,
      json_pack ("{s:I, s:I}", "offset", (json_int_t) a->ranges[i].start,
                 "length",
                 (json_int_t) (a->ranges[i].end - a->ranges[i].start)));
  return json_pack ("{s:I, s:I, s:I, s:b, s:I, s:I, s:I, s:I, s:I, s:I, s:o}",
                    "size", (json_int_t) a->size,
                    "reference-size", (json_int_t) a->reference_size,
                    "granularity", (json_int_t) a->granularity,
                    "recording", a->recording,
                    "next", (json_int_t) a->next,
                    "dirty", (json_int_t) a->dirty,
                    "over-marked", (json_int_t) a->over_marked,
                    "differing", (json_int_t) a->differing,
                    "unit", (json_int_t) a->unit,
                    "missed", (json_int_t) a->missed, "ranges", list);
}

static json_t *
run_audit (json_t *args, struct error *err)
{
  struct stop stop = { .fd = qmp_stop_fd () };
  struct audit_options opt = {
    .bitmap = string (args, "name"),
    .reference = string (args, "reference"),
    .length = UINT64_MAX,
    .stop = &stop,
  };
  struct audit a = { 0 };
  struct drive *d = find_node (args, err);
  json_t *result = NULL;

  if (d == NULL)
    return NULL;
  qmp_uint64 (json_object_get (args, "offset"), &opt.offset);
  qmp_uint64 (json_object_get (args, "length"), &opt.length);
  if (drive_audit (d, &opt, &a, err) == 0)
    result = describe_audit (&a);
  free (a.ranges);
  return result;
}

/* ---- map ---- */

#define MAX_CELLS 65536

static const struct qmp_param map_params[] = {
  { .name = "node", .type = QMP_STRING },
  { .name = "name", .type = QMP_STRING },
  { .name = "cells", .type = QMP_UINT32 },
  { .name = NULL },
};

/* So many granules to a cell, a power of two, that there are at most 'most'
 * cells.
 */
static unsigned
cell_shift (uint64_t bits, uint64_t most)
{
  unsigned shift = 0;

  while (bitmap_bits_for (bits, shift) > most)
    shift++;
  return shift;
}

static json_t *
count_cells (const struct bitmap *bm, unsigned shift)
{
  const uint64_t nr = bitmap_bits_for (bitmap_bits (bm), shift);
  json_t *cells = json_array ();

  for (uint64_t i = 0; i < nr; i++)
    json_array_append_new (cells,
      json_integer (bitmap_count_range (bm, i << shift, (i + 1) << shift)));
  return cells;
}

static json_t *
describe_map (const struct drive *d, const struct named_bitmap *nb,
              uint64_t most)
{
  const uint64_t granularity = bitmap_granularity (nb->bits);
  const unsigned shift = cell_shift (bitmap_bits (nb->bits), most);

  return json_pack ("{s:o, s:o, s:I, s:I, s:I, s:b, s:b, s:b, s:I, s:o}",
                    "node", qmp_string (d->name), "name",
                    qmp_string (nb->name), "size", (json_int_t) d->size,
                    "granularity", (json_int_t) granularity,
                    "count", (json_int_t) bitmap_count (nb->bits),
                    "recording", nb->recording, "persistent", nb->persistent,
                    "busy", nb->busy || nb->incoming,
                    "cell-granules", (json_int_t) 1 << shift,
                    "cells", count_cells (nb->bits, shift));
}

/* The control lock keeps the bitmap alive; no request needs it. */
static json_t *
run_map (json_t *args, struct error *err)
{
  const char *name = string (args, "name");
  struct drive *d = find_node (args, err);
  const struct named_bitmap *nb;
  uint64_t cells = 0;

  if (d == NULL)
    return NULL;
  qmp_uint64 (json_object_get (args, "cells"), &cells);
  if (cells < 1 || cells > MAX_CELLS) {
    error_set (err, EINVAL, "Parameter 'cells' must be from 1 to %d",
               MAX_CELLS);
    return NULL;
  }
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);
  nb = drive_find_bitmap (d, name);
  if (nb == NULL)
    error_set (err, ENOENT, "Dirty bitmap '%s' not found", name);
  else if (drive_is_elsewhere (d))
    error_set (err, EPERM, "disk '%s' is not active here, so its bitmaps say "
               "nothing", d->name);
  else if (nb->inconsistent || nb->bits == NULL)
    error_set (err, EINVAL, "Bitmap '%s' is inconsistent and cannot be used",
               name);
  else
    return describe_map (d, nb, cells);
  return NULL;
}

const struct qmp_command qmp_bitmap_extra_commands[] = {
  { "x-ferry-bitmap-audit", audit_params, run_audit },
  { "x-ferry-bitmap-import", import_params, run_import },
  { "x-ferry-bitmap-map", map_params, run_map },
  { .name = NULL },
};
