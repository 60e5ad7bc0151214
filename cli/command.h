/* nbdferry - a command, its help, and how it is found
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_COMMAND_H
#define FERRY_COMMAND_H

#include <getopt.h>
#include <stdbool.h>
#include <stddef.h>

enum {
  STATUS_DONE = 0,
  STATUS_FAILED = 1,
  STATUS_USAGE = 2,
  STATUS_CANCELLED = 130, /* what a shell makes of SIGINT */
};

struct command {
  const char *name;      /* the word that chooses it */
  const char *full_name; /* "nbdferry bitmap add" */
  const char *synopsis;  /* what follows the full name */
  const char *summary;   /* one line */
  const char *help;      /* what follows the summary; ends with a newline */
  int min_args, max_args; /* of positionals; ignored for a group */

  /* One of these.  run gets the positionals, ending with NULL, the first of
   * which is a path, and what 'option' has filled in; it returns an exit
   * status.
   */
  const struct command *const *group; /* ends with NULL */
  int (*run) (const struct command *cmd, char **args, void *values);

  const struct option *options; /* ends with a zero; NULL: --help only */
  /* One option and its argument, or NULL; -1 to go on, otherwise the exit
   * status.
   */
  int (*option) (const struct command *cmd, int c, const char *arg,
                 void *values);
  size_t values_size;           /* of the struct that 'option' fills in */
  bool json_result;             /* --json prints one value at the end: if there
                                   is none, then of the failure */
};

/* Parse and run; 'argv[0]' is the word that chose the command. */
int command_run (const struct command *cmd, int argc, char **argv);

/* A complaint and a hint on standard error; returns STATUS_USAGE. */
int usage_error (const struct command *cmd, const char *fmt, ...)
  __attribute__ ((format (printf, 2, 3)));

extern const struct command bitmap_command, migrate_cancel_command,
  migrate_command, migrate_pause_command, migrate_recover_command,
  recover_command, status_command, takeover_command;
extern const struct command archive_command, backup_command, restore_command;
extern const struct command sync_command, verify_disks_command;

#endif /* FERRY_COMMAND_H */
