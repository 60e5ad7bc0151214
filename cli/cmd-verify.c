/* nbdferry - nbdferry verify
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Needs no daemon: it is a client of whatever holds the two disks.
 */
#include <config.h>

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "cleanup.h"
#include "command.h"
#include "compare.h"
#include "interrupt.h"
#include "meter.h"
#include "output.h"
#include "remote.h"
#include "size.h"

/* As cmp and diff have it. */
enum { STATUS_SAME = 0, STATUS_DIFFERENT = 1, STATUS_TROUBLE = 2 };

#define SOME 20 /* ranges that are shown without --all */
#define MAX_CONNECTIONS 64

enum { OPT_BLOCK_SIZE = 256, OPT_CONNECTIONS, OPT_ALL, OPT_JSON };

struct verify_values {
  uint64_t block, connections; /* 0: not given */
  bool all, json;
};

struct verify {
  const struct verify_values *values;
  struct side a, b;
  struct bitmap *differs;
  struct meter meter;
  const struct stop *stop;
};

static int
verify_option (const struct command *cmd, int c, const char *arg, void *values)
{
  struct verify_values *v = values;

  switch (c) {
  case OPT_ALL: v->all = true; break;
  case OPT_JSON: v->json = true; break;
  case OPT_BLOCK_SIZE:
    if (size_parse (arg, &v->block) == -1 ||
        hash_block_ok (v->block, NULL) == -1)
      return usage_error (cmd, "--block-size: '%s' is not a power of two from "
                          "4K to 64M", arg);
    break;
  case OPT_CONNECTIONS:
    if (number_parse (arg, &v->connections) == -1 || v->connections < 1 ||
        v->connections > MAX_CONNECTIONS)
      return usage_error (cmd, "--connections: '%s' is not a number from 1 to "
                          "%d", arg, MAX_CONNECTIONS);
    break;
  }
  return -1;
}

/* Whoever reads there may wait for long. */
static void
stop_side (const struct side *s)
{
  if (s->is_uri && s->disk)
    remote_stop (s->disk);
}

static void
progress (void *opaque, uint64_t done, uint64_t total)
{
  struct verify *v = opaque;

  if (stop_wait (v->stop, 0)) {
    stop_side (&v->a);
    stop_side (&v->b);
  }
  meter_show (&v->meter, "verify", done, total);
}

static const char *
method (const struct side *s)
{
  return s->archive ? "archive"
         : s->by_hash ? "hashes" : s->is_uri ? "data" : "file";
}

/* What both have, or only the longer one. */
static uint64_t
shorter (const struct verify *v)
{
  return v->a.size < v->b.size ? v->a.size : v->b.size;
}

static json_t *
describe_side (const struct side *s)
{
  CLEANUP_FREE char *where = text_printable (s->where); /* it may be no UTF-8 */

  return json_pack ("{s:s, s:I, s:s}", "disk", where, "size",
                    (json_int_t) s->size, "read-as", method (s));
}

/* Every range, or the first few of them; how many bytes there are in all. */
static uint64_t
each_range (const struct verify *v, json_t *list, uint64_t *nr)
{
  struct range run = { 0, 0 };
  uint64_t bytes = 0;
  char text[SIZE_TEXT];

  *nr = 0;
  while (bitmap_next_dirty (v->differs, run.end, shorter (v), &run)) {
    uint64_t len = run.end - run.start;

    bytes += len;
    if (++*nr > SOME && !v->values->all)
      continue;
    if (list)
      json_array_append_new (list,
        json_pack ("{s:I, s:I}", "offset", (json_int_t) run.start, "length",
                   (json_int_t) len));
    else
      printf ("offset %" PRIu64 " length %" PRIu64 " (%s) differs\n",
              run.start, len, size_format (len, text));
  }
  return bytes;
}

static void
print_result_json (const struct verify *v, bool same)
{
  json_t *list = json_array ();
  uint64_t nr, bytes = each_range (v, list, &nr);
  json_auto_t *json =
    json_pack ("{s:b, s:o, s:o, s:I, s:I, s:I, s:I, s:o}", "same", same,
               "a", describe_side (&v->a), "b", describe_side (&v->b),
               "block-size", (json_int_t) v->a.block,
               "compared", (json_int_t) shorter (v),
               "differing", (json_int_t) bytes,
               "differing-ranges", (json_int_t) nr, "ranges", list);

  print_json (json);
}

static void
print_result (const struct verify *v, bool same)
{
  char text[SIZE_TEXT], size[SIZE_TEXT];
  uint64_t nr, bytes;

  if (same) {
    printf ("The same: %s in blocks of %s.\n",
            size_format (v->a.size, size), size_format (v->a.block, text));
    return;
  }
  bytes = each_range (v, NULL, &nr);
  if (nr > SOME && !v->values->all)
    printf ("and %" PRIu64 " more ranges (--all shows them)\n", nr - SOME);
  if (v->a.size != v->b.size)
    printf ("The sizes differ: %" PRIu64 " and %" PRIu64 " bytes; compared is "
            "what both have.\n", v->a.size, v->b.size);
  printf ("Different: %s of %s in %" PRIu64 " ranges, in blocks of %s.\n",
          size_format (bytes, text), size_format (shorter (v), size), nr,
          size_format (v->a.block, (char[SIZE_TEXT]){ 0 }));
}

static unsigned
connections (const struct verify_values *v)
{
  return v->connections ? v->connections : 4;
}

static int
verify (struct verify *v, struct error *err)
{
  struct compare_options opt = {
    .threads = connections (v->values),
    .stop = v->stop,
    .progress = progress,
    .opaque = v,
  };
  int r;

  v->differs = bitmap_new (shorter (v), __builtin_ctzll (v->a.block), err);
  if (v->differs == NULL)
    return -1;
  r = compare_sides (&v->a, &v->b, v->differs, &opt, err);
  meter_clear (&v->meter);
  if (v->a.archive || v->b.archive) /* that error says more */
    r |= side_finish (&v->a, err) | side_finish (&v->b, err);
  return r;
}

static int
verify_run (const struct command *cmd, char **args, void *values)
{
  struct verify v = { .values = values };
  uint64_t block = v.values->block ? v.values->block : HASH_BLOCK_DEFAULT;
  struct error err = { 0 };
  int status = STATUS_TROUBLE;

  (void) cmd;
  meter_init (&v.meter);
  v.stop = interrupt_catch (&err);
  if (v.stop &&
      side_open (&v.a, args[0], block, connections (values), v.stop,
                 &err) == 0 &&
      side_open (&v.b, args[1], block, connections (values), v.stop,
                 &err) == 0 &&
      verify (&v, &err) == 0) {
    bool same = v.a.size == v.b.size && bitmap_count_bits (v.differs) == 0;

    if (v.values->json)
      print_result_json (&v, same);
    else
      print_result (&v, same);
    if (output_finish () == 0)
      status = same ? STATUS_SAME : STATUS_DIFFERENT;
  }
  else if (v.stop && stop_wait (v.stop, 0))
    status = STATUS_CANCELLED;
  else
    complain ("%s", err.msg);
  bitmap_free (v.differs);
  side_close (&v.a);
  side_close (&v.b);
  return status;
}

static const struct option verify_options[] = {
  { "help", no_argument, NULL, 'h' },
  { "block-size", required_argument, NULL, OPT_BLOCK_SIZE },
  { "connections", required_argument, NULL, OPT_CONNECTIONS },
  { "all", no_argument, NULL, OPT_ALL },
  { "json", no_argument, NULL, OPT_JSON },
  { 0 },
};

const struct command verify_disks_command = {
  .name = "verify",
  .full_name = "nbdferry verify",
  .synopsis = "A B [OPTION]...",
  .summary = "Compare two disks by hashes.",
  .help =
    "A and B are raw files, block devices, NBD URIs, or archives of backups: a\n"
    "full one, or FULL,INCREMENTAL,... in the order in which they were made.\n"
    "An 'nbdkit ferry' daemon computes the hashes of its disks itself, so that\n"
    "no data moves.\n"
    "The exit status is 0 if both are the same, 1 if they differ, and 2 if\n"
    "that could not be found out.\n"
    "\n"
    "Options:\n"
    "  --block-size SIZE  of what is hashed, a power of two from 4K to 64M\n"
    "                     (default: 64K)\n"
    "  --connections N    to each server (default: 4)\n"
    "  --all              show all ranges that differ, not only some\n"
    "  --json             print JSON\n"
    "  -h, --help         print this help\n",
  .min_args = 2,
  .max_args = 2,
  .run = verify_run,
  .options = verify_options,
  .option = verify_option,
  .values_size = sizeof (struct verify_values),
  .json_result = true,
};
