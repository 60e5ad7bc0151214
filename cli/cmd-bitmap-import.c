/* nbdferry - nbdferry bitmap import
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "absolute.h"
#include "cleanup.h"
#include "cmd-bitmap.h"
#include "output.h"
#include "remote.h"
#include "size.h"

static void
print_imported (const json_t *result)
{
  const json_t *bitmap;
  size_t i;

  json_array_foreach (json_object_get (result, "bitmaps"), i, bitmap) {
    CLEANUP_FREE char *name = text_printable (
      json_string_value (json_object_get (bitmap, "name")) ?: "?");
    char count[SIZE_TEXT];

    size_format (json_integer_value (json_object_get (bitmap, "count")),
                 count);
    printf ("%s: %s dirty, %s\n", name, count,
            json_is_true (json_object_get (bitmap, "recording"))
            ? "recording" : "not recording");
  }
}

/* It is the daemon that opens the file, in another folder. */
static json_t *
arguments (char **args, const struct bitmap_values *v, struct error *err)
{
  CLEANUP_FREE char *path = remote_is_uri (args[1])
    ? remote_absolute_uri (args[1], err) : absolute_path (args[1], err);
  json_t *json;

  if (path == NULL)
    return NULL;
  json = json_pack ("{s:s}", "file", path);
  if (json == NULL)
    error_set (err, EINVAL, "%s: is not valid UTF-8", path);
  else if (args[2])
    json_object_set_new (json, "name", json_string (args[2]));
  if (v->as)
    json_object_set_new (json, "new-name", json_string (v->as));
  if (v->granularity)
    json_object_set_new (json, "granularity", json_integer (v->granularity));
  return json;
}

int
bitmap_import_run (const struct command *cmd, char **args, void *values)
{
  const struct bitmap_values *v = values;
  struct error err = { 0 };
  struct control *c;
  json_t *json, *result = NULL;
  int status = STATUS_FAILED;

  if (v->as && args[2] == NULL)
    return usage_error (cmd, "--as needs the NAME of one bitmap");
  c = control_open (args[0], &err);
  json = c ? arguments (args, v, &err) : NULL;
  if (json)
    json = bitmap_on_disk (c, json, v->node, &err);
  if (json)
    result = control_command (c, "x-ferry-bitmap-import", json, &err);
  if (result == NULL)
    complain ("%s", err.msg);
  else {
    if (v->json)
      print_json (result);
    else
      print_imported (result);
    if (output_finish () == 0)
      status = STATUS_DONE;
  }
  json_decref (result);
  control_close (c);
  return status;
}
