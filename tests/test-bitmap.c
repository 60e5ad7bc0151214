/* nbdferry - test of the bitmap against a plain array
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

/* cmocka passes every test a state that most do not want. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "bitmap.h"

#define SEED UINT64_C (20240607)

static uint64_t random_state;

static uint64_t
rnd (uint64_t n)
{
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (random_state * UINT64_C (0x2545f4914f6cdd1d)) % n;
}

/* A bitmap, and what it should be: one byte a bit. */
struct pair {
  struct bitmap *bm;
  uint8_t *model;
  uint64_t size, nr;
  unsigned shift;
};

static struct pair
pair_new (uint64_t size, unsigned shift)
{
  struct pair p = { .size = size, .shift = shift };
  struct error err;

  p.bm = bitmap_new (size, shift, &err);
  assert_non_null (p.bm);
  p.nr = bitmap_bits_for (size, shift);
  p.model = calloc (p.nr + 1, 1);
  assert_non_null (p.model);
  return p;
}

static void
pair_free (struct pair *p)
{
  bitmap_free (p->bm);
  free (p->model);
}

static void
model_change (struct pair *p, uint64_t offset, uint64_t len, bool set)
{
  uint64_t first, last;

  if (offset >= p->size || len == 0)
    return;
  if (len > p->size - offset)
    len = p->size - offset;
  first = offset >> p->shift;
  last = (offset + len - 1) >> p->shift;
  memset (p->model + first, set, last - first + 1);
}

static void
change (struct pair *p, uint64_t offset, uint64_t len, bool set)
{
  const bool alone = rnd (2);

  model_change (p, offset, len, set);
  if (set)
    (alone ? bitmap_set_alone : bitmap_set) (p->bm, offset, len);
  else
    (alone ? bitmap_clear_alone : bitmap_clear) (p->bm, offset, len);
}

/* The first granule in [i, end) of this kind, or 'end'. */
static uint64_t
model_find (const struct pair *p, bool dirty, uint64_t i, uint64_t end)
{
  const uint8_t *at = i < end ? memchr (p->model + i, dirty, end - i) : NULL;

  return at ? (uint64_t) (at - p->model) : end;
}

static bool
model_next (const struct pair *p, bool dirty, uint64_t from, uint64_t to,
            struct range *run)
{
  uint64_t i, end;

  if (to > p->size)
    to = p->size;
  if (from >= to)
    return false;
  end = ((to - 1) >> p->shift) + 1;
  i = model_find (p, dirty, from >> p->shift, end);
  if (i == end)
    return false;
  run->start = i << p->shift;
  if (run->start < from)
    run->start = from;
  run->end = model_find (p, !dirty, i, end) << p->shift;
  if (run->end > to)
    run->end = to;
  return true;
}

/* Both give the same run, which is returned. */
static bool
check_next (const struct pair *p, bool dirty, uint64_t from, uint64_t to,
            struct range *run)
{
  struct range a = { 1, 1 };
  bool ra, rb;

  *run = a;
  ra = model_next (p, dirty, from, to, &a);
  rb = dirty ? bitmap_next_dirty (p->bm, from, to, run)
             : bitmap_next_clean (p->bm, from, to, run);
  assert_int_equal (ra, rb);
  assert_int_equal (a.start, run->start);
  assert_int_equal (a.end, run->end);
  return ra;
}

/* How much of a range is dirty, for some ranges. */
static void
check_counts (const struct pair *p)
{
  assert_int_equal (bitmap_count_range (p->bm, 0, UINT64_MAX),
                    bitmap_count_bits (p->bm));
  for (unsigned i = 0; i < 4; i++) {
    uint64_t first = rnd (p->nr + 1), end = first + rnd (20000), n = 0;

    for (uint64_t j = first; j < end && j < p->nr; j++)
      n += p->model[j];
    assert_int_equal (bitmap_count_range (p->bm, first, end), n);
  }
}

/* The whole of the bitmap is the model; counts and tree are right. */
static void
check (const struct pair *p)
{
  struct range run;
  uint64_t n = 0, at, i;

  for (at = 0; check_next (p, true, at, UINT64_MAX, &run); at = run.end)
    n += bitmap_bits_for (run.end, p->shift) - (run.start >> p->shift);
  assert_int_equal (bitmap_count_bits (p->bm), n);
  assert_int_equal (bitmap_count (p->bm), n << p->shift);
  assert_true (bitmap_is_consistent (p->bm));
  check_counts (p);

  for (i = 0; i < 20 && p->size > 0; i++) {
    const uint64_t from = rnd (p->size), to = from + rnd (p->size + 2);

    check_next (p, i & 1, from, to, &run);
    check_next (p, i & 1, 0, to, &run);
    assert_int_equal (bitmap_test (p->bm, from), p->model[from >> p->shift]);
  }
}

static void
test_units (void **state)
{
  struct error err;
  struct bitmap *bm;

  assert_int_equal (bitmap_bits_for (0, 16), 0);
  assert_int_equal (bitmap_words_for (0, 16), 0);
  assert_int_equal (bitmap_bits_for (1, 16), 1);
  assert_int_equal (bitmap_bits_for (65536, 16), 1);
  assert_int_equal (bitmap_bits_for (65537, 16), 2);
  assert_int_equal (bitmap_words_for (64 * 512, 9), 1);
  assert_int_equal (bitmap_words_for (64 * 512 + 1, 9), 2);
  assert_int_equal (bitmap_bits_for (INT64_MAX, 9), UINT64_C (1) << 54);
  assert_int_equal (bitmap_bits_for (INT64_MAX, 31), UINT64_C (1) << 32);

  err.errnum = 0;
  assert_null (bitmap_new (512, BITMAP_MIN_SHIFT - 1, &err));
  assert_int_equal (err.errnum, EINVAL);
  err.errnum = 0;
  assert_null (bitmap_new (512, BITMAP_MAX_SHIFT + 1, &err));
  assert_int_equal (err.errnum, EINVAL);
  err.errnum = 0;
  assert_null (bitmap_new (UINT64_C (1) << 63, 16, &err));
  assert_int_equal (err.errnum, EFBIG);
  /* 2 PiB of leaves: no address space has room for them. */
  err.errnum = 0;
  assert_null (bitmap_new (INT64_MAX, 9, &err));
  assert_int_equal (err.errnum, ENOMEM);
  assert_non_null (strstr (err.msg, "bytes for a bitmap"));

  bm = bitmap_new (70000, 16, &err);
  assert_non_null (bm);
  assert_int_equal (bitmap_size (bm), 70000);
  assert_int_equal (bitmap_shift (bm), 16);
  assert_int_equal (bitmap_granularity (bm), 65536);
  assert_int_equal (bitmap_bits (bm), 2);
  bitmap_free (bm);
  bitmap_free (NULL);
}

static void
test_empty_disk (void **state)
{
  struct pair p = pair_new (0, 16), q = pair_new (0, 16), r = pair_new (0, 20);
  struct range run;

  change (&p, 0, UINT64_MAX, true);
  change (&p, 0, 1, false);
  bitmap_clear_all (p.bm);
  bitmap_merge (p.bm, q.bm);
  bitmap_merge (p.bm, r.bm);
  bitmap_retain (p.bm, q.bm, NULL, NULL);
  bitmap_take (p.bm, q.bm);
  check (&p);
  assert_false (bitmap_next_dirty (p.bm, 0, UINT64_MAX, &run));
  assert_false (bitmap_next_clean (p.bm, 0, UINT64_MAX, &run));
  assert_false (bitmap_test (p.bm, 0));
  pair_free (&p);
  pair_free (&q);
  pair_free (&r);
}

/* Bits around 'b', which is a boundary of words or of levels. */
static void
around (struct pair *p, uint64_t b)
{
  const uint64_t g = UINT64_C (1) << p->shift;

  for (uint64_t from = b - 1; from != b + 2; from++)
    for (uint64_t n = 1; n <= 3; n++) {
      change (p, from * g, n * g, true);
      check (p);
      change (p, from * g + g / 2, 1, false);
      check (p);
      change (p, from * g, n * g, false);
    }
  /* Bytes at the edge of a granule. */
  change (p, b * g - 1, 2, true);
  check (p);
  change (p, 0, b * g, true);
  check (p);
  change (p, 0, b * g + 1, true);
  check (p);
  change (p, b * g - 1, 1, false);
  check (p);
  change (p, 0, p->size, true);
  check (p);
  change (p, b * g, 1, false);
  check (p);
  bitmap_clear_all (p->bm);
  memset (p->model, 0, p->nr);
  check (p);
}

static void
test_boundaries (void **state)
{
  static const uint64_t edges[] = { 1, 64, 64 * 64, 64 * 64 * 64 };
  static const unsigned tails[] = { 0, 1, 511, 512, 1023 };

  for (unsigned e = 0; e < 4; e++)
    for (int d = -1; d <= 1; d++)
      for (unsigned t = 0; t < 5; t++) {
        const uint64_t granules = edges[e] + d;
        struct pair p;

        /* The large ones take long: one tail each. */
        if (e == 3 && t != (unsigned) (d + 1) * 2)
          continue;
        p = pair_new (granules * 1024 + tails[t], 10);
        for (unsigned b = 0; b <= e; b++)
          if (e < 3 || b >= 2)
            around (&p, edges[b]);
        if (p.nr > 1)
          around (&p, p.nr - 1);
        pair_free (&p);
      }
}

static void
random_change (struct pair *p)
{
  const uint64_t g = UINT64_C (1) << p->shift;
  uint64_t offset, len;

  switch (rnd (8)) {
  case 0:
  case 1:
    offset = rnd (p->size);
    len = rnd (g) + 1;
    break;
  case 2:
  case 3: /* at a word's boundary */
    offset = rnd (p->nr / 64 + 1) * 64 * g + rnd (3) - 1;
    len = rnd (3) * 64 * g + rnd (3);
    break;
  case 4: /* at a block's */
    offset = rnd (p->nr / 4096 + 1) * 4096 * g + rnd (3) - 1;
    len = rnd (2) * 4096 * g + rnd (3);
    break;
  case 5: /* beyond the end */
    offset = p->size - rnd (p->size / 2 + 1);
    len = UINT64_MAX - rnd (4);
    break;
  default:
    offset = rnd (p->size);
    len = rnd (p->size);
    break;
  }
  change (p, offset, len, rnd (5) < 3);
}

static void
test_random (void **state)
{
  for (unsigned shift = BITMAP_MIN_SHIFT; shift <= BITMAP_MAX_SHIFT; shift++)
    for (unsigned round = 0; round < 4; round++) {
      const uint64_t g = UINT64_C (1) << shift;
      uint64_t size = (rnd (round < 2 ? 300 : 9000) + 1) * g;
      struct pair p;

      size -= round & 1 ? 512 * rnd (g / 512) : rnd (g);
      p = pair_new (size, shift);
      for (unsigned i = 0; i < 150; i++) {
        random_change (&p);
        check (&p);
      }
      pair_free (&p);
    }
}

static void
randomize (struct pair *p, unsigned n)
{
  if (rnd (8) == 0)
    change (p, 0, p->size, true);
  while (n-- > 0)
    random_change (p);
}

static void
test_retain_take_merge (void **state)
{
  for (unsigned round = 0; round < 200; round++) {
    const unsigned shift = 9 + rnd (23);
    const uint64_t size = (rnd (20000) << shift) + rnd (1024) + 1;
    struct pair a = pair_new (size, shift), b = pair_new (size, shift);

    randomize (&a, rnd (20));
    randomize (&b, rnd (20));
    switch (round % 4) {
    case 0:
      bitmap_retain (a.bm, b.bm, NULL, NULL);
      for (uint64_t i = 0; i < a.nr; i++)
        a.model[i] &= b.model[i];
      break;
    case 1:
      bitmap_take (a.bm, b.bm);
      for (uint64_t i = 0; i < a.nr; i++)
        a.model[i] |= b.model[i];
      memset (b.model, 0, b.nr);
      break;
    case 2:
      bitmap_merge (a.bm, b.bm);
      for (uint64_t i = 0; i < a.nr; i++)
        a.model[i] |= b.model[i];
      break;
    case 3:
      bitmap_merge (a.bm, a.bm);
      bitmap_clear_all (b.bm);
      memset (b.model, 0, b.nr);
      break;
    }
    check (&a);
    check (&b);
    pair_free (&a);
    pair_free (&b);
  }
}

/* Each granularity into each other.  The model works on bytes. */
static void
merge_shifts (unsigned from, unsigned to)
{
  const unsigned coarse = from > to ? from : to;
  const uint64_t size = (UINT64_C (3) << coarse) + 512 * rnd (9) + rnd (512);
  struct pair src, dst;
  struct range run;
  uint64_t at = 0;

  src = pair_new (size, from);
  dst = pair_new (size, to);
  for (unsigned i = 0; i < 6; i++) {
    const uint64_t offset = rnd (size);

    change (&src, offset, rnd (i & 1 ? size / 8 + 1 : 2), true);
    if (i < 2)
      change (&dst, rnd (size), 1, true);
  }
  while (model_next (&src, true, at, size, &run)) {
    model_change (&dst, run.start, run.end - run.start, true);
    at = run.end;
  }
  bitmap_merge (dst.bm, src.bm);
  check (&dst);
  check (&src);
  pair_free (&src);
  pair_free (&dst);
}

static void
test_merge_granularities (void **state)
{
  for (unsigned a = BITMAP_MIN_SHIFT; a <= BITMAP_MAX_SHIFT; a++)
    for (unsigned b = BITMAP_MIN_SHIFT; b <= BITMAP_MAX_SHIFT; b++)
      if ((a > b ? a - b : b - a) <= 18 || (a + b) % 3 == 0)
        merge_shifts (a, b);
}

static void
test_new_over (void **state)
{
  static const uint64_t bits[] = {
    1, 63, 64, 65, 4095, 4096, 4097, 10000, 262143, 262144, 262145, 300001
  };

  for (unsigned round = 0; round < 60; round++) {
    const uint64_t nr = bits[round % 12], words = (nr + 63) / 64;
    const uint64_t size = nr * 512 - rnd (512);
    uint64_t *leaves = malloc ((words + 1) * 8);
    struct pair p = { .size = size, .shift = 9, .nr = nr };
    struct error err;

    for (uint64_t i = 0; i <= words; i++) /* the last is not ours */
      leaves[i] =
        rnd (4) ? (round / 12 == 0 ? UINT64_MAX : 0) : rnd (UINT64_MAX);
    leaves[words - 1] |= UINT64_C (1) << 63; /* garbage, but if nr % 64 == 0 */
    leaves[words] = 0x1234;
    p.model = malloc (nr);
    for (uint64_t i = 0; i < nr; i++)
      p.model[i] = ((uint8_t *) leaves)[i / 8] >> i % 8 & 1;
    p.bm = bitmap_new_over (leaves, size, 9, &err);
    assert_non_null (p.bm);
    check (&p);
    for (unsigned i = 0; i < 10; i++)
      random_change (&p);
    check (&p);
    /* The leaves are the caller's, and are what the bitmap says. */
    bitmap_free (p.bm);
    for (uint64_t i = 0; i < words * 64; i++)
      assert_int_equal (((uint8_t *) leaves)[i / 8] >> i % 8 & 1,
                        i < nr ? p.model[i] : 0);
    assert_int_equal (leaves[words], 0x1234);
    free (leaves);
    free (p.model);
  }
}

/* Bits so far apart that only the summaries can find them. */
static void
sparse (uint64_t size, unsigned shift)
{
  const uint64_t nr = bitmap_bits_for (size, shift);
  struct bitmap *bm;
  struct error err;
  struct range run;
  uint64_t at = 0, n = 0, bit[100];

  bm = bitmap_new (size, shift, &err);
  assert_non_null (bm);
  assert_false (bitmap_next_dirty (bm, 0, size, &run));
  assert_true (bitmap_next_clean (bm, 0, UINT64_MAX, &run));
  assert_int_equal (run.start, 0);
  assert_int_equal (run.end, size);
  for (unsigned i = 0; i < 100; i++) {
    bit[i] = nr / 100 * i + rnd (nr / 200);
    bitmap_set (bm, bit[i] << shift, 1);
  }
  assert_int_equal (bitmap_count_bits (bm), 100);
  for (; bitmap_next_dirty (bm, at, size, &run); at = run.end, n++) {
    assert_true (n < 100);
    assert_int_equal (run.start, bit[n] << shift);
    assert_int_equal (run.end, (bit[n] + 1) << shift);
    bitmap_clear (bm, run.start, 1);
  }
  assert_int_equal (n, 100);
  bitmap_set (bm, size - 1, UINT64_MAX);
  assert_true (bitmap_next_dirty (bm, 0, UINT64_MAX, &run));
  assert_int_equal (run.start, (nr - 1) << shift);
  assert_int_equal (run.end, size);
  bitmap_clear_all (bm);
  assert_int_equal (bitmap_count_bits (bm), 0);
  assert_false (bitmap_next_dirty (bm, 0, size, &run));
  bitmap_free (bm);
}

static void
test_64_tib (void **state)
{
  const uint64_t size = UINT64_C (64) << 40;

  sparse (size, 16);
  sparse (size - 512, 16);
}

/* All of 8 TiB, and then all but one granule. */
static void
test_all (void **state)
{
  const uint64_t size = UINT64_C (8) << 40;
  struct bitmap *bm;
  struct error err;
  struct range run;

  bm = bitmap_new (size, 16, &err);
  assert_non_null (bm);
  bitmap_set (bm, 0, size);
  assert_int_equal (bitmap_count (bm), size);
  assert_true (bitmap_next_dirty (bm, 0, size, &run));
  assert_int_equal (run.end, size);
  assert_false (bitmap_next_clean (bm, 0, size, &run));
  bitmap_clear (bm, size / 3, 1);
  assert_true (bitmap_next_clean (bm, 0, size, &run));
  assert_int_equal (run.start, size / 3 >> 16 << 16);
  assert_int_equal (run.end, run.start + 65536);
  assert_false (bitmap_next_clean (bm, run.end, size, &run));
  bitmap_clear_all (bm);
  assert_int_equal (bitmap_count (bm), 0);
  assert_false (bitmap_next_dirty (bm, 0, size, &run));
  assert_true (bitmap_next_clean (bm, 0, size, &run));
  assert_int_equal (run.end, size);
  bitmap_free (bm);
}

static void
test_8_eib (void **state)
{
  const uint64_t size = INT64_MAX;
  struct bitmap *bm;
  struct error err;

  sparse (size, 31);
  bm = bitmap_new (size, 31, &err);
  assert_non_null (bm);
  bitmap_set (bm, size - 5, 100);
  assert_int_equal (bitmap_count_bits (bm), 1);
  assert_int_equal (bitmap_count (bm), UINT64_C (1) << 31);
  assert_true (bitmap_test (bm, size - 1));
  assert_false (bitmap_test (bm, size));
  bitmap_free (bm);

  /* More levels; 16 GiB of addresses. */
  sparse (size, 26);
}

static int
setup (void **state)
{
  random_state = SEED;
  return 0;
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup (test_units, setup),
    cmocka_unit_test_setup (test_empty_disk, setup),
    cmocka_unit_test_setup (test_boundaries, setup),
    cmocka_unit_test_setup (test_random, setup),
    cmocka_unit_test_setup (test_retain_take_merge, setup),
    cmocka_unit_test_setup (test_merge_granularities, setup),
    cmocka_unit_test_setup (test_new_over, setup),
    cmocka_unit_test_setup (test_64_tib, setup),
    cmocka_unit_test_setup (test_all, setup),
    cmocka_unit_test_setup (test_8_eib, setup),
  };

  printf ("seed %llu\n", (unsigned long long) SEED);
  return cmocka_run_group_tests (tests, NULL, NULL);
}
