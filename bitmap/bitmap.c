/* nbdferry - dirty bitmap: creation, sizes, marking
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Bytes become bits here.  How the tree is kept is tree.c's.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "impl.h"

uint64_t
bitmap_bits_for (uint64_t size, unsigned shift)
{
  return (size >> shift) + ((size & ((UINT64_C (1) << shift) - 1)) != 0);
}

uint64_t
bitmap_words_for (uint64_t size, unsigned shift)
{
  return (bitmap_bits_for (size, shift) + WORD_BITS - 1) / WORD_BITS;
}

/* Lay the levels out; returns how many words of summaries of one kind. */
static uint64_t
plan_levels (struct bitmap *bm)
{
  uint64_t below = bm->nr_bits, words = 0;
  unsigned l = 0;

  for (;;) {
    struct level *lv = &bm->levels[l];

    lv->nr = (below + WORD_BITS - 1) / WORD_BITS;
    lv->last = below % WORD_BITS ? low_bits (below % WORD_BITS) : UINT64_MAX;
    if (l == 0)
      lv->last = htole64 (lv->last);
    else {
      if (lv->nr == 0) /* a disk of no bytes still has a top */
        lv->nr = 1;
      words += lv->nr;
      if (lv->nr == 1)
        break;
    }
    below = lv->nr;
    l++;
  }
  bm->top = l;
  return words;
}

/* Memory that is zero and costs nothing until it is touched. */
static void *
map_zero (uint64_t words, size_t *len, struct error *err)
{
  const uint64_t bytes = words * sizeof (uint64_t);
  void *p = MAP_FAILED;

  errno = ENOMEM;
  if (bytes <= SIZE_MAX)
    p = mmap (NULL, bytes, PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    error_set (err, errno, "cannot map %llu bytes for a bitmap: %m",
               (unsigned long long) bytes);
    return NULL;
  }
  *len = bytes;
  return p;
}

/* All but the leaves. */
static struct bitmap *
new_tree (uint64_t size, unsigned shift, struct error *err)
{
  struct bitmap *bm;
  uint64_t words, *p;

  if (shift < BITMAP_MIN_SHIFT || shift > BITMAP_MAX_SHIFT) {
    error_set (err, EINVAL, "a bitmap cannot have a granularity of 2^%u bytes",
               shift);
    return NULL;
  }
  if (size > INT64_MAX) {
    error_set (err, EFBIG, "a disk of %llu bytes is too large for a bitmap",
               (unsigned long long) size);
    return NULL;
  }
  bm = aligned_alloc (64, sizeof *bm); /* its counters have their own lines */
  if (bm == NULL) {
    error_set (err, ENOMEM, "cannot allocate a bitmap: %m");
    return NULL;
  }
  memset (bm, 0, sizeof *bm);
  bm->size = size;
  bm->shift = shift;
  bm->nr_bits = bitmap_bits_for (size, shift);
  words = plan_levels (bm);
  bm->summaries = map_zero (2 * words, &bm->summaries_len, err);
  if (bm->summaries == NULL) {
    free (bm);
    return NULL;
  }
  p = bm->summaries;
  for (unsigned l = 1; l <= bm->top; l++) {
    bm->levels[l].any = p;
    bm->levels[l].full = p + words;
    p += bm->levels[l].nr;
  }
  pthread_mutex_init (&bm->lower_lock, NULL);
  return bm;
}

struct bitmap *
bitmap_new (uint64_t size, unsigned shift, struct error *err)
{
  struct bitmap *bm = new_tree (size, shift, err);

  if (bm != NULL && bm->nr_bits > 0) {
    bm->own_leaves = map_zero (bm->levels[0].nr, &bm->leaves_len, err);
    if (bm->own_leaves == NULL) {
      bitmap_free (bm);
      return NULL;
    }
    bm->levels[0].any = bm->levels[0].full = bm->own_leaves;
  }
  return bm;
}

/* Summaries of level 'l' from the words below.  Nobody else is there yet. */
static void
build_level (struct bitmap *bm, unsigned l)
{
  const struct level *lv = &bm->levels[l], *below = &bm->levels[l - 1];

  for (uint64_t i = 0; i < below->nr; i++) {
    const uint64_t bit = UINT64_C (1) << i % WORD_BITS;

    if (below->any[i] == 0) /* then it is not full either */
      continue;
    lv->any[i / WORD_BITS] |= bit;
    if (below->full[i] == full_word (below, i))
      lv->full[i / WORD_BITS] |= bit;
    if (l == 1)
      bm->count += popcount (below->any[i]);
  }
}

struct bitmap *
bitmap_new_over_zeros (uint64_t *leaves, uint64_t size, unsigned shift,
                       struct error *err)
{
  struct bitmap *bm = new_tree (size, shift, err);

  if (bm != NULL && bm->nr_bits > 0)
    bm->levels[0].any = bm->levels[0].full = leaves;
  return bm;
}

struct bitmap *
bitmap_new_over (uint64_t *leaves, uint64_t size, unsigned shift,
                 struct error *err)
{
  struct bitmap *bm = bitmap_new_over_zeros (leaves, size, shift, err);

  if (bm != NULL && bm->nr_bits > 0) {
    const struct level *lv = &bm->levels[0];

    if (leaves[lv->nr - 1] & ~lv->last) /* do not touch a page for nothing */
      leaves[lv->nr - 1] &= lv->last;
    for (unsigned l = 1; l <= bm->top; l++)
      build_level (bm, l);
  }
  return bm;
}

void
bitmap_free (struct bitmap *bm)
{
  if (bm == NULL)
    return;
  if (bm->own_leaves)
    munmap (bm->own_leaves, bm->leaves_len);
  munmap (bm->summaries, bm->summaries_len);
  pthread_mutex_destroy (&bm->lower_lock);
  free (bm);
}

uint64_t
bitmap_size (const struct bitmap *bm)
{
  return bm->size;
}

unsigned
bitmap_shift (const struct bitmap *bm)
{
  return bm->shift;
}

uint64_t
bitmap_granularity (const struct bitmap *bm)
{
  return UINT64_C (1) << bm->shift;
}

uint64_t
bitmap_bits (const struct bitmap *bm)
{
  return bm->nr_bits;
}

uint64_t
bitmap_count_bits (const struct bitmap *bm)
{
  const uint64_t n = __atomic_load_n (&bm->count, __ATOMIC_RELAXED);

  /* Marks under way are counted before they are known to be new. */
  return n < bm->nr_bits ? n : bm->nr_bits;
}

uint64_t
bitmap_count (const struct bitmap *bm)
{
  return bitmap_count_bits (bm) << bm->shift;
}

/* words[] becomes the bits first..last (numbers within a block); returns
 * which words have any.
 */
static uint64_t
block_range (uint64_t words[64], unsigned first, unsigned last)
{
  const unsigned f = first / WORD_BITS, l = last / WORD_BITS;

  for (unsigned j = f; j <= l; j++)
    words[j] = UINT64_MAX;
  words[f] &= ~low_bits (first % WORD_BITS);
  words[l] &= low_bits (last % WORD_BITS + 1);
  return low_bits (l + 1) & ~low_bits (f);
}

static void
set_bits (struct bitmap *bm, uint64_t first, uint64_t nr, bool alone)
{
  const uint64_t last = first + nr - 1;
  uint64_t words[64], mask;

  for (uint64_t b = first / BLOCK_BITS; b <= last / BLOCK_BITS; b++) {
    const unsigned from = b == first / BLOCK_BITS ? first % BLOCK_BITS : 0;
    const unsigned to =
      b == last / BLOCK_BITS ? last % BLOCK_BITS : BLOCK_BITS - 1;

    if (alone && to - from == BLOCK_BITS - 1 && bm_flip_block (bm, b, true))
      continue;
    mask = block_range (words, from, to);
    bm_or_block (bm, b, words, mask);
  }
}

void
bm_set_bits (struct bitmap *bm, uint64_t first, uint64_t nr)
{
  set_bits (bm, first, nr, false);
}

/* The granules that a range touches; false if it lies beyond the end. */
static bool
touched (const struct bitmap *bm, uint64_t offset, uint64_t len,
         uint64_t *first, uint64_t *last)
{
  if (offset >= bm->size || len == 0)
    return false;
  if (len > bm->size - offset)
    len = bm->size - offset;
  *first = offset >> bm->shift;
  *last = (offset + len - 1) >> bm->shift;
  return true;
}

void
bitmap_set (struct bitmap *bm, uint64_t offset, uint64_t len)
{
  uint64_t first, last;

  if (!touched (bm, offset, len, &first, &last))
    return;
  if (first / WORD_BITS == last / WORD_BITS)
    bm_or_leaf (bm, first / WORD_BITS,
                low_bits (last - first + 1) << first % WORD_BITS);
  else
    bm_set_bits (bm, first, last - first + 1);
}

void
bitmap_set_alone (struct bitmap *bm, uint64_t offset, uint64_t len)
{
  uint64_t first, last;

  if (touched (bm, offset, len, &first, &last))
    set_bits (bm, first, last - first + 1, true);
}

static void
clear (struct bitmap *bm, uint64_t offset, uint64_t len, bool alone)
{
  uint64_t first, last, words[64], mask, m, i, b;

  if (!touched (bm, offset, len, &first, &last))
    return;
  i = bm_next_leaf (bm, DIRTY, first / WORD_BITS);
  while (i <= last / WORD_BITS) {
    unsigned from, to;

    b = i / WORD_BITS;
    from = b == first / BLOCK_BITS ? first % BLOCK_BITS : 0;
    to = b == last / BLOCK_BITS ? last % BLOCK_BITS : BLOCK_BITS - 1;
    if (!alone || to - from < BLOCK_BITS - 1 ||
        !bm_flip_block (bm, b, false)) {
      mask = block_range (words, from, to) & bm_load_any (bm, 1, b);
      for (m = mask; m; m &= m - 1)
        words[__builtin_ctzll (m)] = ~words[__builtin_ctzll (m)];
      bm_and_block (bm, b, words, mask);
    }
    i = bm_next_leaf (bm, DIRTY, (b + 1) * WORD_BITS);
  }
}

void
bitmap_clear (struct bitmap *bm, uint64_t offset, uint64_t len)
{
  clear (bm, offset, len, false);
}

void
bitmap_clear_alone (struct bitmap *bm, uint64_t offset, uint64_t len)
{
  clear (bm, offset, len, true);
}

void
bitmap_clear_all (struct bitmap *bm)
{
  bitmap_clear (bm, 0, bm->size);
}

const uint64_t *
bitmap_leaves (const struct bitmap *bm)
{
  return bm->levels[0].any;
}

bool
bitmap_test (const struct bitmap *bm, uint64_t offset)
{
  const uint64_t bit = offset >> bm->shift;

  return offset < bm->size &&
         (leaf_get (bm, bit / WORD_BITS) >> bit % WORD_BITS & 1);
}
