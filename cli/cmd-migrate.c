/* nbdferry - nbdferry migrate
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "absolute.h"
#include "blobs.h"
#include "cleanup.h"
#include "command.h"
#include "control.h"
#include "follow.h"
#include "mapping-options.h"
#include "migrate-local.h"
#include "nodes.h"
#include "output.h"
#include "progress.h"
#include "size.h"

#define MAX_ATTACH 64

struct migrate_values {
  struct mapping_options names;
  uint64_t channels;            /* 0: not given */
  uint64_t max_bandwidth, downtime_limit;
  bool has_bandwidth, has_downtime;
  const char *compression;      /* or NULL */
  char method[8];               /* of it */
  uint64_t level;
  bool has_level;
  const char *copy_mode;        /* or NULL */
  const char *attach[MAX_ATTACH]; /* NAME=FILE */
  size_t nr_attach;
  const char *hints;            /* or NULL */
  const char *bitmaps_to;       /* or NULL */
  const char *state;            /* or NULL */
  bool overwrite, data_only, no_wait, no_resume, json;
};

enum {
  OPT_CHANNELS = 256,
  OPT_MAX_BANDWIDTH,
  OPT_DOWNTIME_LIMIT,
  OPT_COMPRESSION,
  OPT_ATTACH,
  OPT_COPY_MODE,
  OPT_HINTS,
  OPT_NODE,
  OPT_BITMAP,
  OPT_NO_BITMAPS,
  OPT_OVERWRITE,
  OPT_NO_WAIT,
  OPT_NO_RESUME,
  OPT_JSON,
  OPT_DATA_ONLY,
  OPT_BITMAPS_TO,
  OPT_STATE,
};

static const struct option options[] = {
  { "help", no_argument, NULL, 'h' },
  { "channels", required_argument, NULL, OPT_CHANNELS },
  { "max-bandwidth", required_argument, NULL, OPT_MAX_BANDWIDTH },
  { "downtime-limit", required_argument, NULL, OPT_DOWNTIME_LIMIT },
  { "compression", required_argument, NULL, OPT_COMPRESSION },
  { "attach", required_argument, NULL, OPT_ATTACH },
  { "copy-mode", required_argument, NULL, OPT_COPY_MODE },
  { "hints", required_argument, NULL, OPT_HINTS },
  { "node", required_argument, NULL, OPT_NODE },
  { "bitmap", required_argument, NULL, OPT_BITMAP },
  { "no-bitmaps", no_argument, NULL, OPT_NO_BITMAPS },
  { "overwrite", no_argument, NULL, OPT_OVERWRITE },
  { "no-wait", no_argument, NULL, OPT_NO_WAIT },
  { "no-resume", no_argument, NULL, OPT_NO_RESUME },
  { "json", no_argument, NULL, OPT_JSON },
  { "data-only", no_argument, NULL, OPT_DATA_ONLY },
  { "bitmaps-to", required_argument, NULL, OPT_BITMAPS_TO },
  { "state", required_argument, NULL, OPT_STATE },
  { 0 },
};

/* "zstd", or with a level "zstd:3". */
static int
compression_parse (const char *arg, struct migrate_values *v)
{
  const size_t len = strcspn (arg, ":");
  uint64_t most;

  if (len >= sizeof v->method)
    return -1;
  memcpy (v->method, arg, len);
  v->method[len] = '\0';
  if (strcmp (v->method, "none") == 0)
    most = 0;
  else if (strcmp (v->method, "zlib") == 0)
    most = 9;
  else if (strcmp (v->method, "zstd") == 0)
    most = 20;
  else
    return -1;
  v->has_level = arg[len] == ':';
  if (v->has_level && (most == 0 ||
                       number_parse (arg + len + 1, &v->level) == -1 ||
                       v->level > most))
    return -1;
  v->compression = v->method;
  return 0;
}

/* JSON has no unsigned numbers. */
static bool
fits (uint64_t value)
{
  return value <= INT64_MAX;
}

static int
migrate_option (const struct command *cmd, int c, const char *arg,
                void *values)
{
  struct migrate_values *v = values;

  switch (c) {
  case OPT_CHANNELS:
    if (number_parse (arg, &v->channels) == -1 || v->channels < 1 ||
        v->channels > 64)
      return usage_error (cmd, "--channels: '%s' is not a number from 1 to 64",
                          arg);
    break;
  case OPT_MAX_BANDWIDTH:
    if (size_parse (arg, &v->max_bandwidth) == -1 || !fits (v->max_bandwidth))
      return usage_error (cmd, "--max-bandwidth: '%s' is not a number of "
                          "bytes a second, like 500M", arg);
    v->has_bandwidth = true;
    break;
  case OPT_DOWNTIME_LIMIT:
    if (number_parse (arg, &v->downtime_limit) == -1 ||
        !fits (v->downtime_limit))
      return usage_error (cmd, "--downtime-limit: '%s' is not a number of "
                          "milliseconds", arg);
    v->has_downtime = true;
    break;
  case OPT_COMPRESSION:
    if (compression_parse (arg, v) == -1)
      return usage_error (cmd, "--compression: '%s' is not none, zlib or "
                          "zstd, nor zlib:0 to zlib:9 or zstd:0 to zstd:20",
                          arg);
    break;
  case OPT_ATTACH:
    if (strchr (arg, '=') == NULL || strchr (arg, '=') == arg)
      return usage_error (cmd, "--attach: '%s' is not NAME=FILE", arg);
    if (v->nr_attach == MAX_ATTACH)
      return usage_error (cmd, "--attach: more than %d files", MAX_ATTACH);
    v->attach[v->nr_attach++] = arg;
    break;
  case OPT_COPY_MODE:
    if (strcmp (arg, "background") != 0 && strcmp (arg, "write-blocking") != 0)
      return usage_error (cmd, "--copy-mode: '%s' is not background or "
                          "write-blocking", arg);
    v->copy_mode = arg;
    break;
  case OPT_HINTS:
    if (strcmp (arg, "none") != 0 && strcmp (arg, "fs") != 0)
      return usage_error (cmd, "--hints: '%s' is not none or fs", arg);
    v->hints = arg;
    break;
  case OPT_NODE:
    if (v->names.nr_nodes == MAX_MAPPED)
      return usage_error (cmd, "--node: more than %d disks", MAX_MAPPED);
    v->names.nodes[v->names.nr_nodes++] = arg;
    break;
  case OPT_BITMAP:
    if (v->names.nr_bitmaps == MAX_MAPPED)
      return usage_error (cmd, "--bitmap: more than %d bitmaps", MAX_MAPPED);
    v->names.bitmaps[v->names.nr_bitmaps++] = arg;
    break;
  case OPT_NO_BITMAPS: v->names.no_bitmaps = true; break;
  case OPT_OVERWRITE: v->overwrite = true; break;
  case OPT_NO_WAIT: v->no_wait = true; break;
  case OPT_DATA_ONLY: v->data_only = true; break;
  case OPT_BITMAPS_TO: v->bitmaps_to = arg; break;
  case OPT_STATE: v->state = arg; break;
  case OPT_NO_RESUME: v->no_resume = true; break;
  case OPT_JSON: v->json = true; break;
  }
  return -1;
}

/* Tell the daemon what was asked for, and nothing else: it keeps the rest as
 * it was set before.  But that a migration is not to be paused holds for that
 * one alone: nobody expects the next to be forgotten.
 */
static int
set_parameters (struct control *c, const struct migrate_values *v,
                struct error *err)
{
  json_t *args = json_object (), *result;

  if (v->channels)
    json_object_set_new (args, "multifd-channels",
                         json_integer (v->channels));
  if (v->has_bandwidth)
    json_object_set_new (args, "max-bandwidth",
                         json_integer (v->max_bandwidth));
  if (v->has_downtime)
    json_object_set_new (args, "downtime-limit",
                         json_integer (v->downtime_limit));
  if (v->compression)
    json_object_set_new (args, "multifd-compression",
                         json_string (v->compression));
  if (v->copy_mode)
    json_object_set_new (args, "copy-mode", json_string (v->copy_mode));
  if (v->has_level)
    json_object_set_new (args, strcmp (v->method, "zlib") == 0
                                 ? "multifd-zlib-level"
                                 : "multifd-zstd-level",
                         json_integer (v->level));
  json_object_set_new (args, "x-ferry-resume", json_boolean (!v->no_resume));
  result = control_command (c, "migrate-set-parameters", args, err);
  json_decref (result);
  return result ? 0 : -1;
}

/* Files that go along; the daemon may stand in another folder. */
static int
add_attached (json_t *args, const struct migrate_values *v, struct error *err)
{
  json_t *list = json_array ();

  for (size_t i = 0; i < v->nr_attach; i++) {
    const char *equals = strchr (v->attach[i], '=');
    CLEANUP_FREE char *path = absolute_path (equals + 1, err);

    if (path == NULL) {
      json_decref (list);
      return error_prefix (err, "--attach %s", v->attach[i]);
    }
    json_array_append_new (
      list, json_pack ("{s:s%, s:s}", "name", v->attach[i],
                       (size_t) (equals - v->attach[i]), "path", path));
  }
  return json_object_set_new (args, "x-ferry-attach", list);
}

/* NULL on error. */
static json_t *
migrate_arguments (struct control *c, const char *uri,
                   const struct migrate_values *v, struct error *err)
{
  json_t *args = json_pack ("{s:s}", "uri", uri);
  json_auto_t *nodes = NULL;

  if (v->hints)
    json_object_set_new (args, "x-ferry-hints", json_string (v->hints));
  if (v->data_only)
    json_object_set_new (args, "x-ferry-data-only", json_true ());
  if (v->bitmaps_to)
    json_object_set_new (args, "x-ferry-bitmaps-to",
                         json_string (v->bitmaps_to));
  if (v->nr_attach > 0 && add_attached (args, v, err) == -1) {
    json_decref (args);
    return NULL;
  }
  if (v->overwrite)
    json_object_set_new (args, "x-ferry-overwrite", json_true ());
  if (mapping_options_need_list (&v->names) &&
      (nodes = nodes_query (c, err)) == NULL)
    ;
  else if (mapping_options_add (&v->names, uri, nodes, args, err) == 0)
    return args;
  json_decref (args);
  return NULL;
}

/* Begin it, and leave it to the daemon. */
static int
begin_only (struct control *c, json_t *args, const struct migrate_values *v,
            struct error *err)
{
  json_t *result = control_command (c, "migrate", args, err), *info;

  if (result == NULL)
    return error_prefix (err, "the migration was refused");
  json_decref (result);
  if (!v->json) {
    puts ("the migration has begun; 'nbdferry status' says how it goes");
    return 0;
  }
  info = control_command (c, "query-migrate", json_object (), err);
  if (info == NULL)
    return -1;
  print_json_line (info);
  json_decref (info);
  return 0;
}

/* To a server that is none of ours the data goes, unless something was asked
 * for that could not.
 */
static bool
may_copy (const struct migrate_values *v)
{
  return !v->data_only && v->nr_attach == 0 && v->names.nr_bitmaps == 0 &&
         (v->hints == NULL || strcmp (v->hints, "fs") != 0);
}

static void
say_copying (const char *uri)
{
  complain ("%s is another kind of NBD server: a copy of the data goes there "
            "(as with --data-only); the disks and their bitmaps stay here",
            uri);
}

/* A daemon moves its disks. */
static int
run_by_daemon (char **args, const struct migrate_values *v)
{
  struct error err = { 0 };
  struct control *c = control_open (args[0], &err);
  struct progress progress;
  json_t *arguments = NULL;
  int status = STATUS_DONE;
  bool other = false;

  if (c == NULL ||
      (arguments = migrate_arguments (c, args[1], v, &err)) == NULL ||
      set_parameters (c, v, &err) == -1 ||
      (v->no_wait &&
       begin_only (c, json_incref (arguments), v, &err) == -1)) {
    complain ("%s", err.msg);
    status = STATUS_FAILED;
  }
  else if (!v->no_wait) {
    progress_init (&progress, v->json);
    status = follow_migration (c, json_incref (arguments), &progress,
                               may_copy (v) ? &other : NULL);
    if (other) {
      progress_break (&progress);
      say_copying (args[1]);
      json_object_set_new (arguments, "x-ferry-data-only", json_true ());
      progress_init (&progress, v->json);
      status = follow_migration (c, json_incref (arguments), &progress, NULL);
    }
  }
  json_decref (arguments);
  control_close (c);
  return status;
}

/* The same files for this process. */
static struct blobs *
attached_here (const struct migrate_values *v, struct error *err)
{
  struct blobs *b = blobs_new ();

  if (b == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  for (size_t i = 0; i < v->nr_attach; i++) {
    const char *equals = strchr (v->attach[i], '=');
    CLEANUP_FREE char *path = absolute_path (equals + 1, err);
    CLEANUP_FREE char *name = strndup (v->attach[i], equals - v->attach[i]);

    if (path == NULL || name == NULL || blobs_add (b, name, path, err) == -1) {
      blobs_free (b);
      return NULL;
    }
  }
  return b;
}

/* This process moves disks that nobody has open. */
static int
run_here (char **args, size_t nr, const struct migrate_values *v)
{
  struct migrate_local m = {
    .disks = args, .nr = nr - 1, .uri = args[nr - 1], .state = v->state,
    .params = MIGRATE_PARAMS_DEFAULT, .data_only = v->data_only,
    .bitmaps_to = v->bitmaps_to,
    .before_copy = may_copy (v) ? say_copying : NULL,
  };
  struct progress progress;
  struct error err;

  if (v->channels)
    m.params.channels = v->channels;
  if (v->has_bandwidth)
    m.params.max_bandwidth = v->max_bandwidth;
  if (v->has_downtime)
    m.params.downtime_limit = v->downtime_limit;
  if (v->compression)
    migrate_compression_parse (v->compression, &m.params.compression);
  if (v->nr_attach > 0) {
    m.params.blobs = attached_here (v, &err);
    if (m.params.blobs == NULL) {
      complain ("%s", err.msg);
      return STATUS_FAILED;
    }
  }
  if (v->has_level)
    m.params.zlib_level = m.params.zstd_level = v->level;
  if (v->hints &&
      migrate_hints_parse (v->hints, &m.params.hints, &err) == -1) {
    complain ("%s", err.msg);
    return STATUS_FAILED;
  }
  m.params.overwrite = v->overwrite;
  progress_init (&progress, v->json);
  return migrate_locally (&m, &progress);
}

static int
not_here (const struct command *cmd, const char *what, const char *arg)
{
  return usage_error (cmd, "%s is for a daemon, but '%s' is no control socket",
                      what, arg);
}

/* 0, or an exit status. */
static int
check_usage (const struct command *cmd, char **args, size_t nr, bool here,
             const struct migrate_values *v)
{
  if (v->bitmaps_to && !v->data_only)
    return usage_error (cmd, "--bitmaps-to needs --data-only: otherwise the "
                        "bitmaps go with the disk");
  if (v->nr_attach > 0 && v->data_only)
    return usage_error (cmd, "--attach does not go with --data-only");
  if (v->hints && strcmp (v->hints, "fs") == 0 && v->data_only)
    return usage_error (cmd, "--hints fs is not for --data-only: a copy has "
                        "all data");
  if (v->names.no_bitmaps && v->names.nr_bitmaps > 0)
    return usage_error (cmd, "--bitmap and --no-bitmaps exclude each other");
  if (!here && nr > 2)
    return usage_error (cmd, "one argument too many: '%s'", args[2]);
  if (!here && v->state)
    return usage_error (cmd, "--state is for a disk that no daemon has; a "
                        "daemon knows its own");
  if (here && v->no_wait)
    return not_here (cmd, "--no-wait", args[0]);
  if (here && v->names.nr_nodes > 0)
    return not_here (cmd, "--node", args[0]);
  if (here && (v->names.nr_bitmaps > 0 || v->names.no_bitmaps))
    return not_here (cmd, "a choice of bitmaps", args[0]);
  if (here && v->state && nr > 2)
    return usage_error (cmd, "--state is for one disk, but there are %zu",
                        nr - 1);
  return 0;
}

static int
migrate_run (const struct command *cmd, char **args, void *values)
{
  struct migrate_values *v = values;
  const bool here = migrate_is_disk (args[0]);
  CLEANUP_FREE char *bitmaps_to = NULL;
  struct error err;
  size_t nr = 0;
  int status;

  while (args[nr])
    nr++;
  status = check_usage (cmd, args, nr, here, v);
  if (status != 0)
    return status;
  /* It may be the daemon that makes it, in another folder. */
  if (v->bitmaps_to) {
    bitmaps_to = absolute_path (v->bitmaps_to, &err);
    if (bitmaps_to == NULL) {
      complain ("%s", err.msg);
      return STATUS_FAILED;
    }
    v->bitmaps_to = bitmaps_to;
  }
  status = here ? run_here (args, nr, v) : run_by_daemon (args, v);
  /* A disk that has moved has moved, wherever the lines about it went. */
  output_finish ();
  return status;
}

const struct command migrate_command = {
  .name = "migrate",
  .full_name = "nbdferry migrate",
  .synopsis = "CONTROL|DISK... URI [OPTION]...",
  .summary = "Move disks and their bitmaps to another daemon.",
  .help =
    "URI is the other daemon, started with incoming=on: nbd://HOST for all\n"
    "disks under their own names, nbd://HOST/NAME for the only one.\n"
    "DISK, [NAME=]PATH, is a disk that no daemon has open: this command does\n"
    "all of it then.\n"
    "What can be overcome, like a link that is lost, pauses the migration; it\n"
    "tries again by itself.  Ctrl-C cancels, and leaves the source as it was.\n"
    "\n"
    "Options:\n"
    "  --channels N            connections that share the work\n"
    "  --max-bandwidth RATE    bytes a second, like 500M or 2G; 0: no limit\n"
    "  --downtime-limit MS     how long requests may be held at the end\n"
    "  --compression METHOD    none, zlib or zstd; with a level: zstd:3\n"
    "  --attach NAME=FILE      a file that goes along, into attached/ of the\n"
    "                          state directory over there; several times\n"
    "  --copy-mode MODE        background, or write-blocking: a write is at the\n"
    "                          destination before it is acknowledged\n"
    "  --hints fs              leave out what ext2, ext3 and ext4 say is free,\n"
    "                          if they were unmounted cleanly\n"
    "  --node NODE[=NAME]      only this disk, and what it is called there;\n"
    "                          may be given several times\n"
    "  --bitmap [NODE/]NAME[=ALIAS]\n"
    "                          only this bitmap, and what it is called there;\n"
    "                          may be given several times\n"
    "  --no-bitmaps            only the data\n"
    "  --data-only             URI is any NBD server: copy the data there, as\n"
    "                          of one instant; the disk stays here (a server\n"
    "                          of another kind gets that anyhow)\n"
    "  --bitmaps-to FILE       with it, the bitmaps into a new qcow2 image\n"
    "  --state DIR             the state directory of the only DISK\n"
    "  --overwrite             overwrite what is on the destination's disks:\n"
    "                          file systems, partition tables and the like\n"
    "  --no-wait               do not wait for the end\n"
    "  --no-resume             fail rather than pause\n"
    "  --json                  print each status as JSON on a line\n"
    "  -h, --help              print this help\n"
    "\n"
    "Exit status: 0 if the migration has completed, 1 if it failed or was\n"
    "refused, 2 for wrong usage, 130 if it was cancelled by Ctrl-C.\n",
  .min_args = 2,
  .max_args = -1,
  .run = migrate_run,
  .options = options,
  .option = migrate_option,
  .values_size = sizeof (struct migrate_values),
};
