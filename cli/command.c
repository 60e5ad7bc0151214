/* nbdferry - a command, its help, and how it is found
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "command.h"
#include "output.h"

static const struct option help_only[] = {
  { "help", no_argument, NULL, 'h' },
  { 0 },
};

static void
print_help (const struct command *cmd)
{
  const struct command *const *sub;

  printf ("Usage: %s %s\n\n%s\n", cmd->full_name, cmd->synopsis, cmd->summary);
  if (cmd->group) {
    printf ("\nCommands:\n");
    for (sub = cmd->group; *sub; sub++)
      printf ("  %-9s %s\n", (*sub)->name, (*sub)->summary);
  }
  if (cmd->help)
    printf ("\n%s", cmd->help);
}

static int
hint (const struct command *cmd)
{
  fprintf (stderr, "Try '%s --help'.\n", cmd->full_name);
  return STATUS_USAGE;
}

int
usage_error (const struct command *cmd, const char *fmt, ...)
{
  CLEANUP_FREE char *msg = NULL;
  va_list args;

  va_start (args, fmt);
  if (vasprintf (&msg, fmt, args) == -1)
    msg = NULL;
  va_end (args);
  complain ("%s", msg ? msg : fmt);
  return hint (cmd);
}

static bool
is_json (const struct option *options, int c)
{
  while (options->name && options->val != c)
    options++;
  return options->name && strcmp (options->name, "json") == 0;
}

/* All options; -1 to go on, otherwise the exit status. */
static int
parse_options (const struct command *cmd, int argc, char **argv, void *values,
               bool *json)
{
  const struct option *options = cmd->options ? cmd->options : help_only;
  int c, status;

  optind = 0; /* glibc's word for: start over */
  /* What follows the name of a command is that command's business. */
  while ((c = getopt_long (argc, argv, cmd->group ? "+h" : "h", options,
                           NULL)) != -1) {
    if (c == '?')
      return hint (cmd); /* getopt has complained */
    if (c == 'h') {
      print_help (cmd);
      return output_finish () == 0 ? STATUS_DONE : STATUS_FAILED;
    }
    if (optarg && !text_is_utf8 (optarg))
      return usage_error (cmd, "'%s' is not valid UTF-8", optarg);
    if (is_json (options, c))
      *json = true;
    status = cmd->option (cmd, c, optarg, values);
    if (status != -1)
      return status;
  }
  return -1;
}

static int
run_group (const struct command *cmd, int argc, char **argv)
{
  const struct command *const *sub;

  if (argc == 0)
    return usage_error (cmd, "which command?");
  for (sub = cmd->group; *sub; sub++)
    if (strcmp ((*sub)->name, argv[0]) == 0)
      return command_run (*sub, argc, argv);
  return usage_error (cmd, "there is no command '%s'", argv[0]);
}

static int
run_leaf (const struct command *cmd, int argc, char **argv, void *values)
{
  int i;

  if (argc < cmd->min_args)
    return usage_error (cmd, "arguments are missing: %s %s", cmd->full_name,
                        cmd->synopsis);
  if (cmd->max_args != -1 && argc > cmd->max_args)
    return usage_error (cmd, "one argument too many: '%s'",
                        argv[cmd->max_args]);
  /* The first is a path, which may be anything. */
  for (i = 1; i < argc; i++)
    if (!text_is_utf8 (argv[i]))
      return usage_error (cmd, "'%s' is not valid UTF-8", argv[i]);
  return cmd->run (cmd, argv, values);
}

/* Who reads JSON is told there as well. */
static int
explain_failure (int status)
{
  CLEANUP_FREE char *why = complaints ();
  bool cancelled = status == STATUS_CANCELLED;
  json_auto_t *json =
    json_pack ("{s:s, s:o}", "status", cancelled ? "cancelled" : "failed",
               "error", json_shown (*why || !cancelled ? why : "interrupted"));

  print_json (json);
  output_finish ();
  return status;
}

int
command_run (const struct command *cmd, int argc, char **argv)
{
  CLEANUP_FREE void *values = calloc (1, cmd->values_size + 1);
  bool json = false;
  int status;

  if (values == NULL) {
    complain ("%s", strerror (errno));
    return STATUS_FAILED;
  }
  argv[0] = (char *) cmd->full_name; /* for getopt's complaints */
  status = parse_options (cmd, argc, argv, values, &json);
  if (status != -1)
    return status;
  argc -= optind;
  argv += optind;
  if (cmd->group)
    return run_group (cmd, argc, argv);
  status = run_leaf (cmd, argc, argv, values);
  if (status != STATUS_DONE && json && cmd->json_result && !has_json ())
    return explain_failure (status);
  return status;
}
