/* nbdferry - nbdferry sync: what is known, and how to go on from there
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The table at the head of sync-record.h says what the standby holds.  In
 * doubt nothing is begun, and the user is told what can be done.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "absolute.h"
#include "cleanup.h"
#include "clock.h"
#include "identity.h"
#include "keep-out.h"
#include "nodes.h"
#include "output.h"
#include "probe.h"
#include "remote.h"
#include "side.h"
#include "size.h"
#include "sync.h"

#define BUSY_MS    5000 /* how long a bitmap in use is waited for */
#define LOOK       (1 << 20) /* bytes in which content shows */

#define ADVICE \
  "; --compare sends what differs and goes on from there, --full sends " \
  "everything"

/* What is known of the bitmap. */
struct found {
  bool exists, inconsistent, has_record;
  const char *reason;   /* borrowed from 'about'; or NULL */
  json_t *about;        /* owned */
  struct uuid point;
  struct sync_record record;
};

static void
found_free (struct found *f)
{
  json_decref (f->about);
  sync_record_free (&f->record);
}

/* ---- looking ---- */

static const json_t *
find_named (const json_t *list, const char *key, const char *name)
{
  const json_t *item;
  size_t i;

  json_array_foreach ((json_t *) list, i, item) {
    const char *s = json_string_value (json_object_get (item, key));

    if (s && strcmp (s, name) == 0)
      return item;
  }
  return NULL;
}

/* The disk, and the bitmap as QEMU would list it. */
static int
look_at_node (struct sync_job *s, struct found *f, struct error *err)
{
  json_auto_t *nodes = nodes_query (s->control, err);
  const json_t *node, *b;

  if (nodes == NULL)
    return -1;
  node = s->opt->node ? nodes_find (nodes, s->opt->node, err)
                      : nodes_only (nodes, err);
  if (node == NULL)
    return -1;
  s->node = strdup (node_name (node));
  if (s->node == NULL)
    return error_set (err, ENOMEM, "%m");
  s->size = json_integer_value (json_object_get (
    json_object_get (node, "image"), "virtual-size"));
  if (s->opt->bitmap == NULL)
    return 0;
  b = find_named (json_object_get (node, "dirty-bitmaps"), "name",
                  s->opt->bitmap);
  f->exists = b != NULL;
  f->inconsistent = json_is_true (json_object_get (b, "inconsistent"));
  s->granularity = json_integer_value (json_object_get (b, "granularity"));
  return 0;
}

/* Its point, and why it is inconsistent. */
static int
look_at_bitmap (struct sync_job *s, struct found *f, struct error *err)
{
  const json_t *about;
  const char *point;

  f->about = control_command (s->control, "x-ferry-query-bitmaps",
                              json_object (), err);
  if (f->about == NULL)
    return -1;
  about = find_named (json_object_get (find_named (f->about, "node", s->node),
                                       "bitmaps"), "name", s->opt->bitmap);
  f->reason = json_string_value (json_object_get (about, "reason"));
  point = json_string_value (json_object_get (about, "point"));
  if (point && !uuid_parse (point, &f->point))
    return error_set (err, EPROTO, "the daemon says that the bitmap's point "
                      "is '%s'", point);
  return 0;
}

static int
look_at_record (struct sync_job *s, struct found *f, struct error *err)
{
  json_auto_t *answer =
    control_command (s->control, "x-ferry-query-sync",
                     json_pack ("{s:s, s:s}", "node", s->node, "name",
                                s->opt->bitmap), err);
  const json_t *record = json_object_get (answer, "record");

  if (answer == NULL)
    return -1;
  /* One that makes no sense is as good as none. */
  f->has_record = !json_is_null (record) &&
                  sync_record_parse (record, &f->record, NULL) == 0;
  return 0;
}

static int
look (struct sync_job *s, struct found *f, struct error *err)
{
  if (look_at_node (s, f, err) == -1)
    return -1;
  if (!f->exists)
    return 0;
  return look_at_bitmap (s, f, err) == -1 || look_at_record (s, f, err) == -1
         ? -1 : 0;
}

/* ---- the standby ---- */

static int
open_standby (struct sync_job *s, struct error *err)
{
  const struct sync_options *o = s->opt;
  struct remote_options ro = { .connections = o->connections,
                               .patience_ms = o->patience_ms,
                               .stop = o->stop };
  struct stat st;

  s->is_uri = remote_is_uri (o->standby);
  s->standby = s->is_uri ? remote_absolute_uri (o->standby, err)
                         : absolute_path (o->standby, err);
  if (s->standby == NULL)
    return -1;
  /* Before it is opened: it may take one client alone. */
  if (s->is_uri && identity_ask (s->standby, NULL, IDENTITY_HOPS, o->stop,
                                 &s->identity, err) == -1)
    return -1;
  if (!s->is_uri && stat (s->standby, &st) == 0 && S_ISREG (st.st_mode) &&
      keep_out_of_state (s->standby, err) == -1)
    return -1;
  s->made = !s->is_uri && lstat (s->standby, &st) == -1 && errno == ENOENT;
  s->target = s->is_uri ? remote_open (s->standby, &ro, err)
                        : disk_open_file (s->standby, s->size, false, err);
  if (s->target == NULL)
    return -1;
  if (s->target->readonly)
    return error_set (err, EROFS, "%s: is read-only", s->standby);
  if (s->target->ops->claim && s->target->ops->claim (s->target, err) == -1)
    return -1;
  if (s->target->size < s->size)
    return error_set (err, ENOSPC, "%s: has %" PRIu64 " bytes, fewer than the "
                      "disk, which has %" PRIu64, s->standby, s->target->size,
                      s->size);
  return 0;
}

/* A first copy that was not asked for in so many words goes to a disk without
 * anything on it.
 */
static int
check_blank (struct sync_job *s, struct error *err)
{
  const size_t len = s->target->size < LOOK ? s->target->size : LOOK;
  CLEANUP_FREE char *what = NULL, *buf = malloc (len);
  int known = disk_probe (s->target, &what, err);

  if (known == -1)
    return error_prefix (err, "%s", s->standby);
  if (buf == NULL)
    return error_set (err, ENOMEM, "%m");
  if (s->target->ops->pread (s->target, buf, len, 0) == -1)
    return error_set (err, errno, "%s: read: %m", s->standby);
  if (known == 0 && disk_is_zero (buf, len))
    return 0;
  return error_set (err, EEXIST, "%s: is no standby that is known, and holds "
                    "%s; --full overwrites it, --compare does too, but sends "
                    "only what differs", s->standby,
                    known ? what : "something");
}

/* ---- deciding ---- */

/* The user has said how. */
static int
decide_as_told (struct sync_job *s, struct found *f)
{
  s->mode = s->opt->compare ? SYNC_COMPARE : SYNC_FULL;
  if (s->opt->bitmap == NULL)
    return 0;
  s->create = !f->exists || f->inconsistent;
  s->remove = f->inconsistent;
  return 0;
}

static bool
is_same_standby (const struct sync_job *s, const struct found *f)
{
  return strcmp (f->record.standby, s->standby) == 0;
}

/* Without anything that we know of this bitmap. */
static int
decide_without_record (struct sync_job *s, struct found *f, struct error *err)
{
  if (uuid_is_zero (&f->point)) {
    if (s->opt->adopt)
      return error_set (err, EINVAL, "bitmap '%s' has no point in time that a "
                        "standby could be at, so there is nothing to adopt"
                        ADVICE, s->opt->bitmap);
    s->mode = SYNC_FULL; /* it was made for this, by hand */
    return check_blank (s, err);
  }
  if (!s->opt->adopt)
    return error_set (err, EINVAL, "bitmap '%s' is in use already, but not "
                      "for a standby that is known here: give sync a bitmap "
                      "of its own; or, if %s is as the disk was at the last "
                      "backup by this bitmap, say so by --adopt" ADVICE,
                      s->opt->bitmap, s->standby);
  s->mode = SYNC_INCREMENTAL;
  s->parent = f->point;
  s->blind = true;
  return 0;
}

/* A copy from nowhere was begun, and never completed. */
static int
decide_to_go_on (struct sync_job *s, struct found *f, struct error *err)
{
  struct side side;

  s->mode = SYNC_FULL;
  if (!is_same_standby (s, f))
    return check_blank (s, err);
  if (side_of_disk (&side, s->standby, s->target, HASH_BLOCK_DEFAULT,
                    s->opt->stop, err) == -1)
    return -1;
  if (side.by_hash)
    s->mode = SYNC_COMPARE;
  side_close (&side);
  return 0;
}

static int
decide_by_record (struct sync_job *s, struct found *f, struct error *err)
{
  struct sync_record *r = &f->record;

  if (!uuid_is_zero (&f->point) && uuid_equal (&f->point, &r->to))
    s->known = r->at_to;
  else if (uuid_is_zero (&r->from) && r->at_to.nr == 0)
    return decide_to_go_on (s, f, err);
  else if (!uuid_is_zero (&f->point) && uuid_equal (&f->point, &r->from)) {
    s->known = r->at_from;
    s->on_the_way = !uuid_is_zero (&r->to);
  }
  else
    return error_set (err, EINVAL, "bitmap '%s' does not record since the "
                      "point that %s was brought to: it has been used for "
                      "something else, or was cleared" ADVICE, s->opt->bitmap,
                      r->standby);
  if (!is_same_standby (s, f) && !s->opt->adopt)
    return error_set (err, EINVAL, "bitmap '%s' belongs to the standby %s; if "
                      "%s is the same disk under another name, say so by "
                      "--adopt" ADVICE, s->opt->bitmap, r->standby,
                      s->standby);
  if (r->size != s->target->size)
    return error_set (err, EINVAL, "%s: is not the standby that it was: it "
                      "has %" PRIu64 " bytes instead of %" PRIu64 ADVICE,
                      s->standby, s->target->size, r->size);
  s->mode = SYNC_INCREMENTAL;
  s->parent = f->point;
  return 0;
}

static int
decide (struct sync_job *s, struct found *f, struct error *err)
{
  if (s->opt->compare || s->opt->full)
    return decide_as_told (s, f);
  if (f->inconsistent)
    return error_set (err, EINVAL, "bitmap '%s' is inconsistent%s%s" ADVICE
                      "; both begin the bitmap anew", s->opt->bitmap,
                      f->reason ? ": " : "", f->reason ? f->reason : "");
  if (!f->exists && s->opt->adopt)
    return error_set (err, ENOENT, "there is no bitmap '%s', so nothing is "
                      "known to adopt" ADVICE, s->opt->bitmap);
  if (!f->exists) {
    s->create = true;
    s->mode = SYNC_FULL;
    return check_blank (s, err);
  }
  return f->has_record ? decide_by_record (s, f, err)
                       : decide_without_record (s, f, err);
}

/* A file that was not there is at no point, whatever is known or said of it. */
static int
decide_what_to_do (struct sync_job *s, struct found *f, struct error *err)
{
  int r = decide (s, f, err);

  if (r == 0 && s->made && s->mode == SYNC_INCREMENTAL)
    r = error_set (err, ENOENT, "%s: does not exist, so it is not as it was "
                   "left (is its file system mounted?)" ADVICE, s->standby);
  if (r == -1 && s->made)
    unlink (s->standby);
  return r;
}

/* ---- beginning ---- */

static json_t *
action (const char *type, json_t *data)
{
  return json_pack ("{s:s, s:o}", "type", type, "data", data);
}

static json_t *
begin_arguments (const struct sync_job *s)
{
  char id[UUID_TEXT];
  json_t *args;

  uuid_format (&s->point, id);
  /* If we die, the daemon is to give it up at once. */
  args = json_pack ("{s:s, s:s, s:b, s:s, s:b}", "node", s->node, "id", id,
                    "full", s->mode != SYNC_INCREMENTAL, "scope",
                    s->mode == SYNC_INCREMENTAL ? "needed" : "disk",
                    "linger", false);
  if (s->opt->bitmap)
    json_object_set_new (args, "bitmap", json_string (s->opt->bitmap));
  if (s->opt->scratch_limit)
    json_object_set_new (args, "scratch-limit",
                         json_integer (s->opt->scratch_limit));
  if (s->opt->slow)
    json_object_set_new (args, "on-limit", json_string ("slow"));
  return args;
}

/* A transaction could not make one of the same name.  Nothing is lost: it is
 * inconsistent.
 */
static int
remove_bitmap (struct sync_job *s, struct error *err)
{
  json_t *answer = control_command (s->control, "block-dirty-bitmap-remove",
                                    json_pack ("{s:s, s:s}", "node", s->node,
                                               "name", s->opt->bitmap), err);

  json_decref (answer);
  return answer ? 0 : -1;
}

/* NULL: no memory. */
static json_t *
begin_actions (const struct sync_job *s)
{
  json_t *actions = json_array (), *target;

  if (s->create) {
    target = json_pack ("{s:s, s:s, s:b}", "node", s->node, "name",
                        s->opt->bitmap, "persistent", true);
    if (s->granularity)
      json_object_set_new (target, "granularity",
                           json_integer (s->granularity));
    json_array_append_new (actions,
                           action ("block-dirty-bitmap-add", target));
  }
  json_array_append_new (actions, action ("x-ferry-backup-begin",
                                          begin_arguments (s)));
  return json_pack ("{s:o}", "actions", actions);
}

/* Whoever used the bitmap last may have been killed just now, and then the
 * daemon needs a moment to notice.
 */
static bool
is_busy (struct sync_job *s)
{
  json_auto_t *nodes = nodes_query (s->control, NULL);
  const json_t *node = find_named (nodes, "node-name", s->node);
  const json_t *bitmap = NULL;

  if (s->opt->bitmap)
    bitmap = find_named (json_object_get (node, "dirty-bitmaps"), "name",
                         s->opt->bitmap);
  return json_is_true (json_object_get (bitmap, "busy"));
}

static int
begin (struct sync_job *s, struct error *err)
{
  const uint64_t deadline = now_ns () + BUSY_MS * NS_PER_MS;
  json_t *answer;

  if (s->remove && remove_bitmap (s, err) == -1)
    return -1;
  uuid_new (&s->point);
  for (;;) {
    bool busy = is_busy (s);

    answer = control_command (s->control, "transaction", begin_actions (s),
                              err);
    s->begun = answer != NULL;
    json_decref (answer);
    if (s->begun)
      return 0;
    if (!busy || now_ns () > deadline ||
        stop_wait (s->opt->stop, 50 * NS_PER_MS))
      return -1;
  }
}

/* What has begun: the bitmap must not have changed since we looked. */
static int
check_begun (struct sync_job *s, char **export, struct error *err)
{
  json_auto_t *list = control_command (s->control, "x-ferry-query-backups",
                                       json_object (), err);
  char id[UUID_TEXT];
  const char *parent, *name;
  const json_t *about;
  struct uuid since = { { 0 } };

  if (list == NULL)
    return -1;
  uuid_format (&s->point, id);
  about = find_named (list, "id", id);
  parent = json_string_value (json_object_get (about, "parent"));
  name = json_string_value (json_object_get (about, "export"));
  s->needed = json_integer_value (json_object_get (about, "dirty-bytes"));
  if (name == NULL)
    return error_set (err, EPROTO, "the daemon does not know the backup that "
                      "it has begun");
  if (s->mode == SYNC_INCREMENTAL &&
      (parent == NULL || !uuid_parse (parent, &since) ||
       !uuid_equal (&since, &s->parent)))
    return error_set (err, EBUSY, "bitmap '%s' was used by somebody else just "
                      "now", s->opt->bitmap);
  *export = strdup (name);
  return *export ? 0 : error_set (err, ENOMEM, "%m");
}

void
sync_explain (struct sync_job *s, struct error *err)
{
  json_auto_t *list = NULL;
  const char *why;
  char id[UUID_TEXT];

  if (!s->begun)
    return;
  control_set_limit (s->control, 5 * NS_PER_S);
  list = control_command (s->control, "x-ferry-query-backups", json_object (),
                          NULL);
  uuid_format (&s->point, id);
  why = json_string_value (json_object_get (find_named (list, "id", id),
                                            "error"));
  if (why)
    error_set (err, EIO, "the backup was given up: %s", why);
}

/* Through the first of the daemon's addresses that answers. */
static int
open_view (struct sync_job *s, const char *export, struct error *err)
{
  struct remote_options ro = { .connections = s->opt->connections,
                               .patience_ms = 5000, .stop = s->opt->stop };
  json_auto_t *answer = NULL;
  json_auto_t *uris = NULL;
  const json_t *uri;
  size_t i;

  if (s->opt->uri)
    uris = json_pack ("[s]", s->opt->uri);
  else {
    answer = control_command (s->control, "x-ferry-query-exports",
                              json_object (), err);
    if (answer == NULL)
      return -1;
    uris = json_incref (json_object_get (answer, "uris"));
  }
  error_set (err, ENOENT, "the daemon does not say where it serves its disks; "
             "--uri can");
  json_array_foreach (uris, i, uri) {
    if (!json_is_string (uri))
      continue;
    free (s->view_uri);
    s->view_uri = client_uri_with_export (json_string_value (uri), export,
                                          err);
    if (s->view_uri)
      s->view = remote_open (s->view_uri, &ro, err);
    if (s->view)
      return 0;
  }
  return -1;
}

static int
check_other (struct sync_job *s, struct error *err)
{
  struct uuid own;
  int r;

  if (uuid_is_zero (&s->identity)) /* also a file, which the daemon has locked */
    return 0;
  r = identity_ask (s->view_uri, s->node, IDENTITY_HOPS, s->opt->stop, &own,
                    err);
  if (r != 1 || !uuid_equal (&s->identity, &own))
    return r == -1 ? -1 : 0;
  return error_set (err, EINVAL, "%s: is the disk itself", s->standby);
}

int
sync_begin (struct sync_job *s, const struct sync_options *opt,
            struct error *err)
{
  CLEANUP_FREE char *export = NULL;
  struct found f = { 0 };
  int r = -1;

  *s = (struct sync_job){ .opt = opt };
  s->control = control_open (opt->control, err);
  if (s->control && look (s, &f, err) == 0 && open_standby (s, err) == 0 &&
      decide_what_to_do (s, &f, err) == 0 && begin (s, err) == 0 &&
      check_begun (s, &export, err) == 0 && open_view (s, export, err) == 0)
    r = check_other (s, err);
  found_free (&f);
  return r;
}
