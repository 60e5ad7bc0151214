/* nbdferry - dirty bitmap
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A bitmap says for each granule of a disk whether it is dirty.  It is a
 * tree: the leaves are 64-bit words with one bit a granule (bit i of the
 * bitmap is bit i % 64 of word i / 64, words little-endian in memory, which
 * is also qcow2's order, so that the leaves can be a mapped file).  Above
 * them stand 64-way summaries of two kinds: "some bit below is set" and
 * "every bit below is set".  So the next dirty or clean run is found in
 * O(log n) from anywhere.
 *
 * Units: offsets and lengths are bytes of the disk unless a name says bits.
 * A range of bytes means every granule that it touches.  What lies beyond
 * the end of the disk is cut off.
 *
 * Threads: all functions but those that create and free may run at the same
 * time from any number of threads, without a lock.  A run that is being
 * cleared in another thread may be seen or not; a run that was set before the
 * call, and that nobody clears, is always seen, whatever else is set and
 * cleared around it.  (A clean granule may for an instant be seen as dirty.)
 * The count is exact as soon as nobody flips bits, and until then never too
 * low.  Marking waits for another thread only if its own mark was cleared
 * again before it returned, and then for a moment.
 */
#ifndef FERRY_BITMAP_H
#define FERRY_BITMAP_H

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

#define BITMAP_MIN_SHIFT     9  /* 512 B */
#define BITMAP_MAX_SHIFT     31 /* 2 GiB */
#define BITMAP_DEFAULT_SHIFT 16 /* 64 KiB */

struct bitmap;

/* A run of bytes, [start, end). */
struct range {
  uint64_t start, end;
};

/* The number of bits, and of 64-bit leaf words, for a disk of 'size' bytes. */
uint64_t bitmap_bits_for (uint64_t size, unsigned shift);
uint64_t bitmap_words_for (uint64_t size, unsigned shift);

/* A new bitmap for a disk of 'size' bytes (0 to 2^63-1) with granules of
 * 1 << shift bytes, all clean.  Its leaves are anonymous memory that costs
 * nothing until it is touched.  NULL on error.
 */
struct bitmap *bitmap_new (uint64_t size, unsigned shift, struct error *err);

/* The same over leaf words that the caller owns, keeps alive, and lets go
 * only after bitmap_free: for a mapped file.  The bits that are set in them
 * are taken over: summaries and count are built by one walk.  Bits beyond
 * the last granule are cleared first.
 */
struct bitmap *bitmap_new_over (uint64_t *leaves, uint64_t size,
                                unsigned shift, struct error *err);

/* The same over words that are known to be zero: none is looked at. */
struct bitmap *bitmap_new_over_zeros (uint64_t *leaves, uint64_t size,
                                      unsigned shift, struct error *err);

/* Frees the bitmap (and its leaves, if they are its own); NULL is allowed. */
void bitmap_free (struct bitmap *bm);

uint64_t bitmap_size (const struct bitmap *bm);        /* of the disk, bytes */
unsigned bitmap_shift (const struct bitmap *bm);       /* log2 granularity */
uint64_t bitmap_granularity (const struct bitmap *bm); /* bytes */
uint64_t bitmap_bits (const struct bitmap *bm);        /* how many granules */

/* How many bits are set; kept as they flip, so this costs one load. */
uint64_t bitmap_count_bits (const struct bitmap *bm);
/* As QEMU counts: set bits * granularity (may exceed the disk's size). */
uint64_t bitmap_count (const struct bitmap *bm);

/* How many of the bits [first, end) are set: they are counted, from the top of
 * the tree, which skips what is clean and what is full.  While bits flip, each
 * is seen before or after.
 */
uint64_t bitmap_count_range (const struct bitmap *bm, uint64_t first,
                             uint64_t end);

/* Mark, or unmark, each granule touched by [offset, offset+len). */
void bitmap_set (struct bitmap *bm, uint64_t offset, uint64_t len);
void bitmap_clear (struct bitmap *bm, uint64_t offset, uint64_t len);
void bitmap_clear_all (struct bitmap *bm);

/* The same, several times as fast where whole blocks of 4096 granules flip.
 * Nobody else uses the bitmap meanwhile but for its count: the caller has a
 * lock for that, or is the only one who knows it.
 */
void bitmap_set_alone (struct bitmap *bm, uint64_t offset, uint64_t len);
void bitmap_clear_alone (struct bitmap *bm, uint64_t offset, uint64_t len);

/* Is the granule that holds 'offset' dirty? */
bool bitmap_test (const struct bitmap *bm, uint64_t offset);

/* The leaf words, for bitmap_leaf_test: a look at one bit that does not say
 * whether readers who come from the top find it already.
 */
const uint64_t *bitmap_leaves (const struct bitmap *bm);

static inline bool
bitmap_leaf_test (const uint64_t *leaves, uint64_t bit)
{
  return le64toh (__atomic_load_n (&leaves[bit / 64], __ATOMIC_SEQ_CST)) >>
           bit % 64 & 1;
}

/* The first dirty (clean) run that begins in or reaches into [from, to):
 * run->start >= from, run->end <= to, both on granule boundaries except
 * where from, to or the end of the disk cut them.  False if there is none.
 */
bool bitmap_next_dirty (const struct bitmap *bm, uint64_t from, uint64_t to,
                        struct range *run);
bool bitmap_next_clean (const struct bitmap *bm, uint64_t from, uint64_t to,
                        struct range *run);

/* dst |= src.  The granularities may differ (a dirty granule of src marks
 * every granule of dst that it touches); the sizes must be equal.  The cost
 * follows src's set bits.
 */
void bitmap_merge (struct bitmap *dst, const struct bitmap *src);

/* bm &= keep, word by word: clears in 'bm' what is not set in 'keep' at the
 * time when that word is visited.  Same size and granularity.  This is how a
 * bitmap is cleared as of an instant in the past while writers go on: they
 * mark 'keep' as well since that instant, both bitmaps before a write and both
 * again after it.  What a writer has marked in 'keep' before the return is in
 * 'bm' at the return; in between it may be missing there for a moment.
 *
 * So 'before', unless NULL, is told what each block of 4096 bits has before
 * anything of it is cleared: all that may be missing is in there.  If it says
 * false the block stays as it is.
 */
typedef bool (*bitmap_before) (void *opaque, uint64_t block,
                               const uint64_t words[64]);

void bitmap_retain (struct bitmap *bm, const struct bitmap *keep,
                    bitmap_before before, void *opaque);

/* Set the bits of 'words' in a block, as far as there are such. */
void bitmap_restore_block (struct bitmap *bm, uint64_t block,
                           const uint64_t words[64]);

/* Move every set bit of 'src' into 'dst' and leave 'src' clean, each word in
 * one atomic exchange, so that a bit set meanwhile ends in one of the two:
 * the snapshot-and-clear of a round.  Same size and granularity.
 */
void bitmap_take (struct bitmap *dst, struct bitmap *src);

/* For tests: does the tree agree with its leaves?  Only while nobody else
 * uses it.
 */
bool bitmap_is_consistent (const struct bitmap *bm);

#endif /* FERRY_BITMAP_H */
