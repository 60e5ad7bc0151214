/* nbdferry - test of a bitmap's bits as bytes
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

#include "wire.h"

#define SEED  UINT64_C (20240607)
#define SHIFT 9
#define G     (UINT64_C (1) << SHIFT)

static uint64_t random_state = SEED;

static uint64_t
rnd (uint64_t n)
{
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (random_state * UINT64_C (0x2545f4914f6cdd1d)) % n;
}

static struct bitmap *
new_bits (uint64_t nr)
{
  struct error err;
  struct bitmap *bm = bitmap_new (nr * G - rnd (G), SHIFT, &err);

  assert_non_null (bm);
  return bm;
}

static bool
bit (const struct bitmap *bm, uint64_t i)
{
  return bitmap_test (bm, i * G);
}

/* Stretches of every kind: empty, full, sparse, dense, alternating. */
static void
fill (struct bitmap *bm)
{
  const uint64_t nr = bitmap_bits (bm);
  uint64_t i = 0, n, density;

  while (i < nr) {
    density = rnd (5);
    for (n = rnd (rnd (2) ? 40 : 1500) + 1; n > 0 && i < nr; n--, i++)
      if (density == 0   ? false
          : density == 1 ? true
          : density == 2 ? rnd (50) == 0
          : density == 3 ? rnd (2) == 0
                         : i % 2 == 0)
        bitmap_set (bm, i * G, 1);
  }
}

/* One bit after the other. */
struct naive_bits {
  const uint8_t *p;
  size_t at;
};

static unsigned
naive_bit (struct naive_bits *b)
{
  unsigned bit = b->p[b->at / 8] >> b->at % 8 & 1;

  b->at++;
  return bit;
}

static uint64_t
naive_rice (struct naive_bits *b, unsigned k)
{
  uint64_t q = 0, x = 0;

  while (q < 20 && naive_bit (b))
    q++;
  if (q == 20) {
    for (unsigned i = 0; i < 32; i++)
      x |= (uint64_t) naive_bit (b) << i;
    return x;
  }
  for (unsigned i = 0; i < k; i++)
    x |= (uint64_t) naive_bit (b) << i;
  return q << k | x;
}

/* The format once more, as simply as can be: bits into an array. */
static void
naive_decode (const uint8_t *p, size_t len, uint8_t *bits)
{
  const uint8_t *end = p + len;

  while (p < end) {
    uint64_t v = 0, n;
    unsigned s = 0;

    do
      v |= (uint64_t) (*p & 127) << s, s += 7;
    while (*p++ & 128);
    n = v >> 2;
    if ((v & 3) == 2) {
      for (uint64_t i = 0; i < n * 64; i++)
        if (p[i / 8] >> i % 8 & 1)
          bits[i] = 1;
      p += n * 8;
      bits += n * 64;
    }
    else if ((v & 3) == 3) {
      struct naive_bits b = { p + 2, 0 };

      for (uint64_t i = 0; i < n; i++) {
        uint64_t run = naive_rice (&b, p[0]) + 1;

        memset (bits, 1, run);
        bits += run;
        if (i + 1 < n)
          bits += naive_rice (&b, p[1]) + 1;
      }
      p += 2 + (b.at + 7) / 8;
    }
    else {
      memset (bits, v & 3, n);
      bits += n;
    }
  }
}

#define GUARD 0xa5

/* Write [first, last) in pieces of random lengths, in as many sections as
 * the capacity makes necessary.  Each section must decode to the same bits.
 */
static void
round_trip (const struct bitmap *bm, uint64_t first, uint64_t last, size_t cap,
            uint64_t piece)
{
  const uint64_t nr = bitmap_bits (bm), size = bitmap_size (bm);
  struct bitmap *copy;
  struct error err;
  uint8_t *buf = malloc (cap + 1), *bits = calloc (nr + 128, 1);
  uint64_t at = first * G, end, to, got;
  struct bits_writer w;

  copy = bitmap_new (size, SHIFT, &err);
  assert_non_null (copy);
  while (at < last * G && at < size) {
    const uint64_t section = at / G;

    memset (buf, GUARD, cap + 1);
    bits_writer_init (&w, buf, cap, section);
    got = at;
    do {
      /* Also pieces that begin and end within a granule. */
      end = got + 1 + rnd (piece * G);
      if (end > last * G)
        end = last * G;
      if (end > size)
        end = size;
      got = bits_write (&w, bm, got, end);
    } while (got == end && got < last * G && got < size);
    assert_true (w.len <= cap);
    assert_int_equal (buf[cap], GUARD);
    assert_true (got == end || got % G == 0 || got == at);
    assert_true (got > at); /* so large are all buffers */
    to = bitmap_bits_for (got, SHIFT);
    /* What goes into a packet as the section's end. */
    assert_true (w.next <= to);
    assert_int_equal (bits_check (buf, w.len, section, to - section, nr, &err),
                      0);
    assert_int_equal (bits_apply (copy, buf, w.len, section, to - section,
                                  &err),
                      0);
    naive_decode (buf, w.len, bits + section);
    at = got;
  }
  for (uint64_t i = 0; i < nr; i++) {
    assert_int_equal (bit (copy, i), i >= first && i < last && bit (bm, i));
    assert_int_equal (bit (copy, i), bits[i]);
  }
  assert_true (bitmap_is_consistent (copy));
  bitmap_free (copy);
  free (buf);
  free (bits);
}

static void
test_round_trip (void **state)
{
  for (unsigned round = 0; round < 400; round++) {
    const uint64_t nr = rnd (round % 10 ? 700 : 20000) + 1;
    struct bitmap *bm = new_bits (nr);
    uint64_t first = rnd (nr);

    fill (bm);
    round_trip (bm, 0, nr, 1 << 20, nr);
    round_trip (bm, 0, nr, 20 + rnd (60), nr);
    round_trip (bm, first, first + rnd (nr - first + 1), 1 << 20, 30);
    round_trip (bm, first, nr, 20 + rnd (2000), 200);
    bitmap_free (bm);
  }
}

/* However little room there is: never a byte too far, and what is said to be
 * in is in.
 */
static void
test_capacity (void **state)
{
  struct bitmap *bm = new_bits (3000);
  const uint64_t size = bitmap_size (bm);
  struct error err;

  fill (bm);
  for (size_t cap = 0; cap < 300; cap++) {
    struct bitmap *copy = bitmap_new (size, SHIFT, &err);
    uint8_t buf[301];
    struct bits_writer w;
    uint64_t got, in, i;

    memset (buf, GUARD, sizeof buf);
    bits_writer_init (&w, buf, cap, 0);
    got = bits_write (&w, bm, 0, size);
    assert_true (w.len <= cap);
    for (i = w.len; i < sizeof buf; i++)
      assert_int_equal (buf[i], GUARD);
    assert_true (got == size || got % G == 0);
    in = bitmap_bits_for (got, SHIFT);
    assert_int_equal (bits_apply (copy, buf, w.len, 0, in, &err), 0);
    for (i = 0; i < in; i++)
      assert_int_equal (bit (bm, i), bit (copy, i));
    for (; i < bitmap_bits (bm); i++)
      assert_false (bit (copy, i));
    bitmap_free (copy);
  }
  bitmap_free (bm);
}

static size_t
encoded_size (const struct bitmap *bm)
{
  static uint8_t buf[1 << 20];
  struct bits_writer w;

  bits_writer_init (&w, buf, sizeof buf, 0);
  assert_int_equal (bits_write (&w, bm, 0, UINT64_MAX), UINT64_MAX);
  return w.len;
}

/* What is simple is small; what is random costs its literals. */
static void
test_compact (void **state)
{
  const uint64_t nr = UINT64_C (1) << 28;
  struct bitmap *bm = new_bits (nr);
  struct bits_writer w;
  uint8_t buf[64];

  assert_int_equal (encoded_size (bm), 0);
  bitmap_set (bm, 0, UINT64_MAX);
  assert_true (encoded_size (bm) <= 5);
  bitmap_clear (bm, 0, 12345 * G);
  bitmap_clear (bm, 99999999 * G, G);
  assert_true (encoded_size (bm) <= 15);
  bitmap_free (bm);

  bm = new_bits (64000);
  for (uint64_t i = 0; i < 64000; i++)
    if (rnd (2))
      bitmap_set (bm, i * G, 1);
  assert_true (encoded_size (bm) < 64000 / 8 + 64);
  bitmap_clear_all (bm);

  /* Many clean calls make one skip, and a granule that two calls share is
   * written once.
   */
  bitmap_set (bm, 50000 * G, 1);
  bits_writer_init (&w, buf, sizeof buf, 0);
  for (uint64_t at = 0; at < 64000 * G; at += G / 2)
    bits_write (&w, bm, at, at + G / 2);
  assert_int_equal (w.len, 3 + 1);
  bitmap_free (bm);
}

/* The example of docs/protocol.md. */
static void
test_example (void **state)
{
  static const uint8_t section[] = { 0x0f, 0x00, 0x02, 0x28, 0x02 };
  struct bitmap *bm = new_bits (20);
  struct error err;

  assert_int_equal (bits_apply (bm, section, sizeof section, 0, 12, &err), 0);
  for (unsigned i = 0; i < 20; i++)
    assert_int_equal (bit (bm, i), i == 0 || i == 4 || i == 10 || i == 11);
  bitmap_free (bm);
}

/* The binary entropy of a million bits with as many per mille set, bytes. */
static const struct {
  unsigned per_mille, entropy;
} entropies[] = {
  { 1, 1426 },    { 10, 10099 },  { 50, 35800 },  { 100, 58624 },
  { 200, 90241 }, { 300, 110161 }, { 500, 125000 }, { 700, 110161 },
  { 900, 58624 }, { 990, 10099 },
};

/* At random, whatever the density: within a fifth of the entropy, and never
 * more than a hundredth above the plain bits.
 */
static void
test_entropy (void **state)
{
  const uint64_t nr = 1000000;
  struct error err;

  for (unsigned k = 0; k < sizeof entropies / sizeof entropies[0]; k++) {
    struct bitmap *bm = new_bits (nr), *copy;
    static uint8_t buf[200000];
    struct bits_writer w;
    struct range a = { 0, 0 }, b = { 0, 0 };

    for (uint64_t i = 0; i < nr; i++)
      if (rnd (1000) < entropies[k].per_mille)
        bitmap_set (bm, i * G, 1);
    bits_writer_init (&w, buf, sizeof buf, 0);
    assert_int_equal (bits_write (&w, bm, 0, UINT64_MAX), UINT64_MAX);
    if (w.len > entropies[k].entropy * 1.2 || w.len > nr / 8 * 1.01)
      fail_msg ("%u in a thousand: %zu bytes, the entropy is %u",
                entropies[k].per_mille, w.len, entropies[k].entropy);
    copy = bitmap_new (bitmap_size (bm), SHIFT, &err);
    assert_int_equal (bits_apply (copy, buf, w.len, 0, nr, &err), 0);
    while (bitmap_next_dirty (bm, a.end, UINT64_MAX, &a)) {
      assert_true (bitmap_next_dirty (copy, b.end, UINT64_MAX, &b));
      assert_true (a.start == b.start && a.end == b.end);
    }
    assert_false (bitmap_next_dirty (copy, b.end, UINT64_MAX, &b));
    bitmap_free (bm);
    bitmap_free (copy);
  }
}

/* Short gaps, and among them very long ones, up to beyond what one code can
 * hold.
 */
static void
test_long_runs (void **state)
{
  const char *sanitizer = getenv ("FERRY_SANITIZE");
  /* What ThreadSanitizer notes of 1 GiB of words takes 22 GiB. */
  const bool small = sanitizer && strstr (sanitizer, "thread");
  const uint64_t nr = UINT64_C (5) << 32;
  struct bitmap *bm = new_bits (nr), *copy;
  struct range a = { 0, 0 }, b = { 0, 0 };
  static uint8_t buf[1 << 20];
  uint64_t at = 7;
  struct bits_writer w;
  struct error err;

  for (unsigned i = 0; i < 3000 && at < nr; i++) {
    uint64_t run = i % 500 == 499 ? 30000 : 1 + rnd (3);

    if (i == 1700 && !small)
      run = (UINT64_C (1) << 32) - 1 + rnd (3);
    bitmap_set (bm, at * G, run * G);
    at += run + (i % 100 == 99 ? rnd (1 << 22) : 1 + rnd (9));
    if (i == 800 || i == 801)
      at += (UINT64_C (1) << 32) - 5 + rnd (8);
  }
  bits_writer_init (&w, buf, sizeof buf, 0);
  assert_int_equal (bits_write (&w, bm, 0, UINT64_MAX), UINT64_MAX);
  assert_true (w.len < 3000);
  copy = bitmap_new (bitmap_size (bm), SHIFT, &err);
  assert_int_equal (bits_apply (copy, buf, w.len, 0, bitmap_bits (bm), &err),
                    0);
  while (bitmap_next_dirty (bm, a.end, UINT64_MAX, &a)) {
    assert_true (bitmap_next_dirty (copy, b.end, UINT64_MAX, &b));
    assert_true (a.start == b.start && a.end == b.end);
  }
  assert_false (bitmap_next_dirty (copy, b.end, UINT64_MAX, &b));
  bitmap_free (bm);
  bitmap_free (copy);
}

struct bad {
  const char *name, *bytes;
  size_t len;
};

#define BYTES(s) s, sizeof s - 1

/* In a section of 100 bits at bit 30 of 200. */
static const struct bad bad[] = {
  { "cut number", BYTES ("\x85") },
  { "overlong number", BYTES ("\x85\x00") },
  { "long overlong number",
    BYTES ("\x85\x80\x80\x80\x80\x80\x80\x80\x80\x00") },
  { "number of 65 bits", BYTES ("\x81\x80\x80\x80\x80\x80\x80\x80\x80\x02") },
  { "number of 11 bytes",
    BYTES ("\x81\x80\x80\x80\x80\x80\x80\x80\x80\x81\x00") },
  { "number without end",
    BYTES ("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff") },
  { "skip of 0", BYTES ("\x00") },
  { "set of 0", BYTES ("\x01") },
  { "words of 0", BYTES ("\x02") },
  { "runs of 0", BYTES ("\x03\0\0\0") },
  { "runs without parameters", BYTES ("\x07\0") },
  { "runs without bits", BYTES ("\x07\0\0") },
  { "runs with a parameter of 32", BYTES ("\x07\x20\0\0\0\0\0\0") },
  { "gaps with a parameter of 255", BYTES ("\x0b\0\xff\0\0\0\0\0") },
  { "2 runs, cut off", BYTES ("\x0b\0\x03\xf0") },
  { "2 runs, cut off in the gap", BYTES ("\x0b\0\x1f\0\0") },
  { "2^62-1 runs", BYTES ("\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"
                          "\0\0\0\0") },
  { "a run of 101", BYTES ("\x07\x07\0\xc8") },
  { "2 runs, the second beyond the end", BYTES ("\x0b\0\x07\x88\x01\0") },
  { "a gap beyond the end", BYTES ("\x0b\0\x07\x8c\x01\0") },
  { "a bit after the runs", BYTES ("\x07\0\0\x02") },
  { "a long code that was not needed", BYTES ("\x07\x02\0\xff\xff\xff\x04"
                                             "\0\0\0") },
  { "a long code, beyond the end", BYTES ("\x07\x02\0\xff\xff\xff\xff"
                                         "\xff\xff\xff") },
  { "a code of more than 32 bits", BYTES ("\x07\x1f\0\x03\0\0\0\0\0") },
  { "set of 101", BYTES ("\x95\x03") },
  { "skip of 101", BYTES ("\x94\x03") },
  { "skip of 100, set of 1", BYTES ("\x90\x03\x05") },
  { "set of 2^62-1", BYTES ("\xfd\xff\xff\xff\xff\xff\xff\xff\xff\x01") },
  { "words of 2^62-1", BYTES ("\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01"
                              "abcdefgh") },
  /* 2^61: times 8 it is 2^64 */
  { "words of 2^61", BYTES ("\x82\x80\x80\x80\x80\x80\x80\x80\x80\x01"
                            "abcdefgh") },
  { "no word", BYTES ("\x06") },
  { "7 bytes of a word", BYTES ("\x06"
                                "1234567") },
  { "2 words, bit 100 set", BYTES ("\x0a\1\0\0\0\0\0\0\0"
                                   "\0\0\0\0\x10\0\0\0") },
  { "2 words, bit 127 set", BYTES ("\x0a\1\0\0\0\0\0\0\0"
                                   "\0\0\0\0\0\0\0\x80") },
  { "3 words", BYTES ("\x0e\1\0\0\0\0\0\0\0"
                      "\0\0\0\0\0\0\0\0"
                      "\0\0\0\0\0\0\0\0") },
  { "2 words, set of 1", BYTES ("\x0a\1\0\0\0\0\0\0\0"
                                "\0\0\0\0\0\0\0\0\x05") },
  { "good, then bad", BYTES ("\x05\x04\x05\x00") },
};

static const struct bad good[] = {
  { "nothing", BYTES ("") },
  { "set of 100", BYTES ("\x91\x03") },
  { "skip of 100", BYTES ("\x90\x03") },
  { "skip of 99, set of 1", BYTES ("\x8c\x03\x05") },
  { "2 words, bit 99 set", BYTES ("\x0a\1\0\0\0\0\0\0\0"
                                  "\0\0\0\0\x08\0\0\0") },
  { "skip of 99, a word of bit 0", BYTES ("\x8c\x03\x06\1\0\0\0\0\0\0\0") },
  { "3 runs", BYTES ("\x0f\0\x02\x28\x02") },
  { "a run of 100", BYTES ("\x07\x07\0\xc6") },
  { "a long code of 90", BYTES ("\x07\x02\0\xff\xff\x9f\x05\0\0\0") },
};

static void
test_refused (void **state)
{
  struct bitmap *bm = new_bits (200);
  struct error err;

  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    err.errnum = 0;
    /* A copy of that size, so that a sanitizer sees reads beyond it. */
    uint8_t *p = malloc (bad[i].len);

    memcpy (p, bad[i].bytes, bad[i].len);
    if (bits_check (p, bad[i].len, 30, 100, 200, &err) != -1)
      fail_msg ("accepted: %s", bad[i].name);
    assert_int_equal (err.errnum, EBADMSG);
    assert_true (strlen (err.msg) > 20);
    assert_int_equal (bits_apply (bm, p, bad[i].len, 30, 100, &err), -1);
    assert_int_equal (bitmap_count_bits (bm), 0);
    free (p);
  }
  /* A section outside the bitmap. */
  assert_int_equal (bits_check (NULL, 0, 201, 0, 200, &err), -1);
  assert_int_equal (bits_check (NULL, 0, 101, 100, 200, &err), -1);
  assert_int_equal (bits_check (NULL, 0, UINT64_MAX, 2, 200, &err), -1);
  assert_int_equal (bits_check (NULL, 0, 2, UINT64_MAX, 200, &err), -1);
  assert_int_equal (bits_check (NULL, 0, 200, 0, 200, &err), 0);
  assert_int_equal (bits_apply (bm, NULL, 0, 150, 51, &err), -1);
  assert_int_equal (bits_check (NULL, 0, 201, 0, 200, NULL), -1);
  bitmap_free (bm);
}

static void
test_accepted (void **state)
{
  for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
    struct bitmap *bm = new_bits (200);
    uint8_t bits[256] = { 0 };
    struct error err;

    if (bits_apply (bm, (const uint8_t *) good[i].bytes, good[i].len, 30, 100,
                    &err) != 0)
      fail_msg ("%s: %s", good[i].name, err.msg);
    naive_decode ((const uint8_t *) good[i].bytes, good[i].len, bits + 30);
    for (unsigned b = 0; b < 200; b++)
      assert_int_equal (bit (bm, b), bits[b]);
    bitmap_free (bm);
  }
}

/* Prefixes and mutations of what is good: refused, or within the section. */
static void
test_mutated (void **state)
{
  struct bitmap *bm = new_bits (5000), *copy = new_bits (5000);
  uint8_t buf[2000], cut[2000];
  struct bits_writer w;
  struct error err;
  struct range run;
  unsigned refused = 0, rounds = 20000;

  for (unsigned i = 0; i < rounds; i++) {
    size_t len;

    if (i % 500 == 0) {
      bitmap_clear_all (bm);
      fill (bm);
      bits_writer_init (&w, buf, sizeof buf, 1000);
      bits_write (&w, bm, 1000 * G, 4000 * G);
    }
    len = i % 2 ? w.len : rnd (w.len + 1);
    memcpy (cut, buf, len);
    for (unsigned n = rnd (4); n > 0 && len > 0; n--)
      cut[rnd (len)] = rnd (256);
    if (bits_apply (copy, cut, len, 1000, 3000, &err) == -1) {
      refused++;
      assert_int_equal (bitmap_count_bits (copy), 0);
    }
    assert_false (bitmap_next_dirty (copy, 0, 1000 * G, &run));
    assert_false (bitmap_next_dirty (copy, 4000 * G, UINT64_MAX, &run));
    bitmap_clear_all (copy);
  }
  assert_true (refused > 100 && refused < rounds);
  bitmap_free (bm);
  bitmap_free (copy);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_round_trip), cmocka_unit_test (test_capacity),
    cmocka_unit_test (test_compact),    cmocka_unit_test (test_example),
    cmocka_unit_test (test_entropy),    cmocka_unit_test (test_long_runs),
    cmocka_unit_test (test_refused),
    cmocka_unit_test (test_accepted),   cmocka_unit_test (test_mutated),
  };

  printf ("seed %llu\n", (unsigned long long) SEED);
  return cmocka_run_group_tests (tests, NULL, NULL);
}
