/* nbdferry - test of compression, and of giving it up
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

/* cmocka passes every test a state that most do not want. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "compress.h"
#include "packet.h"

#define LEN (1 << 20)

static uint8_t payload[LEN], before[LEN];
static uint64_t random_state = 20240607;

static uint64_t
rnd (void)
{
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * UINT64_C (0x2545f4914f6cdd1d);
}

static void
fill_random (void)
{
  for (size_t i = 0; i < LEN; i += 8) {
    uint64_t r = rnd ();

    memcpy (payload + i, &r, 8);
  }
}

/* Words of a small language. */
static void
fill_text (void)
{
  memset (payload, ' ', LEN);
  for (size_t i = 0; i < LEN; i += 8)
    snprintf ((char *) payload + i, 8, "w%05u", (unsigned) (rnd () % 5000));
}

/* Whatever happens, what arrives is what was there. */
static size_t
pass (struct compressor *c, enum migrate_compression how, size_t len)
{
  static uint8_t out[LEN];
  size_t r;

  memcpy (before, payload, len);
  r = compress_if_it_pays (c, how, payload, len);
  if (r == 0)
    assert_memory_equal (payload, before, len);
  else {
    assert_true (r <= len - len / 8);
    assert_int_equal (
      decompress_payload (how == MIGRATE_COMPRESSION_ZLIB ? PACKET_ZLIB
                                                          : PACKET_ZSTD,
                          out, len, payload, r, NULL), 0);
    assert_memory_equal (out, before, len);
  }
  return r;
}

static void
test_pays (void **state)
{
  for (enum migrate_compression how = MIGRATE_COMPRESSION_ZLIB;
       how <= MIGRATE_COMPRESSION_ZSTD; how++) {
    struct compressor c = { 0 };

    for (size_t len = 256; len <= LEN; len *= 2) {
      fill_text ();
      assert_int_equal (pass (&c, how, len) > 0, len >= 512);
      assert_int_equal (pass (&c, MIGRATE_COMPRESSION_NONE, len), 0);
    }
    compressor_free (&c);
  }
}

static void
test_random (void **state)
{
  struct compressor c = { 0 };

  for (unsigned i = 0; i < 40; i++) {
    fill_random ();
    assert_int_equal (pass (&c, MIGRATE_COMPRESSION_ZSTD, LEN), 0);
  }
  assert_int_equal (c.hopeless, 40);
  /* It ends with the first that shrinks. */
  fill_text ();
  assert_true (pass (&c, MIGRATE_COMPRESSION_ZSTD, LEN) > 0);
  assert_int_equal (c.hopeless, 0);
  assert_int_equal (c.trusting, 0);
  compressor_free (&c);
}

/* What samples cannot see is found in time, and then they are not heeded. */
static void
test_sample_is_wrong (void **state)
{
  struct compressor c = { 0 };
  unsigned raw = 0, packed = 0;

  for (unsigned i = 0; i < 40; i++) {
    fill_random ();
    for (size_t at = LEN / 8; at < LEN; at += LEN / 8)
      for (size_t k = 0; k < LEN / 8; k += 4096)
        memcpy (payload + at + k, payload + (k + at / 8) % (LEN / 8), 2048);
    if (pass (&c, MIGRATE_COMPRESSION_ZSTD, LEN) == 0)
      raw++;
    else
      packed++;
  }
  printf ("%u raw, %u packed\n", raw, packed);
  assert_true (raw < 20);
  assert_true (packed >= 20);
  compressor_free (&c);
}

static size_t
size_at (enum migrate_compression how, unsigned level)
{
  struct migrate_params params = { .compression = how,
                                   .zlib_level = level,
                                   .zstd_level = level };
  struct compressor c = { 0 };
  size_t r;

  random_state = 7;
  fill_text ();
  compressor_set_level (&c, &params);
  r = pass (&c, how, LEN);
  compressor_free (&c);
  return r;
}

static void
test_levels (void **state)
{
  const size_t one = size_at (MIGRATE_COMPRESSION_ZLIB, 1);
  struct compressor c = { 0 };
  const struct migrate_params defaults = MIGRATE_PARAMS_DEFAULT;

  assert_int_equal (defaults.zlib_level, 1);
  assert_int_equal (defaults.zstd_level, 1);
  /* 0 of zlib does not compress, that of zstd is its own default. */
  assert_int_equal (size_at (MIGRATE_COMPRESSION_ZLIB, 0), 0);
  assert_true (size_at (MIGRATE_COMPRESSION_ZSTD, 0) > 0);
  assert_true (size_at (MIGRATE_COMPRESSION_ZLIB, 9) <
               size_at (MIGRATE_COMPRESSION_ZLIB, 1));
  assert_true (size_at (MIGRATE_COMPRESSION_ZSTD, 15) <
               size_at (MIGRATE_COMPRESSION_ZSTD, 1));
  random_state = 7;
  fill_text ();
  assert_int_equal (pass (&c, MIGRATE_COMPRESSION_ZLIB, LEN), one);
  compressor_free (&c);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_pays),
    cmocka_unit_test (test_random),
    cmocka_unit_test (test_sample_is_wrong),
    cmocka_unit_test (test_levels),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
