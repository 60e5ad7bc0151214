/* nbdferry - the daemon's part of a backup
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "backup-session.h"
#include "cleanup.h"
#include "clock.h"
#include "nodes.h"
#include "size.h"

/* ---- which disks, and which kind ---- */

static const json_t *
find_named (const json_t *array, const char *key, const char *name)
{
  const json_t *o;
  size_t i;

  json_array_foreach ((json_t *) array, i, o) {
    const char *s = json_string_value (json_object_get (o, key));

    if (s && strcmp (s, name) == 0)
      return o;
  }
  return NULL;
}

/* Does the bitmap know of a backup that the next one can build upon? */
static bool
has_point (const json_t *extra, const char *node, const char *bitmap)
{
  const json_t *disk = find_named (extra, "node", node);
  const json_t *b = find_named (json_object_get (disk, "bitmaps"), "name",
                                bitmap);

  return json_is_string (json_object_get (b, "point"));
}

/* A bitmap that is there keeps its granularity: the same may be asked for again,
 * so that one command does for every night, but no other.
 */
static int
check_granularity (const struct backup_session *s, const char *node,
                   const json_t *bitmap, struct error *err)
{
  uint64_t has = json_integer_value (json_object_get (bitmap, "granularity"));
  uint64_t wanted = s->opt->granularity;
  char a[SIZE_TEXT], b[SIZE_TEXT];

  if (bitmap == NULL || wanted == 0 || wanted == has)
    return 0;
  return error_set (err, EINVAL, "the bitmap '%s' of disk '%s' has a "
                    "granularity of %s, not %s; --granularity is for a new "
                    "one", s->opt->bitmap, node, size_format (has, a),
                    size_format (wanted, b));
}

static int
choose_kind (struct backup_session *s, struct backup_disk *d,
             const json_t *node, const json_t *extra, struct error *err)
{
  const char *bitmap = s->opt->bitmap;
  const json_t *b;
  bool point;

  d->full = s->opt->kind == BACKUP_FULL || bitmap == NULL;
  if (bitmap == NULL)
    return 0;
  b = find_named (json_object_get (node, "dirty-bitmaps"), "name", bitmap);
  d->create = b == NULL;
  point = !d->create && has_point (extra, d->node, bitmap);
  if (check_granularity (s, d->node, b, err) == -1)
    return -1;
  if (!point && s->opt->kind == BACKUP_INCREMENTAL)
    return error_set (err, EINVAL, d->create
                      ? "disk '%s' has no bitmap '%s', so there is nothing "
                        "that an incremental backup could build upon"
                      : "the bitmap '%2$s' of disk '%1$s' knows of no earlier "
                        "backup that an incremental one could build upon",
                      d->node, bitmap);
  if (!point)
    d->full = true;
  d->has_point = point;
  return 0;
}

static int
add_disk (struct backup_session *s, const json_t *node, const json_t *extra,
          struct error *err)
{
  struct backup_disk *d = &s->disks[s->nr];

  d->node = strdup (node_name (node));
  if (d->node == NULL)
    return error_set (err, errno, "%m");
  s->nr++;
  for (size_t i = 0; i + 1 < s->nr; i++)
    if (strcmp (s->disks[i].node, d->node) == 0)
      return error_set (err, EINVAL, "disk '%s' is named twice", d->node);
  return choose_kind (s, d, node, extra, err);
}

int
session_choose (struct backup_session *s, struct control *control,
                const struct backup_options *opt, const char *const *names,
                size_t nr, struct error *err)
{
  json_auto_t *nodes = nodes_query (control, err), *extra = NULL;
  int r = 0;

  *s = (struct backup_session){ .control = control, .opt = opt };
  if (nodes == NULL)
    return -1;
  extra = control_command (control, "x-ferry-query-bitmaps", json_object (),
                           err);
  if (extra == NULL)
    return -1;
  s->disks = calloc (nr ? nr : 1, sizeof s->disks[0]);
  if (s->disks == NULL)
    return error_set (err, ENOMEM, "%m");
  uuid_new (&s->id);
  for (size_t i = 0; i < (nr ? nr : 1) && r == 0; i++) {
    const json_t *node = nr ? nodes_find (nodes, names[i], err)
                            : nodes_only (nodes, err);

    r = node ? add_disk (s, node, extra, err) : -1;
  }
  return r;
}

/* ---- begin ---- */

static void
add_action (json_t *actions, const char *type, json_t *data)
{
  json_array_append_new (actions, json_pack ("{s:s, s:o}", "type", type,
                                             "data", data));
}

static void
add_begin (const struct backup_session *s, const struct backup_disk *d,
           json_t *actions)
{
  const struct backup_options *opt = s->opt;
  char id[UUID_TEXT];
  json_t *data;

  if (d->create) {
    data = json_pack ("{s:s, s:s, s:b}", "node", d->node, "name", opt->bitmap,
                      "persistent", 1);
    if (opt->granularity)
      json_object_set_new (data, "granularity",
                           json_integer (opt->granularity));
    add_action (actions, "block-dirty-bitmap-add", data);
  }
  uuid_format (&s->id, id);
  data = json_pack ("{s:s, s:s, s:b, s:s, s:b}", "node", d->node, "id", id,
                    "full", (int) d->full, "scope", "needed", "linger", 0);
  if (opt->bitmap)
    json_object_set_new (data, "bitmap", json_string (opt->bitmap));
  if (opt->has_scratch_limit)
    json_object_set_new (data, "scratch-limit",
                         json_integer (opt->scratch_limit));
  if (opt->on_limit)
    json_object_set_new (data, "on-limit", json_string (opt->on_limit));
  add_action (actions, "x-ferry-backup-begin", data);
}

static int
transaction (struct backup_session *s, json_t *actions, struct error *err)
{
  json_t *result = control_command (
    s->control, "transaction", json_pack ("{s:o}", "actions", actions), err);

  json_decref (result);
  return result ? 0 : -1;
}

static bool
get_uuid (const json_t *o, const char *key, struct uuid *u)
{
  const char *s = json_string_value (json_object_get (o, key));

  return s && uuid_parse (s, u);
}

static uint64_t
get_number (const json_t *o, const char *key)
{
  return json_integer_value (json_object_get (o, key));
}

/* What query-backups says of it. */
static int
fill (const struct backup_session *s, struct backup_disk *d,
      const json_t *info, struct error *err)
{
  const char *export = json_string_value (json_object_get (info, "export"));
  struct archive_head *h = &d->head;

  uuid_new (&h->id);
  h->disk = strdup (d->node);
  h->size = get_number (info, "size");
  h->generation = get_number (info, "generation");
  h->time = get_number (info, "time");
  h->tool = strdup ("nbdferry " PACKAGE_VERSION);
  if (s->opt->bitmap) {
    h->bitmap = strdup (s->opt->bitmap);
    h->granularity = get_number (info, "granularity");
  }
  d->export = export ? strdup (export) : NULL;
  d->needed = d->full ? h->size : get_number (info, "dirty-bytes");
  if (!get_uuid (info, "lineage", &h->lineage) ||
      !get_uuid (info, "point", &h->point) || d->export == NULL ||
      (!d->full && !get_uuid (info, "parent", &h->parent)))
    return error_set (err, EPROTO, "the daemon does not say what it has begun");
  return 0;
}

/* The element of query-backups that is ours, borrowed. */
static const json_t *
find_ours (const struct backup_session *s, const json_t *list,
           const struct backup_disk *d)
{
  const json_t *o;
  struct uuid id;
  size_t i;

  json_array_foreach ((json_t *) list, i, o) {
    const char *node = json_string_value (json_object_get (o, "node"));

    if (node && strcmp (node, d->node) == 0 && get_uuid (o, "id", &id) &&
        uuid_equal (&id, &s->id))
      return o;
  }
  return NULL;
}

int
session_begin (struct backup_session *s, struct error *err)
{
  json_t *actions = json_array ();
  json_auto_t *list = NULL;

  for (size_t i = 0; i < s->nr; i++)
    add_begin (s, &s->disks[i], actions);
  if (transaction (s, actions, err) == -1)
    return -1;
  s->begun = true;
  list = control_command (s->control, "x-ferry-query-backups", json_object (),
                          err);
  for (size_t i = 0; list && i < s->nr; i++) {
    const json_t *info = find_ours (s, list, &s->disks[i]);

    if (info == NULL) {
      error_set (err, EPROTO, "the daemon does not know the backup that it has "
                 "begun");
      break;
    }
    if (fill (s, &s->disks[i], info, err) == -1)
      break;
    if (i + 1 == s->nr)
      return 0;
  }
  session_give_up (s);
  return -1;
}

const json_t *
session_uris (struct backup_session *s, struct error *err)
{
  json_auto_t *answer = NULL;
  json_t *uris;

  if (s->uris == NULL && s->opt->uri)
    s->uris = json_pack ("[s]", s->opt->uri);
  if (s->uris)
    return s->uris;
  answer = control_command (s->control, "x-ferry-query-exports",
                            json_object (), err);
  if (answer == NULL)
    return NULL;
  uris = json_object_get (answer, "uris");
  if (json_array_size (uris) > 0)
    return s->uris = json_incref (uris);
  error_set (err, ENOENT, "the daemon does not say where it listens; say it "
             "with --uri");
  return NULL;
}

struct direct *
session_direct (struct backup_session *s, const struct backup_disk *d)
{
  json_auto_t *answer = NULL;
  char id[UUID_TEXT];
  int fds[2];

  uuid_format (&s->id, id);
  answer = control_command (s->control, "x-ferry-backup-direct",
                            json_pack ("{s:s, s:s}", "node", d->node, "id",
                                       id), NULL);
  if (answer == NULL || !control_take_fds (s->control, fds, 2))
    return NULL;
  return direct_open (fds[0], fds[1], d->head.size, NULL);
}

int
session_forget (struct backup_session *s, struct backup_disk *d,
                struct error *err)
{
  json_auto_t *answer = NULL;
  char id[UUID_TEXT];

  if (!d->full || !d->has_point)
    return 0;
  uuid_format (&s->id, id);
  answer = control_command (s->control, "x-ferry-backup-forget",
                            json_pack ("{s:s, s:s}", "node", d->node, "id",
                                       id), err);
  d->forgotten = answer != NULL;
  return answer ? 0 : -1;
}

int
session_check (struct backup_session *s, struct error *err)
{
  json_auto_t *list = control_command (s->control, "x-ferry-query-backups",
                                       json_object (), err);

  if (list == NULL)
    return -1;
  for (size_t i = 0; i < s->nr; i++) {
    const json_t *info = find_ours (s, list, &s->disks[i]);
    const char *state = json_string_value (json_object_get (info, "state"));

    if (state == NULL || strcmp (state, "running") != 0)
      return error_set (err, EIO, "the daemon has given the backup of disk "
                        "'%s' up", s->disks[i].node);
  }
  return 0;
}

/* Nobody waits longer for what can also be left out. */
#define COURTESY (1 * NS_PER_S)
#define FAREWELL (5 * NS_PER_S)

/* So many bytes at least, so that not every moment brings a command. */
#define RELEASE_STEP (8 << 20)

void
session_release (struct backup_session *s, struct backup_disk *d,
                 uint64_t up_to)
{
  char id[UUID_TEXT];

  if (up_to <= d->released ||
      (up_to - d->released < RELEASE_STEP && up_to < d->head.size))
    return;
  uuid_format (&s->id, id);
  control_set_limit (s->control, COURTESY);
  json_decref (control_command (
    s->control, "x-ferry-backup-release",
    json_pack ("{s:s, s:s, s:I, s:I}", "node", d->node, "id", id, "offset",
               (json_int_t) d->released, "length",
               (json_int_t) (up_to - d->released)), NULL));
  control_set_limit (s->control, UINT64_MAX);
  d->released = up_to;
}

/* ---- end ---- */

static json_t *
end_actions (const struct backup_session *s)
{
  json_t *actions = json_array ();
  char id[UUID_TEXT];

  uuid_format (&s->id, id);
  for (size_t i = 0; i < s->nr; i++)
    add_action (actions, "x-ferry-backup-end",
                json_pack ("{s:s, s:s, s:b}", "node", s->disks[i].node, "id",
                           id, "success", 1));
  return actions;
}

int
session_commit (struct backup_session *s, bool *unknown, struct error *err)
{
  json_t *args = json_pack ("{s:o}", "actions", end_actions (s)), *msg;
  unsigned id;
  int r;

  *unknown = true;
  if (control_send (s->control, "transaction", args, &id, err) == -1)
    return -1;
  for (;;) {
    if (control_receive (s->control, UINT64_MAX, &msg, err) != 1)
      return -1;
    if (control_is_reply (msg, id))
      break;
    json_decref (msg);
  }
  *unknown = false;
  r = control_result (msg, err) ? 0 : -1;
  json_decref (msg);
  if (r == 0)
    s->begun = false;
  return r;
}

void
session_give_up (struct backup_session *s)
{
  char id[UUID_TEXT];

  if (!s->begun)
    return;
  s->begun = false;
  uuid_format (&s->id, id);
  control_set_limit (s->control, FAREWELL);
  /* What cannot be told the daemon, it notices when we leave. */
  for (size_t i = 0; i < s->nr; i++)
    json_decref (control_command (
      s->control, "x-ferry-backup-end",
      json_pack ("{s:s, s:s, s:b}", "node", s->disks[i].node, "id", id,
                 "success", 0), NULL));
  for (size_t i = 0; i < s->nr; i++)
    if (s->disks[i].create)
      json_decref (control_command (
        s->control, "block-dirty-bitmap-remove",
        json_pack ("{s:s, s:s}", "node", s->disks[i].node, "name",
                   s->opt->bitmap), NULL));
}

void
session_explain (struct backup_session *s, struct error *err)
{
  json_auto_t *list = NULL;

  control_set_limit (s->control, FAREWELL);
  if (s->begun)
    list = control_command (s->control, "x-ferry-query-backups",
                            json_object (), NULL);
  for (size_t i = 0; list && i < s->nr; i++) {
    const json_t *info = find_ours (s, list, &s->disks[i]);
    const char *why = json_string_value (json_object_get (info, "error"));

    if (why) {
      error_set (err, EIO, "the daemon has given the backup of disk '%s' up: "
                 "%s", s->disks[i].node, why);
      return;
    }
  }
}

void
session_free (struct backup_session *s)
{
  for (size_t i = 0; i < s->nr; i++) {
    free (s->disks[i].node);
    free (s->disks[i].export);
    archive_head_free (&s->disks[i].head);
  }
  free (s->disks);
  json_decref (s->uris);
  *s = (struct backup_session){ 0 };
}
