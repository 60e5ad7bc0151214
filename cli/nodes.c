/* nbdferry - the daemon's disks, as QMP lists them
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

#include "cleanup.h"
#include "nodes.h"

/* QMP lists what is newest first, which people find odd. */
static json_t *
reversed (const json_t *array)
{
  json_t *copy = json_array ();
  size_t i;

  for (i = json_array_size (array); i > 0; i--)
    json_array_append (copy, json_array_get (array, i - 1));
  return copy;
}

json_t *
nodes_query (struct control *c, struct error *err)
{
  json_t *answer = control_command (c, "query-named-block-nodes",
                                    json_object (), err);
  json_t *nodes = NULL, *node, *bitmaps;
  size_t i;

  if (answer == NULL)
    return NULL;
  if (!json_is_array (answer))
    error_set (err, EPROTO, "the daemon gave no list of its disks");
  else {
    nodes = reversed (answer);
    json_array_foreach (nodes, i, node) {
      bitmaps = json_object_get (node, "dirty-bitmaps");
      if (bitmaps)
        json_object_set_new (node, "dirty-bitmaps", reversed (bitmaps));
    }
  }
  json_decref (answer);
  return nodes;
}

const char *
node_name (const json_t *node)
{
  const char *name = json_string_value (json_object_get (node, "node-name"));

  return name ? name : "";
}

/* "vda, vdb": the caller frees it. */
static char *
list_names (const json_t *nodes)
{
  char *list = NULL;
  const json_t *node;
  size_t i, len;
  FILE *f = open_memstream (&list, &len);

  if (f == NULL)
    return NULL;
  json_array_foreach ((json_t *) nodes, i, node)
    fprintf (f, "%s%s", i ? ", " : "", node_name (node));
  if (fclose (f) != 0) {
    free (list);
    return NULL;
  }
  return list;
}

const json_t *
nodes_find (const json_t *nodes, const char *name, struct error *err)
{
  CLEANUP_FREE char *list = NULL;
  const json_t *node;
  size_t i;

  json_array_foreach ((json_t *) nodes, i, node)
    if (strcmp (node_name (node), name) == 0)
      return node;
  list = list_names (nodes);
  error_set (err, ENOENT, "there is no disk '%s', but: %s", name,
             list ? list : "?");
  return NULL;
}

const json_t *
nodes_only (const json_t *nodes, struct error *err)
{
  CLEANUP_FREE char *list = NULL;

  if (json_array_size (nodes) == 1)
    return json_array_get (nodes, 0);
  if (json_array_size (nodes) == 0) {
    error_set (err, ENOENT, "the daemon has no disk");
    return NULL;
  }
  list = list_names (nodes);
  error_set (err, EINVAL, "the daemon has several disks, "
             "say which one with --node: %s", list ? list : "?");
  return NULL;
}
