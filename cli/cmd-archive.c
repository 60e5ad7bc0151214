/* nbdferry - nbdferry archive: look at, check and merge archives
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "archive-merge.h"
#include "archive-write.h"
#include "archives.h"
#include "cleanup.h"
#include "cmd-archive.h"
#include "output.h"
#include "partial.h"
#include "size.h"

enum { OPT_JSON = 256, OPT_CHAIN, OPT_FORCE, OPT_COMPRESSION };

static int
archive_option (const struct command *cmd, int c, const char *arg,
                void *values)
{
  struct archive_values *v = values;

  switch (c) {
  case OPT_JSON: v->json = true; break;
  case OPT_CHAIN: v->chain = true; break;
  case OPT_FORCE: v->force = true; break;
  case OPT_COMPRESSION:
    if (compression_parse (arg, &v->compression) == -1)
      return usage_error (cmd, "--compression: '%s' is not none, zlib[:1-9] "
                          "or zstd[:1-19]", arg);
    v->has_compression = true;
    break;
  }
  return -1;
}

static size_t
count (char **args)
{
  size_t n = 0;

  while (args[n])
    n++;
  return n;
}

/* ---- info ---- */

static void
print_info (const char *path, const struct archive_head *h,
            const struct archive_totals *t)
{
  CLEANUP_FREE char *file = text_printable (path);
  CLEANUP_FREE char *disk = text_printable (h->disk);
  CLEANUP_FREE char *bitmap = text_printable (h->bitmap ? h->bitmap : "");
  char text[UUID_TEXT], time[TIME_TEXT], a[SIZE_TEXT], b[SIZE_TEXT];

  printf ("%s\n", file);
  printf ("  disk        %s, %s (%" PRIu64 " bytes)\n", disk,
          size_format (h->size, a), h->size);
  printf ("  time        %s\n", time_format (h->time, time));
  uuid_format (&h->point, text);
  printf ("  point       %s\n", text);
  uuid_format (&h->parent, text);
  printf ("  parent      %s\n",
          archive_is_full (h) ? "none: a full backup" : text);
  if (h->bitmap)
    printf ("  bitmap      %s, granularity %s\n", bitmap,
            size_format (h->granularity, a));
  uuid_format (&h->lineage, text);
  printf ("  lineage     %s, generation %" PRIu64 "\n", text, h->generation);
  if (h->tool) {
    CLEANUP_FREE char *tool = text_printable (h->tool);

    printf ("  written by  %s\n", tool);
  }
  if (t == NULL) {
    printf ("  INCOMPLETE: it has no end\n");
    return;
  }
  printf ("  data        %s, stored in %s\n", size_format (t->data, a),
          size_format (t->stored, b));
  printf ("  zeros       %s\n", size_format (t->zeros, a));
  printf ("  holes       %s\n", size_format (t->holes, a));
  printf ("  packets     %" PRIu64 ", with %" PRIu64 " extents\n", t->packets,
          t->extents);
}

static int
info_one (const char *path, json_t *array)
{
  struct error err;
  struct archive_reader *r = archive_open (path, ARCHIVE_LAZY, &err);
  CLEANUP_CLOSE int fd = archive_open_file (path);
  struct archive_totals totals;
  bool complete;

  if (r == NULL) {
    complain ("%s", err.msg);
    if (array)
      json_array_append_new (array, archive_error_json (path, err.msg));
    return -1;
  }
  complete = archive_peek_totals (fd, path, &totals, NULL) == 0;
  if (array) {
    json_t *json = archive_json (path, archive_get_head (r),
                                 complete ? &totals : NULL);

    json_object_set_new (json, "complete", json_boolean (complete));
    json_array_append_new (array, json);
  }
  else
    print_info (path, archive_get_head (r), complete ? &totals : NULL);
  archive_close (r);
  return complete ? 0 : -1;
}

static int
archive_info_run (const struct command *cmd, char **args, void *values)
{
  const struct archive_values *v = values;
  json_auto_t *array = v->json ? json_array () : NULL;
  int status = STATUS_DONE;

  (void) cmd;
  for (; *args; args++)
    if (info_one (*args, array) == -1)
      status = STATUS_FAILED;
  if (array)
    print_json (array);
  return output_finish () == 0 ? status : STATUS_FAILED;
}

/* ---- verify ---- */

/* Is there no gap, and are they in order? */
static int
verify_chain (char **args, json_t *array)
{
  struct chain chain;
  struct error err;
  int r = chain_open (&chain, args, count (args), &err);
  json_t *json;

  if (r == 0)
    chain_close (&chain);
  else
    complain ("%s", err.msg);
  if (array) {
    json = json_pack ("{s:b}", "chain-ok", r == 0);
    if (r == -1)
      json_object_set_new (json, "error", json_shown (err.msg));
    json_array_append_new (array, json);
  }
  return r;
}

static void
verified (const char *path, int r, const struct archive_totals *t,
          const struct error *err, json_t *array)
{
  CLEANUP_FREE char *file = text_printable (path);
  char a[SIZE_TEXT];
  json_t *json;

  if (array) {
    json = json_pack ("{s:o, s:b}", "file", json_shown (path), "ok", r == 0);
    if (r == -1)
      json_object_set_new (json, "error", json_shown (err->msg));
    json_array_append_new (array, json);
  }
  if (r == -1)
    complain ("%s", err->msg);
  else if (!array)
    printf ("%s: ok, %s in %" PRIu64 " packets\n", file,
            size_format (t->bytes + ARCHIVE_END_SIZE, a), t->packets);
}

static int
archive_verify_run (const struct command *cmd, char **args, void *values)
{
  const struct archive_values *v = values;
  json_auto_t *array = v->json ? json_array () : NULL;
  int status = STATUS_DONE;
  struct copying progress;
  struct error err;

  (void) cmd;
  copying_init (&progress, false, true);
  progress.quiet = true;
  for (char **path = args; *path; path++) {
    struct archive_totals totals;
    int r = archive_check (*path, &progress, &totals, &err);

    if (r == -1 && err.errnum == ECANCELED && progress.interrupted)
      return STATUS_CANCELLED;
    verified (*path, r, &totals, &err, array);
    if (r == -1)
      status = STATUS_FAILED;
  }
  if (v->chain && status == STATUS_DONE && verify_chain (args, array) == -1)
    status = STATUS_FAILED;
  if (array)
    print_json (array);
  return output_finish () == 0 ? status : STATUS_FAILED;
}

/* ---- merge ---- */

/* The parent of the first, all else of the last. */
static int
merged_head (const struct chain *c, struct archive_head *head,
             struct error *err)
{
  if (archive_head_copy (head, archive_get_head (c->readers[c->nr - 1]),
                         err) == -1)
    return -1;
  head->parent = archive_get_head (c->readers[0])->parent;
  uuid_new (&head->id);
  free (head->tool);
  head->tool = strdup ("nbdferry " PACKAGE_VERSION);
  return 0;
}

static int
write_pieces (struct archive_merge *m, struct archive_appender *a,
              struct copying *progress, struct error *err)
{
  struct merge_piece p;
  int n;

  while ((n = archive_merge_next (m, &p, err)) == 1) {
    if (archive_append (a, p.offset, p.length, p.type, p.data, err) == -1)
      return -1;
    if (copying_interrupted (progress))
      return error_set (err, ECANCELED, "interrupted");
    copying_show (progress, p.offset + p.length);
  }
  return n == -1 ? -1 : archive_append_end (a, err);
}

static int
merge_into (struct chain *c, int fd, const char *name,
            const struct pack_compression *compression,
            struct copying *progress, struct error *err)
{
  struct archive_appender a = { .number = 1, .compression = *compression };
  struct archive_merge *m = archive_merge_open (c->readers, c->nr, err);
  struct archive_head head = { 0 };
  int r = -1;

  if (m && merged_head (c, &head, err) == 0 && pack_init (&a.pack, err) == 0) {
    copying_begin (progress, head.disk, head.size);
    a.id = &head.id;
    a.writer = archive_writer_open (fd, name, &head, err);
    if (a.writer)
      r = write_pieces (m, &a, progress, err);
    copying_break (progress);
  }
  archive_writer_free (a.writer);
  pack_destroy (&a.pack);
  archive_head_free (&head);
  archive_merge_free (m);
  return r;
}

/* Nothing of it is used before all of it was found right. */
static int
check_all (char *const *paths, size_t nr, struct copying *progress,
           struct error *err)
{
  for (size_t i = 0; i < nr; i++)
    if (archive_check (paths[i], progress, NULL, err) == -1)
      return -1;
  return 0;
}

static int
archive_merge_run (const struct command *cmd, char **args, void *values)
{
  const struct archive_values *v = values;
  struct pack_compression compression = {
    .how = MIGRATE_COMPRESSION_ZSTD,
  };
  size_t nr = count (args) - 1;
  struct partial out = PARTIAL_NONE;
  struct copying progress;
  struct chain chain = { 0 };
  struct error err;
  int r = -1;

  (void) cmd;
  if (v->has_compression)
    compression = v->compression;
  copying_init (&progress, false, true);
  progress.quiet = true;
  if (chain_open (&chain, args, nr, &err) == 0 &&
      partial_open (&out, args[nr], v->force, &err) == 0 &&
      check_all (args, nr, &progress, &err) == 0 &&
      merge_into (&chain, out.fd, args[nr], &compression, &progress, &err) ==
        0)
    r = partial_commit (&out, &err);
  partial_drop (&out);
  chain_close (&chain);
  if (r == 0)
    return STATUS_DONE;
  complain ("%s", err.msg);
  return progress.interrupted ? STATUS_CANCELLED : STATUS_FAILED;
}

/* ---- the commands ---- */

#define JSON_HELP "  --json             print JSON\n"
#define HELP_HELP "  -h, --help         print this help\n"

static const struct option list_options[] = {
  { "help", no_argument, NULL, 'h' },
  { "json", no_argument, NULL, OPT_JSON },
  { 0 },
};

static const struct option verify_options[] = {
  { "help", no_argument, NULL, 'h' },
  { "json", no_argument, NULL, OPT_JSON },
  { "chain", no_argument, NULL, OPT_CHAIN },
  { 0 },
};

static const struct option merge_options[] = {
  { "help", no_argument, NULL, 'h' },
  { "compression", required_argument, NULL, OPT_COMPRESSION },
  { "force", no_argument, NULL, OPT_FORCE },
  { 0 },
};

static const struct command list_command = {
  .name = "list",
  .full_name = "nbdferry archive list",
  .synopsis = "FILE|FOLDER... [OPTION]...",
  .summary = "List archives, and which builds upon which.",
  .help =
    "Of a FOLDER, all archives in it.  They are sorted by disk and time.\n"
    "\n"
    "Options:\n"
    JSON_HELP
    HELP_HELP,
  .min_args = 1,
  .max_args = -1,
  .run = archive_list_run,
  .options = list_options,
  .option = archive_option,
  .values_size = sizeof (struct archive_values),
  .json_result = true,
};

static const struct command info_command = {
  .name = "info",
  .full_name = "nbdferry archive info",
  .synopsis = "FILE... [OPTION]...",
  .summary = "Say what archives hold, as they say themselves.",
  .help =
    "Options:\n"
    JSON_HELP
    HELP_HELP,
  .min_args = 1,
  .max_args = -1,
  .run = archive_info_run,
  .options = list_options,
  .option = archive_option,
  .values_size = sizeof (struct archive_values),
  .json_result = true,
};

static const struct command verify_command = {
  .name = "verify",
  .full_name = "nbdferry archive verify",
  .synopsis = "FILE... [OPTION]...",
  .summary = "Read all of each archive, and check every checksum.",
  .help =
    "FILE - is standard input.\n"
    "\n"
    "Options:\n"
    "  --chain            they must also follow one another in this order\n"
    JSON_HELP
    HELP_HELP,
  .min_args = 1,
  .max_args = -1,
  .run = archive_verify_run,
  .options = verify_options,
  .option = archive_option,
  .values_size = sizeof (struct archive_values),
  .json_result = true,
};

static const struct command merge_command = {
  .name = "merge",
  .full_name = "nbdferry archive merge",
  .synopsis = "FILE... OUT [OPTION]...",
  .summary = "Make one archive of several that follow one another.",
  .help =
    "OUT builds upon what the first builds upon, and leads to where the last\n"
    "leads to.  The FILEs are not touched.  OUT - is standard output.\n"
    "\n"
    "Options:\n"
    "  --compression METHOD  none, zlib[:1-9] or zstd[:1-19] (default: zstd)\n"
    "  --force            replace OUT if it exists\n"
    HELP_HELP,
  .min_args = 2,
  .max_args = -1,
  .run = archive_merge_run,
  .options = merge_options,
  .option = archive_option,
  .values_size = sizeof (struct archive_values),
};

static const struct command *const group[] = {
  &list_command, &info_command, &verify_command, &merge_command, NULL,
};

const struct command archive_command = {
  .name = "archive",
  .full_name = "nbdferry archive",
  .synopsis = "COMMAND FILE...",
  .summary = "List, describe, check and merge archives of backups.",
  .help =
    "'nbdferry archive COMMAND --help' says more.\n",
  .group = group,
};
