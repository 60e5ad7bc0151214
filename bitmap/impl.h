/* nbdferry - dirty bitmap: what its files share
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Private to bitmap/.  The essay on the tree, its invariants and its memory
 * order is at the head of tree.c.
 */
#ifndef FERRY_BITMAP_IMPL_H
#define FERRY_BITMAP_IMPL_H

#include <endian.h>
#include <pthread.h>

#include "bitmap.h"

#define WORD_BITS  64u
#define BLOCK_BITS 4096u /* a block: the 64 leaves below one summary word */

/* 2^63-1 bytes in granules of 512 make 2^54 bits, 2^48 leaves: eight levels
 * of summaries stand on them.
 */
#define MAX_LEVELS 9

/* One level of the tree.  Level 0 is the leaves, where 'any' and 'full' are
 * the same words; in a summary, bit i % 64 of word i / 64 speaks for word i
 * of the level below.
 */
struct level {
  uint64_t *any;  /* the word below is not zero */
  uint64_t *full; /* each valid bit of the word below is set */
  uint64_t nr;    /* words */
  uint64_t last;  /* the valid bits of the last word, as they lie in memory */
};

struct bitmap {
  /* Read-only after creation. */
  uint64_t size, nr_bits;
  unsigned shift;
  unsigned top; /* levels[top] has one word; at least 1 */
  struct level levels[MAX_LEVELS];
  void *own_leaves; /* mapped by us, or NULL */
  void *summaries;  /* one mapping for both trees */
  size_t leaves_len, summaries_len;

  /* Atomic. */
  uint64_t count __attribute__ ((aligned (64)));

  /* The summary word that is being lowered (see word_id), or 0: written
   * under 'lower_lock', read by anybody.
   */
  uint64_t lowering __attribute__ ((aligned (64)));
  pthread_mutex_t lower_lock; /* protects the clearing of 'any' bits */
};

/* What find looks for. */
enum kind { DIRTY, CLEAN };

/* All words of the tree are read and written through these.  Everything is
 * seq_cst, so that the arguments in tree.c can be made by interleaving
 * alone; a load costs nothing more for it on x86, and one instruction (ldar)
 * on ARM.
 */
static inline uint64_t
word_get (const uint64_t *p)
{
  return __atomic_load_n (p, __ATOMIC_SEQ_CST);
}

static inline uint64_t
word_or (uint64_t *p, uint64_t bits)
{
  /* Where the old value is wanted, x86 has no OR but a loop; a swap it has. */
  if (bits == UINT64_MAX)
    return __atomic_exchange_n (p, bits, __ATOMIC_SEQ_CST);
  return __atomic_fetch_or (p, bits, __ATOMIC_SEQ_CST);
}

static inline uint64_t
word_and (uint64_t *p, uint64_t bits)
{
  if (bits == 0)
    return __atomic_exchange_n (p, 0, __ATOMIC_SEQ_CST);
  return __atomic_fetch_and (p, bits, __ATOMIC_SEQ_CST);
}

/* The value of word 'i' of a level if all below it is set. */
static inline uint64_t
full_word (const struct level *lv, uint64_t i)
{
  return i == lv->nr - 1 ? lv->last : UINT64_MAX;
}

/* The lowest bits of a word, 0 to 64 of them. */
static inline uint64_t
low_bits (unsigned n)
{
  return n >= WORD_BITS ? UINT64_MAX : (UINT64_C (1) << n) - 1;
}

/* Without -mpopcnt the builtin is a call; most words need none. */
static inline unsigned
popcount (uint64_t w)
{
  if (w == 0)
    return 0;
  if (w == UINT64_MAX)
    return WORD_BITS;
  return __builtin_popcountll (w);
}

static inline uint64_t
word_id (unsigned l, uint64_t i)
{
  return i << 4 | l; /* never 0, as l >= 1 */
}

/* Leaf 'i' in the host's byte order. */
static inline uint64_t
leaf_get (const struct bitmap *bm, uint64_t i)
{
  return le64toh (word_get (&bm->levels[0].any[i]));
}

/* tree.c */

/* All 4096 bits of block 'b', which has so many and all of them the other way,
 * or false.  Nobody else uses the bitmap.
 */
bool bm_flip_block (struct bitmap *bm, uint64_t b, bool set);

/* The children of summary word 'i' of level 'l', out of those in 'mask',
 * that are not zero now.
 */
uint64_t bm_children_any (const struct bitmap *bm, unsigned l, uint64_t i,
                          uint64_t mask);

/* For each leaf j in 'mask' of block 'b': set the bits of words[j] (host
 * order, only valid bits).
 */
void bm_or_block (struct bitmap *bm, uint64_t b, const uint64_t words[64],
                  uint64_t mask);

/* For each leaf j in 'mask' of block 'b': clear the bits that words[j] lacks.
 * On return words[j] holds the bits that this call has cleared.
 */
void bm_and_block (struct bitmap *bm, uint64_t b, uint64_t words[64],
                   uint64_t mask);

/* Set bits (host order, only valid ones) of leaf 'i'. */
void bm_or_leaf (struct bitmap *bm, uint64_t i, uint64_t bits);

/* bitmap.c */

/* Set bits first to first+nr-1, which must exist; nr >= 1. */
void bm_set_bits (struct bitmap *bm, uint64_t first, uint64_t nr);

/* find.c */

/* Word 'i' of 'any' at level 'l' as a reader must see it: a bit whose mark
 * has returned is in it even while another thread lowers the word.
 */
uint64_t bm_load_any (const struct bitmap *bm, unsigned l, uint64_t i);

/* The first leaf >= i that may hold a bit of this kind, or the number of
 * leaves.
 */
uint64_t bm_next_leaf (const struct bitmap *bm, enum kind kind, uint64_t i);

/* The first bit of this kind in [from, to), or 'to', which is at most the
 * number of bits.
 */
uint64_t bm_find (const struct bitmap *bm, enum kind kind, uint64_t from,
                  uint64_t to);

/* The first block >= b below which a leaf is set: its number in *b, the
 * leaves in *mask.  False if there is none.
 */
bool bm_next_block (const struct bitmap *bm, uint64_t *b, uint64_t *mask);

#endif /* FERRY_BITMAP_IMPL_H */
