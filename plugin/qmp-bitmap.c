/* nbdferry - the control socket: commands on bitmaps
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Each command is a list of one action for drive/transaction.c, and an action
 * of "transaction" has the arguments of the command of that name.  What is
 * checked here is what needs no bitmap: types, and the names of nodes.
 */
#include <config.h>

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "house.h"
#include "qmp-backup.h"
#include "qmp-dispatch.h"
#include "transaction.h"

/* ---- what arguments they have ---- */

static const struct qmp_param target_params[] = {
  { .name = "node", .type = QMP_STRING },
  { .name = "name", .type = QMP_STRING },
  { .name = NULL },
};

static const struct qmp_param add_params[] = {
  { .name = "node", .type = QMP_STRING },
  { .name = "name", .type = QMP_STRING },
  { .name = "granularity", .type = QMP_UINT32, .optional = true },
  { .name = "persistent", .type = QMP_BOOL, .optional = true },
  { .name = "disabled", .type = QMP_BOOL, .optional = true },
  { .name = NULL },
};

/* A source of a merge is a name, or a node and a name. */
static int
check_source (json_t *value, const char *path, struct error *err)
{
  if (json_is_string (value))
    return 0;
  if (json_is_object (value))
    return qmp_check_object (value, target_params, path, err);
  /* QEMU has no name for an element of a list, hence 'null'. */
  return error_set (err, EINVAL, "Invalid parameter type for 'null', "
                    "expected: BlockDirtyBitmapOrStr");
}

static int
check_sources (json_t *value, const char *path, struct error *err)
{
  return qmp_check_array (value, path, err, check_source);
}

static const struct qmp_param merge_params[] = {
  { .name = "node", .type = QMP_STRING },
  { .name = "target", .type = QMP_STRING },
  { .name = "bitmaps", .type = QMP_ARRAY, .check = check_sources },
  { .name = NULL },
};

static const struct qmp_param abort_params[] = {
  { .name = NULL },
};

static const struct action_type {
  const char *name;
  const struct qmp_param *params;
  enum bitmap_action_type type;
} action_types[] = {
  { "block-dirty-bitmap-add", add_params, BITMAP_ADD },
  { "block-dirty-bitmap-remove", target_params, BITMAP_REMOVE },
  { "block-dirty-bitmap-clear", target_params, BITMAP_CLEAR },
  { "block-dirty-bitmap-enable", target_params, BITMAP_ENABLE },
  { "block-dirty-bitmap-disable", target_params, BITMAP_DISABLE },
  { "block-dirty-bitmap-merge", merge_params, BITMAP_MERGE },
  { "x-ferry-backup-begin", qmp_backup_begin_params, BITMAP_BACKUP_BEGIN },
  { "x-ferry-backup-end", qmp_backup_end_params, BITMAP_BACKUP_END },
  { "abort", abort_params, BITMAP_ABORT },
  { .name = NULL },
};

static const struct action_type *
find_type (const char *name)
{
  for (const struct action_type *t = action_types; t->name; t++)
    if (!strcmp (t->name, name))
      return t;
  return NULL;
}

/* ---- from JSON to actions; strings stay the JSON's ---- */

static const char *
string (json_t *args, const char *name)
{
  return json_string_value (json_object_get (args, name));
}

static struct drive *
find_node (const char *name, bool add, struct error *err)
{
  struct drive *d = house_drive (name);

  if (d)
    return d;
  /* QEMU's add takes the name of a device, too, and says so. */
  if (add)
    error_set (err, ENOENT, "Cannot find device='%s' nor node-name='%s'",
               name, name);
  else
    error_set (err, ENOENT, "Node '%s' not found", name);
  return NULL;
}

static int
add_options (struct bitmap_action *a, json_t *args, struct error *err)
{
  json_t *granularity = json_object_get (args, "granularity");

  a->persistent = json_is_true (json_object_get (args, "persistent"));
  a->disabled = json_is_true (json_object_get (args, "disabled"));
  if (granularity == NULL)
    return 0;
  qmp_uint64 (granularity, &a->granularity);
  /* 0 would mean "the default" further down. */
  if (a->granularity == 0 && a->target.name[0] != '\0')
    return error_set (err, EINVAL,
                      "Granularity must be power of 2 and at least 512");
  return 0;
}

static int
add_sources (struct bitmap_action *a, json_t *list, struct error *err)
{
  size_t nr = json_array_size (list);
  struct bitmap_ref *refs = NULL;
  json_t *value;
  size_t i;

  if (nr > 0) {
    refs = calloc (nr, sizeof *refs);
    if (refs == NULL)
      return error_set (err, ENOMEM, "Out of memory");
  }
  a->sources = refs;
  a->nr_sources = nr;
  json_array_foreach (list, i, value) {
    refs[i].drive = a->target.drive;
    refs[i].name = json_string_value (value);
    if (json_is_object (value)) {
      refs[i].name = string (value, "name");
      refs[i].drive = find_node (string (value, "node"), false, err);
      if (refs[i].drive == NULL)
        return -1;
    }
  }
  return 0;
}

static int
fill_action (struct bitmap_action *a, const struct action_type *t,
             json_t *args, struct error *err)
{
  a->type = t->type;
  a->target.name = string (args, t->type == BITMAP_MERGE ? "target" : "name");
  a->target.drive = find_node (string (args, "node"), t->type == BITMAP_ADD,
                               err);
  if (a->target.drive == NULL)
    return -1;
  if (t->type == BITMAP_ADD)
    return add_options (a, args, err);
  if (t->type == BITMAP_MERGE)
    return add_sources (a, json_object_get (args, "bitmaps"), err);
  return 0;
}

/* ---- one command ---- */

static json_t *
run_one (const char *name, json_t *args, struct error *err)
{
  struct bitmap_action a = { 0 };
  int r = fill_action (&a, find_type (name), args, err);

  if (r == 0)
    r = bitmap_transaction (&a, 1, err);
  free ((void *) a.sources);
  return r == 0 ? json_object () : NULL;
}

static json_t *
run_add (json_t *args, struct error *err)
{
  return run_one ("block-dirty-bitmap-add", args, err);
}

static json_t *
run_remove (json_t *args, struct error *err)
{
  return run_one ("block-dirty-bitmap-remove", args, err);
}

static json_t *
run_clear (json_t *args, struct error *err)
{
  return run_one ("block-dirty-bitmap-clear", args, err);
}

static json_t *
run_enable (json_t *args, struct error *err)
{
  return run_one ("block-dirty-bitmap-enable", args, err);
}

static json_t *
run_disable (json_t *args, struct error *err)
{
  return run_one ("block-dirty-bitmap-disable", args, err);
}

static json_t *
run_merge (json_t *args, struct error *err)
{
  return run_one ("block-dirty-bitmap-merge", args, err);
}

/* ---- several, all or nothing ---- */

static int
check_action_type (json_t *value, const char *path, struct error *err)
{
  (void) path;
  if (find_type (json_string_value (value)))
    return 0;
  return error_set (err, EINVAL, "Parameter 'type' does not accept value '%s'",
                    json_string_value (value));
}

static const struct qmp_param action_params[] = {
  { .name = "type", .type = QMP_STRING, .check = check_action_type },
  { .name = "data", .type = QMP_OBJECT },
  { .name = NULL },
};

static const struct action_type *
type_of_action (json_t *action)
{
  const char *name = string (action, "type");

  return name ? find_type (name) : NULL;
}

static int
check_action (json_t *value, const char *path, struct error *err)
{
  const struct action_type *t;
  json_t *data;
  char full[64];

  if (qmp_check_type (value, QMP_OBJECT, path, path, err) == -1)
    return -1;
  /* The members of a known action's data come before what is unexpected
   * beside it.
   */
  t = type_of_action (value);
  data = json_object_get (value, "data");
  snprintf (full, sizeof full, "%s.data", path);
  if (t && json_is_object (data) &&
      qmp_check_object (data, t->params, full, err) == -1)
    return -1;
  return qmp_check_object (value, action_params, path, err);
}

static int
check_actions (json_t *value, const char *path, struct error *err)
{
  return qmp_check_array (value, path, err, check_action);
}

static int
check_completion_mode (json_t *value, const char *path, struct error *err)
{
  const char *mode = json_string_value (value);

  (void) path;
  if (!strcmp (mode, "individual") || !strcmp (mode, "grouped"))
    return 0;
  return error_set (err, EINVAL,
                    "Parameter 'completion-mode' does not accept value '%s'",
                    mode);
}

static const struct qmp_param property_params[] = {
  { .name = "completion-mode", .type = QMP_STRING, .optional = true,
    .check = check_completion_mode },
  { .name = NULL },
};

static int
check_properties (json_t *value, const char *path, struct error *err)
{
  return qmp_check_object (value, property_params, path, err);
}

static const struct qmp_param transaction_params[] = {
  { .name = "actions", .type = QMP_ARRAY, .check = check_actions },
  { .name = "properties", .type = QMP_OBJECT, .optional = true,
    .check = check_properties },
  { .name = NULL },
};

/* Nothing that acts on bitmaps has a completion that could be grouped; QEMU
 * refuses it just so.  It has no objection to an abort.
 */
static int
check_grouped (json_t *args, json_t *action, struct error *err)
{
  json_t *properties = json_object_get (args, "properties");
  const char *mode = string (properties, "completion-mode");

  if (mode == NULL || strcmp (mode, "grouped") ||
      type_of_action (action)->type == BITMAP_ABORT)
    return 0;
  return error_set (err, EINVAL, "Action '%s' does not support Transaction "
                    "property completion-mode = grouped",
                    string (action, "type"));
}

static int
fill_one (struct bitmap_action *a, struct view **v, json_t *action,
          struct error *err)
{
  const struct action_type *t = type_of_action (action);
  json_t *data = json_object_get (action, "data");

  if (t->type == BITMAP_ABORT) {
    a->type = BITMAP_ABORT;
    return 0;
  }
  if (t->type != BITMAP_BACKUP_BEGIN && t->type != BITMAP_BACKUP_END)
    return fill_action (a, t, data, err);
  *v = qmp_backup_action (a, t->type, data, err);
  return *v ? 0 : -1;
}

static json_t *
run_transaction (json_t *args, struct error *err)
{
  json_t *list = json_object_get (args, "actions"), *action;
  size_t nr = json_array_size (list), used = 0, i;
  struct bitmap_action *actions = calloc (nr + 1, sizeof *actions);
  CLEANUP_FREE struct view **views = calloc (nr + 1, sizeof views[0]);
  int r = 0;

  if (actions == NULL || views == NULL) {
    free (actions);
    return NULL;
  }
  json_array_foreach (list, i, action) {
    r = check_grouped (args, action, err);
    if (r == 0)
      r = fill_one (&actions[i], &views[i], action, err);
    if (r == -1)
      break;
    used = i + 1;
    if (actions[i].type == BITMAP_ABORT)
      break; /* QEMU does not look at what follows */
  }
  if (r == 0 && used > 0)
    r = bitmap_transaction (actions, used, err);
  for (i = 0; i < nr; i++) {
    free ((void *) actions[i].sources);
    if (views[i])
      views_settle (views[i]);
  }
  free (actions);
  return r == 0 ? json_object () : NULL;
}

const struct qmp_command qmp_bitmap_commands[] = {
  { "block-dirty-bitmap-add", add_params, run_add },
  { "block-dirty-bitmap-remove", target_params, run_remove },
  { "block-dirty-bitmap-clear", target_params, run_clear },
  { "block-dirty-bitmap-enable", target_params, run_enable },
  { "block-dirty-bitmap-disable", target_params, run_disable },
  { "block-dirty-bitmap-merge", merge_params, run_merge },
  { "transaction", transaction_params, run_transaction },
  { .name = NULL },
};
