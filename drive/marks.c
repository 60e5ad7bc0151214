/* nbdferry - what each write marks
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Most of the time nobody clears a bit of what writes mark: a clear has a
 * companion, a backup a successor, a migration its ship map, and each of them
 * comes with marks of its own ('again'), which are put in place while nobody
 * writes.  As long as marks without 'again' are in place, then, the bits of
 * their bitmaps only grow.  Two things follow.
 *
 * What was marked before a write is still marked after it, so the second mark
 * is left out.
 *
 * A granule that was marked in all bitmaps by a call that has returned needs
 * no more than a look.  It is remembered in 'known'; what is there was found
 * with its store, so the marks that it speaks of have reached the top of each
 * tree.  The leaves are looked at all the same: a page of the sidecar may be
 * gone, and the look is what tells (SIGBUS, and the page is empty then).
 *
 * The granule is one of the finest bitmap, and lies within one of each other.
 * A slot that others use as well is overwritten; what is forgotten is marked
 * in full.
 */
#include <config.h>

#include <stdlib.h>

#include "marks.h"

struct marks *
marks_new (size_t room)
{
  return calloc (1, sizeof (struct marks) + room * sizeof (struct bitmap *));
}

void
marks_ready (struct marks *m)
{
  m->shift = BITMAP_MAX_SHIFT;
  for (size_t i = 0; i < m->nr; i++) {
    const unsigned shift = bitmap_shift (m->map[i]);

    if (shift < m->shift)
      m->shift = shift;
    if (i < MARKS_SHORT) {
      m->leaf[i].words = bitmap_leaves (m->map[i]);
      m->leaf[i].shift = shift;
    }
  }
  m->nr_short = m->again || m->nr > MARKS_SHORT ? 0 : m->nr;
}

void
marks_remove (struct marks *m, const struct bitmap *map)
{
  size_t n = 0;

  for (size_t i = 0; i < m->nr; i++)
    if (m->map[i] != map)
      m->map[n++] = m->map[i];
  m->nr = n;
  m->nr_short = 0;
}

/* The slot for that granule and what it holds if it is known; 0: it cannot be
 * remembered.
 */
static uint64_t
slot_for (uint64_t granule, size_t *slot)
{
  const uint64_t tag = granule / 32 / MARKS_SLOTS;

  *slot = granule / 32 % MARKS_SLOTS;
  return tag > UINT32_MAX ? 0 : tag << 32 | UINT64_C (1) << granule % 32;
}

static bool
is_marked (const struct marks *m, uint64_t offset)
{
  for (size_t i = 0; i < m->nr_short; i++) {
    const uint64_t bit = offset >> m->leaf[i].shift;

    if (!bitmap_leaf_test (m->leaf[i].words, bit))
      return false;
  }
  return true;
}

static void
remember (struct marks *m, size_t slot, uint64_t want, uint64_t old)
{
  if (old >> 32 == want >> 32)
    want |= old;
  /* If somebody else was faster, it is for another time. */
  atomic_compare_exchange_strong (&m->known[slot], &old, want);
}

static void
mark_all (const struct marks *m, uint64_t offset, uint64_t len)
{
  for (size_t i = 0; i < m->nr; i++)
    bitmap_set (m->map[i], offset, len);
}

void
marks_before (struct marks *m, uint64_t offset, uint64_t len)
{
  const uint64_t granule = offset >> m->shift;
  uint64_t want, old;
  size_t slot;

  if (m->nr_short == 0 || len == 0 ||
      (offset + len - 1) >> m->shift != granule) {
    mark_all (m, offset, len);
    return;
  }
  want = slot_for (granule, &slot);
  old = atomic_load_explicit (&m->known[slot], memory_order_acquire);
  if (want && (old & want) == want && old >> 32 == want >> 32 &&
      is_marked (m, offset))
    return;
  mark_all (m, offset, len);
  if (want)
    remember (m, slot, want, old);
}

/* The fence orders the data before the look at the bits: whoever clears a bit
 * and then reads the data sees either our data or has its cleared bit seen,
 * and set again, by us.
 */
void
marks_after (struct marks *m, uint64_t offset, uint64_t len)
{
  if (!m->again)
    return;
  atomic_thread_fence (memory_order_seq_cst);
  mark_all (m, offset, len);
}
