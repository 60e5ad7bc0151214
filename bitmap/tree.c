/* nbdferry - dirty bitmap: the tree
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The tree, here with 4 bits a word instead of 64, the disk having 14 bits:
 *
 *   level 1   any   1    0    1    1      full  0    0    0    1
 *                  |    |    |    |
 *   level 0        0010 0000 1000 11--        (bit 0 of a word on the left)
 *
 *   any: the leaf is not 0.  full: all its valid bits are set; the last leaf
 *   has two.
 *
 * (Levels go on until one word is left; level 1 always exists.)  When nobody
 * is in a call, each summary bit is exactly what it says of the word below.
 * While threads are at work, this holds:
 *
 *   (A) From the return of a mark, and while nobody clears it, every reader
 *       that starts at the top finds it: no 'any' bit on its path is missing.
 *   (B) Each bit is settled at last by the thread that touched it last.
 *   (C) 'count' is never below the number of marks that have returned.
 *
 * All words of the tree are read and changed with seq_cst, so there is one
 * order of all these steps, and what follows is argued in that order.  It has
 * to be that strong: a setter writes the leaf and reads the summary, a clearer
 * writes the summary and reads the leaf.  That is Dekker's protocol, and with
 * less than seq_cst both may read the old value.
 *
 * Setting.  OR the leaf; then, on every level up to the top, read the 'any'
 * bit and OR it if it is missing.  The walk is never cut short, not even if
 * the leaf's bits were set before: the thread that set them may not have
 * reached the top, and our caller relies on (A) as soon as we return.  After
 * an OR of a summary bit the word below is read again: a clearer may have
 * emptied it and found no summary bit to clear before ours came.  Then we
 * lower it ourselves (this is the one case where a setter takes a lock, and
 * it needs that its own mark was cleared before it returned).
 *
 * Lowering (clearing an 'any' bit) is what can hurt.  Between "the leaf has
 * become zero" and "clear the bit above" a setter may set the leaf, see the
 * bit above still there, and return.  So the word below is read again after
 * the bit was cleared, and the bit restored if need be.  That makes it right
 * in the end, but until then a reader would miss a mark that has returned,
 * against (A), and the clearing thread may be off its CPU just there.  So
 * what is being lowered is announced in 'lowering', before and until after:
 *
 *   lower (one thread at a time, under lower_lock)     reader
 *   1. is the word below zero?  else leave             a. load any
 *   2. lowering = this word                            b. is lowering this
 *   3. any &= ~bit                                        word? then ask the
 *   4. is the word below still zero?                      words below
 *      else any |= bit                                 c. else any |= load any
 *   5. lowering = 0
 *
 * Take a mark that returned before a.  A thread that comes to 1 later leaves.
 * There is at most one that has passed 1 before and is under way: the lock
 * keeps all others out.  If a reads 0, that thread is between 3 and 4 (its
 * step 4 finds the mark: 3 came after the setter had seen the bit, or else
 * the setter would have set it).  So b finds the announcement, and the word
 * below has the mark; or the thread is past 5, and c finds the bit restored.
 * If a came before 3 it has read 1, and that is why a is kept beside c.
 * Readers never wait, setters never wait for clearers; clearers wait for each
 * other, 64 leaves at a time.
 *
 * That the word below may be zero for an instant, between 3 and 4, deceives
 * nobody on the next level: only a thread that holds the lock acts on it.
 * That is also why a clearer looks at the 'any' bit with the lock held, even
 * if only to find that it is gone: before 4 it may be gone for an instant.
 *
 * 'full' needs no such promise.  The thread that fills a leaf, or takes the
 * first bit out of a full one, sets the bit above to what the leaf is now,
 * and looks again until both agree; then it does the same one level up if it
 * changed anything.  Take the last change of the bit and the look that
 * followed it: if the leaf has changed since, then he who changed it has
 * looked at the bit later, and would have changed it: (B).  For an instant
 * 'full' may claim too much, if the same leaf is being filled and cleared at
 * once: a run is then seen longer than it is, which costs a transfer, never
 * data.  Nothing ever misses a dirty bit because of 'full'.
 *
 * The count is raised before the bits are set and lowered after they were
 * cleared, and what turns out not to have flipped is corrected.  Relaxed is
 * enough: whoever clears a bit has read it with an acquire, from the setter
 * that had raised the count before, so that each -1 comes after its +1 in the
 * order of this one variable; and nobody concludes anything about another
 * variable from it.
 */
#include <config.h>

#include "cleanup.h"
#include "impl.h"

static void
count_add (struct bitmap *bm, uint64_t n)
{
  if (n)
    __atomic_fetch_add (&bm->count, n, __ATOMIC_RELAXED);
}

static void
count_sub (struct bitmap *bm, uint64_t n)
{
  if (n)
    __atomic_fetch_sub (&bm->count, n, __ATOMIC_RELAXED);
}

uint64_t
bm_children_any (const struct bitmap *bm, unsigned l, uint64_t i,
                 uint64_t mask)
{
  const uint64_t *child = bm->levels[l - 1].any + i * WORD_BITS;
  uint64_t r = 0;

  for (; mask; mask &= mask - 1)
    if (word_get (&child[__builtin_ctzll (mask)]) != 0)
      r |= mask & -mask;
  return r;
}

static uint64_t
children_full (const struct bitmap *bm, unsigned l, uint64_t i, uint64_t mask)
{
  const struct level *below = &bm->levels[l - 1];
  uint64_t r = 0, c;

  for (; mask; mask &= mask - 1) {
    c = i * WORD_BITS + __builtin_ctzll (mask);
    if (word_get (&below->full[c]) == full_word (below, c))
      r |= mask & -mask;
  }
  return r;
}

/* Clear the 'any' bits of zero words: word 'i' of level 'l', out of 'mask',
 * and from there upward.  Steps 1 to 5 of the essay.
 */
static void
lower_any (struct bitmap *bm, unsigned l, uint64_t i, uint64_t mask)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&bm->lower_lock);

  for (; l <= bm->top; l++) {
    uint64_t *word = &bm->levels[l].any[i];
    uint64_t zero, back;

    mask &= word_get (word);
    zero = mask & ~bm_children_any (bm, l, i, mask);
    if (zero == 0)
      return;
    __atomic_store_n (&bm->lowering, word_id (l, i), __ATOMIC_SEQ_CST);
    word_and (word, ~zero);
    back = bm_children_any (bm, l, i, zero);
    if (back)
      word_or (word, back);
    __atomic_store_n (&bm->lowering, 0, __ATOMIC_SEQ_CST);
    if (word_get (word) != 0)
      return;
    mask = UINT64_C (1) << i % WORD_BITS;
    i /= WORD_BITS;
  }
}

/* The words below word 'i' of level 'l' in 'mask' hold marks: make that known
 * to the top.
 */
static void
raise_any (struct bitmap *bm, unsigned l, uint64_t i, uint64_t mask)
{
  for (; l <= bm->top; l++) {
    uint64_t *word = &bm->levels[l].any[i];
    const uint64_t missing = mask & ~word_get (word);

    if (missing) {
      word_or (word, missing);
      if (bm_children_any (bm, l, i, missing) != missing)
        lower_any (bm, l, i, missing);
    }
    mask = UINT64_C (1) << i % WORD_BITS;
    i /= WORD_BITS;
  }
}

/* Words below word 'i' of level 'l' in 'mask' have become full, or cease to be.
 */
static void
settle_full (struct bitmap *bm, unsigned l, uint64_t i, uint64_t mask)
{
  for (; l <= bm->top; l++) {
    uint64_t *word = &bm->levels[l].full[i];
    bool changed = false;

    for (;;) {
      const uint64_t w = word_get (word) & mask;
      const uint64_t is = children_full (bm, l, i, mask);

      if (w == is)
        break;
      if (is & ~w)
        word_or (word, is & ~w);
      if (w & ~is)
        word_and (word, ~(w & ~is));
      changed = true;
    }
    if (!changed)
      return;
    mask = UINT64_C (1) << i % WORD_BITS;
    i /= WORD_BITS;
  }
}

/* Set bits of leaf 'i'; returns how many flipped, and whether that made the
 * leaf full.
 */
static unsigned
or_leaf (struct bitmap *bm, uint64_t i, uint64_t bits, bool *filled)
{
  const struct level *lv = &bm->levels[0];
  const uint64_t full = full_word (lv, i);
  uint64_t old = word_get (&lv->any[i]);

  bits = htole64 (bits);
  *filled = false;
  if ((bits & ~old) == 0) /* no need to own the cache line */
    return 0;
  old = word_or (&lv->any[i], bits);
  *filled = old != full && (old | bits) == full;
  return popcount (bits & ~old);
}

void
bm_or_leaf (struct bitmap *bm, uint64_t i, uint64_t bits)
{
  const uint64_t bit = UINT64_C (1) << i % WORD_BITS;
  bool filled = false;
  unsigned n;

  if (bits & ~leaf_get (bm, i)) {
    n = popcount (bits);
    count_add (bm, n);
    count_sub (bm, n - or_leaf (bm, i, bits, &filled));
  }
  raise_any (bm, 1, i / WORD_BITS, bit);
  if (filled)
    settle_full (bm, 1, i / WORD_BITS, bit);
}

void
bm_or_block (struct bitmap *bm, uint64_t b, const uint64_t words[64],
             uint64_t mask)
{
  uint64_t m, want = 0, flipped = 0, full = 0;
  bool filled;

  for (m = mask; m; m &= m - 1)
    want += popcount (words[__builtin_ctzll (m)]);
  count_add (bm, want);
  for (m = mask; m; m &= m - 1) {
    const unsigned j = __builtin_ctzll (m);

    flipped += or_leaf (bm, b * WORD_BITS + j, words[j], &filled);
    if (filled)
      full |= m & -m;
  }
  count_sub (bm, want - flipped);
  raise_any (bm, 1, b, mask);
  if (full)
    settle_full (bm, 1, b, full);
}

void
bm_and_block (struct bitmap *bm, uint64_t b, uint64_t words[64], uint64_t mask)
{
  const struct level *lv = &bm->levels[0];
  uint64_t flipped = 0, unfull = 0, zero = 0;

  for (; mask; mask &= mask - 1) {
    const unsigned j = __builtin_ctzll (mask);
    const uint64_t i = b * WORD_BITS + j;
    const uint64_t keep = htole64 (words[j]);
    uint64_t old = word_get (&lv->any[i]);

    if (old & ~keep)
      old = word_and (&lv->any[i], keep);
    words[j] = le64toh (old & ~keep);
    if (words[j] == 0)
      continue;
    flipped += popcount (words[j]);
    if (old == full_word (lv, i))
      unfull |= mask & -mask;
    if ((old & keep) == 0)
      zero |= mask & -mask;
  }
  count_sub (bm, flipped);
  if (unfull)
    settle_full (bm, 1, b, unfull);
  if (zero)
    lower_any (bm, 1, b, zero);
}

bool
bm_flip_block (struct bitmap *bm, uint64_t b, bool set)
{
  const struct level *lv = &bm->levels[1];
  const uint64_t value = set ? UINT64_MAX : 0;
  const uint64_t bit = UINT64_C (1) << b % WORD_BITS;
  uint64_t *leaf = bm->levels[0].any + b * WORD_BITS;

  if ((b + 1) * BLOCK_BITS > bm->nr_bits ||
      (set ? lv->any[b] != 0 : lv->full[b] != UINT64_MAX))
    return false;
  /* Whole words all the same, for who looks without need. */
  for (unsigned j = 0; j < WORD_BITS; j++)
    __atomic_store_n (&leaf[j], value, __ATOMIC_RELAXED);
  __atomic_store_n (&lv->any[b], value, __ATOMIC_RELAXED);
  __atomic_store_n (&lv->full[b], value, __ATOMIC_RELAXED);
  if (set) {
    count_add (bm, BLOCK_BITS);
    raise_any (bm, 2, b / WORD_BITS, bit);
  }
  else {
    count_sub (bm, BLOCK_BITS);
    lower_any (bm, 2, b / WORD_BITS, bit);
  }
  settle_full (bm, 2, b / WORD_BITS, bit);
  return true;
}

/* Does level 'l' say what the words below it are? */
static bool
level_is_consistent (const struct bitmap *bm, unsigned l)
{
  const struct level *lv = &bm->levels[l], *below = &bm->levels[l - 1];

  for (uint64_t i = 0; i < lv->nr; i++) {
    const uint64_t left = below->nr - i * WORD_BITS;
    const uint64_t mask = low_bits (left < WORD_BITS ? left : WORD_BITS);

    if (lv->any[i] != bm_children_any (bm, l, i, mask) ||
        lv->full[i] != children_full (bm, l, i, mask))
      return false;
  }
  return true;
}

bool
bitmap_is_consistent (const struct bitmap *bm)
{
  const struct level *lv = &bm->levels[0];
  uint64_t count = 0;

  for (uint64_t i = 0; i < lv->nr; i++)
    count += popcount (lv->any[i]);
  if (count != bm->count || bm->lowering != 0)
    return false;
  if (lv->nr > 0 && (lv->any[lv->nr - 1] & ~lv->last) != 0)
    return false;
  for (unsigned l = 1; l <= bm->top; l++)
    if (!level_is_consistent (bm, l))
      return false;
  return true;
}
