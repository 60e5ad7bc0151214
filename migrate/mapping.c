/* nbdferry - which bitmaps travel, and what they are called over there
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <string.h>

#include "mapping.h"
#include "ship-map.h"

#define MAX_NAME 1023 /* of a bitmap, bytes */

static const char *
get (const json_t *object, const char *member)
{
  return json_string_value (json_object_get (object, member));
}

/* The object of an array whose member is that. */
static const json_t *
find (const json_t *array, const char *member, const char *value)
{
  const json_t *o;
  size_t i;

  json_array_foreach ((json_t *) array, i, o)
    if (strcmp (get (o, member), value) == 0)
      return o;
  return NULL;
}

/* ---- checks ---- */

static int
check_bitmaps (const json_t *node, struct error *err)
{
  const json_t *bitmaps = json_object_get (node, "bitmaps"), *o;
  size_t i;

  json_array_foreach ((json_t *) bitmaps, i, o) {
    const char *name = get (o, "name"), *alias = get (o, "alias");

    if (strlen (alias) > MAX_NAME)
      return error_set (err, EINVAL, "The bitmap alias '%.100s...' is longer "
                        "than %d bytes", alias, MAX_NAME);
    if (strlen (name) > MAX_NAME)
      return error_set (err, EINVAL, "The bitmap name '%.100s...' is longer "
                        "than %d bytes", name, MAX_NAME);
    if (alias[0] == '\0' || name[0] == '\0')
      return error_set (err, EINVAL, "The bitmap name '%s' or its alias '%s' "
                        "is empty", name, alias);
    if (ship_map_name (name) || ship_map_name (alias))
      return error_set (err, EINVAL, "The bitmap name '%s' or its alias '%s' "
                        "is reserved", name, alias);
    if (find (bitmaps, "name", name) != o)
      return error_set (err, EINVAL, "The bitmap '%s'/'%s' is mapped twice",
                        get (node, "node-name"), name);
    if (find (bitmaps, "alias", alias) != o)
      return error_set (err, EINVAL, "The bitmap alias '%s'/'%s' is used "
                        "twice", get (node, "alias"), alias);
  }
  return 0;
}

int
mapping_check (const json_t *mapping, struct error *err)
{
  const json_t *o;
  size_t i;

  json_array_foreach ((json_t *) mapping, i, o) {
    const char *name = get (o, "node-name"), *alias = get (o, "alias");

    if (alias[0] == '\0')
      return error_set (err, EINVAL, "The node alias '%s' is not well-formed",
                        alias);
    if (find (mapping, "node-name", name) != o)
      return error_set (err, EINVAL, "The node name '%s' is mapped twice",
                        name);
    if (find (mapping, "alias", alias) != o)
      return error_set (err, EINVAL, "The node alias '%s' is used twice",
                        alias);
    if (check_bitmaps (o, err) == -1)
      return -1;
  }
  return 0;
}

/* ---- looking up ---- */

static void
transform (const json_t *bitmap, bool *persistent)
{
  const json_t *p = json_object_get (json_object_get (bitmap, "transform"),
                                     "persistent");

  if (p)
    *persistent = json_is_true (p);
}

const char *
mapping_disk (const json_t *mapping, const char *node)
{
  const json_t *o = find (mapping, "node-name", node);

  return o ? get (o, "alias") : NULL;
}

const char *
mapping_bitmap (const json_t *mapping, const char *node, const char *name,
                bool *persistent)
{
  const json_t *o = find (mapping, "node-name", node);

  if (mapping == NULL)
    return name;
  o = o ? find (json_object_get (o, "bitmaps"), "name", name) : NULL;
  if (o == NULL)
    return NULL;
  transform (o, persistent);
  return get (o, "alias");
}

const char *
mapping_name (const json_t *mapping, const char *node, const char *alias,
              bool *persistent, struct error *err)
{
  const json_t *o = find (mapping, "alias", node), *b;

  if (mapping == NULL)
    return alias;
  /* A disk comes under its own name: channels and COMMIT know no other. */
  if (o && strcmp (get (o, "node-name"), node) != 0) {
    error_set (err, EINVAL, "The node alias '%s' stands for the node '%s' at "
               "the destination, which cannot call a disk otherwise than the "
               "source does", node, get (o, "node-name"));
    return NULL;
  }
  if (o == NULL) {
    error_set (err, ENOENT, "Unknown node alias '%s'", node);
    return NULL;
  }
  b = find (json_object_get (o, "bitmaps"), "alias", alias);
  if (b == NULL) {
    error_set (err, ENOENT, "Unknown bitmap alias '%s' on node '%s' (alias "
               "'%s')", alias, node, node);
    return NULL;
  }
  transform (b, persistent);
  return get (b, "name");
}
