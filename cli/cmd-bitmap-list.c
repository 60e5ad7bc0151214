/* nbdferry - nbdferry bitmap list
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "cmd-bitmap.h"
#include "control.h"
#include "nodes.h"
#include "output.h"
#include "size.h"

/* The member of 'list' whose 'key' is 'value', or NULL. */
static const json_t *
find (const json_t *list, const char *key, const char *value)
{
  const json_t *item;
  size_t i;

  json_array_foreach ((json_t *) list, i, item) {
    const char *v = json_string_value (json_object_get (item, key));

    if (v && value && strcmp (v, value) == 0)
      return item;
  }
  return NULL;
}

/* How much of the disk that is. */
static void
add_share (json_t *entry, const json_t *node)
{
  uint64_t size = json_integer_value (json_object_get (
    json_object_get (node, "image"), "virtual-size"));
  uint64_t g = json_integer_value (json_object_get (entry, "granularity"));
  uint64_t count = json_integer_value (json_object_get (entry, "count"));

  if (size == 0 || g == 0)
    return;
  json_object_set_new (entry, "size", json_integer (size));
  json_object_set_new (entry, "share",
    json_real ((double) (count / g) / (size / g + (size % g != 0))));
}

/* Append the bitmaps of a node to 'list', each with its node's name first,
 * and with what 'extra' says of it.
 */
static void
gather (const json_t *node, const json_t *extra, json_t *list)
{
  const json_t *bitmaps = json_object_get (node, "dirty-bitmaps");
  const json_t *more = find (extra, "node", node_name (node)), *about;
  json_t *bitmap, *entry;
  size_t i;

  json_array_foreach ((json_t *) bitmaps, i, bitmap) {
    entry = json_pack ("{s:s}", "node", node_name (node));
    json_object_update (entry, bitmap);
    about = find (json_object_get (more, "bitmaps"), "name",
                  json_string_value (json_object_get (bitmap, "name")));
    if (about)
      json_object_update (entry, (json_t *) about);
    if (more)
      json_object_set (entry, "trust", json_object_get (more, "trust"));
    add_share (entry, node);
    json_array_append_new (list, entry);
  }
}

/* All bitmaps, or those of one node: an array, or NULL. */
static json_t *
query (struct control *c, const char *wanted, struct error *err)
{
  json_t *nodes = nodes_query (c, err), *list = NULL, *extra;
  const json_t *node;
  size_t i;

  if (nodes == NULL)
    return NULL;
  /* QEMU's daemons do not know this, and so give no reasons. */
  extra = control_command (c, "x-ferry-query-bitmaps", json_object (), NULL);
  node = wanted ? nodes_find (nodes, wanted, err) : NULL;
  if (node || !wanted)
    list = json_array ();
  if (node)
    gather (node, extra, list);
  else if (!wanted)
    json_array_foreach (nodes, i, node)
      gather (node, extra, list);
  json_decref (extra);
  json_decref (nodes);
  return list;
}

static void
add_flag (struct table *t, const json_t *bitmap, const char *key)
{
  table_add (t, json_is_true (json_object_get (bitmap, key)) ? "yes" : "no");
}

static void
add_size (struct table *t, const json_t *bitmap, const char *key)
{
  json_int_t value = json_integer_value (json_object_get (bitmap, key));
  char text[SIZE_TEXT];

  table_add (t, size_format (value > 0 ? value : 0, text));
}

/* "inconsistent: WHY", "ok, trust: unverifiable (NOTE)". */
static void
add_state (struct table *t, const json_t *bitmap)
{
  CLEANUP_FREE char *text = NULL;
  const char *why = json_string_value (json_object_get (bitmap, "reason"));
  const char *trust = json_string_value (json_object_get (bitmap, "trust"));
  bool bad = json_is_true (json_object_get (bitmap, "inconsistent"));
  bool unsure = trust && strcmp (trust, "unverifiable") == 0;

  if (asprintf (&text, "%s%s%s%s%s", bad ? "inconsistent" : "ok",
                unsure && !bad ? ", trust: unverifiable" : "",
                why ? bad ? ": " : " (" : "", why ? why : "",
                why && !bad ? ")" : "") == -1)
    text = NULL;
  table_add (t, text ? text : "?");
}

static void
add_row (struct table *t, const json_t *bitmap)
{
  const char *name = json_string_value (json_object_get (bitmap, "name"));

  table_add (t, json_string_value (json_object_get (bitmap, "node")));
  table_add (t, name ? name : "-"); /* QEMU has some without a name */
  add_size (t, bitmap, "granularity");
  add_size (t, bitmap, "count");
  add_flag (t, bitmap, "recording");
  add_flag (t, bitmap, "persistent");
  add_flag (t, bitmap, "busy");
  add_state (t, bitmap);
}

static void
print_table (const json_t *list)
{
  static const char *const heads[] = {
    "NODE", "NAME", "GRANULARITY", "COUNT", "RECORDING", "PERSISTENT", "BUSY",
    "STATE",
  };
  struct table t = { .columns = sizeof heads / sizeof heads[0] };
  json_t *bitmap;
  size_t i;

  for (i = 0; i < t.columns; i++)
    table_add (&t, heads[i]);
  json_array_foreach ((json_t *) list, i, bitmap)
    add_row (&t, bitmap);
  table_print (&t);
  table_clear (&t);
}

int
bitmap_list_run (const struct command *cmd, char **args, void *values)
{
  const struct bitmap_values *v = values;
  struct error err = { 0 };
  struct control *c = control_open (args[0], &err);
  json_t *list = c ? query (c, v->node, &err) : NULL;
  int status = STATUS_FAILED;

  (void) cmd;
  if (list == NULL)
    complain ("%s", err.msg);
  else {
    if (v->json)
      print_json (list);
    else
      print_table (list);
    if (output_finish () == 0)
      status = STATUS_DONE;
  }
  json_decref (list);
  control_close (c);
  return status;
}
