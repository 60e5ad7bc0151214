/* nbdferry - operations on bitmaps: what takes long
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * After the instant, while requests go on.  First all that sets bits, then
 * all that clears them, so that a bit which moves from one bitmap to another
 * is never in neither, whenever we are killed; with a sync between, so that
 * this holds for a loss of power as well.
 */
#include <config.h>

#include <errno.h>

#include "transaction-impl.h"

static struct planned *
planned_of (struct transaction *t, const struct bitmap_ref *ref)
{
  return planned_find (plan_of (t, ref->drive), ref->name);
}

/* dst |= src, as it is after the actions before.  One that is cleared has
 * then what its companion has, and what was merged into it since; but its
 * bits are still there, and only grow for now.
 */
static void
merge_one (struct planned *dst, bool cleared, const struct planned *src,
           bool src_cleared)
{
  struct bitmap *into[2] = { dst->nb->bits, cleared ? dst->merged : NULL };

  if (src == dst)
    return;
  for (size_t i = 0; i < 2; i++) {
    if (into[i] == NULL)
      continue;
    if (!src_cleared)
      bitmap_merge (into[i], src->nb->bits);
    else {
      bitmap_merge (into[i], src->companion);
      if (src->merged)
        bitmap_merge (into[i], src->merged);
    }
  }
}

/* All that sets bits, in order.  Returns whether there was anything. */
static bool
walk_merges (struct transaction *t, const struct bitmap_action *actions,
             size_t nr)
{
  bool any = false;

  for (size_t i = 0; i < nr; i++) {
    struct planned *b;

    if (actions[i].target.name == NULL)
      continue;
    b = planned_of (t, &actions[i].target);
    if (actions[i].type == BITMAP_CLEAR ||
        (actions[i].type == BITMAP_BACKUP_END && actions[i].success)) {
      b->cleared = true;
      if (b->merged)
        bitmap_clear_all (b->merged);
    }
    else if (actions[i].type == BITMAP_MERGE) {
      for (size_t k = 0; k < actions[i].nr_sources; k++) {
        struct planned *src = planned_of (t, &actions[i].sources[k]);

        merge_one (b, b->cleared, src, src->cleared);
      }
      any = true;
    }
    else
      continue;
    b->touched = true;
  }
  return any;
}

/* Of one that records and outlives us, what is being cleared is noted. */
static void
clear_one (struct plan *p, struct planned *b)
{
  const bool noted = p->note && b->nb->persistent && b->recording;

  if (b->merged)
    bitmap_merge (b->companion, b->merged);
  if (noted)
    clear_note_begin (p->note, b->nb);
  bitmap_retain (b->nb->bits, b->companion, noted ? clear_note_block : NULL,
                 p->note);
  drive_forget_reason (p->drive, b->nb);
}

/* Then all that clears them: a bit that moves from one bitmap to another is
 * never in neither.
 */
static int
walk_clears (struct plan *p, struct error *err)
{
  for (size_t i = 0; i < p->nr; i++) {
    struct planned *b = &p->list[i];

    if (b->cleared)
      clear_one (p, b);
    /* After the bits: a migration that sees the new version sends them all. */
    if (b->touched)
      atomic_fetch_add (&b->nb->version, 1);
  }
  return p->note && p->note->failed
           ? error_set (err, EIO, "%s/clearing cannot be written: some of what "
                        "was to be cleared is still dirty",
                        p->drive->state_dir)
           : 0;
}

/* Bits that were merged are durable before those that they came from go. */
static int
sync_merges (struct transaction *t, struct error *err)
{
  int r = 0;

  for (size_t i = 0; i < t->nr; i++) {
    struct plan *p = &t->plans[i];

    if (p->merges && p->drive->store &&
        qcow2_sync (p->drive->store, err) == -1)
      r = -1;
  }
  return r;
}

int
transaction_walk (struct transaction *t, const struct bitmap_action *actions,
                  size_t nr, struct error *err)
{
  bool cleared = false;
  int r = 0;

  if (walk_merges (t, actions, nr)) {
    for (size_t i = 0; i < nr; i++)
      cleared |= actions[i].type == BITMAP_CLEAR ||
                 actions[i].type == BITMAP_BACKUP_END;
    /* Without a clear, it is enough that they are when it has settled. */
    if (cleared && sync_merges (t, err) == -1)
      return -1;
  }
  for (size_t i = 0; i < t->nr; i++)
    if (walk_clears (&t->plans[i], err) == -1)
      r = -1;
  return r;
}
