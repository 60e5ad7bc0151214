/* nbdferry - operations on bitmaps, all or nothing
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A transaction has five parts; transaction-walk.c has the fourth.
 *
 * 1. Prepare: each action is checked against a plan of the list as the
 *    actions before it leave it.  New bitmaps are made.  Nothing that others
 *    can see has changed; an error ends here, and the plan is thrown away.
 * 2. Record: the sidecars' directories are written.  A failure puts back
 *    those that were written before it.  Before a directory can say that a
 *    bitmap does not record any more, the activity log says that armed regions
 *    concern all bitmaps: bits of that one may be in memory alone.
 * 3. The instant: the gates are shut, and what writes mark is replaced.
 * 4. Walk: merges and clears, while requests go on; first all that sets bits,
 *    then all that clears them, so that a bit which moves from one bitmap to
 *    another is never in neither, whenever we are killed.  A clear must
 *    be one as of the instant, so the bitmap gets a companion, which is marked
 *    beside it from the instant on if it records then; and every bit is
 *    cleared that the companion does not have (bitmap_retain).  Writes mark
 *    the companion first, so that a write after the instant keeps its bit, or
 *    gets it back at once; the companion is in memory that dies with the
 *    daemon, and so each block is noted before it is cleared (clear-note.h; if
 *    that cannot be, the activity log says that a clear is under way).
 * 5. Settle: bits that were merged, or of bitmaps that do not record any more,
 *    are made durable; then what the activity log says is taken back.
 *
 * Killed between 2 and 3, it is as if the instant had been the kill.  The
 * directory must not be written later: a bitmap that is on disk as recording
 * after the instant lacks what was written since.  Nor need it be written
 * twice, since the log covers what it may say too early.
 *
 * The control locks of all drives are held throughout.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "points.h"
#include "ship-map.h"
#include "transaction-impl.h"

#define MAX_PERSISTENT_NAME 1023

struct plan *
plan_of (struct transaction *t, const struct drive *d)
{
  for (size_t i = 0; i < t->nr; i++)
    if (t->drives[i] == d)
      return &t->plans[i];
  return NULL;
}

/* ---- prepare ---- */

static void
collect (struct transaction *t, struct drive *d)
{
  if (d == NULL) /* of an abort */
    return;
  for (size_t i = 0; i < t->nr; i++)
    if (t->drives[i] == d)
      return;
  t->drives[t->nr++] = d;
}

static int
collect_drives (struct transaction *t, const struct bitmap_action *actions,
                size_t nr, struct error *err)
{
  size_t most = 0;

  for (size_t i = 0; i < nr; i++)
    most += 1 + actions[i].nr_sources;
  t->drives = calloc (most ? most : 1, sizeof t->drives[0]);
  t->plans = calloc (most ? most : 1, sizeof t->plans[0]);
  if (t->drives == NULL || t->plans == NULL)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < nr; i++) {
    collect (t, actions[i].target.drive);
    for (size_t k = 0; k < actions[i].nr_sources; k++)
      collect (t, actions[i].sources[k].drive);
  }
  drives_sort (t->drives, t->nr);
  return 0;
}

static int
begin_plan (struct plan *p, struct drive *d, size_t room, struct error *err)
{
  p->drive = d;
  if (drive_is_elsewhere (d))
    return error_set (err, EPERM, "disk '%s' was handed over to another "
                      "server, and its bitmaps with it", d->name);
  p->list = calloc (d->nr_bitmaps + room, sizeof p->list[0]);
  if (p->list == NULL)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < d->nr_bitmaps; i++) {
    p->list[i].nb = d->bitmaps[i];
    p->list[i].recording = d->bitmaps[i]->recording;
    p->list[i].successor = d->bitmaps[i]->successor;
    p->list[i].point = d->bitmaps[i]->point;
  }
  p->nr = d->nr_bitmaps;
  return 0;
}

struct planned *
planned_find (struct plan *p, const char *name)
{
  for (size_t i = 0; i < p->nr; i++)
    if (strcmp (p->list[i].nb->name, name) == 0)
      return &p->list[i];
  return NULL;
}

/* A bitmap that may be worked on; the words are QEMU's. */
struct planned *
transaction_usable (struct transaction *t, const struct bitmap_ref *ref,
                    bool even_inconsistent, struct error *err)
{
  struct planned *b = planned_find (plan_of (t, ref->drive), ref->name);

  if (b == NULL) {
    error_set (err, ENOENT, "Dirty bitmap '%s' not found", ref->name);
    return NULL;
  }
  if (b->nb->busy || b->nb->incoming || b->removed || b->begins) {
    error_set (err, EBUSY, "Bitmap '%s' is currently in use by another "
               "operation and cannot be used", ref->name);
    return NULL;
  }
  if (b->nb->inconsistent && !even_inconsistent) {
    error_set (err, EINVAL, "Bitmap '%s' is inconsistent and cannot be used",
               ref->name);
    return NULL;
  }
  if (b->nb->persistent && drive_failure (ref->drive)) {
    error_set (err, EIO, "Bitmap '%s' cannot be used: %s has failed (%s)",
               ref->name, ref->drive->sidecar, drive_failure (ref->drive));
    return NULL;
  }
  return b;
}

static int
check_persistent (const struct plan *p, const char *name, struct error *err)
{
  if (p->drive->store == NULL)
    return error_set (err, EOPNOTSUPP, "Can't store persistent bitmaps to "
                      "%s: Operation not supported", p->drive->name);
  if (p->drive->size == 0) /* QEMU could not read such a sidecar */
    return error_set (err, EINVAL, "Can't make bitmap '%s' persistent in "
                      "'%s': The disk is empty", name, p->drive->name);
  if (strlen (name) > MAX_PERSISTENT_NAME)
    return error_set (err, EINVAL, "Can't make bitmap '%s' persistent in "
                      "'%s': Name length exceeds maximum (%d characters)",
                      name, p->drive->name, MAX_PERSISTENT_NAME);
  return 0;
}

static int
prepare_add (struct plan *p, const struct bitmap_action *a, struct error *err)
{
  const char *name = a->target.name;
  unsigned shift = BITMAP_DEFAULT_SHIFT;
  struct planned *b;

  if (name[0] == '\0')
    return error_set (err, EINVAL, "Bitmap name cannot be empty");
  if (ship_map_reserved (name) && !a->own)
    return error_set (err, EINVAL, "Bitmap name '%s' is reserved: x-ferry- "
                      "begins the names of nbdferry's own", name);
  if (a->granularity != 0) {
    if (a->granularity < 512 || (a->granularity & (a->granularity - 1)) != 0)
      return error_set (err, EINVAL,
                        "Granularity must be power of 2 and at least 512");
    shift = __builtin_ctzll (a->granularity);
    if (shift > BITMAP_MAX_SHIFT)
      return error_set (err, EINVAL, "Granularity must be at most 2 GiB");
  }
  if (planned_find (p, name))
    return error_set (err, EEXIST, "Bitmap already exists: %s", name);
  if (a->persistent && check_persistent (p, name, err) == -1)
    return -1;
  if (strlen (name) > MAX_PERSISTENT_NAME)
    return error_set (err, EINVAL, "Bitmap name too long: %s", name);

  b = &p->list[p->nr];
  b->nb = drive_new_bitmap (p->drive, name, shift, a->persistent,
                            !a->disabled, err);
  if (b->nb == NULL)
    return a->persistent ? error_prefix (err, "Can't make bitmap '%s' "
                                         "persistent in '%s'", name,
                                         p->drive->name)
                         : -1;
  /* Nobody knows it yet, and it is recorded with these. */
  if (a->bits)
    bitmap_merge (b->nb->bits, a->bits);
  b->added = true;
  b->recording = !a->disabled;
  p->nr++;
  p->changed = true;
  p->persistent |= a->persistent;
  return 0;
}

static int
prepare_merge (struct transaction *t, const struct bitmap_action *a,
               struct planned *b, struct error *err)
{
  for (size_t i = 0; i < a->nr_sources; i++) {
    const struct planned *src =
      transaction_usable (t, &a->sources[i], false, err);
    uint64_t to = a->target.drive->size;
    uint64_t from = a->sources[i].drive->size;

    if (src == NULL)
      return -1;
    if (to != from)
      return error_set (err, EINVAL, "Bitmaps are of different sizes "
                        "(destination size is %" PRIu64 ", source size is %"
                        PRIu64 ") and can't be merged", to, from);
  }
  b->grows = true;
  if (b->companion && b->merged == NULL)
    b->merged = bitmap_new (a->target.drive->size, b->nb->shift, err);
  return b->companion && b->merged == NULL ? -1 : 0;
}

static int
prepare_clear (struct plan *p, struct planned *b, struct error *err)
{
  if (b->companion)
    return 0;
  b->companion = bitmap_new (p->drive->size, b->nb->shift, err);
  return b->companion ? 0 : -1;
}

void
transaction_lose_point (struct plan *p, struct planned *b)
{
  if (point_is_none (&b->point))
    return;
  b->point = (struct point){ 0 };
  p->pointed = true;
}

static int
prepare (struct transaction *t, const struct bitmap_action *a,
         struct error *err)
{
  struct plan *p = plan_of (t, a->target.drive);
  struct planned *b;

  if (a->type == BITMAP_ABORT)
    return error_set (err, ECANCELED, "Transaction aborted using Abort action");
  if (a->type == BITMAP_ADD)
    return prepare_add (p, a, err);
  if (a->type == BITMAP_BACKUP_BEGIN)
    return transaction_prepare_begin (t, p, a, err);
  if (a->type == BITMAP_BACKUP_END)
    return transaction_prepare_end (p, a, err);
  if (a->type == BITMAP_BACKUP_FORGET)
    return transaction_prepare_forget (p, a, err);
  b = transaction_usable (t, &a->target, a->type == BITMAP_REMOVE, err);
  if (b == NULL)
    return -1;
  switch (a->type) {
  case BITMAP_REMOVE:
    b->removed = true;
    break;
  case BITMAP_ENABLE:
  case BITMAP_DISABLE:
    if (b->recording != (a->type == BITMAP_ENABLE))
      transaction_lose_point (p, b);
    b->recording = a->type == BITMAP_ENABLE;
    break;
  case BITMAP_CLEAR:
    transaction_lose_point (p, b);
    return prepare_clear (p, b, err);
  default:
    return prepare_merge (t, a, b, err);
  }
  p->changed = true;
  p->persistent |= b->nb->persistent;
  return 0;
}

/* What will be in place at the instant, and after the walk. */
static int
finish_plan (struct plan *p, struct error *err)
{
  struct drive *d = p->drive;
  size_t most = 3 * p->nr + 4, n = 0, companions = 0;
  bool persistent = false;

  p->bitmaps = calloc (p->nr + 1, sizeof p->bitmaps[0]);
  p->marks = marks_new (most);
  p->marks_after = marks_new (most);
  if (!p->bitmaps || !p->marks || !p->marks_after)
    return error_set (err, ENOMEM, "%m");
  /* Companions first: a bit that bitmap_retain finds in the bitmap alone was
   * set before the instant.
   */
  for (size_t i = 0; i < p->nr; i++)
    if (p->list[i].companion && p->list[i].recording)
      p->marks->map[companions++] = p->list[i].companion;
  for (size_t i = 0; i < p->nr; i++)
    if (p->list[i].successor && p->list[i].recording)
      p->marks->map[companions + n++] = p->list[i].successor;
  p->marks->again = companions + n > 0;
  p->marks_after->again = n > 0;
  for (size_t i = 0; i < p->nr; i++) {
    struct planned *b = &p->list[i];

    if (b->removed)
      continue;
    p->bitmaps[p->nr_bitmaps++] = b->nb;
    if (b->recording && b->nb->bits) {
      p->marks->map[companions + n++] = b->nb->bits;
      persistent |= b->nb->persistent;
    }
  }
  p->marks->nr = companions + n;
  p->marks_after->nr = n;
  p->marks->persistent = p->marks_after->persistent = persistent;
  memcpy (p->marks_after->map, p->marks->map + companions,
          n * sizeof p->marks->map[0]);
  marks_add_ship (p->marks, d);
  marks_add_ship (p->marks_after, d);
  return 0;
}

/* ---- record ---- */

/* What the activity log must say meanwhile. */
static void
note_kinds (struct transaction *t, const struct bitmap_action *a)
{
  struct plan *p = plan_of (t, a->target.drive);
  const struct planned *b;

  if (a->type == BITMAP_BACKUP_BEGIN || a->target.name == NULL)
    return;
  b = planned_find (p, a->target.name);
  if (!b->nb->persistent || b->removed)
    return;
  p->merges |= a->type == BITMAP_MERGE;
  p->clears |= (a->type == BITMAP_CLEAR ||
                (a->type == BITMAP_BACKUP_END && a->success)) && b->recording;
  p->disables |= a->type == BITMAP_DISABLE && !b->recording;
}

static int
flag_log (struct plan *p, struct error *err)
{
  struct activity *log = p->drive->activity;

  if (p->disables &&
      activity_flag (log, ACTIVITY_EVERY, 0, true, err) == -1)
    return -1;
  if (!p->clears)
    return 0;
  p->note = malloc (sizeof *p->note);
  if (p->note && clear_note_open (p->note, p->drive) == 0)
    return 0;
  free (take_ptr (&p->note));
  /* Then all is dirty after a crash of the daemon, for which this need not be
   * durable.
   */
  return activity_flag (log, ACTIVITY_CLEARING, 0, false, err);
}

/* Part 5; the flags stay if the bits are not durable. */
static int
settle (struct plan *p, struct error *err)
{
  struct drive *d = p->drive;

  if ((p->disables || p->merges) && qcow2_sync (d->store, err) == -1) {
    drive_store_failed (d, err->msg);
    return error_prefix (err, "the bitmaps were changed, but that is not "
                         "durable");
  }
  if (p->disables || p->clears)
    /* Should this fail, too much is dirty after a crash. */
    activity_flag (d->activity, 0, ACTIVITY_EVERY | ACTIVITY_CLEARING, false,
                   NULL);
  return 0;
}

static int
write_plan (struct plan *p, struct error *err)
{
  CLEANUP_FREE struct drive_entry *entries =
    calloc (p->nr + 1, sizeof (struct drive_entry));
  size_t n = 0;

  if (entries == NULL)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < p->nr; i++)
    if (!p->list[i].removed) {
      entries[n].nb = p->list[i].nb;
      entries[n].point = p->list[i].point;
      entries[n++].recording = p->list[i].recording;
    }
  if ((p->pointed || p->persistent) &&
      points_write (p->drive, entries, n, err) == -1)
    return -1;
  return p->persistent ? drive_write_directory (p->drive, entries, n, err)
                       : 0;
}

/* What was recorded for these is taken back, if that can be. */
static void
unrecord (struct transaction *t, size_t nr)
{
  for (size_t k = 0; k < nr; k++) {
    struct plan *p = &t->plans[k];

    if (p->persistent)
      drive_write_list (p->drive, NULL);
    if (p->pointed || p->persistent)
      points_write_list (p->drive, NULL);
    /* Else a crash, some day, would make everything dirty. */
    if (p->disables || p->clears)
      activity_flag (p->drive->activity, 0,
                     ACTIVITY_EVERY | ACTIVITY_CLEARING, false, NULL);
  }
}

static int
record (struct transaction *t, struct error *err)
{
  for (size_t i = 0; i < t->nr; i++) {
    struct plan *p = &t->plans[i];

    if (flag_log (p, err) == -1 || write_plan (p, err) == -1) {
      unrecord (t, i + 1);
      return -1;
    }
  }
  return 0;
}

/* ---- the instant, and the walk ---- */

static void
instant (struct transaction *t)
{
  drives_close (t->drives, t->nr, false);
  for (size_t i = 0; i < t->nr; i++) {
    struct plan *p = &t->plans[i];

    p->marks = drive_swap_marks (p->drive, p->marks);
    pthread_mutex_lock (&p->drive->list);
    for (size_t k = 0; k < p->nr; k++)
      p->list[k].nb->recording = p->list[k].recording;
    pthread_mutex_unlock (&p->drive->list);
    transaction_backups_instant (p);
  }
  drives_open (t->drives, t->nr, false);
  for (size_t i = 0; i < t->nr; i++) {
    struct plan *p = &t->plans[i];

    if (p->changed) {
      drive_set_bitmaps (p->drive, p->bitmaps, p->nr_bitmaps);
      p->bitmaps = NULL;
    }
  }
}

static void
drop_companions (struct plan *p)
{
  bool any = false;

  for (size_t i = 0; i < p->nr; i++)
    any |= p->list[i].companion != NULL;
  if (!any)
    return;
  gate_close (&p->drive->writes);
  p->marks_after = drive_swap_marks (p->drive, p->marks_after);
  gate_open (&p->drive->writes);
}

static void
free_plan (struct plan *p, bool done)
{
  for (size_t i = 0; i < p->nr; i++) {
    struct planned *b = &p->list[i];

    transaction_free_backup (b, done);
    bitmap_free (b->companion);
    bitmap_free (b->merged);
    /* What was added and removed in one transaction goes either way. */
    if (done ? b->removed : b->added)
      drive_free_bitmap (p->drive, b->nb);
  }
  if (p->note)
    clear_note_close (p->note, p->drive);
  free (p->note);
  free (p->list);
  free (p->bitmaps);
  free (p->marks);
  free (p->marks_after);
  free (p->hooks);
}

int
bitmap_transaction (const struct bitmap_action *actions, size_t nr,
                    struct error *err)
{
  struct transaction t = { 0 };
  bool done = false;
  int r = -1;

  if (collect_drives (&t, actions, nr, err) == -1)
    goto out;
  drives_lock (t.drives, t.nr);
  for (size_t i = 0; i < t.nr; i++)
    if (begin_plan (&t.plans[i], t.drives[i], nr, err) == -1)
      goto unlock;
  for (size_t i = 0; i < nr; i++)
    if (prepare (&t, &actions[i], err) == -1)
      goto unlock;
  for (size_t i = 0; i < t.nr; i++)
    if (finish_plan (&t.plans[i], err) == -1)
      goto unlock;
  if (transaction_plan_hooks (&t, actions, nr, err) == -1)
    goto unlock;
  for (size_t i = 0; i < nr; i++)
    note_kinds (&t, &actions[i]);
  if (record (&t, err) == -1)
    goto unlock;
  instant (&t);
  r = transaction_walk (&t, actions, nr, err);
  for (size_t i = 0; i < t.nr; i++)
    drop_companions (&t.plans[i]);
  done = true;
  for (size_t i = 0; i < t.nr; i++)
    transaction_backups_done (&t.plans[i]);
  for (size_t i = 0; i < t.nr; i++)
    if (settle (&t.plans[i], err) == -1)
      r = -1;

 unlock:
  for (size_t i = 0; i < t.nr; i++)
    free_plan (&t.plans[i], done);
  drives_unlock (t.drives, t.nr);
 out:
  free (t.drives);
  free (t.plans);
  return r;
}
