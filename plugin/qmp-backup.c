/* nbdferry - the control socket: backups
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <string.h>

#include "cleanup.h"
#include "house.h"
#include "qmp-backup.h"
#include "qmp.h"

/* ---- arguments ---- */

static int
check_id (json_t *value, const char *path, struct error *err)
{
  struct uuid id;

  /* All zeros stands for none. */
  if (uuid_parse (json_string_value (value), &id) && !uuid_is_zero (&id))
    return 0;
  return error_set (err, EINVAL, "Parameter '%s' expects a UUID", path);
}

static int
check_word (json_t *value, const char *path, const char *a, const char *b,
            struct error *err)
{
  const char *s = json_string_value (value);

  if (!strcmp (s, a) || !strcmp (s, b))
    return 0;
  return error_set (err, EINVAL, "Parameter '%s' does not accept value '%s'",
                    path, s);
}

static int
check_limit (json_t *value, const char *path, struct error *err)
{
  uint64_t n;

  if (qmp_uint64 (value, &n) && n > 0 && n <= INT64_MAX)
    return 0;
  return error_set (err, EINVAL, "Parameter '%s' expects a number of bytes, 1 "
                    "or more", path);
}

static int
check_scope (json_t *value, const char *path, struct error *err)
{
  return check_word (value, path, "disk", "needed", err);
}

static int
check_on_limit (json_t *value, const char *path, struct error *err)
{
  return check_word (value, path, "slow", "fail", err);
}

const struct qmp_param qmp_backup_begin_params[] = {
  { .name = "node", .type = QMP_STRING },
  { .name = "id", .type = QMP_STRING, .check = check_id },
  { .name = "bitmap", .type = QMP_STRING, .optional = true },
  { .name = "full", .type = QMP_BOOL, .optional = true },
  { .name = "scope", .type = QMP_STRING, .optional = true,
    .check = check_scope },
  { .name = "scratch-limit", .type = QMP_UINT64, .optional = true,
    .check = check_limit },
  { .name = "on-limit", .type = QMP_STRING, .optional = true,
    .check = check_on_limit },
  { .name = "linger", .type = QMP_BOOL, .optional = true },
  { .name = NULL },
};

const struct qmp_param qmp_backup_end_params[] = {
  { .name = "node", .type = QMP_STRING },
  { .name = "id", .type = QMP_STRING, .check = check_id },
  { .name = "success", .type = QMP_BOOL },
  { .name = NULL },
};

static const struct qmp_param release_params[] = {
  { .name = "node", .type = QMP_STRING },
  { .name = "id", .type = QMP_STRING, .check = check_id },
  { .name = "offset", .type = QMP_UINT64 },
  { .name = "length", .type = QMP_UINT64 },
  { .name = NULL },
};

static const char *
string (json_t *args, const char *name)
{
  return json_string_value (json_object_get (args, name));
}

/* Has the argument that value? */
static bool
is (json_t *args, const char *name, const char *value)
{
  const char *s = string (args, name);

  return s && !strcmp (s, value);
}

static struct drive *
node_and_id (json_t *args, struct uuid *id, struct error *err)
{
  struct drive *d = house_drive (string (args, "node"));

  uuid_parse (string (args, "id"), id);
  if (d == NULL)
    error_set (err, ENOENT, "Node '%s' not found", string (args, "node"));
  return d;
}

static struct view *
begin_action (struct bitmap_action *a, json_t *args, struct error *err)
{
  json_t *linger = json_object_get (args, "linger");
  struct view_options opt = {
    .bitmap = string (args, "bitmap"),
    .full = json_is_true (json_object_get (args, "full")),
    .needed = is (args, "scope", "needed"),
    .slow = is (args, "on-limit", "slow"),
    .client = json_is_false (linger) ? qmp_client () : 0,
  };

  opt.drive = node_and_id (args, &opt.id, err);
  if (opt.drive == NULL)
    return NULL;
  qmp_uint64 (json_object_get (args, "scratch-limit"), &opt.scratch_limit);
  return views_begin (&opt, a, err);
}

struct view *
qmp_backup_action (struct bitmap_action *a, enum bitmap_action_type type,
                   json_t *args, struct error *err)
{
  struct drive *d;
  struct uuid id;

  if (type == BITMAP_BACKUP_BEGIN)
    return begin_action (a, args, err);
  d = node_and_id (args, &id, err);
  if (d == NULL)
    return NULL;
  return views_end (d, &id, json_is_true (json_object_get (args, "success")),
                    a, err);
}

/* ---- what there is ---- */

static void
add_uuid (json_t *o, const char *name, const struct uuid *id)
{
  char text[UUID_TEXT];

  if (uuid_is_zero (id))
    return;
  uuid_format (id, text);
  json_object_set_new (o, name, json_string (text));
}

static json_t *
export_name (const struct drive *d, const char *id)
{
  CLEANUP_FREE char *name = NULL;

  if (asprintf (&name, "%s@backup/%s", d->name, id) == -1) {
    name = NULL;
    return NULL;
  }
  return qmp_string (name);
}

static json_t *
describe (struct view *v)
{
  const struct view_options *opt = view_options (v);
  struct view_info info;
  char id[UUID_TEXT];
  json_t *o;

  view_info (v, &info);
  uuid_format (&opt->id, id);
  o = json_pack ("{s:o, s:s, s:b, s:s, s:o, s:I, s:I, s:I, s:I, s:s, s:I, s:I,"
                 " s:I, s:s, s:b, s:s}",
                 "node", qmp_string (opt->drive->name), "id", id,
                 "full", (int) (opt->full || opt->bitmap == NULL),
                 "scope", opt->needed ? "needed" : "disk",
                 "export", export_name (opt->drive, id),
                 "size", (json_int_t) opt->drive->size,
                 "granularity", (json_int_t) info.granularity,
                 "dirty-bytes", (json_int_t) info.dirty,
                 "generation", (json_int_t) info.generation,
                 "point", id, "time", (json_int_t) info.time,
                 "scratch-used", (json_int_t) info.scratch_used,
                 "scratch-limit", (json_int_t) info.scratch_limit,
                 "on-limit", opt->slow ? "slow" : "fail",
                 "linger", (int) (opt->client == 0),
                 "state", info.failed ? "failed" : "running");
  if (opt->bitmap)
    json_object_set_new (o, "bitmap", qmp_string (opt->bitmap));
  add_uuid (o, "lineage", &info.lineage);
  add_uuid (o, "parent", &info.parent.id);
  if (info.failed)
    json_object_set_new (o, "error", qmp_string (info.error));
  return o;
}

static json_t *
query_backups (json_t *args, struct error *err)
{
  CLEANUP_FREE struct view **views = NULL;
  json_t *list = json_array ();
  size_t nr;

  (void) args;
  (void) err;
  views = views_all (&nr);
  for (size_t i = 0; i < nr; i++) {
    json_array_append_new (list, describe (views[i]));
    view_unref (views[i]);
  }
  return list;
}

/* ---- one command ---- */

static json_t *
run_begin (json_t *args, struct error *err)
{
  struct bitmap_action a;
  struct view *v = begin_action (&a, args, err);
  json_t *result = NULL;

  if (v == NULL)
    return NULL;
  view_ref (v);
  if (bitmap_transaction (&a, 1, err) == 0)
    result = describe (v);
  views_settle (v);
  view_unref (v);
  return result;
}

static json_t *
run_end (json_t *args, struct error *err)
{
  const bool success = json_is_true (json_object_get (args, "success"));
  struct bitmap_action a;
  struct view *v;
  struct drive *d;
  struct uuid id;
  int r;

  d = node_and_id (args, &id, err);
  if (d == NULL)
    return NULL;
  if (!success)
    return views_give_up (d, &id, err) == 0 ? json_object () : NULL;
  v = views_end (d, &id, true, &a, err);
  if (v == NULL)
    return NULL;
  r = bitmap_transaction (&a, 1, err);
  views_settle (v);
  return r == 0 ? json_object () : NULL;
}

static const struct qmp_param id_params[] = {
  { .name = "node", .type = QMP_STRING },
  { .name = "id", .type = QMP_STRING, .check = check_id },
  { .name = NULL },
};

static json_t *
run_forget (json_t *args, struct error *err)
{
  struct uuid id;
  struct drive *d = node_and_id (args, &id, err);

  return d && views_forget (d, &id, err) == 0 ? json_object () : NULL;
}

static struct view *
find_view (json_t *args, struct error *err)
{
  struct uuid id;
  struct drive *d = node_and_id (args, &id, err);
  struct view *v = d ? views_find (d, &id) : NULL;

  if (d && v == NULL)
    error_set (err, ENOENT, "Node '%s' has no backup '%s'", d->name,
               string (args, "id"));
  return v;
}

static json_t *
run_release (json_t *args, struct error *err)
{
  struct view *v = find_view (args, err);
  uint64_t offset, length;

  if (v == NULL)
    return NULL;
  qmp_uint64 (json_object_get (args, "offset"), &offset);
  qmp_uint64 (json_object_get (args, "length"), &length);
  view_release (v, offset, length);
  view_unref (v);
  return json_object ();
}

static json_t *
run_direct (json_t *args, struct error *err)
{
  struct view *v = find_view (args, err);
  int fds[QMP_FDS], r;

  if (v == NULL)
    return NULL;
  r = view_direct (v, fds, err);
  view_unref (v);
  if (r == -1)
    return NULL;
  qmp_attach (fds);
  return json_object ();
}

const struct qmp_command qmp_backup_commands[] = {
  { "x-ferry-backup-begin", qmp_backup_begin_params, run_begin },
  { "x-ferry-backup-end", qmp_backup_end_params, run_end },
  { "x-ferry-backup-release", release_params, run_release },
  { "x-ferry-backup-direct", id_params, run_direct },
  { "x-ferry-backup-forget", id_params, run_forget },
  { "x-ferry-query-backups", NULL, query_backups },
  { .name = NULL },
};
