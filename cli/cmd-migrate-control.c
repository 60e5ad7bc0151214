/* nbdferry - nbdferry migrate-recover, migrate-pause, migrate-cancel
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * For a migration that runs in the daemon, whoever has begun it.
 */
#include <config.h>

#include <stdio.h>
#include <string.h>

#include "command.h"
#include "control.h"
#include "output.h"

/* QEMU's migrate_cancel is no error if there is nothing to cancel; but who
 * asks for it here wants to know.  NULL: it was cancelled.
 */
static const char *
why_not_cancelled (struct control *c)
{
  json_auto_t *info = control_command (c, "query-migrate", json_object (),
                                       NULL);
  const char *status = json_string_value (json_object_get (info, "status"));

  if (status && strcmp (status, "completed") == 0)
    return "the migration had completed before, and cannot be cancelled; "
           "'nbdferry status' says where the disks are";
  return NULL;
}

/* One QMP command that returns nothing; if there is 'why_not', that may have
 * meant nothing.
 */
static int
run_one (const char *control, const char *command, json_t *args,
         const char *(*why_not) (struct control *c), const char *done)
{
  const char *why = NULL;
  struct error err = { 0 };
  struct control *c = control_open (control, &err);
  json_t *result = NULL;
  int status = STATUS_FAILED;

  if (c)
    result = control_command (c, command, args, &err);
  else
    json_decref (args);
  if (result && why_not)
    why = why_not (c);
  if (result == NULL || why)
    complain ("%s", why ? why : err.msg);
  else {
    puts (done);
    status = output_finish () == 0 ? STATUS_DONE : STATUS_FAILED;
  }
  json_decref (result);
  control_close (c);
  return status;
}

static int
recover_run (const struct command *cmd, char **args, void *values)
{
  json_t *a = json_object ();

  (void) cmd, (void) values;
  if (args[1])
    json_object_set_new (a, "uri", json_string (args[1]));
  return run_one (args[0], "migrate-recover", a, NULL, "trying again; "
                  "'nbdferry status' says how it goes");
}

static int
pause_run (const struct command *cmd, char **args, void *values)
{
  (void) cmd, (void) values;
  return run_one (args[0], "migrate-pause", json_object (), NULL, "the "
                  "migration is paused until 'nbdferry migrate-recover'");
}

static int
cancel_run (const struct command *cmd, char **args, void *values)
{
  (void) cmd, (void) values;
  return run_one (args[0], "migrate-cancel", json_object (), why_not_cancelled,
                  "the migration, if there was one, is cancelled; the source "
                  "serves its disks");
}

const struct command migrate_recover_command = {
  .name = "migrate-recover",
  .full_name = "nbdferry migrate-recover",
  .synopsis = "CONTROL [URI] [OPTION]",
  .summary = "Try at once to go on with a migration that is paused.",
  .help =
    "CONTROL is that of the source.  A migration that lost its destination\n"
    "tries again by itself, at growing intervals; this does it now.  With URI\n"
    "the same destination is looked for over there from now on, also by disks\n"
    "that were handed over already.\n"
    "\n"
    "Options:\n"
    "  -h, --help   print this help\n",
  .min_args = 1,
  .max_args = 2,
  .run = recover_run,
};

const struct command migrate_pause_command = {
  .name = "migrate-pause",
  .full_name = "nbdferry migrate-pause",
  .synopsis = "CONTROL [OPTION]",
  .summary = "Pause a migration until migrate-recover.",
  .help =
    "CONTROL is that of the source, which goes on serving its disks.  It stays\n"
    "paused if the daemon is started again.\n"
    "\n"
    "Options:\n"
    "  -h, --help   print this help\n",
  .min_args = 1,
  .max_args = 1,
  .run = pause_run,
};

const struct command migrate_cancel_command = {
  .name = "migrate-cancel",
  .full_name = "nbdferry migrate-cancel",
  .synopsis = "CONTROL [OPTION]",
  .summary = "Give up a migration that runs or is paused.",
  .help =
    "CONTROL is that of the source, which is left as it was.  It is refused\n"
    "once the disks have been handed over.\n"
    "\n"
    "Options:\n"
    "  -h, --help   print this help\n",
  .min_args = 1,
  .max_args = 1,
  .run = cancel_run,
};
