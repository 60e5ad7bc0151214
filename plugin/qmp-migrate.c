/* nbdferry - the control socket: migration
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * There is one migration at a time, house.outgoing; when it has ended it is
 * kept for query-migrate until the next one begins.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "blobs.h"
#include "cleanup.h"
#include "client.h"
#include "house.h"
#include "info-json.h"
#include "qmp.h"
#include "qmp-dispatch.h"
#include "qmp-query.h"
#include "redirect.h"

/* What clients were told about the present migration. */
static struct {
  pthread_mutex_t lock; /* protects what follows; nothing is above it */
  enum migrate_status status;
  unsigned round;
} told = { .lock = PTHREAD_MUTEX_INITIALIZER };

/* ---- events ---- */

/* From a thread of the migration.  The lock keeps the events in order. */
void
qmp_migration_changed (void *opaque, const struct migrate_info *info)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&told.lock);
  json_t *data;

  (void) opaque;
  if (info->round > told.round) {
    told.round = info->round;
    data = json_pack ("{s:I}", "pass", (json_int_t) info->round);
    qmp_event ("MIGRATION_PASS", data);
    json_decref (data);
  }
  if (info->status != told.status) {
    told.status = info->status;
    data = json_pack ("{s:s}", "status", migrate_status_name (info->status));
    qmp_event ("MIGRATION", data);
    json_decref (data);
  }
}

static void
forget_told (void)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&told.lock);

  told.status = MIGRATE_NONE;
  told.round = 0;
}

/* ---- which drives ---- */

/* Those that the client has named; 'drives' has room for all there are. */
static int
named_drives (json_t *nodes, struct drive **drives, size_t *nr,
              struct error *err)
{
  json_t *node;
  size_t i;

  if (json_array_size (nodes) == 0)
    return error_set (err, EINVAL, "Parameter 'x-ferry-nodes' expects at "
                      "least one node");
  json_array_foreach (nodes, i, node) {
    const char *name = json_string_value (node);
    struct drive *d = house_drive (name);

    if (d == NULL)
      return error_set (err, ENOENT, "Node '%s' not found", name);
    for (size_t k = 0; k < *nr; k++)
      if (drives[k] == d)
        return error_set (err, EINVAL, "Node '%s' is named twice", name);
    drives[(*nr)++] = d;
  }
  return 0;
}

/* Those that the URI means: the disk of that name, or all. */
static int
uri_drives (const char *uri, struct drive **drives, size_t *nr,
            struct error *err)
{
  /* What is wrong with the URI is for others to say. */
  CLEANUP_FREE char *name = client_uri_export (uri, NULL);

  if (name && name[0] && house.nr_drives > 1) {
    drives[0] = house_drive (name);
    if (drives[0] == NULL)
      return error_set (err, ENOENT, "The URI names the export '%s', but "
                        "there is no disk of that name here; say which one "
                        "is to go there with --node (x-ferry-nodes)", name);
    *nr = 1;
    return 0;
  }
  memcpy (drives, house.drives, house.nr_drives * sizeof drives[0]);
  *nr = house.nr_drives;
  return 0;
}

/* Only a disk that is served from here can be moved. */
static int
check_active (struct drive *d, struct error *err)
{
  switch (qmp_drive_mode (d)) {
  case DRIVE_ACTIVE:
    return 0;
  case DRIVE_INCOMING:
    return error_set (err, EBUSY, "Node '%s' cannot be migrated: it is itself "
                      "the destination of a migration", d->name);
  case DRIVE_PREPARED:
    return error_set (err, EBUSY, "Node '%s' cannot be migrated: a migration "
                      "to it is not finished", d->name);
  default:
    return error_set (err, EBUSY, "Node '%s' cannot be migrated: it was "
                      "handed over to another server already", d->name);
  }
}

/* ---- migrate ---- */

static int
check_node_name (json_t *value, const char *path, struct error *err)
{
  return qmp_check_type (value, QMP_STRING, path, path, err);
}

static int
check_nodes (json_t *value, const char *path, struct error *err)
{
  return qmp_check_array (value, path, err, check_node_name);
}

static const struct qmp_param attach_params[] = {
  { .name = "name", .type = QMP_STRING },
  { .name = "path", .type = QMP_STRING },
  { .name = NULL },
};

static int
check_attached (json_t *value, const char *path, struct error *err)
{
  if (qmp_check_type (value, QMP_OBJECT, path, path, err) == -1)
    return -1;
  return qmp_check_object (value, attach_params, path, err);
}

static int
check_attach (json_t *value, const char *path, struct error *err)
{
  return qmp_check_array (value, path, err, check_attached);
}

/* ---- the command ---- */

static const struct qmp_param recover_params[] = {
  { .name = "uri", .type = QMP_STRING, .optional = true },
  { .name = NULL },
};

static const struct qmp_param migrate_params[] = {
  { .name = "uri", .type = QMP_STRING },
  { .name = "blk", .type = QMP_BOOL, .optional = true },
  { .name = "inc", .type = QMP_BOOL, .optional = true },
  { .name = "detach", .type = QMP_BOOL, .optional = true },
  { .name = "resume", .type = QMP_BOOL, .optional = true },
  { .name = "x-ferry-nodes", .type = QMP_ARRAY, .optional = true,
    .check = check_nodes },
  { .name = "x-ferry-data-only", .type = QMP_BOOL, .optional = true },
  { .name = "x-ferry-bitmaps-to", .type = QMP_STRING, .optional = true },
  { .name = "x-ferry-attach", .type = QMP_ARRAY, .optional = true,
    .check = check_attach },
  { .name = "x-ferry-mapping", .type = QMP_ARRAY, .optional = true,
    .check = qmp_check_mapping },
  { .name = "x-ferry-overwrite", .type = QMP_BOOL, .optional = true },
  { .name = "x-ferry-hints", .type = QMP_STRING, .optional = true },
  { .name = NULL },
};

static const char *
string (json_t *args, const char *name)
{
  return json_string_value (json_object_get (args, name));
}

static bool
is_data_only (json_t *args)
{
  return json_is_true (json_object_get (args, "x-ferry-data-only"));
}

/* 'detach' has no meaning in QMP, as in QEMU. */
static int
check_flags (json_t *args, struct error *err)
{
  if (json_is_true (json_object_get (args, "blk")) ||
      json_is_true (json_object_get (args, "inc")))
    return error_set (err, EINVAL, "Parameters 'blk' and 'inc' are not "
                      "supported: disks are all that is migrated");
  if (is_data_only (args) && json_object_get (args, "x-ferry-attach"))
    return error_set (err, EINVAL, "Parameter 'x-ferry-attach' does not go "
                      "with 'x-ferry-data-only'");
  if (string (args, "x-ferry-bitmaps-to") == NULL)
    return 0;
  if (!is_data_only (args))
    return error_set (err, EINVAL, "Parameter 'x-ferry-bitmaps-to' needs "
                      "'x-ferry-data-only'");
  if (string (args, "x-ferry-bitmaps-to")[0] != '/')
    return error_set (err, EINVAL, "Parameter 'x-ferry-bitmaps-to' must be an "
                      "absolute path");
  return 0;
}

static int
choose_drives (json_t *args, struct drive **drives, size_t *nr,
               struct error *err)
{
  json_t *nodes = json_object_get (args, "x-ferry-nodes");
  const char *uri = json_string_value (json_object_get (args, "uri"));
  int r = nodes ? named_drives (nodes, drives, nr, err)
    : uri_drives (uri, drives, nr, err);

  for (size_t i = 0; r == 0 && i < *nr; i++)
    r = check_active (drives[i], err);
  return r;
}

/* NULL on error. */
static struct blobs *
attached_files (json_t *args, struct error *err)
{
  struct blobs *b = blobs_new ();
  json_t *o;
  size_t i;

  if (b == NULL)
    error_set (err, ENOMEM, "%m");
  json_array_foreach (json_object_get (args, "x-ferry-attach"), i, o)
    if (b && blobs_add (b, json_string_value (json_object_get (o, "name")),
                        json_string_value (json_object_get (o, "path")),
                        err) == -1) {
      blobs_free (b);
      b = NULL;
    }
  return b;
}

static bool
is_migrating (void)
{
  return (house.outgoing && !outgoing_ended (house.outgoing)) ||
         (house.plain && !plain_ended (house.plain));
}

/* Its last event comes before the first of the next one. */
static void
join_last (void)
{
  if (house.outgoing)
    outgoing_join (house.outgoing);
  if (house.plain)
    plain_join (house.plain);
  forget_told ();
}

/* What takes the place of the last one. */
static void
set_migration (struct outgoing *o, struct plain *p)
{
  if (house.outgoing)
    outgoing_free (house.outgoing);
  if (house.plain)
    plain_free (house.plain);
  house.outgoing = o;
  house.plain = p;
}

/* house.lock is held.  'uri' may be NULL. */
static json_t *
resume (const char *uri, struct error *err)
{
  struct outgoing *o = house.outgoing;
  int r = o && !outgoing_ended (o) && !outgoing_has_let_go (o)
    ? outgoing_recover (o, uri, err) : redirect (uri, err);

  return r == 0 ? json_object () : NULL;
}

static json_t *
run_recover (json_t *args, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&house.lock);

  return resume (json_string_value (json_object_get (args, "uri")), err);
}

static json_t *
run_pause (json_t *args, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&house.lock);

  (void) args;
  if (house.outgoing == NULL || outgoing_ended (house.outgoing)) {
    error_set (err, EINVAL, "migrate-pause: there is no migration");
    return NULL;
  }
  return outgoing_ask_pause (house.outgoing, err) == 0 ? json_object ()
                                                       : NULL;
}

static json_t *
run_migrate (json_t *args, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&house.lock);
  const char *uri = json_string_value (json_object_get (args, "uri"));
  CLEANUP_FREE struct drive **drives = calloc (house.nr_drives,
                                               sizeof drives[0]);
  json_t *hints = json_object_get (args, "x-ferry-hints");
  struct migrate_params params = house.params;
  struct outgoing *o = NULL;
  struct plain *p = NULL;
  size_t nr = 0;

  if (drives == NULL || check_flags (args, err) == -1)
    return NULL;
  if (json_is_true (json_object_get (args, "resume")))
    return resume (uri, err);
  if (hints && migrate_hints_parse (json_string_value (hints), &params.hints,
                                    err) == -1)
    return NULL;
  if (params.hints != MIGRATE_HINTS_NONE && is_data_only (args)) {
    error_set (err, EINVAL, "Parameter 'x-ferry-hints' cannot be 'fs' with "
               "'x-ferry-data-only'");
    return NULL;
  }
  if (is_migrating ()) {
    error_set (err, EBUSY, "There's a migration process in progress");
    return NULL;
  }
  if (choose_drives (args, drives, &nr, err) == -1)
    return NULL;

  params.overwrite =
    json_is_true (json_object_get (args, "x-ferry-overwrite"));
  if (json_object_get (args, "x-ferry-mapping")) {
    params.mapping = json_object_get (args, "x-ferry-mapping");
    params.own_mapping = true;
  }
  params.blobs = attached_files (args, err);
  if (params.blobs == NULL)
    return NULL;
  join_last ();
  if (is_data_only (args))
    p = plain_start (drives, nr, uri, string (args, "x-ferry-bitmaps-to"),
                     &params, qmp_migration_changed, NULL,
                     err);
  else
    o = outgoing_start (drives, nr, uri, &params, qmp_migration_changed, NULL,
                        err);
  if (o == NULL)
    blobs_free (params.blobs);
  if (o == NULL && p == NULL)
    return NULL;
  set_migration (o, p);
  return json_object ();
}

static json_t *
run_cancel (json_t *args, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&house.lock);

  (void) args;
  if (house.outgoing && !outgoing_ended (house.outgoing) &&
      outgoing_cancel (house.outgoing, err) == -1)
    return NULL;
  if (house.plain)
    plain_cancel (house.plain);
  return json_object ();
}

/* ---- query-migrate ---- */

static json_t *
migration_info (const struct migrate_info *i)
{
  json_t *info;

  if (i->status == MIGRATE_NONE)
    return json_object ();
  info = migrate_info_to_json (i);
  if (i->status == MIGRATE_FAILED || i->status == MIGRATE_PAUSED)
    json_object_set_new (info, "error-desc", qmp_string (i->error));
  return info;
}

json_t *
qmp_migration_info (void)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&house.lock);
  struct migrate_info info = { .status = MIGRATE_NONE };
  json_t *result, *hints;

  if (house.outgoing)
    outgoing_info (house.outgoing, &info);
  else if (house.plain)
    plain_info (house.plain, &info);
  result = migration_info (&info);
  hints = house.outgoing ? outgoing_hints (house.outgoing) : NULL;
  if (hints)
    json_object_set_new (json_object_get (result, "x-ferry"), "hints", hints);
  return result;
}

static json_t *
query_migrate (json_t *args, struct error *err)
{
  (void) args;
  (void) err;
  return qmp_migration_info ();
}

/* QEMU's own name of migrate-cancel has an underscore. */
const struct qmp_command qmp_migrate_commands[] = {
  { "migrate", migrate_params, run_migrate },
  { "migrate-cancel", NULL, run_cancel },
  { "migrate_cancel", NULL, run_cancel },
  { "migrate-pause", NULL, run_pause },
  { "migrate-recover", recover_params, run_recover },
  { "query-migrate", NULL, query_migrate },
  { .name = NULL },
};
