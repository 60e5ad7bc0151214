/* nbdferry - nbdferry takeover
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Disks that were handed over as one are taken over as one: all are looked at
 * before the first is changed.  Killed in between, the same command finds
 * which were done (taken_from), and does the others.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "absolute.h"
#include "cleanup.h"
#include "command.h"
#include "output.h"
#include "remote.h"
#include "takeover.h"

enum { OPT_STATE = 256, OPT_FORCE, OPT_YES, OPT_JSON };

struct takeover_values {
  const char *state;
  bool force, yes, json;
};

struct taken {
  char *path, *state_dir, *journal;
  struct journal_record rec; /* as it was found */
  bool done;                 /* by a takeover before, which was interrupted */
};

struct list {
  struct taken *v;
  size_t nr;
};

/* ---- looking ---- */

static int
find_disk (struct taken *t, const char *arg, const char *state,
           struct error *err)
{
  struct stat st;

  if (stat (arg, &st) == 0 && S_ISSOCK (st.st_mode))
    return error_set (err, EINVAL, "%s is a socket: name the disk itself, "
                      "after its daemon was stopped", arg);
  if (remote_is_uri (arg) && state == NULL)
    return error_set (err, EINVAL, "%s: say with --state where its state "
                      "directory is", arg);
  t->path = remote_is_uri (arg) ? strdup (arg) : absolute_path (arg, err);
  if (t->path == NULL)
    return -1;
  if (state)
    t->state_dir = absolute_path (state, err);
  else if (asprintf (&t->state_dir, "%s.ferry", t->path) == -1)
    t->state_dir = NULL;
  if (t->state_dir == NULL ||
      asprintf (&t->journal, "%s/journal", t->state_dir) == -1) {
    t->journal = NULL;
    return error_set (err, ENOMEM, "%m");
  }
  return journal_read (t->journal, &t->rec, err);
}

/* Does anybody have it open?  Asked of all before the first is changed. */
static int
check_free (const struct taken *t, struct error *err)
{
  struct disk *disk;
  int r = 0;

  if (remote_is_uri (t->path)) /* to open it will tell */
    return 0;
  disk = disk_open_file (t->path, 0, false, err);
  if (disk == NULL)
    return -1;
  if (disk->readonly)
    r = error_set (err, EROFS, "%s cannot be written", t->path);
  disk->ops->close (disk);
  return r;
}

static bool
is_named (const struct list *l, const char *journal)
{
  for (size_t i = 0; i < l->nr; i++)
    if (strcmp (l->v[i].journal, journal) == 0)
      return true;
  return false;
}

/* How many of those named belong to that handover, done or not. */
static size_t
count_session (const struct list *l, const struct uuid *session)
{
  size_t n = 0;

  for (size_t i = 0; i < l->nr; i++)
    n += uuid_equal (&l->v[i].rec.session, session) ||
         uuid_equal (&l->v[i].rec.taken_from, session);
  return n;
}

/* Those that were done before: active, by a takeover from a session that
 * another one of the list still has.
 */
static void
find_done (struct list *l)
{
  for (size_t i = 0; i < l->nr; i++) {
    struct taken *t = &l->v[i];

    if (t->rec.state != JOURNAL_ACTIVE || uuid_is_zero (&t->rec.taken_from))
      continue;
    for (size_t k = 0; k < l->nr; k++)
      t->done |= l->v[k].rec.state != JOURNAL_ACTIVE &&
                 uuid_equal (&l->v[k].rec.session, &t->rec.taken_from);
  }
}

static int
check_siblings (const struct list *l, const struct taken *t,
                struct error *err)
{
  const struct journal_record *rec = &t->rec;
  size_t n = count_session (l, &rec->session);

  /* Of a migration that has not come that far nothing is decided. */
  if (rec->state == JOURNAL_INCOMING)
    return 0;
  if (rec->together > n)
    return error_set (err, EPERM, "%s moved together with %" PRIu64 " other "
                      "disk%s: name all of them%s%s%s, so that they are "
                      "taken over together", t->path, rec->together - 1,
                      rec->together == 2 ? "" : "s",
                      rec->coordinator ? " (one has the journal " : "",
                      rec->coordinator ?: "", rec->coordinator ? ")" : "");
  if (rec->coordinator && !is_named (l, rec->coordinator))
    return error_set (err, EPERM, "%s moved together with the disk whose "
                      "journal is %s: name that one as well", t->path,
                      rec->coordinator);
  return 0;
}

static int
look (struct list *l, char **args, const struct takeover_values *v,
      struct error *err)
{
  for (size_t i = 0; args[i]; i++) {
    l->nr = i + 1;
    if (find_disk (&l->v[i], args[i], v->state, err) == -1)
      return -1;
    for (size_t k = 0; k < i; k++)
      if (strcmp (l->v[k].journal, l->v[i].journal) == 0)
        return error_set (err, EINVAL, "%s is named twice", l->v[i].path);
  }
  find_done (l);
  for (size_t i = 0; i < l->nr; i++) {
    struct taken *t = &l->v[i];

    if (t->done)
      continue;
    if (takeover_check (&t->rec, v->force, err) == -1)
      return error_prefix (err, "%s", t->path);
    if (check_siblings (l, t, err) == -1 || check_free (t, err) == -1)
      return -1;
  }
  return 0;
}

/* ---- asking ---- */

static void
warn (const struct list *l)
{
  for (size_t i = 0; i < l->nr; i++) {
    const struct taken *t = &l->v[i];
    CLEANUP_FREE char *path = text_printable (t->path);
    CLEANUP_FREE char *peer = t->rec.peer ? text_printable (t->rec.peer)
                                          : NULL;

    if (t->done)
      continue;
    fprintf (stderr, "%s: %s%s%s%s\n  %s\n", path,
             journal_state_name (t->rec.state), peer ? " (to " : "",
             peer ?: "", peer ? ")" : "", takeover_warning (&t->rec));
  }
  fprintf (stderr,
           "After this %s served here, whatever the other side does.  If the\n"
           "other side is ever started again and serves the disk too, there\n"
           "are two disks that go their own ways, and nothing can make them\n"
           "one again.  Make sure that it is gone for good.\n",
           l->nr == 1 ? "the disk is" : "the disks are");
}

/* Only "yes" is yes. */
static bool
ask (struct error *err)
{
  char answer[16] = "";

  if (!isatty (STDIN_FILENO)) {
    error_set (err, EPERM, "this must be confirmed: say --yes");
    return false;
  }
  fprintf (stderr, "Type yes to take over: ");
  fflush (stderr);
  if (fgets (answer, sizeof answer, stdin) &&
      strcmp (answer, "yes\n") == 0)
    return true;
  error_set (err, ECANCELED, "nothing was done");
  return false;
}

/* ---- doing ---- */

static json_t *
text (const char *s)
{
  CLEANUP_FREE char *printable = text_printable (s);

  return json_string (text_is_utf8 (s) ? s : printable);
}

static json_t *
describe (const struct drive *d)
{
  const struct journal_record *rec = journal_get (d->journal);
  json_t *list = json_array (), *b;
  char lineage[UUID_TEXT];

  uuid_format (&rec->lineage, lineage);
  for (size_t i = 0; i < d->nr_bitmaps; i++) {
    const struct named_bitmap *nb = d->bitmaps[i];

    b = json_pack ("{s:s, s:b, s:b, s:I}", "name", nb->name, "recording",
                   nb->recording, "inconsistent", nb->inconsistent, "count",
                   nb->bits ? (json_int_t) bitmap_count (nb->bits) : 0);
    if (nb->reason)
      json_object_set_new (b, "reason", text (nb->reason->text));
    json_array_append_new (list, b);
  }
  return json_pack ("{s:o, s:s, s:I, s:o}", "disk", text (d->path),
                    "lineage", lineage, "generation",
                    (json_int_t) rec->generation, "bitmaps", list);
}

static int
take_one (const struct taken *t, bool force, json_t *results,
          struct error *err)
{
  const struct drive_options opt = {
    .name = "disk", .path = t->path, .state_dir = t->state_dir,
    .takeover = true, .force = force,
  };
  struct drive *d = drive_open (&opt, err);
  int r;

  if (d == NULL)
    return -1;
  json_array_append_new (results, describe (d));
  r = drive_shutdown (d, err);
  drive_free (d);
  return r;
}

static int
take_all (const struct list *l, bool force, json_t *results,
          struct error *err)
{
  for (size_t i = 0; i < l->nr; i++)
    if (!l->v[i].done && take_one (&l->v[i], force, results, err) == -1)
      return l->nr == 1
               ? -1
               : error_prefix (err, "run the same command again for those "
                               "that were not taken over");
  return 0;
}

static void
print_results (const json_t *results)
{
  const json_t *o, *b, *list;
  size_t i, k;

  json_array_foreach ((json_t *) results, i, o) {
    CLEANUP_FREE char *path = text_printable (
      json_string_value (json_object_get (o, "disk")));

    printf ("%s: taken over; its lineage is now %s\n", path,
            json_string_value (json_object_get (o, "lineage")));
    list = json_object_get (o, "bitmaps");
    json_array_foreach ((json_t *) list, k, b) {
      const char *why = json_string_value (json_object_get (b, "reason"));
      CLEANUP_FREE char *name = text_printable (
        json_string_value (json_object_get (b, "name")));
      CLEANUP_FREE char *reason = why ? text_printable (why) : NULL;

      printf ("  bitmap %s: %s%s%s\n", name,
              json_is_true (json_object_get (b, "inconsistent"))
                ? "inconsistent" : "kept", reason ? "; " : "", reason ?: "");
    }
  }
}

static int
run_takeover (const struct command *cmd, char **args, void *values)
{
  const struct takeover_values *v = values;
  json_auto_t *results = json_array ();
  struct list l = { 0 };
  struct error err = { 0 };
  size_t n = 0;
  int r;

  while (args[n])
    n++;
  if (v->state && n > 1)
    return usage_error (cmd, "--state is for one disk");
  l.v = calloc (n, sizeof l.v[0]);
  if (l.v == NULL)
    r = error_set (&err, ENOMEM, "%m");
  else
    r = look (&l, args, v, &err);
  if (r == 0) {
    warn (&l);
    if (!v->yes && !ask (&err))
      r = -1;
  }
  if (r == 0)
    r = take_all (&l, v->force, results, &err);
  if (r == -1)
    complain ("%s", err.msg);
  if (v->json && (r == 0 || json_array_size (results) > 0))
    print_json (results);
  else
    print_results (results);
  for (size_t i = 0; i < l.nr; i++) {
    free (l.v[i].path);
    free (l.v[i].state_dir);
    free (l.v[i].journal);
    journal_record_free (&l.v[i].rec);
  }
  free (l.v);
  return output_finish () == 0 && r == 0 ? STATUS_DONE : STATUS_FAILED;
}

static int
takeover_option (const struct command *cmd, int c, const char *arg,
                 void *values)
{
  struct takeover_values *v = values;

  (void) cmd;
  switch (c) {
  case OPT_STATE: v->state = arg; break;
  case OPT_FORCE: v->force = true; break;
  case OPT_YES: v->yes = true; break;
  case OPT_JSON: v->json = true; break;
  }
  return -1;
}

static const struct option takeover_options[] = {
  { "help", no_argument, NULL, 'h' },
  { "state", required_argument, NULL, OPT_STATE },
  { "force", no_argument, NULL, OPT_FORCE },
  { "yes", no_argument, NULL, OPT_YES },
  { "json", no_argument, NULL, OPT_JSON },
  { 0 },
};

const struct command takeover_command = {
  .name = "takeover",
  .full_name = "nbdferry takeover",
  .synopsis = "DISK... [OPTION]...",
  .summary = "Serve a disk here whose other side is gone for good.",
  .help =
    "DISK is the raw file or block device, of which this side has let go, or\n"
    "which is the destination of a migration that will never be finished.  Its\n"
    "daemon must be stopped.  Disks that moved together are named together.\n"
    "The next daemon that opens the disk serves it.  If the other side serves\n"
    "it as well, there are two of it: be sure that it never will.\n"
    "\n"
    "Options:\n"
    "  --state DIR        the state directory (default: DISK.ferry)\n"
    "  --force            also if only a part of the disk has arrived, or if\n"
    "                     the other side has acknowledged that it serves it\n"
    "  --yes              do not ask\n"
    "  --json             print what was done as JSON\n"
    "  -h, --help         print this help\n"
    "\n"
    "Exit status: 0 if all were taken over, 1 if not, 2 for wrong usage.\n",
  .min_args = 1,
  .max_args = 256,
  .run = run_takeover,
  .options = takeover_options,
  .option = takeover_option,
  .values_size = sizeof (struct takeover_values),
  .json_result = true,
};
