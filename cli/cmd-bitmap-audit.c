/* nbdferry - nbdferry bitmap audit
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The daemon compares a piece at a time, so that no command takes long, and
 * so that the ranges it finds fit into a reply however many they are.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "absolute.h"
#include "cleanup.h"
#include "cmd-bitmap.h"
#include "output.h"
#include "size.h"

#define PIECE (UINT64_C (256) << 20)

struct audit {
  const char *name, *reference, *node;
  bool json, progress;
  /* So far, in bytes. */
  uint64_t size, reference_size, granularity;
  uint64_t dirty, over_marked, differing, missed;
  bool recording;
  json_t *ranges;             /* for --json */
  uint64_t start, end;        /* the last range, not yet shown: it may go on
                                 in the next piece; empty at first */
};

static uint64_t
number (const json_t *json, const char *key)
{
  return json_integer_value (json_object_get (json, key));
}

static void
clear_progress (const struct audit *a)
{
  if (a->progress)
    fputs ("\r\033[K", stderr);
}

static void
flush_range (struct audit *a)
{
  char text[SIZE_TEXT];

  if (a->start == a->end)
    return;
  clear_progress (a);
  if (a->json)
    json_array_append_new (a->ranges,
      json_pack ("{s:I, s:I}", "offset", (json_int_t) a->start, "length",
                 (json_int_t) (a->end - a->start)));
  else
    printf ("offset %" PRIu64 " length %" PRIu64 " (%s) differs, and is not "
            "marked\n", a->start, a->end - a->start,
            size_format (a->end - a->start, text));
}

static void
add_range (struct audit *a, uint64_t start, uint64_t len)
{
  if (start != a->end || a->start == a->end) {
    flush_range (a);
    a->start = start;
  }
  a->end = start + len;
}

/* What the daemon found in a piece.  -1 if it makes no sense. */
static int
take (struct audit *a, uint64_t from, const json_t *result, struct error *err)
{
  const json_t *range;
  size_t i;

  a->size = number (result, "size");
  if (number (result, "next") > a->size ||
      (number (result, "next") <= from && from < a->size))
    return error_set (err, EPROTO, "the daemon does not go on");
  a->reference_size = number (result, "reference-size");
  a->granularity = number (result, "granularity");
  a->recording = json_is_true (json_object_get (result, "recording"));
  a->dirty += number (result, "dirty");
  a->over_marked += number (result, "over-marked");
  a->differing += number (result, "differing");
  a->missed += number (result, "missed");
  json_array_foreach (json_object_get (result, "ranges"), i, range)
    add_range (a, number (range, "offset"), number (range, "length"));
  return 0;
}

static void
show_progress (const struct audit *a, uint64_t at)
{
  char done[SIZE_TEXT], all[SIZE_TEXT];

  if (a->progress && a->size > 0)
    fprintf (stderr, "\r\033[K%s of %s", size_compact (at, done),
             size_compact (a->size, all));
}

static int
run (struct control *c, struct audit *a, struct error *err)
{
  uint64_t at = 0;

  do {
    json_t *args, *result;
    int r;

    args = json_pack ("{s:s, s:s, s:I, s:I}", "name", a->name, "reference",
                      a->reference, "offset", (json_int_t) at, "length",
                      (json_int_t) PIECE);
    args = bitmap_on_disk (c, args, a->node, err);
    result = args ? control_command (c, "x-ferry-bitmap-audit", args, err)
                  : NULL;
    if (result == NULL)
      return -1;
    r = take (a, at, result, err);
    at = number (result, "next");
    json_decref (result);
    if (r == -1)
      return -1;
    show_progress (a, at);
  } while (at < a->size);
  flush_range (a);
  clear_progress (a);
  return 0;
}

static void
print_result (const struct audit *a)
{
  char differing[SIZE_TEXT], dirty[SIZE_TEXT], over[SIZE_TEXT];
  char missed[SIZE_TEXT];

  if (a->reference_size != a->size)
    printf ("The reference has %" PRIu64 " bytes and the disk %" PRIu64
            "; what the reference lacks counts as different.\n",
            a->reference_size, a->size);
  printf ("%s differ, %s are marked; %s are marked and do not differ\n",
          size_format (a->differing, differing), size_format (a->dirty, dirty),
          size_format (a->over_marked, over));
  if (a->missed == 0)
    printf ("Every difference is marked.\n");
  else
    printf ("%s differ and are not marked%s\n",
            size_format (a->missed, missed), a->recording ? "" :
            "; the bitmap is not recording");
}

static void
print_result_json (const struct audit *a)
{
  json_auto_t *json =
    json_pack ("{s:s, s:I, s:I, s:I, s:b, s:I, s:I, s:I, s:I, s:O}",
               "name", a->name, "size", (json_int_t) a->size,
               "reference-size", (json_int_t) a->reference_size,
               "granularity", (json_int_t) a->granularity,
               "recording", a->recording, "dirty", (json_int_t) a->dirty,
               "over-marked", (json_int_t) a->over_marked,
               "differing", (json_int_t) a->differing,
               "missed", (json_int_t) a->missed, "ranges", a->ranges);

  print_json (json);
}

int
bitmap_audit_run (const struct command *cmd, char **args, void *values)
{
  const struct bitmap_values *v = values;
  struct audit a = { .name = args[1], .node = v->node, .json = v->json,
                     .ranges = json_array () };
  CLEANUP_FREE char *path = NULL;
  struct error err = { 0 };
  struct control *c = NULL;
  int status = STATUS_FAILED;

  (void) cmd;
  /* Progress would be mixed up with ranges on the same terminal's lines. */
  a.progress = isatty (STDERR_FILENO);
  a.reference = args[2];
  if (strstr (args[2], "://") == NULL)
    a.reference = path = absolute_path (args[2], &err);
  if (a.reference)
    c = control_open (args[0], &err);
  if (c == NULL || run (c, &a, &err) == -1) {
    clear_progress (&a);
    complain ("%s", err.msg);
  }
  else {
    if (a.json)
      print_result_json (&a);
    else
      print_result (&a);
    if (output_finish () == 0 && a.missed == 0)
      status = STATUS_DONE;
  }
  json_decref (a.ranges);
  control_close (c);
  return status;
}
