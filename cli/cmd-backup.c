/* nbdferry - nbdferry backup
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The order is what makes it safe:
 *
 *   begin: the bitmaps are frozen, and the disks as they are now can be read
 *   copy each disk, all but the END of an archive
 *   the daemon is asked whether it still can be read: what was copied is right
 *   END (whoever reads a pipe takes what it has for complete then)
 *   every OUT is made durable, and gets its name
 *   end: the bitmaps are advanced
 *
 * Whatever fails before the last step, the bitmaps keep all their bits, and
 * the next backup lacks nothing.  If the last step itself fails, OUT is a
 * complete archive that nothing will ever build upon: the next one builds upon
 * the same parent, and holds what OUT holds, too.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "archives.h"
#include "backup-out.h"
#include "backup-session.h"
#include "cleanup.h"
#include "clock.h"
#include "command.h"
#include "copy.h"
#include "copying.h"
#include "output.h"
#include "size.h"

#define MAX_NODES 256
#define CONNECTIONS 4

struct backup_values {
  struct backup_options opt;
  const char *nodes[MAX_NODES];
  size_t nr_nodes;
  enum out_format format;
  struct pack_compression compression;
  bool has_compression;
  uint64_t connections;  /* 0: not given */
  bool force, json;
};

struct backup {
  const struct backup_values *v;
  struct control *control;
  struct backup_session session;
  struct out *outs;      /* one for each disk of the session */
  size_t nr_outs;        /* that are prepared */
  struct copying progress;
  uint64_t began;
};

/* ---- options ---- */

enum {
  OPT_BITMAP = 256,
  OPT_FULL,
  OPT_INCREMENTAL,
  OPT_FORMAT,
  OPT_NODE,
  OPT_COMPRESSION,
  OPT_CONNECTIONS,
  OPT_SCRATCH_LIMIT,
  OPT_ON_LIMIT,
  OPT_GRANULARITY,
  OPT_URI,
  OPT_FORCE,
  OPT_JSON,
};

static const struct option options[] = {
  { "help", no_argument, NULL, 'h' },
  { "bitmap", required_argument, NULL, OPT_BITMAP },
  { "full", no_argument, NULL, OPT_FULL },
  { "incremental", no_argument, NULL, OPT_INCREMENTAL },
  { "format", required_argument, NULL, OPT_FORMAT },
  { "node", required_argument, NULL, OPT_NODE },
  { "compression", required_argument, NULL, OPT_COMPRESSION },
  { "connections", required_argument, NULL, OPT_CONNECTIONS },
  { "scratch-limit", required_argument, NULL, OPT_SCRATCH_LIMIT },
  { "on-limit", required_argument, NULL, OPT_ON_LIMIT },
  { "granularity", required_argument, NULL, OPT_GRANULARITY },
  { "uri", required_argument, NULL, OPT_URI },
  { "force", no_argument, NULL, OPT_FORCE },
  { "json", no_argument, NULL, OPT_JSON },
  { 0 },
};

static int
set_kind (const struct command *cmd, struct backup_values *v,
          enum backup_kind kind)
{
  if (v->opt.kind != BACKUP_AUTO && v->opt.kind != kind)
    return usage_error (cmd, "a backup cannot be --full and --incremental");
  v->opt.kind = kind;
  return -1;
}

static int
set_format (const struct command *cmd, struct backup_values *v,
            const char *arg)
{
  if (strcmp (arg, "archive") == 0)
    v->format = OUT_ARCHIVE;
  else if (strcmp (arg, "raw") == 0)
    v->format = OUT_RAW;
  else
    return usage_error (cmd, "--format: '%s' is not archive or raw", arg);
  return -1;
}

/* Those with a number. */
static int
number_option (const struct command *cmd, int c, const char *arg,
               struct backup_values *v)
{
  uint64_t g;

  switch (c) {
  case OPT_CONNECTIONS:
    if (number_parse (arg, &v->connections) == -1 || v->connections < 1 ||
        v->connections > COPY_MAX_CONNECTIONS)
      return usage_error (cmd, "--connections: '%s' is not a number from 1 to "
                          "%d", arg, COPY_MAX_CONNECTIONS);
    break;
  case OPT_SCRATCH_LIMIT:
    if (size_parse (arg, &v->opt.scratch_limit) == -1 ||
        v->opt.scratch_limit < 1 || v->opt.scratch_limit > INT64_MAX)
      return usage_error (cmd, "--scratch-limit: '%s' is not a size, like 2G",
                          arg);
    v->opt.has_scratch_limit = true;
    break;
  case OPT_GRANULARITY:
    if (size_parse (arg, &g) == -1 || g < 512 || g > UINT64_C (1) << 31 ||
        (g & (g - 1)) != 0)
      return usage_error (cmd, "--granularity: '%s' is not a power of two "
                          "from 512 to 2G", arg);
    v->opt.granularity = g;
    break;
  }
  return -1;
}

static int
backup_option (const struct command *cmd, int c, const char *arg,
               void *values)
{
  struct backup_values *v = values;

  switch (c) {
  case OPT_BITMAP: v->opt.bitmap = arg; break;
  case OPT_FULL: return set_kind (cmd, v, BACKUP_FULL);
  case OPT_INCREMENTAL: return set_kind (cmd, v, BACKUP_INCREMENTAL);
  case OPT_FORMAT: return set_format (cmd, v, arg);
  case OPT_NODE:
    if (v->nr_nodes == MAX_NODES)
      return usage_error (cmd, "--node: more than %d disks", MAX_NODES);
    v->nodes[v->nr_nodes++] = arg;
    break;
  case OPT_COMPRESSION:
    if (compression_parse (arg, &v->compression) == -1)
      return usage_error (cmd, "--compression: '%s' is not none, zlib[:1-9] "
                          "or zstd[:1-19]", arg);
    v->has_compression = true;
    break;
  case OPT_ON_LIMIT:
    if (strcmp (arg, "slow") != 0 && strcmp (arg, "fail") != 0)
      return usage_error (cmd, "--on-limit: '%s' is not slow or fail", arg);
    v->opt.on_limit = arg;
    break;
  case OPT_URI: v->opt.uri = arg; break;
  case OPT_FORCE: v->force = true; break;
  case OPT_JSON: v->json = true; break;
  default: return number_option (cmd, c, arg, v);
  }
  return -1;
}

/* ---- copying ---- */

/* A disk that is being copied. */
struct under_way {
  struct copy *copy;
  struct backup_session *session;
  struct backup_disk *disk;
};

static bool
op_wait (void *opaque, uint64_t ns)
{
  struct under_way *u = opaque;

  return copy_wait (u->copy, ns);
}

static uint64_t
op_done (void *opaque)
{
  struct under_way *u = opaque;

  return copy_done (u->copy);
}

static void
op_stop (void *opaque)
{
  struct under_way *u = opaque;

  copy_stop (u->copy, NULL);
}

static void
op_tick (void *opaque)
{
  struct under_way *u = opaque;

  session_release (u->session, u->disk, copy_read_up_to (u->copy));
}

static const struct copying_ops ops = { op_wait, op_done, op_stop, op_tick };

/* The first address of the daemon that works. */
static struct copy *
start_copy (struct backup *b, struct copy_options *opt, struct error *err)
{
  const json_t *uris = session_uris (&b->session, err);
  struct copy *c = NULL;

  if (uris == NULL)
    return NULL;
  for (size_t i = 0; c == NULL && i < json_array_size (uris); i++) {
    opt->uri = json_string_value (json_array_get (uris, i));
    if (opt->uri)
      c = copy_start (opt, err);
  }
  if (c == NULL && b->v->opt.uri == NULL)
    error_prefix (err, "cannot read the backup from the daemon");
  return c;
}

/* It was begun, and has failed. */
static void
say_what_was_overwritten (const struct backup *b)
{
  for (size_t i = 0; i < b->nr_outs; i++)
    if (b->session.disks[i].forgotten && !b->outs[i].complete)
      complain ("%s was overwritten in part, so no backup can build upon it: "
                "the next one by this bitmap is a full one (with --force)",
                b->outs[i].path);
}

/* Its threads hang in a target that does not answer. */
static void
leave (struct backup *b)
{
  control_hurry (b->control);
  session_give_up (&b->session);
  for (size_t i = 0; i < b->nr_outs; i++) {
    if (b->outs[i].partial.tmp)
      unlink (b->outs[i].partial.tmp);
    if (b->outs[i].target.partial.tmp)
      unlink (b->outs[i].target.partial.tmp);
  }
  complain ("left while the target does not answer; the bitmap is as it was");
  say_what_was_overwritten (b);
  _exit (copying_failed (&b->progress, true, "interrupted"));
}

/* Who asks a server for data waits for it.  Who reads it from the disk mostly
 * does not: more threads than processors are only in the way of the one that
 * writes.
 */
static unsigned
connections (const struct backup *b, const struct out *o, bool direct)
{
  long cpus;

  if (b->v->connections)
    return b->v->connections;
  if (!direct || (o->target.disk && o->target.disk->fixed_size))
    return CONNECTIONS;
  cpus = sysconf (_SC_NPROCESSORS_ONLN);
  return cpus < 2 ? 2 : cpus < CONNECTIONS ? cpus : CONNECTIONS;
}

static int
copy_disk (struct backup *b, struct backup_disk *d, struct out *o,
           struct error *err)
{
  struct copy_options opt = {
    .export = d->export,
    .size = d->head.size,
    .full = d->full,
    .writer = o->writer,
    .target = o->target.disk,
    .id = d->head.id,
    .compression = { .how = MIGRATE_COMPRESSION_ZSTD },
  };
  struct under_way u = { NULL, &b->session, d };
  struct error why;
  int r;

  if (b->v->has_compression)
    opt.compression = b->v->compression;
  /* Who says where to read from wants it to be read from there. */
  if (b->v->opt.uri == NULL)
    opt.direct = session_direct (&b->session, d);
  opt.connections = connections (b, o, opt.direct);
  u.copy = start_copy (b, &opt, err);
  if (u.copy == NULL) {
    direct_close (opt.direct);
    return -1;
  }
  copying_begin (&b->progress, d->node, d->needed);
  if (!copying_wait (&b->progress, &ops, &u))
    leave (b);
  if (copying_interrupted (&b->progress))
    copy_stop (u.copy, NULL);
  else if (session_check (&b->session, &why) == -1)
    copy_stop (u.copy, &why);
  else
    copy_approve (u.copy);
  if (!copying_wait (&b->progress, &ops, &u))
    leave (b);
  copying_break (&b->progress);
  r = copy_end (u.copy, err);
  direct_close (opt.direct);
  if (r == -1)
    return -1;
  if (copying_interrupted (&b->progress))
    return error_set (err, ECANCELED, "interrupted");
  return 0;
}

/* ---- the steps ---- */

static int
prepare (struct backup *b, const char *pattern, struct error *err)
{
  struct backup_session *s = &b->session;

  if (session_choose (s, b->control, &b->v->opt, b->v->nodes, b->v->nr_nodes,
                      err) == -1)
    return -1;
  b->outs = calloc (s->nr, sizeof b->outs[0]);
  if (b->outs == NULL)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < s->nr; i++) {
    char *path = out_name (pattern, s->disks[i].node, s->nr > 1, b->v->format,
                           err);

    if (path == NULL)
      return -1;
    b->nr_outs++;
    if (out_prepare (&b->outs[i], path, b->v->format, b->v->force, err) == -1)
      return -1;
  }
  return 0;
}

/* It was accepted, and nothing of it has changed yet. */
static int
overwrite (struct backup *b, struct backup_disk *d, struct out *o,
           struct error *err)
{
  if (o->archive || o->target.partial.tmp)
    return 0;
  return session_forget (&b->session, d, err) == -1
           ? -1
           : target_begin (&o->target, err);
}

static int
copy_all (struct backup *b, struct error *err)
{
  struct backup_session *s = &b->session;

  for (size_t i = 0; i < s->nr; i++)
    if (out_begin (&b->outs[i], s, &s->disks[i], b->v->force,
                   b->v->connections ? b->v->connections : CONNECTIONS,
                   err) == -1 ||
        overwrite (b, &s->disks[i], &b->outs[i], err) == -1 ||
        copy_disk (b, &s->disks[i], &b->outs[i], err) == -1)
      return -1;
  return 0;
}

static int
commit_outs (struct backup *b, struct error *err)
{
  for (size_t i = 0; i < b->session.nr; i++)
    if (out_commit (&b->outs[i], err) == -1)
      return -1;
  return 0;
}

/* OUT is complete, but the bitmap is not known to be advanced. */
static void
say_what_holds (struct backup *b, bool unknown, const struct error *err)
{
  char point[UUID_TEXT];

  uuid_format (&b->session.id, point);
  if (b->session.opt->bitmap == NULL)
    return;
  complain ("%s: %s", unknown ? "the daemon did not answer whether it has "
            "advanced the bitmap" : "the daemon did not advance the bitmap",
            err->msg);
  for (size_t i = 0; i < b->session.nr; i++)
    if (strcmp (b->outs[i].path, "-") == 0)
      complain ("what went to standard output is complete");
    else
      complain ("%s is complete and durable", b->outs[i].path);
  complain ("no change is lost: %sthe next backup builds upon the same parent "
            "as this one, and holds all that this one holds, too; restore it "
            "without this one", unknown ? "unless 'bitmap list --json' shows "
            "the point of this backup, " : "");
  if (unknown)
    complain ("the point of this backup is %s", point);
}

static int
run_steps (struct backup *b, const char *pattern, struct error *err)
{
  bool unknown;

  if (prepare (b, pattern, err) == -1 ||
      session_begin (&b->session, err) == -1) {
    copying_interrupted (&b->progress);
    return -1;
  }
  if (copy_all (b, err) == -1) {
    if (b->progress.interrupted)
      control_hurry (b->control);
    else
      session_explain (&b->session, err);
    session_give_up (&b->session);
    return -1;
  }
  if (commit_outs (b, err) == -1) {
    session_give_up (&b->session);
    return -1;
  }
  if (session_commit (&b->session, &unknown, err) == 0)
    return 0;
  session_explain (&b->session, err);
  say_what_holds (b, unknown, err);
  session_give_up (&b->session);
  err->msg[0] = '\0'; /* all was said */
  return -1;
}

/* ---- the result ---- */

static void
print_result (const struct backup *b, const struct backup_disk *d,
              const struct out *o, uint64_t ms)
{
  CLEANUP_FREE char *disk = text_printable (d->node);
  CLEANUP_FREE char *path = text_printable (
    strcmp (o->path, "-") == 0 ? "standard output" : o->path);
  const struct archive_totals *t = o->writer ? archive_writer_totals (o->writer)
                                             : NULL;
  char a[SIZE_TEXT], c[SIZE_TEXT];

  fprintf (b->progress.out, "%s: %s backup of disk '%s' in %" PRIu64
           ".%03" PRIu64 " s", path, d->full ? "full" : "incremental", disk,
           ms / 1000, ms % 1000);
  if (t)
    fprintf (b->progress.out, ", %s of data in %s",
             size_format (t->data, a), size_format (t->bytes +
                                                    ARCHIVE_END_SIZE, c));
  else
    fprintf (b->progress.out, ", %s", size_format (d->needed, a));
  fputc ('\n', b->progress.out);
}

static void
report (struct backup *b)
{
  uint64_t ms = (now_ns () - b->began) / NS_PER_MS;
  json_t *list = json_array ();

  for (size_t i = 0; i < b->session.nr; i++) {
    const struct out *o = &b->outs[i];

    if (b->progress.mode == PROGRESS_JSON)
      json_array_append_new (
        list, archive_json (o->path, &b->session.disks[i].head,
                            o->writer ? archive_writer_totals (o->writer)
                                      : NULL));
    else
      print_result (b, &b->session.disks[i], o, ms);
  }
  copying_result (&b->progress,
                  json_pack ("{s:s, s:I, s:o}", "status", "completed",
                             "total-time", (json_int_t) ms, "backups", list));
}

static int
failed (struct backup *b, const struct error *err)
{
  copying_break (&b->progress);
  if (b->progress.interrupted)
    complain ("the backup was given up; the bitmap is as it was");
  else if (err->msg[0])
    complain ("%s", err->msg);
  say_what_was_overwritten (b);
  return copying_failed (&b->progress, b->progress.interrupted, err->msg);
}

static int
backup_run (const struct command *cmd, char **args, void *values)
{
  struct backup_values *v = values;
  struct backup b = { .v = v, .began = now_ns () };
  struct error err = { 0 };
  int status = STATUS_DONE;

  if (v->opt.bitmap == NULL && v->opt.kind == BACKUP_INCREMENTAL)
    return usage_error (cmd, "an incremental backup needs --bitmap");
  copying_init (&b.progress, v->json, strcmp (args[1], "-") == 0);
  b.control = control_open (args[0], &err);
  if (b.control)
    control_hurry_when (b.control, b.progress.signals);
  if (b.control == NULL || run_steps (&b, args[1], &err) == -1)
    status = failed (&b, &err);
  else
    report (&b);
  for (size_t i = 0; i < b.nr_outs; i++)
    out_close (&b.outs[i]);
  free (b.outs);
  session_free (&b.session);
  control_close (b.control);
  output_finish (); /* a backup is one, wherever the lines about it went */
  return status;
}

const struct command backup_command = {
  .name = "backup",
  .full_name = "nbdferry backup",
  .synopsis = "CONTROL OUT --bitmap NAME [OPTION]...",
  .summary = "Back disks up, all of them or what has changed.",
  .help =
    "OUT is a file, which becomes an archive; a block device, a file with\n"
    "--format raw, or an NBD URI, which are brought up to date in place; or\n"
    "-, standard output.  In it %n is the disk, %t the time, %% a percent\n"
    "sign.  If it is a folder, an archive of that name is made in it.\n"
    "\n"
    "The first backup by a bitmap is a full one, and makes the bitmap; later\n"
    "ones are incremental.\n"
    "\n"
    "Options:\n"
    "  --bitmap NAME          what records the changes; without it, all is\n"
    "                         backed up, and nothing can follow\n"
    "  --full                 back all up; later ones build upon this\n"
    "  --incremental          fail if it would be a full one\n"
    "  --node NODE            this disk; several may be given: all of them at\n"
    "                         one instant\n"
    "  --format FORMAT        archive, or raw\n"
    "  --compression METHOD   none, zlib[:1-9] or zstd[:1-19] (default: zstd)\n"
    "  --connections N        to the daemon (4)\n"
    "  --granularity G        of a new bitmap: a power of two, 512 to 2G\n"
    "  --scratch-limit SIZE   how much of what clients overwrite meanwhile is\n"
    "                         kept in the state directory\n"
    "  --on-limit slow|fail   what to do at that limit: slow the clients, or\n"
    "                         give the backup up (default)\n"
    "  --uri URI              where the daemon listens\n"
    "  --force                replace OUT if it exists; with a full backup,\n"
    "                         overwrite what is on a device or server\n"
    "  --json                 print JSON on lines\n"
    "  -h, --help             print this help\n"
    "\n"
    "Exit status: 0 if OUT is complete and durable, and the bitmap advanced;\n"
    "1 if not, and then the next backup lacks nothing; 2 for wrong usage; 130\n"
    "if it was interrupted.\n",
  .min_args = 2,
  .max_args = 2,
  .run = backup_run,
  .options = options,
  .option = backup_option,
  .values_size = sizeof (struct backup_values),
};
