/* nbdferry - dirty bitmap: the next run
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A search climbs from a leaf until a summary word has something to the
 * right, and descends to it: at most twice the height of the tree.  While
 * other threads clear, a summary bit may stand over an empty word; then the
 * search goes on to the right of it.
 */
#include <config.h>

#include "impl.h"

uint64_t
bm_load_any (const struct bitmap *bm, unsigned l, uint64_t i)
{
  const uint64_t *word = &bm->levels[l].any[i];
  uint64_t left, w = word_get (word);

  /* Steps a, b, c of the essay in tree.c. */
  if (word_get (&bm->lowering) != word_id (l, i))
    return w | word_get (word);
  left = bm->levels[l - 1].nr - i * WORD_BITS;
  return w | bm_children_any (bm, l, i,
                              low_bits (left < WORD_BITS ? left : WORD_BITS));
}

/* The children of word 'i' of level 'l' that may hold such a bit. */
static uint64_t
children (const struct bitmap *bm, enum kind kind, unsigned l, uint64_t i)
{
  uint64_t left;

  if (kind == DIRTY)
    return bm_load_any (bm, l, i);
  left = bm->levels[l - 1].nr - i * WORD_BITS;
  return ~word_get (&bm->levels[l].full[i]) &
         low_bits (left < WORD_BITS ? left : WORD_BITS);
}

uint64_t
bm_next_leaf (const struct bitmap *bm, enum kind kind, uint64_t i)
{
  unsigned l = 1;
  uint64_t w;

  /* 'i' is a word of level l-1: the first that has not been ruled out. */
  while (l <= bm->top && i / WORD_BITS < bm->levels[l].nr) {
    w = children (bm, kind, l, i / WORD_BITS) & ~low_bits (i % WORD_BITS);
    if (w == 0) {
      i = i / WORD_BITS + 1;
      l++;
      continue;
    }
    i = i / WORD_BITS * WORD_BITS + __builtin_ctzll (w);
    if (--l == 0)
      return i;
    i *= WORD_BITS;
  }
  return bm->levels[0].nr;
}

bool
bm_next_block (const struct bitmap *bm, uint64_t *b, uint64_t *mask)
{
  uint64_t i = *b * WORD_BITS;

  while ((i = bm_next_leaf (bm, DIRTY, i)) < bm->levels[0].nr) {
    *b = i / WORD_BITS;
    *mask = bm_load_any (bm, 1, *b);
    if (*mask)
      return true;
    i = (*b + 1) * WORD_BITS;
  }
  return false;
}

uint64_t
bm_find (const struct bitmap *bm, enum kind kind, uint64_t from, uint64_t to)
{
  uint64_t i, w, bit;

  while (from < to) {
    i = from / WORD_BITS;
    w = leaf_get (bm, i);
    if (kind == CLEAN)
      w = ~w;
    w &= ~low_bits (from % WORD_BITS);
    if (w) {
      bit = i * WORD_BITS + __builtin_ctzll (w);
      return bit < to ? bit : to;
    }
    from = bm_next_leaf (bm, kind, i + 1) * WORD_BITS;
  }
  return to;
}

static bool
next_run (const struct bitmap *bm, enum kind kind, uint64_t from, uint64_t to,
          struct range *run)
{
  const unsigned shift = bm->shift;
  uint64_t first, last, end;

  if (to > bm->size)
    to = bm->size;
  if (from >= to)
    return false;
  end = bitmap_bits_for (to, shift);
  first = bm_find (bm, kind, from >> shift, end);
  if (first == end)
    return false;
  last = bm_find (bm, kind == DIRTY ? CLEAN : DIRTY, first + 1, end);
  run->start = first << shift > from ? first << shift : from;
  run->end = last == end ? to : last << shift;
  return true;
}

bool
bitmap_next_dirty (const struct bitmap *bm, uint64_t from, uint64_t to,
                   struct range *run)
{
  return next_run (bm, DIRTY, from, to, run);
}

bool
bitmap_next_clean (const struct bitmap *bm, uint64_t from, uint64_t to,
                   struct range *run)
{
  return next_run (bm, CLEAN, from, to, run);
}
