/* nbdferry - nbdferry bitmap list
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cmd-bitmap.h"
#include "control.h"
#include "nodes.h"
#include "output.h"
#include "size.h"

/* Append the bitmaps of a node to 'list', each with its node's name first. */
static void
gather (const json_t *node, json_t *list)
{
  const json_t *bitmaps = json_object_get (node, "dirty-bitmaps");
  json_t *bitmap, *entry;
  size_t i;

  json_array_foreach ((json_t *) bitmaps, i, bitmap) {
    entry = json_pack ("{s:s}", "node", node_name (node));
    json_object_update (entry, bitmap);
    json_array_append_new (list, entry);
  }
}

/* All bitmaps, or those of one node: an array, or NULL. */
static json_t *
query (struct control *c, const char *wanted, struct error *err)
{
  json_t *nodes = nodes_query (c, err), *list = NULL;
  const json_t *node;
  size_t i;

  if (nodes == NULL)
    return NULL;
  node = wanted ? nodes_find (nodes, wanted, err) : NULL;
  if (node || !wanted)
    list = json_array ();
  if (node)
    gather (node, list);
  else if (!wanted)
    json_array_foreach (nodes, i, node)
      gather (node, list);
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
  table_add (t, json_is_true (json_object_get (bitmap, "inconsistent"))
                ? "inconsistent" : "ok");
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
