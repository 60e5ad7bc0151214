/* nbdferry - the options of migrate that choose and rename
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "client.h"
#include "mapping-options.h"
#include "nodes.h"

/* Is 'text' that name, or that name, '=' and another one?  '*alias' is what it
 * is to be called.
 */
static bool
is_name (const char *text, const char *name, const char **alias)
{
  size_t n = strlen (name);

  if (strncmp (text, name, n) != 0 || (text[n] != '\0' && text[n] != '='))
    return false;
  *alias = text[n] == '=' ? text + n + 1 : name;
  return true;
}

/* The node that an option means: the one with the longest name that fits. */
static const char *
find_node (const json_t *nodes, const char *text, const char **alias,
           struct error *err)
{
  const char *best = NULL, *a;
  const json_t *node;
  size_t i;

  json_array_foreach ((json_t *) nodes, i, node) {
    const char *name = node_name (node);

    if (is_name (text, name, &a) &&
        (best == NULL || strlen (name) > strlen (best))) {
      best = name;
      *alias = a;
    }
  }
  if (best == NULL)
    nodes_find (nodes, text, err); /* says which there are */
  return best;
}

/* The bitmap of that node that an option means, or NULL. */
static const char *
find_bitmap (const json_t *node, const char *text, const char **alias)
{
  const json_t *list = json_object_get (node, "dirty-bitmaps"), *b;
  size_t n = strlen (node_name (node)), i;
  const char *best = NULL, *a;

  json_array_foreach ((json_t *) list, i, b) {
    const char *name = json_string_value (json_object_get (b, "name"));
    const char *rest = text + n + 1;

    if (name == NULL || (best && strlen (name) <= strlen (best)))
      continue;
    if (is_name (text, name, &a) ||
        (strncmp (text, node_name (node), n) == 0 && text[n] == '/' &&
         is_name (rest, name, &a))) {
      best = name;
      *alias = a;
    }
  }
  return best;
}

static void
add_bitmap (json_t *list, const char *name, const char *alias)
{
  json_array_append_new (list, json_pack ("{s:s, s:s}", "name", name,
                                          "alias", alias));
}

/* Those of a node that travel; 'used' says of each option whether it meant
 * one.
 */
static json_t *
choose_bitmaps (const struct mapping_options *v, const json_t *node,
                bool *used)
{
  const json_t *all = json_object_get (node, "dirty-bitmaps"), *b;
  json_t *list = json_array ();
  size_t i;

  if (v->nr_bitmaps == 0 && !v->no_bitmaps)
    json_array_foreach ((json_t *) all, i, b) {
      const char *name = json_string_value (json_object_get (b, "name"));

      add_bitmap (list, name, name);
    }
  for (i = 0; i < v->nr_bitmaps; i++) {
    const char *alias, *name = find_bitmap (node, v->bitmaps[i], &alias);

    if (name == NULL)
      continue;
    used[i] = true;
    add_bitmap (list, name, alias);
  }
  return list;
}

bool
mapping_options_need_list (const struct mapping_options *v)
{
  for (size_t i = 0; i < v->nr_nodes; i++)
    if (strchr (v->nodes[i], '='))
      return true;
  return v->nr_bitmaps > 0 || v->no_bitmaps;
}

static void
add_nodes (const struct mapping_options *v, json_t *args)
{
  json_t *names = json_array ();

  for (size_t i = 0; i < v->nr_nodes; i++)
    json_array_append_new (names, json_string (v->nodes[i]));
  json_object_set_new (args, "x-ferry-nodes", names);
}

int
mapping_options_add (const struct mapping_options *v, const char *uri,
                     const json_t *nodes, json_t *args, struct error *err)
{
  CLEANUP_FREE char *export = NULL;
  json_auto_t *names = json_array (), *mapping = json_array ();
  bool used[MAX_MAPPED] = { false };
  bool renamed = v->nr_bitmaps > 0 || v->no_bitmaps;
  size_t nr = v->nr_nodes ? v->nr_nodes : json_array_size (nodes);

  if (nodes == NULL) {
    if (v->nr_nodes)
      add_nodes (v, args);
    return 0;
  }
  export = client_uri_export (uri, err);
  if (export == NULL)
    return -1;
  for (size_t i = 0; i < nr; i++) {
    const char *alias = NULL, *name;

    if (v->nr_nodes)
      name = find_node (nodes, v->nodes[i], &alias, err);
    else
      name = alias = node_name (json_array_get (nodes, i));
    if (name == NULL)
      return -1;
    json_array_append_new (names, json_string (name));
    renamed |= strcmp (name, alias) != 0;
    if (export[0] != '\0' && strcmp (name, alias) == 0 && nr == 1)
      alias = export;
    json_array_append_new (
      mapping, json_pack ("{s:s, s:s, s:o}", "node-name", name, "alias",
                          alias, "bitmaps",
                          choose_bitmaps (v, nodes_find (nodes, name, err),
                                          used)));
  }
  for (size_t i = 0; i < v->nr_bitmaps; i++)
    if (!used[i])
      return error_set (err, ENOENT, "--bitmap: no disk that is to move has a "
                        "bitmap '%s'", v->bitmaps[i]);
  if (v->nr_nodes)
    json_object_set (args, "x-ferry-nodes", names);
  if (renamed)
    json_object_set (args, "x-ferry-mapping", mapping);
  return 0;
}
