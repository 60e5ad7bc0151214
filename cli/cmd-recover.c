/* nbdferry - nbdferry recover
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What a daemon does when it opens a disk after a crash and is told to end at
 * once, without the daemon.
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "absolute.h"
#include "cleanup.h"
#include "command.h"
#include "drive.h"
#include "output.h"
#include "size.h"

enum { OPT_STATE = 256, OPT_JSON };

struct recover_values {
  const char *state;
  bool json;
};

/* A bitmap as it was found. */
struct before {
  char *name;
  bool in_use, inconsistent;
  uint64_t bits, nr_bits; /* set, and all of them */
  unsigned shift;
};

struct found {
  struct before *list;
  size_t nr;
};

/* ---- before ---- */

static int
note_bitmap (void *opaque, const struct qcow2_entry *entry, uint64_t size,
             struct error *err)
{
  struct found *f = opaque;
  struct before *p = reallocarray (f->list, f->nr + 1, sizeof *p);

  if (p == NULL)
    return error_set (err, ENOMEM, "%m");
  f->list = p;
  p += f->nr;
  *p = (struct before){ .name = strdup (entry->name), .in_use = entry->in_use,
                        .inconsistent = entry->inconsistent,
                        .nr_bits = bitmap_bits_for (size, entry->shift),
                        .shift = entry->shift };
  if (p->name == NULL)
    return error_set (err, ENOMEM, "%m");
  f->nr++;
  return 0;
}

static int
count_words (void *opaque, uint64_t first_bit, const uint64_t *words,
             size_t nr, struct error *err)
{
  struct found *f = opaque;
  struct before *b = &f->list[f->nr - 1];

  (void) err;
  for (size_t i = 0; i < nr && first_bit + i * 64 < b->nr_bits; i++) {
    uint64_t left = b->nr_bits - (first_bit + i * 64), w = words[i];

    if (left < 64)
      w &= (UINT64_C (1) << left) - 1;
    b->bits += __builtin_popcountll (w);
  }
  return 0;
}

/* Only to tell what has changed: if it cannot be read, opening it will say
 * why.
 */
static void
look (struct found *f, const char *sidecar)
{
  static const struct qcow2_reader reader = { note_bitmap, count_words };
  CLEANUP_CLOSE int fd = open (sidecar, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  struct error ignored;

  if (fd >= 0)
    qcow2_read_bitmaps (fd, sidecar, &reader, f, &ignored);
}

static void
forget (struct found *f)
{
  for (size_t i = 0; i < f->nr; i++)
    free (f->list[i].name);
  free (f->list);
}

static const struct before *
find (const struct found *f, const char *name)
{
  for (size_t i = 0; i < f->nr; i++)
    if (strcmp (f->list[i].name, name) == 0)
      return &f->list[i];
  return NULL;
}

/* ---- after ---- */

/* A path may be anything. */
static json_t *
json_text (const char *text)
{
  CLEANUP_FREE char *printable = text_printable (text);

  return json_string (text_is_utf8 (text) ? text : printable);
}

/* What has become of a bitmap. */
static const char *
result_of (const struct named_bitmap *nb, const struct before *b)
{
  if (nb->inconsistent)
    return b && b->inconsistent ? "inconsistent" : "given-up";
  if (b && bitmap_count_bits (nb->bits) > b->bits)
    return "widened";
  return "kept";
}

static json_t *
describe_bitmap (const struct named_bitmap *nb, const struct before *b)
{
  json_t *json =
    json_pack ("{s:s, s:s, s:I, s:b, s:I}", "name", nb->name,
               "result", result_of (nb, b),
               "granularity", (json_int_t) 1 << nb->shift,
               "recording", nb->recording,
               "count", nb->bits ? (json_int_t) bitmap_count (nb->bits) : 0);

  if (b && !b->inconsistent)
    json_object_set_new (json, "count-before",
                         json_integer (b->bits << b->shift));
  if (nb->reason)
    json_object_set_new (json, "reason", json_text (nb->reason->text));
  return json;
}

static json_t *
describe (const struct drive *d, const struct found *f, bool unclean)
{
  json_t *list = json_array ();

  for (size_t i = 0; i < d->nr_bitmaps; i++) {
    const struct named_bitmap *nb = d->bitmaps[i];

    json_array_append_new (list, describe_bitmap (nb, find (f, nb->name)));
  }
  return json_pack ("{s:o, s:o, s:b, s:o}", "disk", json_text (d->path),
                    "sidecar", json_text (d->sidecar), "unclean", unclean,
                    "bitmaps", list);
}

static void
print_bitmap (const json_t *json)
{
  const char *result =
    json_string_value (json_object_get (json, "result"));
  const char *reason =
    json_string_value (json_object_get (json, "reason"));
  const json_t *before = json_object_get (json, "count-before");
  CLEANUP_FREE char *name = text_printable (
    json_string_value (json_object_get (json, "name")));
  CLEANUP_FREE char *why = reason ? text_printable (reason) : NULL;
  char count[SIZE_TEXT], was[SIZE_TEXT];

  size_format (json_integer_value (json_object_get (json, "count")), count);
  if (strcmp (result, "kept") == 0)
    printf ("  %s: kept, %s dirty", name, count);
  else if (strcmp (result, "widened") == 0)
    printf ("  %s: widened, from %s to %s dirty", name,
            size_format (json_integer_value (before), was), count);
  else
    printf ("  %s: %s, can only be removed", name,
            strcmp (result, "given-up") == 0 ? "given up" : "inconsistent");
  printf ("%s%s\n", why ? "; " : "", why ? why : "");
}

static void
print_result (const json_t *json)
{
  CLEANUP_FREE char *path = text_printable (
    json_string_value (json_object_get (json, "disk")));
  const json_t *list = json_object_get (json, "bitmaps"), *bitmap;
  size_t i;

  printf ("%s: %s\n", path, json_is_true (json_object_get (json, "unclean"))
          ? "was left in use, and is closed in good order now"
          : "had been closed in good order; nothing to repair");
  if (json_array_size (list) == 0)
    printf ("  no bitmaps\n");
  json_array_foreach ((json_t *) list, i, bitmap)
    print_bitmap (bitmap);
}

/* ---- the work ---- */

/* Opening would make what is missing, and a destination active. */
static int
check_state (const char *state_dir, bool *clean, struct error *err)
{
  CLEANUP_FREE char *journal = NULL, *sidecar = NULL;
  struct journal_record rec;
  enum journal_state state;

  if (asprintf (&journal, "%s/journal", state_dir) == -1 ||
      asprintf (&sidecar, "%s/bitmaps.qcow2", state_dir) == -1)
    return error_set (err, ENOMEM, "%m");
  if (access (sidecar, F_OK) == -1)
    return error_set (err, errno, "%s: %m; there is nothing to recover",
                      sidecar);
  if (access (journal, F_OK) == -1) /* lost; opening makes a new one */
    return 0;
  if (journal_read (journal, &rec, err) == -1)
    return -1;
  state = rec.state;
  *clean = rec.clean;
  journal_record_free (&rec);
  if (state == JOURNAL_INCOMING || state == JOURNAL_PREPARED)
    return error_set (err, EPERM, "%s: the disk is the destination of a "
                      "migration that has not completed; start its daemon "
                      "again, with incoming=on", state_dir);
  if (state == JOURNAL_GONE)
    return error_set (err, EPERM, "%s: the disk was handed over to another "
                      "server; its bitmaps are there", state_dir);
  return 0;
}

static json_t *
recover (const char *disk, const char *state_dir, struct error *err)
{
  const struct drive_options opt = { .name = "disk", .path = disk,
                                     .state_dir = state_dir };
  CLEANUP_FREE char *sidecar = NULL;
  struct found found = { 0 };
  struct drive *d = NULL;
  json_t *json = NULL;
  bool unclean, clean = false;

  if (check_state (state_dir, &clean, err) == -1)
    return NULL;
  if (asprintf (&sidecar, "%s/bitmaps.qcow2", state_dir) == -1) {
    sidecar = NULL;
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  look (&found, sidecar);
  unclean = !clean;
  for (size_t i = 0; i < found.nr; i++)
    unclean |= found.list[i].in_use && !found.list[i].inconsistent;
  d = drive_open (&opt, err);
  if (d == NULL)
    goto out;
  if (d->store == NULL)
    error_set (err, EROFS, "%s: cannot be written, so nothing was done", disk);
  else if (d->mode != DRIVE_ACTIVE)
    error_set (err, EPERM, "%s: is not active here (%s); its bitmaps were "
               "left alone", disk, drive_mode_name (d->mode));
  else {
    json = describe (d, &found, unclean);
    if (drive_shutdown (d, err) == -1) {
      json_decref (json);
      json = NULL;
    }
  }

 out:
  drive_free (d);
  forget (&found);
  return json;
}

static int
run_recover (const struct command *cmd, char **args, void *values)
{
  const struct recover_values *v = values;
  struct error err = { 0 };
  CLEANUP_FREE char *disk = absolute_path (args[0], &err), *state = NULL;
  json_auto_t *json = NULL;

  (void) cmd;
  if (v->state)
    state = absolute_path (v->state, &err);
  else if (disk && asprintf (&state, "%s.ferry", disk) == -1) {
    state = NULL;
    error_set (&err, ENOMEM, "%m");
  }
  if (disk && state)
    json = recover (disk, state, &err);
  if (json == NULL) {
    complain ("%s", err.msg);
    return STATUS_FAILED;
  }
  if (v->json)
    print_json (json);
  else
    print_result (json);
  return output_finish () == 0 ? STATUS_DONE : STATUS_FAILED;
}

static int
recover_option (const struct command *cmd, int c, const char *arg,
                void *values)
{
  struct recover_values *v = values;

  (void) cmd;
  if (c == OPT_STATE)
    v->state = arg;
  else
    v->json = true;
  return -1;
}

static const struct option recover_options[] = {
  { "help", no_argument, NULL, 'h' },
  { "state", required_argument, NULL, OPT_STATE },
  { "json", no_argument, NULL, OPT_JSON },
  { 0 },
};

const struct command recover_command = {
  .name = "recover",
  .full_name = "nbdferry recover",
  .synopsis = "DISK [OPTION]...",
  .summary = "Repair the bitmaps of a disk after a crash, without serving it.",
  .help =
    "DISK is the raw file or block device, which no daemon has open.  After\n"
    "this QEMU can open its bitmaps.\n"
    "\n"
    "Options:\n"
    "  --state DIR        the state directory (default: DISK.ferry)\n"
    "  --json             print what was done as JSON\n"
    "  -h, --help         print this help\n",
  .min_args = 1,
  .max_args = 1,
  .run = run_recover,
  .options = recover_options,
  .option = recover_option,
  .values_size = sizeof (struct recover_values),
  .json_result = true,
};
