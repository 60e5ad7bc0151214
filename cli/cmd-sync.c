/* nbdferry - nbdferry sync
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "clock.h"
#include "command.h"
#include "interrupt.h"
#include "output.h"
#include "size.h"
#include "sync.h"

#define MAX_CONNECTIONS 64

enum {
  OPT_BITMAP = 256,
  OPT_NODE,
  OPT_COMPARE,
  OPT_FULL,
  OPT_ADOPT,
  OPT_CONNECTIONS,
  OPT_PATIENCE,
  OPT_URI,
  OPT_SCRATCH_LIMIT,
  OPT_ON_LIMIT,
  OPT_JSON,
};

struct sync_values {
  struct sync_options opt;
  uint64_t connections, patience; /* seconds */
  bool has_patience, json;
};

static int
sync_option (const struct command *cmd, int c, const char *arg, void *values)
{
  struct sync_values *v = values;

  switch (c) {
  case OPT_BITMAP: v->opt.bitmap = arg; break;
  case OPT_NODE: v->opt.node = arg; break;
  case OPT_URI: v->opt.uri = arg; break;
  case OPT_COMPARE: v->opt.compare = true; break;
  case OPT_FULL: v->opt.full = true; break;
  case OPT_ADOPT: v->opt.adopt = true; break;
  case OPT_JSON: v->json = true; break;
  case OPT_CONNECTIONS:
    if (number_parse (arg, &v->connections) == -1 || v->connections < 1 ||
        v->connections > MAX_CONNECTIONS)
      return usage_error (cmd, "--connections: '%s' is not a number from 1 to "
                          "%d", arg, MAX_CONNECTIONS);
    break;
  case OPT_PATIENCE:
    if (number_parse (arg, &v->patience) == -1 || v->patience > 86400)
      return usage_error (cmd, "--patience: '%s' is not a number from 0 to "
                          "86400", arg);
    v->has_patience = true;
    break;
  case OPT_SCRATCH_LIMIT:
    if (size_parse (arg, &v->opt.scratch_limit) == -1 ||
        v->opt.scratch_limit < 1)
      return usage_error (cmd, "--scratch-limit: '%s' is not a size", arg);
    break;
  case OPT_ON_LIMIT:
    if (strcmp (arg, "slow") != 0 && strcmp (arg, "fail") != 0)
      return usage_error (cmd, "--on-limit: '%s' is neither slow nor fail",
                          arg);
    v->opt.slow = arg[0] == 's';
    break;
  }
  return -1;
}

static const char *
mode_name (const struct sync_job *s)
{
  return s->mode == SYNC_FULL ? "full"
         : s->mode == SYNC_COMPARE ? "compare" : "incremental";
}

static void
print_result_json (const struct sync_job *s, double seconds)
{
  json_auto_t *json = NULL;
  char id[UUID_TEXT];

  uuid_format (&s->point, id);
  json = json_pack ("{s:s, s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:i,"
                    " s:f}", "node", s->node, "standby", s->standby, "mode",
                    mode_name (s), "point", id, "size", (json_int_t) s->size,
                    "compared", (json_int_t) s->compared,
                    "differing", (json_int_t) s->differing,
                    "data", (json_int_t) s->copied.data,
                    "zeros", (json_int_t) s->copied.zeros,
                    "zeros-kept", (json_int_t) s->copied.kept,
                    "sent-again", (int) s->copied.again, "seconds", seconds);
  if (s->opt->bitmap)
    json_object_set_new (json, "bitmap", json_string (s->opt->bitmap));
  if (!uuid_is_zero (&s->parent)) {
    uuid_format (&s->parent, id);
    json_object_set_new (json, "parent", json_string (id));
  }
  print_json (json);
}

static void
print_result (const struct sync_job *s, double seconds)
{
  char a[SIZE_TEXT], b[SIZE_TEXT];

  if (s->mode == SYNC_COMPARE)
    printf ("compared %s, of which %s differed\n",
            size_format (s->compared, a), size_format (s->differing, b));
  printf ("%s: sent %s of data and %s of zeros in %.1f s\n", mode_name (s),
          size_format (s->copied.data, a), size_format (s->copied.zeros, b),
          seconds);
  if (s->copied.again)
    printf ("the standby was lost; %u parts were sent again\n",
            s->copied.again);
  if (s->blind)
    printf ("The standby was believed to be at the last point; "
            "'nbdferry verify' or --compare can tell.\n");
}

static int
run (struct sync_values *v)
{
  uint64_t begin = now_ns ();
  struct sync_job job;
  struct error err = { 0 };
  int status = STATUS_FAILED;

  if (sync_begin (&job, &v->opt, &err) == 0 && sync_run (&job, &err) == 0) {
    double seconds = (double) (now_ns () - begin) / NS_PER_S;

    if (v->json)
      print_result_json (&job, seconds);
    else
      print_result (&job, seconds);
    if (output_finish () == 0)
      status = STATUS_DONE;
  }
  else if (stop_wait (v->opt.stop, 0)) {
    meter_clear (&job.meter);
    complain ("given up; the next run sends what this one did not confirm");
    status = STATUS_CANCELLED;
  }
  else {
    meter_clear (&job.meter);
    sync_explain (&job, &err);
    complain ("%s", err.msg);
  }
  sync_close (&job);
  return status;
}

static int
sync_run_command (const struct command *cmd, char **args, void *values)
{
  struct sync_values *v = values;
  struct sync_options *o = &v->opt;
  struct error err;

  if (o->compare + o->full + o->adopt > 1)
    return usage_error (cmd, "--compare, --full and --adopt exclude each "
                        "other");
  if (o->bitmap == NULL && !o->compare)
    return usage_error (cmd, "--bitmap is missing (only --compare can do "
                        "without)");
  o->control = args[0];
  o->standby = args[1];
  o->connections = v->connections ? v->connections : 4;
  o->patience_ms = (v->has_patience ? v->patience : 60) * 1000;
  o->stop = interrupt_catch (&err);
  if (o->stop == NULL) {
    complain ("%s", err.msg);
    return STATUS_FAILED;
  }
  return run (v);
}

static const struct option sync_options[] = {
  { "help", no_argument, NULL, 'h' },
  { "bitmap", required_argument, NULL, OPT_BITMAP },
  { "node", required_argument, NULL, OPT_NODE },
  { "compare", no_argument, NULL, OPT_COMPARE },
  { "full", no_argument, NULL, OPT_FULL },
  { "adopt", no_argument, NULL, OPT_ADOPT },
  { "connections", required_argument, NULL, OPT_CONNECTIONS },
  { "patience", required_argument, NULL, OPT_PATIENCE },
  { "uri", required_argument, NULL, OPT_URI },
  { "scratch-limit", required_argument, NULL, OPT_SCRATCH_LIMIT },
  { "on-limit", required_argument, NULL, OPT_ON_LIMIT },
  { "json", no_argument, NULL, OPT_JSON },
  { 0 },
};

const struct command sync_command = {
  .name = "sync",
  .full_name = "nbdferry sync",
  .synopsis = "CONTROL STANDBY --bitmap NAME [OPTION]...",
  .summary = "Bring a standby up to date, again and again.",
  .help =
    "STANDBY is an NBD URI, a block device or a raw file, at least as large\n"
    "as the disk.  The first run makes the bitmap and copies everything, each\n"
    "later one what was written since.  A standby that is not as the last run\n"
    "has left it is refused.\n"
    "\n"
    "Options:\n"
    "  --bitmap NAME      the bitmap of this standby, and of nothing else\n"
    "  --compare          find by hashes what differs, and send that\n"
    "  --full             send everything\n"
    "  --adopt            it is the known standby under a new name; or it is at\n"
    "                     the point of the last backup by the bitmap\n"
    "  --node NODE        the disk; needed if the daemon has several\n"
    "  --connections N    to the standby and to the daemon (default: 4)\n"
    "  --patience S       for how many seconds a lost standby is waited for\n"
    "                     (default: 60)\n"
    "  --scratch-limit S  how much old data the daemon may keep aside\n"
    "  --on-limit slow|fail\n"
    "                     at that limit, slow writers, or give up at once\n"
    "                     (default: fail)\n"
    "  --uri URI          where the daemon serves its disks (default: ask it)\n"
    "  --json             print the result as JSON\n"
    "  -h, --help         print this help\n",
  .min_args = 2,
  .max_args = 2,
  .run = sync_run_command,
  .options = sync_options,
  .option = sync_option,
  .values_size = sizeof (struct sync_values),
  .json_result = true,
};
