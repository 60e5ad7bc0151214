/* nbdferry - the control socket: a migration's parameters
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * They are house.params: of the next migration, and of one that is under way.
 */
#include <config.h>

#include <errno.h>

#include "cleanup.h"
#include "house.h"
#include "mapping.h"
#include "qmp-dispatch.h"
#include "qmp-query.h"

#define MAX_DOWNTIME_MS (2000 * 1000)

/* ---- block-bitmap-mapping ---- */

static const struct qmp_param transform_params[] = {
  { .name = "persistent", .type = QMP_BOOL, .optional = true },
  { .name = NULL },
};

static int
check_transform (json_t *value, const char *path, struct error *err)
{
  return qmp_check_object (value, transform_params, path, err);
}

static const struct qmp_param bitmap_alias_params[] = {
  { .name = "name", .type = QMP_STRING },
  { .name = "alias", .type = QMP_STRING },
  { .name = "transform", .type = QMP_OBJECT, .optional = true,
    .check = check_transform },
  { .name = NULL },
};

static int
check_bitmap_alias (json_t *value, const char *path, struct error *err)
{
  if (qmp_check_type (value, QMP_OBJECT, path, path, err) == -1)
    return -1;
  return qmp_check_object (value, bitmap_alias_params, path, err);
}

static int
check_bitmap_aliases (json_t *value, const char *path, struct error *err)
{
  return qmp_check_array (value, path, err, check_bitmap_alias);
}

static const struct qmp_param node_alias_params[] = {
  { .name = "node-name", .type = QMP_STRING },
  { .name = "alias", .type = QMP_STRING },
  { .name = "bitmaps", .type = QMP_ARRAY, .check = check_bitmap_aliases },
  { .name = NULL },
};

static int
check_node_alias (json_t *value, const char *path, struct error *err)
{
  if (qmp_check_type (value, QMP_OBJECT, path, path, err) == -1)
    return -1;
  return qmp_check_object (value, node_alias_params, path, err);
}

int
qmp_check_mapping (json_t *value, const char *path, struct error *err)
{
  if (qmp_check_array (value, path, err, check_node_alias) == -1)
    return -1;
  return mapping_check (value, err);
}

/* ---- parameters ---- */

static int
check_channels (json_t *value, const char *path, struct error *err)
{
  uint64_t n;

  if (!qmp_uint64 (value, &n) || n < 1 || n > MIGRATE_MAX_CHANNELS)
    return error_set (err, EINVAL, "Parameter '%s' expects a value between 1 "
                      "and %d", path, MIGRATE_MAX_CHANNELS);
  return 0;
}

static int
check_downtime (json_t *value, const char *path, struct error *err)
{
  uint64_t ms;

  if (!qmp_uint64 (value, &ms) || ms > MAX_DOWNTIME_MS)
    return error_set (err, EINVAL, "Parameter '%s' expects an integer in the "
                      "range of 0 to (2000 * 1000) ms", path);
  return 0;
}

static int
check_compression (json_t *value, const char *path, struct error *err)
{
  enum migrate_compression c;

  if (migrate_compression_parse (json_string_value (value), &c) == -1)
    return error_set (err, EINVAL, "Parameter '%s' does not accept value '%s'",
                      path, json_string_value (value));
  return 0;
}

static int
check_copy_mode (json_t *value, const char *path, struct error *err)
{
  enum migrate_copy_mode m;

  if (migrate_copy_mode_parse (json_string_value (value), &m) == -1)
    return error_set (err, EINVAL, "Parameter '%s' does not accept value '%s'",
                      path, json_string_value (value));
  return 0;
}

static int
check_level (json_t *value, unsigned most, const char *path,
             struct error *err)
{
  uint64_t n;

  if (!qmp_uint64 (value, &n) || n > most)
    return error_set (err, EINVAL, "Parameter '%s' expects a value between 0 "
                      "and %u", path, most);
  return 0;
}

static int
check_zlib_level (json_t *value, const char *path, struct error *err)
{
  return check_level (value, 9, path, err);
}

static int
check_zstd_level (json_t *value, const char *path, struct error *err)
{
  return check_level (value, 20, path, err);
}

static const struct qmp_param set_params[] = {
  { .name = "max-bandwidth", .type = QMP_UINT64, .optional = true },
  { .name = "downtime-limit", .type = QMP_UINT64, .optional = true,
    .check = check_downtime },
  { .name = "multifd-channels", .type = QMP_UINT8, .optional = true,
    .check = check_channels },
  { .name = "multifd-compression", .type = QMP_STRING, .optional = true,
    .check = check_compression },
  { .name = "copy-mode", .type = QMP_STRING, .optional = true,
    .check = check_copy_mode },
  { .name = "block-bitmap-mapping", .type = QMP_ARRAY, .optional = true,
    .check = qmp_check_mapping },
  { .name = "multifd-zlib-level", .type = QMP_UINT8, .optional = true,
    .check = check_zlib_level },
  { .name = "multifd-zstd-level", .type = QMP_UINT8, .optional = true,
    .check = check_zstd_level },
  { .name = "x-ferry-resume", .type = QMP_BOOL, .optional = true },
  { .name = NULL },
};

static json_t *
run_set_parameters (json_t *args, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&house.lock);
  struct migrate_params *p = &house.params;
  uint64_t n;

  (void) err;
  qmp_uint64 (json_object_get (args, "max-bandwidth"), &p->max_bandwidth);
  qmp_uint64 (json_object_get (args, "downtime-limit"), &p->downtime_limit);
  if (qmp_uint64 (json_object_get (args, "multifd-channels"), &n))
    p->channels = n;
  if (json_object_get (args, "multifd-compression"))
    migrate_compression_parse
      (json_string_value (json_object_get (args, "multifd-compression")),
       &p->compression);
  if (json_object_get (args, "copy-mode"))
    migrate_copy_mode_parse
      (json_string_value (json_object_get (args, "copy-mode")),
       &p->copy_mode);
  if (json_object_get (args, "block-bitmap-mapping")) {
    json_decref (p->mapping);
    p->mapping = json_deep_copy (json_object_get (args,
                                                  "block-bitmap-mapping"));
    incoming_set_mapping (house.incoming, p->mapping);
  }
  if (qmp_uint64 (json_object_get (args, "multifd-zlib-level"), &n))
    p->zlib_level = n;
  if (qmp_uint64 (json_object_get (args, "multifd-zstd-level"), &n))
    p->zstd_level = n;
  if (json_object_get (args, "x-ferry-resume"))
    p->no_resume = !json_is_true (json_object_get (args, "x-ferry-resume"));
  /* Beyond that, a number has no place in our JSON, or on any wire. */
  if (p->max_bandwidth > INT64_MAX)
    p->max_bandwidth = INT64_MAX;
  if (house.outgoing && !outgoing_ended (house.outgoing))
    outgoing_set_params (house.outgoing, p);
  if (house.plain && !plain_ended (house.plain))
    plain_set_params (house.plain, p);
  return json_object ();
}

static json_t *
query_parameters (json_t *args, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&house.lock);
  const struct migrate_params *p = &house.params;
  json_t *result;

  (void) args;
  (void) err;
  result = json_pack ("{s:I, s:I, s:I, s:s, s:s, s:I, s:I, s:b}",
                    "max-bandwidth", (json_int_t) p->max_bandwidth,
                    "downtime-limit", (json_int_t) p->downtime_limit,
                    "multifd-channels",
                    (json_int_t) (p->channels ? p->channels
                                  : migrate_near_channels ()),
                    "multifd-compression",
                    migrate_compression_name (p->compression),
                    "copy-mode", migrate_copy_mode_name (p->copy_mode),
                    "multifd-zlib-level", (json_int_t) p->zlib_level,
                    "multifd-zstd-level", (json_int_t) p->zstd_level,
                    "x-ferry-resume", !p->no_resume);
  if (p->mapping)
    json_object_set (result, "block-bitmap-mapping", p->mapping);
  return result;
}

const struct qmp_command qmp_migrate_params_commands[] = {
  { "migrate-set-parameters", set_params, run_set_parameters },
  { "query-migrate-parameters", NULL, query_parameters },
  { .name = NULL },
};
