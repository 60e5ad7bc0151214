/* nbdferry - the control socket: what is known of standbys
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The daemon keeps what `nbdferry sync` has to know at its next run; what it
 * means is not the daemon's affair (docs/sync.md).
 */
#include <config.h>

#include <errno.h>

#include "cleanup.h"
#include "house.h"
#include "qmp-dispatch.h"
#include "qmp-query.h"
#include "sync-record.h"

static pthread_mutex_t files = PTHREAD_MUTEX_INITIALIZER; /* protects sync.json
                                                             of all drives */

static const struct qmp_param query_params[] = {
  { .name = "node", .type = QMP_STRING },
  { .name = "name", .type = QMP_STRING },
  { .name = NULL },
};

static int
check_record (json_t *value, const char *path, struct error *err)
{
  struct sync_record r;

  if (sync_record_parse (value, &r, err) == -1)
    return error_prefix (err, "Parameter '%s'", path);
  sync_record_free (&r);
  return 0;
}

static const struct qmp_param record_params[] = {
  { .name = "node", .type = QMP_STRING },
  { .name = "name", .type = QMP_STRING },
  { .name = "record", .type = QMP_OBJECT, .optional = true,
    .check = check_record },
  { .name = NULL },
};

static bool
bitmap_exists (void *opaque, const char *name)
{
  struct drive *d = opaque;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  return drive_find_bitmap (d, name) != NULL;
}

/* The drive, if its bitmap is there; NULL with 'err'. */
static struct drive *
find (json_t *args, const char **bitmap, struct error *err)
{
  const char *node = json_string_value (json_object_get (args, "node"));
  struct drive *d = house_drive (node);

  *bitmap = json_string_value (json_object_get (args, "name"));
  if (d == NULL)
    error_set (err, ENOENT, "Node '%s' not found", node);
  else if (qmp_drive_mode (d) != DRIVE_ACTIVE) {
    error_set (err, EPERM, "disk '%s' is not active here", node);
    d = NULL;
  }
  else if (!bitmap_exists (d, *bitmap)) {
    error_set (err, ENOENT, "Dirty bitmap '%s' not found", *bitmap);
    d = NULL;
  }
  return d;
}

static json_t *
query_sync (json_t *args, struct error *err)
{
  const char *bitmap;
  struct drive *d = find (args, &bitmap, err);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&files);
  json_t *record = d ? sync_store_get (d->state_dir, bitmap, err) : NULL;

  return record ? json_pack ("{s:o}", "record", record) : NULL;
}

static json_t *
sync_record (json_t *args, struct error *err)
{
  const char *bitmap;
  struct drive *d = find (args, &bitmap, err);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&files);

  if (d == NULL || sync_store_set (d->state_dir, bitmap,
                                   json_object_get (args, "record"),
                                   bitmap_exists, d, err) == -1)
    return NULL;
  return json_object ();
}

const struct qmp_command qmp_sync_commands[] = {
  { "x-ferry-query-sync", query_params, query_sync },
  { "x-ferry-sync-record", record_params, sync_record },
  { .name = NULL },
};
