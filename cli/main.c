/* nbdferry - the command
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <stdio.h>

#include "command.h"
#include "output.h"

static int
main_option (const struct command *cmd, int c, const char *arg, void *values)
{
  (void) cmd, (void) c, (void) arg, (void) values; /* there is no other */
  puts ("nbdferry " PACKAGE_VERSION);
  return output_finish () == 0 ? STATUS_DONE : STATUS_FAILED;
}

static const struct option main_options[] = {
  { "help", no_argument, NULL, 'h' },
  { "version", no_argument, NULL, 'V' },
  { 0 },
};

static const struct command *const main_group[] = {
  &status_command, &bitmap_command, &migrate_command,
  &migrate_recover_command, &migrate_pause_command, &migrate_cancel_command,
  &recover_command, &backup_command, &archive_command, &restore_command,
  &sync_command, &takeover_command, &verify_disks_command, NULL,
};

static const struct command main_command = {
  .name = "nbdferry",
  .full_name = "nbdferry",
  .synopsis = "[--help | --version] COMMAND CONTROL ...",
  .summary = "Look after the disks of an 'nbdkit ferry' daemon.",
  .help =
    "CONTROL is the daemon's control socket.  'nbdferry COMMAND --help' says\n"
    "more about a command, nbdferry(1) says everything.  'nbdferry recover'\n"
    "and 'nbdferry verify' need no daemon.\n"
    "\n"
    "Options:\n"
    "  -h, --help   print this help\n"
    "  --version    print the version\n",
  .group = main_group,
  .options = main_options,
  .option = main_option,
};

int
main (int argc, char *argv[])
{
  output_init ();
  if (argc == 0) /* execve can do that */
    return STATUS_USAGE;
  return command_run (&main_command, argc, argv);
}
