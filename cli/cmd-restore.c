/* nbdferry - nbdferry restore
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Nothing is written before all archives were read to their ends and found
 * right.  Standard input cannot be read twice: what comes from there goes to a
 * file that gets its name only when the end was right, and to nothing else.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "archives.h"
#include "cleanup.h"
#include "clock.h"
#include "command.h"
#include "copying.h"
#include "output.h"
#include "remote.h"
#include "restore.h"
#include "size.h"
#include "target.h"

#define THREADS 4

struct restore_values {
  bool overwrite, incremental, json;
  struct uuid onto;      /* all 0: not given */
  uint64_t connections;  /* 0: not given */
};

enum {
  OPT_OVERWRITE = 256,
  OPT_INCREMENTAL,
  OPT_ONTO_POINT,
  OPT_CONNECTIONS,
  OPT_JSON,
};

static const struct option options[] = {
  { "help", no_argument, NULL, 'h' },
  { "overwrite", no_argument, NULL, OPT_OVERWRITE },
  { "incremental", no_argument, NULL, OPT_INCREMENTAL },
  { "onto-point", required_argument, NULL, OPT_ONTO_POINT },
  { "connections", required_argument, NULL, OPT_CONNECTIONS },
  { "json", no_argument, NULL, OPT_JSON },
  { 0 },
};

static int
restore_option (const struct command *cmd, int c, const char *arg,
                void *values)
{
  struct restore_values *v = values;

  switch (c) {
  case OPT_OVERWRITE: v->overwrite = true; break;
  case OPT_INCREMENTAL: v->incremental = true; break;
  case OPT_ONTO_POINT:
    if (!uuid_parse (arg, &v->onto) || uuid_is_zero (&v->onto))
      return usage_error (cmd, "--onto-point: '%s' is not the UUID of a point",
                          arg);
    v->incremental = true;
    break;
  case OPT_CONNECTIONS:
    if (number_parse (arg, &v->connections) == -1 || v->connections < 1 ||
        v->connections > 64)
      return usage_error (cmd, "--connections: '%s' is not a number from 1 to "
                          "64", arg);
    break;
  case OPT_JSON: v->json = true; break;
  }
  return -1;
}

/* ---- is it right to do that? ---- */

static int
check_first (const struct chain *c, const struct restore_values *v,
             struct error *err)
{
  const struct archive_head *first = archive_get_head (c->readers[0]);
  const char *name = archive_get_name (c->readers[0]);
  char parent[UUID_TEXT], onto[UUID_TEXT];
  bool full = archive_is_full (first);

  uuid_format (&first->parent, parent);
  uuid_format (&v->onto, onto);
  if (full && v->incremental)
    return error_set (err, EINVAL, "%s is a full backup: it is not to be "
                      "restored onto what is there", name);
  if (!full && !v->incremental)
    return error_set (err, EINVAL, "%s is not a full backup: it builds upon "
                      "the point %s.  Give the archives before it, too; or, if "
                      "the target is the disk at that very point, "
                      "--onto-point %s", name, parent, parent);
  if (!uuid_is_zero (&v->onto) && !uuid_equal (&v->onto, &first->parent))
    return error_set (err, EINVAL, "%s builds upon the point %s, not upon %s",
                      name, parent, onto);
  return 0;
}

/* All of each, before anything is written. */
static int
verify_all (char *const *paths, size_t nr, struct copying *progress,
            struct error *err)
{
  for (size_t i = 0; i < nr; i++)
    if (archive_check (paths[i], progress, NULL, err) == -1)
      return -1;
  return 0;
}

/* ---- the work ---- */

static bool
op_wait (void *r, uint64_t ns)
{
  return restore_wait (r, ns);
}

static uint64_t
op_done (void *r)
{
  return restore_done (r);
}

static void
op_stop (void *r)
{
  restore_stop (r);
}

static const struct copying_ops ops = {
  .wait = op_wait,
  .done = op_done,
  .stop = op_stop,
};

static int
write_all (const struct chain *c, struct target *t,
           const struct restore_values *v, struct copying *progress,
           struct error *err)
{
  const struct archive_head *last = archive_get_head (c->readers[c->nr - 1]);
  struct restore_options opt = {
    .readers = c->readers,
    .nr = c->nr,
    .target = t->disk,
    .fresh = t->fresh,
    .threads = v->connections ? v->connections : THREADS,
  };
  struct restore *r = restore_start (&opt, err);

  if (r == NULL)
    return -1;
  copying_begin (progress, last->disk, last->size);
  if (!copying_wait (progress, &ops, r)) {
    /* Its threads hang; what a file was made of them goes with us. */
    copying_break (progress);
    complain ("leaving, though the target does not answer");
    if (t->partial.tmp)
      unlink (t->partial.tmp);
    _exit (copying_failed (progress, true, "interrupted"));
  }
  copying_break (progress);
  return restore_end (r, err);
}

static void
report (const struct chain *c, const char *where, uint64_t began,
        struct copying *progress)
{
  const struct archive_head *last = archive_get_head (c->readers[c->nr - 1]);
  CLEANUP_FREE char *disk = text_printable (last->disk);
  CLEANUP_FREE char *to = text_printable (where);
  char a[SIZE_TEXT], time[TIME_TEXT], point[UUID_TEXT];
  uint64_t ms = (now_ns () - began) / NS_PER_MS;

  uuid_format (&last->point, point);
  if (progress->mode == PROGRESS_JSON)
    copying_result (progress,
                    json_pack ("{s:s, s:s, s:s, s:I, s:s, s:I, s:I}",
                               "status", "completed", "disk", last->disk,
                               "target", where, "size",
                               (json_int_t) last->size, "point", point,
                               "time", (json_int_t) last->time, "total-time",
                               (json_int_t) ms));
  else
    printf ("%s: disk '%s' (%s) as it was at %s, in %" PRIu64 ".%03" PRIu64
            " s\n", to, disk, size_format (last->size, a),
            time_format (last->time, time), ms / 1000, ms % 1000);
}

static int
restore (struct chain *c, const char *where, const struct restore_values *v,
         struct copying *progress, struct error *err)
{
  const struct archive_head *last = archive_get_head (c->readers[c->nr - 1]);
  struct target_options opt = {
    .where = where,
    .size = last->size,
    .connections = v->connections ? v->connections : THREADS,
    .in_place = v->incremental,
    .overwrite = v->overwrite,
  };
  uint64_t began = now_ns ();
  struct target t;
  int r;

  if (target_open (&t, &opt, err) == -1)
    return -1;
  r = target_begin (&t, err);
  if (r == 0)
    r = write_all (c, &t, v, progress, err);
  if (r == 0)
    r = target_commit (&t, err);
  else if (!t.partial.tmp)
    error_prefix (err, "%s is not complete now", where);
  target_close (&t);
  if (r == 0)
    report (c, where, began, progress);
  return r;
}

/* The only archive, from standard input. */
static int
restore_stdin (const char *where, const struct restore_values *v,
               struct copying *progress, struct error *err)
{
  struct archive_reader *r;
  struct chain c = { .readers = &r, .nr = 1 };
  int n;

  if (remote_is_uri (where) || access (where, F_OK) == 0)
    return error_set (err, EINVAL, "what comes from standard input is known "
                      "to be right only at its end, so it can only be restored "
                      "to a new file: save the archive to a file first");
  r = archive_open ("-", 0, err);
  if (r == NULL)
    return -1;
  n = check_first (&c, v, err);
  if (n == 0 && v->incremental)
    n = error_set (err, EINVAL, "from standard input only a full backup can "
                   "be restored");
  if (n == 0)
    n = restore (&c, where, v, progress, err);
  archive_close (r);
  return n;
}

/* It would be empty before it was read. */
static int
refuse_itself (char **paths, size_t nr, const char *where, struct error *err)
{
  struct stat out, in;

  if (stat (where, &out) == -1)
    return 0;
  for (size_t i = 0; i < nr; i++)
    if (stat (paths[i], &in) == 0 && in.st_dev == out.st_dev &&
        in.st_ino == out.st_ino)
      return error_set (err, EINVAL, "%s is the archive %s itself", where,
                        paths[i]);
  return 0;
}

static int
restore_files (char **paths, size_t nr, const char *where,
               const struct restore_values *v, struct copying *progress,
               struct error *err)
{
  struct chain c;
  int r;

  for (size_t i = 0; i < nr; i++)
    if (strcmp (paths[i], "-") == 0)
      return error_set (err, EINVAL, "standard input can only be the one "
                        "archive that there is");
  if (refuse_itself (paths, nr, where, err) == -1)
    return -1;
  if (chain_open (&c, paths, nr, err) == -1)
    return -1;
  r = check_first (&c, v, err);
  if (r == 0)
    r = verify_all (paths, nr, progress, err);
  if (r == 0)
    r = restore (&c, where, v, progress, err);
  chain_close (&c);
  return r;
}

static int
restore_run (const struct command *cmd, char **args, void *values)
{
  const struct restore_values *v = values;
  struct copying progress;
  struct error err = { 0 };
  size_t nr = 0;
  int r;

  (void) cmd;
  while (args[nr + 1])
    nr++;
  copying_init (&progress, v->json, false);
  if (nr == 1 && strcmp (args[0], "-") == 0)
    r = restore_stdin (args[1], v, &progress, &err);
  else
    r = restore_files (args, nr, args[nr], v, &progress, &err);
  if (r == -1) {
    copying_break (&progress);
    complain ("%s", err.msg);
    return copying_failed (&progress, progress.interrupted, err.msg);
  }
  output_finish ();
  return STATUS_DONE;
}

const struct command restore_command = {
  .name = "restore",
  .full_name = "nbdferry restore",
  .synopsis = "ARCHIVE... OUT [OPTION]...",
  .summary = "Write a backup, with all that it builds upon, to a disk.",
  .help =
    "The ARCHIVEs are a full backup and those that follow it, in order.  OUT\n"
    "is a file, which is made, a block device or an NBD URI.  All archives\n"
    "are checked before a byte is written.  A single ARCHIVE may be -,\n"
    "standard input; then OUT must be a file that does not exist.\n"
    "\n"
    "Options:\n"
    "  --overwrite         OUT may hold something, which is lost\n"
    "  --onto-point POINT  OUT is the disk as it was at that point: the first\n"
    "                      ARCHIVE must build upon it\n"
    "  --incremental       the same, for whatever the first ARCHIVE builds\n"
    "                      upon\n"
    "  --connections N     to an NBD server, or threads that write (4)\n"
    "  --json              print JSON on lines\n"
    "  -h, --help          print this help\n"
    "\n"
    "Exit status: 0 if it was restored and is durable, 1 if not, 2 for wrong\n"
    "usage, 130 if it was interrupted.\n",
  .min_args = 2,
  .max_args = -1,
  .run = restore_run,
  .options = options,
  .option = restore_option,
  .values_size = sizeof (struct restore_values),
};
