/* nbdferry - nbdferry status
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "command.h"
#include "control.h"
#include "migration-info.h"
#include "output.h"
#include "size.h"

struct status_values {
  bool json;
};

static int
status_option (const struct command *cmd, int c, const char *arg, void *values)
{
  struct status_values *v = values;

  (void) cmd, (void) c, (void) arg; /* there is no other */
  v->json = true;
  return -1;
}

/* "  WHAT: TEXT", if the daemon says it. */
static void
print_text (const json_t *object, const char *key, const char *what)
{
  const char *text = json_string_value (json_object_get (object, key));
  CLEANUP_FREE char *safe = text ? text_printable (text) : NULL;

  if (safe)
    printf ("  %-13s %s\n", what, safe);
}

static uint64_t
number (const json_t *object, const char *key)
{
  json_int_t v = json_integer_value (json_object_get (object, key));

  return v > 0 ? v : 0;
}

/* Where a disk that is not simply served stands, and what can be done. */
static void
print_advice (const char *mode)
{
  static const struct {
    const char *mode, *text;
  } advice[] = {
    { "incoming", "a destination; it is served once a source has handed it "
                  "over" },
    { "prepared", "everything has arrived; the source hands it over by itself "
                  "when it runs and can be reached (if it is lost for good: "
                  "nbdferry takeover)" },
    { "leaving", "handed over; the destination must acknowledge that, and is "
                 "asked until it does (at another address: nbdferry "
                 "migrate-recover)" },
    { "gone", "handed over; start the peer if it is down, it is asked until it "
              "acknowledges that (at another address: nbdferry "
              "migrate-recover; if it is lost for good: nbdferry takeover)" },
    { "forwarding", "served by the peer; this daemon can be stopped when its "
                    "clients have moved" },
  };

  for (size_t i = 0; i < sizeof advice / sizeof advice[0]; i++)
    if (mode && strcmp (mode, advice[i].mode) == 0)
      printf ("  %-13s %s\n", "", advice[i].text);
}

static void
print_disk (const json_t *disk)
{
  const char *name = json_string_value (json_object_get (disk, "name"));
  CLEANUP_FREE char *safe = text_printable (name ? name : "");
  char text[SIZE_TEXT];

  printf ("disk %s\n", safe);
  print_text (disk, "path", "path");
  print_text (disk, "state-dir", "state in");
  printf ("  %-13s %s (%" PRIu64 " bytes)\n", "size",
          size_format (number (disk, "size"), text), number (disk, "size"));
  print_text (disk, "mode", "mode");
  print_advice (json_string_value (json_object_get (disk, "mode")));
  print_text (disk, "peer", "peer");
  print_text (disk, "lineage", "lineage");
  if (json_object_get (disk, "generation"))
    printf ("  %-13s %" PRIu64 "\n", "generation",
            number (disk, "generation"));
  printf ("  %-13s %" PRIu64 "\n", "bitmaps", number (disk, "bitmaps"));
  printf ("  %-13s %" PRIu64 " us\n", "longest hold",
          number (disk, "longest-hold-us"));
}

static void
print_migration (const json_t *info)
{
  struct migration m;
  char line[512];

  migration_parse (info, &m);
  if (m.status[0] == '\0') {
    printf ("migration: none\n");
    return;
  }
  migration_describe (&m, line, sizeof line);
  printf ("migration: %s\n", line);
  print_text (info, "error-desc", "reason");
  if (strcmp (m.status, "postcopy-paused") != 0)
    return;
  if (json_is_true (json_object_get (json_object_get (info, "x-ferry"),
                                     "waits")))
    printf ("  paused by migrate-pause; 'nbdferry migrate-recover' goes on\n");
  else
    printf ("  it tries again by itself; 'nbdferry migrate-recover' does it "
            "now\n");
  printf ("  'nbdferry migrate-cancel' gives it up; the disks are served from "
          "here\n");
}

static void
print_status (const json_t *status)
{
  const char *version = json_string_value (json_object_get (status,
                                                            "version"));
  CLEANUP_FREE char *safe = text_printable (version ? version : "?");
  json_t *disk;
  size_t i;

  printf ("nbdferry %s, process %" PRIu64 "\n", safe, number (status, "pid"));
  json_array_foreach (json_object_get (status, "disks"), i, disk)
    print_disk (disk);
  print_migration (json_object_get (status, "migration"));
}

static int
status_run (const struct command *cmd, char **args, void *values)
{
  const struct status_values *v = values;
  struct error err = { 0 };
  struct control *c = control_open (args[0], &err);
  json_t *status = c ? control_command (c, "x-ferry-status", json_object (),
                                        &err) : NULL;
  int r = STATUS_FAILED;

  (void) cmd;
  if (status == NULL)
    complain ("%s", err.msg);
  else {
    if (v->json)
      print_json (status);
    else
      print_status (status);
    if (output_finish () == 0)
      r = STATUS_DONE;
  }
  json_decref (status);
  control_close (c);
  return r;
}

static const struct option options[] = {
  { "help", no_argument, NULL, 'h' },
  { "json", no_argument, NULL, 'j' },
  { 0 },
};

const struct command status_command = {
  .name = "status",
  .full_name = "nbdferry status",
  .synopsis = "CONTROL [OPTION]...",
  .summary = "Show the daemon, its disks, and the last migration.",
  .help =
    "Options:\n"
    "  --json       the answer of x-ferry-status as it is\n"
    "  -h, --help   print this help\n",
  .min_args = 1,
  .max_args = 1,
  .run = status_run,
  .options = options,
  .option = status_option,
  .values_size = sizeof (struct status_values),
  .json_result = true,
};
