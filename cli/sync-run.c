/* nbdferry - nbdferry sync: a run, once it has begun
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The order is what makes it safe (sync-record.h): the record says that a run
 * is on its way before the standby is touched; what is to be found there
 * afterwards is recorded when all of it is durable; and only then does the
 * bitmap begin anew.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "compare.h"
#include "remote.h"
#include "size.h"
#include "sync.h"

bool
sync_is_needed (void *job, uint64_t offset, uint64_t len)
{
  struct sync_job *s = job;
  const uint64_t end = offset + len < s->size ? offset + len : s->size;

  if (s->mode != SYNC_INCREMENTAL)
    return true;
  while (offset < end) {
    struct extent ext;

    if (s->view->ops->extent (s->view, offset, end, &ext) == -1 ||
        ext.type != EXTENT_HOLE)
      return true;
    offset = ext.end;
  }
  return false;
}

int
sync_keep_record (struct sync_job *s, struct error *err)
{
  json_t *record, *answer;

  if (s->opt->bitmap == NULL)
    return 0;
  record = sync_record_to_json (&s->record);
  answer = control_command (s->control, "x-ferry-sync-record",
                            json_pack ("{s:s, s:s, s:o}", "node", s->node,
                                       "name", s->opt->bitmap, "record",
                                       record), err);
  json_decref (answer);
  return answer ? 0 : -1;
}

int
sync_check_standby (struct sync_job *s, bool on_the_way, struct error *err)
{
  uint64_t offset = 0;
  int r = sync_samples_check (&s->known, s->target,
                              on_the_way ? sync_is_needed : NULL, s, &offset);

  if (r == 1)
    return 0;
  if (r == -1)
    return error_set (err, errno, "%s: read at %" PRIu64 ": %m", s->standby,
                      offset);
  return error_set (err, EINVAL, "%s: is not as it was left: what is at %"
                    PRIu64 " has changed.  It was written by somebody else, "
                    "was rolled back, or is another disk.  --compare sends "
                    "what differs and goes on from there, --full sends "
                    "everything", s->standby, offset);
}

/* ---- callbacks of the long work ---- */

static void
progress (void *opaque, uint64_t done)
{
  struct sync_job *s = opaque;

  if (s->opt->stop && stop_wait (s->opt->stop, 0)) {
    remote_stop (s->view);
    if (s->is_uri)
      remote_stop (s->target);
  }
  meter_show (&s->meter, s->doing, done, s->total);
}

static void
compare_progress (void *opaque, uint64_t done, uint64_t total)
{
  struct sync_job *s = opaque;

  meter_show (&s->meter, "compare", done, total);
}

/* The daemon need not keep that any longer, whatever is written to the disk. */
static void
confirmed (void *opaque, uint64_t end)
{
  struct sync_job *s = opaque;
  char id[UUID_TEXT];

  uuid_format (&s->point, id);
  control_set_limit (s->control, NS_PER_S); /* it may also be left out */
  json_decref (control_command (
    s->control, "x-ferry-backup-release",
    json_pack ("{s:s, s:s, s:I, s:I}", "node", s->node, "id", id, "offset",
               (json_int_t) s->released, "length",
               (json_int_t) (end - s->released)), NULL));
  control_set_limit (s->control, UINT64_MAX);
  s->released = end;
}

/* The standby was lost, and is there again: is it still the same? */
static int
again (void *opaque, struct error *err)
{
  return sync_check_standby (opaque, true, err);
}

/* ---- comparing ---- */

static int
compare (struct sync_job *s, struct bitmap *differs, struct error *err)
{
  struct compare_options opt = { .threads = s->opt->connections,
                                 .stop = s->opt->stop,
                                 .progress = compare_progress, .opaque = s };
  const uint64_t block = bitmap_granularity (differs);
  struct side a, b;
  int r = -1;

  if (side_of_disk (&a, s->view_uri, s->view, block, s->opt->stop, err) == -1)
    return -1;
  if (side_of_disk (&b, s->standby, s->target, block, s->opt->stop,
                    err) == 0) {
    r = compare_sides (&a, &b, differs, &opt, err);
    side_close (&b);
  }
  side_close (&a);
  meter_clear (&s->meter);
  s->compared = s->size;
  s->differing = bitmap_count (differs);
  if (s->differing > s->size)
    s->differing = s->size;
  return r;
}

/* Where nothing was written something must be known all the same, so that the
 * standby can be recognised.
 */
static int
sample_view (struct sync_job *s, struct error *err)
{
  CLEANUP_FREE char *buf = malloc (SYNC_SAMPLE_MAX);
  struct sync_samples *to = &s->known;

  if (buf == NULL)
    return error_set (err, ENOMEM, "%m");
  while (s->size > 0 && to->nr < SYNC_SAMPLES) {
    uint64_t offset, len;
    struct uuid u;

    uuid_new (&u);
    memcpy (&offset, u.b, sizeof offset);
    offset = offset % s->size & -(uint64_t) SYNC_SAMPLE_MAX;
    len = s->size - offset < SYNC_SAMPLE_MAX ? s->size - offset
                                             : SYNC_SAMPLE_MAX;
    if (s->view->ops->pread (s->view, buf, len, offset) == -1)
      return error_set (err, errno, "reading the backup at %" PRIu64 ": %m",
                        offset);
    to->sample[to->nr++] = (struct sync_sample){
      .offset = offset, .len = len, .hash = sync_sample_hash (buf, len),
    };
  }
  return 0;
}

/* ---- copying ---- */

static bool
was_written (void *written, uint64_t offset, uint64_t len)
{
  struct range run;

  return bitmap_next_dirty (written, offset, offset + len, &run);
}

static int
copy (struct sync_job *s, const struct bitmap *only, struct bitmap *written,
      struct error *err)
{
  struct sync_copy_options opt = {
    .source = s->view, .target = s->target, .target_name = s->standby,
    .full = s->mode != SYNC_INCREMENTAL, .only = only, .written = written,
    .threads = s->opt->connections,
    .patience_ms = s->is_uri ? s->opt->patience_ms : 0,
    .stop = s->opt->stop, .progress = progress, .confirmed = confirmed,
    .again = again, .opaque = s,
  };

  s->doing = "sync";
  s->total = s->mode == SYNC_FULL ? s->size
             : s->mode == SYNC_COMPARE ? s->differing : s->needed;
  if (sync_copy (&opt, &s->copied, err) == -1)
    return -1;
  meter_clear (&s->meter);
  sync_samples_merge (&s->record.at_to, &s->known, was_written, written,
                      &s->copied.sampler);
  return 0;
}

static int
compare_and_copy (struct sync_job *s, struct bitmap *written,
                  struct error *err)
{
  struct bitmap *differs;
  int r;

  if (s->mode != SYNC_COMPARE)
    return copy (s, NULL, written, err);
  differs = bitmap_new (s->size, __builtin_ctz (HASH_BLOCK_DEFAULT), err);
  if (differs == NULL)
    return -1;
  r = compare (s, differs, err);
  if (r == 0)
    r = sample_view (s, err);
  if (r == 0)
    r = copy (s, differs, written, err);
  bitmap_free (differs);
  return r;
}

/* ---- the run ---- */

static int
end (struct sync_job *s, bool success, struct error *err)
{
  char id[UUID_TEXT];
  json_t *answer;

  uuid_format (&s->point, id);
  answer = control_command (s->control, "x-ferry-backup-end",
                            json_pack ("{s:s, s:s, s:b}", "node", s->node,
                                       "id", id, "success", success), err);
  json_decref (answer);
  if (answer == NULL)
    return -1;
  s->begun = false;
  return 0;
}

/* On the way from here on.  A full copy starts from nowhere. */
static int
record_begin (struct sync_job *s, struct error *err)
{
  s->record = (struct sync_record){
    .standby = strdup (s->standby), .size = s->target->size, .to = s->point,
  };
  if (s->record.standby == NULL)
    return error_set (err, ENOMEM, "%m");
  if (s->mode == SYNC_INCREMENTAL) {
    s->record.from = s->parent;
    s->record.at_from = s->known;
  }
  return sync_keep_record (s, err);
}

int
sync_run (struct sync_job *s, struct error *err)
{
  struct bitmap *written;
  int r;

  meter_init (&s->meter);
  if (sync_check_standby (s, s->on_the_way, err) == -1 ||
      record_begin (s, err) == -1)
    return -1;
  s->recorded = true;
  written = bitmap_new (s->size, BITMAP_MIN_SHIFT + 3, err);
  if (written == NULL)
    return -1;
  r = compare_and_copy (s, written, err);
  meter_clear (&s->meter);
  bitmap_free (written);
  if (r == -1 || sync_keep_record (s, err) == -1)
    return -1;
  return end (s, true, err);
}

/* A bitmap that this run has made stays, to be gone on with, once that is
 * recorded.  Before, nothing was sent, and nobody has any use for it.
 */
static void
give_up (struct sync_job *s)
{
  control_set_limit (s->control, 5 * NS_PER_S);
  if (end (s, false, NULL) == 0 && s->create && !s->recorded)
    json_decref (control_command (
      s->control, "block-dirty-bitmap-remove",
      json_pack ("{s:s, s:s}", "node", s->node, "name", s->opt->bitmap),
      NULL));
}

void
sync_close (struct sync_job *s)
{
  if (s->begun)
    give_up (s);
  if (s->view)
    s->view->ops->close (s->view);
  if (s->target)
    s->target->ops->close (s->target);
  control_close (s->control);
  sync_record_free (&s->record);
  free (s->view_uri);
  free (s->standby);
  free (s->node);
}
