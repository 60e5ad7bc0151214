/* nbdferry - dirty bitmap: how much of a range is dirty
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * From the top down: what is clean below a summary bit is skipped, and what
 * is full is counted without a look.  So the cost follows the leaves that are
 * neither.
 */
#include <config.h>

#include "impl.h"

/* The bits set below word 'i' of level 'l', out of [from, to). */
static uint64_t
count_below (const struct bitmap *bm, unsigned l, uint64_t i, uint64_t from,
             uint64_t to)
{
  const unsigned shift = 6 * l; /* log2 of the bits that one bit here is for */
  uint64_t any, full, n = 0;

  if (l == 0) {
    any = leaf_get (bm, i);
    if (from > i * WORD_BITS)
      any &= ~low_bits (from - i * WORD_BITS);
    if (to < (i + 1) * WORD_BITS)
      any &= low_bits (to - i * WORD_BITS);
    return popcount (any);
  }
  any = bm_load_any (bm, l, i);
  full = word_get (&bm->levels[l].full[i]);
  for (; any; any &= any - 1) {
    const uint64_t child = i * WORD_BITS + __builtin_ctzll (any);
    const uint64_t first = child << shift;
    uint64_t last = first + (UINT64_C (1) << shift);

    if (last <= from)
      continue;
    if (first >= to)
      break;
    if (last > bm->nr_bits)
      last = bm->nr_bits;
    if ((full & any & -any) && first >= from && last <= to)
      n += last - first;
    else
      n += count_below (bm, l - 1, child, from, to);
  }
  return n;
}

uint64_t
bitmap_count_range (const struct bitmap *bm, uint64_t first, uint64_t end)
{
  if (end > bm->nr_bits)
    end = bm->nr_bits;
  return first < end ? count_below (bm, bm->top, 0, first, end) : 0;
}
