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

const struct qmp_command qmp_bitmap_extra_commands[] = {
  { "x-ferry-bitmap-audit", audit_params, run_audit },
  { "x-ferry-bitmap-import", import_params, run_import },
  { .name = NULL },
};
