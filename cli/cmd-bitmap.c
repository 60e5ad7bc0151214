/* nbdferry - nbdferry bitmap: make, change and remove bitmaps
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>

#include "cmd-bitmap.h"
#include "control.h"
#include "nodes.h"
#include "output.h"
#include "size.h"

#define NODE_HELP \
  "  --node NODE        the disk; needed if the daemon has several\n"
#define HELP_HELP \
  "  -h, --help         print this help\n"

static const struct command add_command, merge_command;

enum {
  OPT_NODE = 256,
  OPT_GRANULARITY,
  OPT_DISABLED,
  OPT_TRANSIENT,
  OPT_JSON,
  OPT_AS,
};

static int
bitmap_option (const struct command *cmd, int c, const char *arg, void *values)
{
  struct bitmap_values *v = values;
  uint64_t g;

  switch (c) {
  case OPT_NODE: v->node = arg; break;
  case OPT_AS: v->as = arg; break;
  case OPT_DISABLED: v->disabled = true; break;
  case OPT_TRANSIENT: v->transient = true; break;
  case OPT_JSON: v->json = true; break;
  case OPT_GRANULARITY:
    if (size_parse (arg, &g) == -1 || g < 512 || g > UINT64_C (1) << 31 ||
        (g & (g - 1)) != 0)
      return usage_error (cmd, "--granularity: '%s' is not a power of two "
                          "from 512 to 2G", arg);
    v->granularity = g;
    break;
  }
  return -1;
}

/* The arguments of the QMP command, without the disk; NULL: no memory. */
static json_t *
arguments_add (char **args, const struct bitmap_values *v)
{
  json_t *json = json_pack ("{s:s, s:b}", "name", args[1],
                            "persistent", !v->transient);

  if (v->disabled)
    json_object_set_new (json, "disabled", json_true ());
  if (v->granularity)
    json_object_set_new (json, "granularity", json_integer (v->granularity));
  return json;
}

static json_t *
arguments_merge (char **args)
{
  json_t *sources = json_array ();
  char **source;

  for (source = args + 2; *source; source++)
    json_array_append_new (sources, json_string (*source));
  return json_pack ("{s:s, s:o}", "target", args[1], "bitmaps", sources);
}

json_t *
bitmap_on_disk (struct control *c, json_t *args, const char *node,
                struct error *err)
{
  json_t *nodes = NULL;
  const json_t *only;

  if (node == NULL) {
    nodes = nodes_query (c, err);
    only = nodes ? nodes_only (nodes, err) : NULL;
    if (only == NULL) {
      json_decref (nodes);
      json_decref (args);
      return NULL;
    }
    node = node_name (only);
  }
  if (args == NULL)
    error_set (err, ENOMEM, "%m");
  json_object_set_new (args, "node", json_string (node));
  json_decref (nodes);
  return args;
}

/* Send the command, about the disk that was named or the only one. */
static int
run_on_disk (struct control *c, const char *command, json_t *args,
             const char *node, struct error *err)
{
  json_t *result = NULL;

  args = bitmap_on_disk (c, args, node, err);
  if (args)
    result = control_command (c, command, args, err);
  json_decref (result);
  return result ? 0 : -1;
}

/* add, remove, clear, enable, disable and merge. */
static int
run_bitmap (const struct command *cmd, char **args, void *values)
{
  const struct bitmap_values *v = values;
  struct error err = { 0 };
  struct control *c = control_open (args[0], &err);
  char command[64];
  json_t *json;
  int r = -1;

  if (c) {
    if (cmd == &add_command)
      json = arguments_add (args, v);
    else if (cmd == &merge_command)
      json = arguments_merge (args);
    else
      json = json_pack ("{s:s}", "name", args[1]);
    snprintf (command, sizeof command, "block-dirty-bitmap-%s", cmd->name);
    r = run_on_disk (c, command, json, v->node, &err);
  }
  if (r == -1)
    complain ("%s", err.msg);
  control_close (c);
  return r == 0 ? STATUS_DONE : STATUS_FAILED;
}

static const struct option node_options[] = {
  { "help", no_argument, NULL, 'h' },
  { "node", required_argument, NULL, OPT_NODE },
  { 0 },
};

static const struct option add_options[] = {
  { "help", no_argument, NULL, 'h' },
  { "node", required_argument, NULL, OPT_NODE },
  { "granularity", required_argument, NULL, OPT_GRANULARITY },
  { "disabled", no_argument, NULL, OPT_DISABLED },
  { "transient", no_argument, NULL, OPT_TRANSIENT },
  { 0 },
};

static const struct option import_options[] = {
  { "help", no_argument, NULL, 'h' },
  { "node", required_argument, NULL, OPT_NODE },
  { "as", required_argument, NULL, OPT_AS },
  { "granularity", required_argument, NULL, OPT_GRANULARITY },
  { "json", no_argument, NULL, OPT_JSON },
  { 0 },
};

/* Of list and audit. */
static const struct option list_options[] = {
  { "help", no_argument, NULL, 'h' },
  { "node", required_argument, NULL, OPT_NODE },
  { "json", no_argument, NULL, OPT_JSON },
  { 0 },
};

static const struct command add_command = {
  .name = "add",
  .full_name = "nbdferry bitmap add",
  .synopsis = "CONTROL NAME [OPTION]...",
  .summary = "Add a bitmap, which is clean and records from now on.",
  .help =
    "Options:\n"
    "  --granularity G    bytes for each bit, a power of two from 512 to 2G\n"
    "                     (default: 64K)\n"
    NODE_HELP
    "  --disabled         do not record yet\n"
    "  --transient        do not keep it when the daemon ends\n"
    HELP_HELP,
  .min_args = 2,
  .max_args = 2,
  .run = run_bitmap,
  .options = add_options,
  .option = bitmap_option,
  .values_size = sizeof (struct bitmap_values),
};

/* Those that only take a name are alike. */
#define SIMPLE(cmd_name, what)                                               \
  {                                                                          \
    .name = cmd_name,                                                        \
    .full_name = "nbdferry bitmap " cmd_name,                                \
    .synopsis = "CONTROL NAME [OPTION]...",                                  \
    .summary = what,                                                         \
    .help = "Options:\n" NODE_HELP HELP_HELP,                                \
    .min_args = 2,                                                           \
    .max_args = 2,                                                           \
    .run = run_bitmap,                                                       \
    .options = node_options,                                                 \
    .option = bitmap_option,                                                 \
    .values_size = sizeof (struct bitmap_values),                            \
  }

static const struct command
  remove_command = SIMPLE ("remove", "Remove a bitmap."),
  clear_command = SIMPLE ("clear", "Make a bitmap all clean."),
  enable_command = SIMPLE ("enable", "Have a bitmap record writes."),
  disable_command = SIMPLE ("disable", "Have a bitmap stay as it is.");

static const struct command merge_command = {
  .name = "merge",
  .full_name = "nbdferry bitmap merge",
  .synopsis = "CONTROL TARGET SOURCE... [OPTION]...",
  .summary = "Add what is dirty in the sources to the target.",
  .help =
    "All are bitmaps of one disk; their granularities may differ.  The\n"
    "sources stay as they are.\n"
    "\n"
    "Options:\n"
    NODE_HELP
    HELP_HELP,
  .min_args = 3,
  .max_args = -1,
  .run = run_bitmap,
  .options = node_options,
  .option = bitmap_option,
  .values_size = sizeof (struct bitmap_values),
};

static const struct command list_command = {
  .name = "list",
  .full_name = "nbdferry bitmap list",
  .synopsis = "CONTROL [OPTION]...",
  .summary = "List the bitmaps of all disks, or of one.",
  .help =
    "Options:\n"
    "  --node NODE        of this disk only\n"
    "  --json             an array of QEMU's BlockDirtyInfo, with \"node\"\n"
    HELP_HELP,
  .min_args = 1,
  .max_args = 1,
  .run = bitmap_list_run,
  .options = list_options,
  .option = bitmap_option,
  .values_size = sizeof (struct bitmap_values),
  .json_result = true,
};

static const struct command import_command = {
  .name = "import",
  .full_name = "nbdferry bitmap import",
  .synopsis = "CONTROL IMAGE [NAME] [OPTION]...",
  .summary = "Bring in the bitmaps, or one, of a qcow2 image or NBD server.",
  .help =
    "IMAGE is any qcow2 image of a disk of the same size, which nobody has\n"
    "open; or the NBD URI of a server that offers its bitmaps as QEMU does.\n"
    "All of its bitmaps are brought in, or none.\n"
    "\n"
    "Options:\n"
    "  --granularity G    bytes for each bit, which a server does not tell\n"
    "                     (default: 64K)\n"
    "  --as NEWNAME       what NAME is to be called here\n"
    NODE_HELP
    "  --json             print what was brought in as JSON\n"
    HELP_HELP,
  .min_args = 2,
  .max_args = 3,
  .run = bitmap_import_run,
  .options = import_options,
  .option = bitmap_option,
  .values_size = sizeof (struct bitmap_values),
  .json_result = true,
};

static const struct command audit_command = {
  .name = "audit",
  .full_name = "nbdferry bitmap audit",
  .synopsis = "CONTROL NAME REFERENCE [OPTION]...",
  .summary = "Is a bitmap right?  Compare the disk with a reference.",
  .help =
    "REFERENCE is the disk as it was when the bitmap was clean: a raw file, a\n"
    "block device or an NBD URI.  Every range that differs without being\n"
    "dirty is printed, and the exit status is 1 if there is any.\n"
    "\n"
    "Options:\n"
    NODE_HELP
    "  --json             print JSON\n"
    HELP_HELP,
  .min_args = 3,
  .max_args = 3,
  .run = bitmap_audit_run,
  .options = list_options,
  .option = bitmap_option,
  .values_size = sizeof (struct bitmap_values),
  .json_result = true,
};

static const struct command *const group[] = {
  &add_command, &remove_command, &clear_command, &enable_command,
  &disable_command, &merge_command, &list_command, &import_command,
  &audit_command, &bitmap_map_command, NULL,
};

const struct command bitmap_command = {
  .name = "bitmap",
  .full_name = "nbdferry bitmap",
  .synopsis = "COMMAND CONTROL ...",
  .summary = "Make, change, remove, list, check and draw dirty bitmaps.",
  .help =
    "'nbdferry bitmap COMMAND --help' says more.\n",
  .group = group,
};
