/* nbdferry - the source of a migration: what need not be sent
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * hints=fs takes chunks out of the ship map that file systems say are free.
 * A hint must never hide a write, so the order is this:
 *
 *   1. Writes mark the ship map, in which everything is set.
 *   2. Writes also mark a map of their own, 'watch', and always before the
 *      ship map.  When drive_set_watch returns, no write is under way that
 *      does not.
 *   3. The superblock is read, then the maps.
 *   4. If 'watch' has anything in a file system's place, that is not believed:
 *      what was read may be of two times.  So a map that is believed is that
 *      of the disk as it was at 2.
 *   5. Chunks that are free are cleared from the ship map, where 'watch' has
 *      nothing.
 *   6. What 'watch' has in them now is set in the ship map again.
 *
 * A write marks watch, ship, lands, and marks watch, ship.  Its last mark of
 * the ship map comes after 5, and then the chunk is dirty; or before, and then
 * its mark of 'watch' is older still, and is seen at 6.  (All these are
 * seq_cst.)  From there on the ship map is all there is to mark.
 *
 * The bits of bitmaps travel with the chunks.  Those of chunks that were
 * cleared would not: the bitmaps are sent whole, once.
 */
#include <config.h>

#include <errno.h>
#include <string.h>

#include "cleanup.h"
#include "held.h"
#include "hints.h"
#include "outgoing-impl.h"

static bool
cancelled (void *opaque)
{
  const struct outgoing *o = opaque;

  return stop_wait (&o->cancel, 0);
}

/* Steps 5 and 6, for one free run.  Returns how many bytes were cleared. */
static uint64_t
clear_run (struct bitmap *ship, const struct bitmap *watch, struct range all)
{
  struct range run = { all.start, all.start }, late;
  uint64_t cleared = 0;

  while (bitmap_next_clean (watch, run.end, all.end, &run)) {
    bitmap_clear (ship, run.start, run.end - run.start);
    cleared += run.end - run.start;
    late.end = run.start;
    while (bitmap_next_dirty (watch, late.end, run.end, &late)) {
      bitmap_set (ship, late.start, late.end - late.start);
      cleared -= late.end - late.start;
    }
  }
  return cleared;
}

uint64_t
hints_clear (struct bitmap *ship, const struct bitmap *watch,
             const struct bitmap *vacant, struct hints_fs *fs)
{
  const uint64_t end = fs->offset + fs->size;
  struct range run = { fs->offset, fs->offset };
  uint64_t cleared = 0;

  if (!fs->known)
    return 0;
  if (bitmap_next_dirty (watch, fs->offset, end, &run)) {
    fs->known = false;
    strcpy (fs->reason, "it was written to while its maps were read");
    return 0;
  }
  run.end = fs->offset;
  while (bitmap_next_dirty (vacant, run.end, end, &run))
    cleared += clear_run (ship, watch, run);
  return cleared;
}

static void
report (json_t *list, const struct drive *d, const struct hints_fs *fs,
        uint64_t cleared)
{
  json_t *o = json_pack ("{s:s, s:I, s:I, s:s, s:s, s:I}",
                         "node", d->name, "offset", (json_int_t) fs->offset,
                         "size", (json_int_t) fs->size, "type", fs->type,
                         "state", fs->known ? "used" : "refused",
                         "cleared-bytes", (json_int_t) cleared);

  if (!fs->known)
    json_object_set_new (o, "reason", json_string (fs->reason));
  json_array_append_new (list, o);
}

/* What was cleared need not be sent after a pause either: it is taken for what
 * the destination holds, as if it had been acknowledged and flushed.  Nothing
 * has been sent yet, so all that is clean in the ship map was cleared here, and
 * the flusher has nothing to do.
 */
static void
leave_out (struct shipment *s)
{
  const uint64_t size = s->drive->size;
  struct range run;

  pthread_mutex_lock (&s->lock);
  for (uint64_t at = 0; bitmap_next_clean (s->ship, at, size, &run);
       at = run.end)
    bitmap_set_alone (s->acked, run.start, run.end - run.start);
  pthread_mutex_unlock (&s->lock);
  held_flushing (s);
  held_flushed (s);
}

/* Steps 3 to 6, with 'watch' in place. */
static int
use_hints (struct outgoing *o, struct shipment *s, struct bitmap *watch,
           struct bitmap *vacant, json_t *list)
{
  CLEANUP_FREE struct hints *h = malloc (sizeof *h);
  struct drive *d = s->drive;
  struct hints_fs none = { .size = d->size, .type = "unknown" };
  struct error err = { .errnum = ENOMEM, .msg = "there is no memory" };
  uint64_t cleared, all = 0;

  if (h == NULL ||
      hints_read (d->disk, vacant, h, cancelled, o, &err) == -1) {
    if (err.errnum == ECANCELED)
      return -1;
    snprintf (none.reason, sizeof none.reason, "%s", err.msg);
    report (list, d, &none, 0);
    return 0;
  }
  for (size_t i = 0; i < h->nr; i++) {
    cleared = hints_clear (s->ship, watch, vacant, &h->fs[i]);
    report (list, d, &h->fs[i], cleared);
    all += cleared;
  }
  if (all > 0) {
    shipment_send_whole (s);
    leave_out (s);
  }
  return 0;
}

static int
hints_for (struct outgoing *o, struct shipment *s, json_t *list,
           struct error *err)
{
  struct drive *d = s->drive;
  struct bitmap *watch, *vacant;
  int r = -1;

  watch = bitmap_new (d->size, bitmap_shift (s->ship), err);
  vacant = bitmap_new (d->size, bitmap_shift (s->ship), err);
  if (watch && vacant && drive_set_watch (d, watch, err) == 0) {
    r = use_hints (o, s, watch, vacant, list);
    drive_drop_watch (d);
    if (r == -1)
      error_set (err, ECANCELED, "cancelled");
  }
  bitmap_free (watch);
  bitmap_free (vacant);
  return r;
}

int
outgoing_use_hints (struct outgoing *o, struct error *err)
{
  json_t *list;
  int r = 0;

  if (o->params.hints == MIGRATE_HINTS_NONE)
    return 0;
  list = json_array ();
  for (size_t i = 0; r == 0 && i < o->nr; i++)
    r = hints_for (o, &o->shipments[i], list, err);
  pthread_mutex_lock (&o->lock);
  json_decref (o->hints);
  o->hints = list;
  pthread_mutex_unlock (&o->lock);
  return r;
}

json_t *
outgoing_hints (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  return o->hints ? json_deep_copy (o->hints) : NULL;
}

int
migrate_hints_parse (const char *name, enum migrate_hints *h,
                     struct error *err)
{
  if (strcmp (name, "none") == 0)
    *h = MIGRATE_HINTS_NONE;
  else if (strcmp (name, "fs") != 0)
    return error_set (err, EINVAL, "Parameter 'x-ferry-hints' does not accept "
                      "value '%s'", name);
  else if (!hints_supported ())
    return error_set (err, ENOTSUP, "Parameter 'x-ferry-hints' cannot be 'fs' "
                      "here: nbdferry was built without libext2fs");
  else
    *h = MIGRATE_HINTS_FS;
  return 0;
}
