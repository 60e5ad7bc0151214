/* nbdferry - dirty bitmap: two bitmaps at once
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * All of these walk one bitmap's tree, 64 leaves at a time, and touch only
 * blocks in which a bit is set.
 */
#include <config.h>

#include <assert.h>
#include <string.h>

#include "impl.h"

static void
load_block (const struct bitmap *bm, uint64_t b, uint64_t words[64],
            uint64_t mask)
{
  for (; mask; mask &= mask - 1) {
    const unsigned j = __builtin_ctzll (mask);

    words[j] = leaf_get (bm, b * WORD_BITS + j);
  }
}

static void
merge_runs (struct bitmap *dst, const struct bitmap *src)
{
  const uint64_t g = bitmap_granularity (dst);
  struct range run;

  for (uint64_t at = 0; bitmap_next_dirty (src, at, src->size, &run);) {
    bitmap_set (dst, run.start, run.end - run.start);
    /* The rest of a coarse granule of dst is marked already. */
    at = (run.end + g - 1) & -g;
  }
}

void
bitmap_merge (struct bitmap *dst, const struct bitmap *src)
{
  uint64_t words[64], mask, b;

  assert (dst->size == src->size);
  if (dst == src)
    return;
  if (dst->shift != src->shift) {
    merge_runs (dst, src);
    return;
  }
  for (b = 0; bm_next_block (src, &b, &mask); b++) {
    load_block (src, b, words, mask);
    bm_or_block (dst, b, words, mask);
  }
}

/* Is anything set in 'words' that is not in 'kept'? */
static bool
leaves_out (const uint64_t words[64], const uint64_t kept[64], uint64_t mask)
{
  for (; mask; mask &= mask - 1) {
    const unsigned j = __builtin_ctzll (mask);

    if (words[j] & ~kept[j])
      return true;
  }
  return false;
}

/* A writer that marks both bitmaps, writes, and marks both again may do all
 * of that between our look at 'keep' and the clearing in 'bm'.  Nothing would
 * bring its bit back, so we look at 'keep' a second time and put back what it
 * has by now.  A writer whose mark in 'keep' comes even later has a mark of
 * 'bm' still before it: the one after its write has landed.
 */
void
bitmap_retain (struct bitmap *bm, const struct bitmap *keep,
               bitmap_before before, void *opaque)
{
  uint64_t words[64], kept[64], mask, again, m, b;

  assert (bm->size == keep->size && bm->shift == keep->shift);
  for (b = 0; bm_next_block (bm, &b, &mask); b++) {
    memset (words, 0, sizeof words);
    load_block (bm, b, words, mask);
    load_block (keep, b, kept, mask);
    if (!leaves_out (words, kept, mask) ||
        (before && !before (opaque, b, words)))
      continue;
    load_block (keep, b, kept, mask); /* it may have taken long */
    /* What was not there stays: only a writer can have set it since. */
    for (m = mask; m; m &= m - 1) {
      const unsigned j = __builtin_ctzll (m);

      words[j] = kept[j] | ~words[j];
    }
    bm_and_block (bm, b, words, mask); /* leaves what it cleared in words */
    load_block (keep, b, kept, mask);
    again = 0;
    for (m = mask; m; m &= m - 1) {
      const unsigned j = __builtin_ctzll (m);

      words[j] &= kept[j];
      if (words[j])
        again |= m & -m;
    }
    if (again)
      bm_or_block (bm, b, words, again);
  }
}

void
bitmap_restore_block (struct bitmap *bm, uint64_t block,
                      const uint64_t words[64])
{
  const struct level *lv = &bm->levels[0];
  uint64_t valid[64], mask = 0;

  if (block > lv->nr / WORD_BITS) /* it may be anything */
    return;
  for (unsigned j = 0; j < 64 && block * WORD_BITS + j < lv->nr; j++) {
    valid[j] = words[j] & le64toh (full_word (lv, block * WORD_BITS + j));
    if (valid[j])
      mask |= UINT64_C (1) << j;
  }
  if (mask)
    bm_or_block (bm, block, valid, mask);
}

void
bitmap_take (struct bitmap *dst, struct bitmap *src)
{
  uint64_t words[64], mask, m, b;

  assert (dst->size == src->size && dst->shift == src->shift && dst != src);
  for (b = 0; bm_next_block (src, &b, &mask); b++) {
    for (m = mask; m; m &= m - 1)
      words[__builtin_ctzll (m)] = 0;
    bm_and_block (src, b, words, mask);
    bm_or_block (dst, b, words, mask);
  }
}
