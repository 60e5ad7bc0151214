/* nbdferry - hashes of blocks, against the hash of each block by itself
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <xxhash.h>

#include "hasher.h"

#define SIZE (3 * 1024 * 1024 + 5 * 512)

static uint8_t data[SIZE];
static uint64_t bytes_read;
static int fail_errno;

/* The disk: runs of data, zeros and holes, which do not keep to blocks. */
static enum extent_type
type_at (uint64_t offset)
{
  uint64_t unit = offset / 512;

  return unit < 2048 ? unit / 37 % 3 : unit < 5000 ? EXTENT_HOLE : EXTENT_DATA;
}

static int
test_pread (void *opaque, void *buf, size_t count, uint64_t offset)
{
  assert_int_equal (offset + count <= SIZE, 1);
  for (size_t i = 0; i < count; i += 512) /* holes are never read */
    assert_int_equal (type_at (offset + i), EXTENT_DATA);
  if (fail_errno) {
    errno = fail_errno;
    return -1;
  }
  bytes_read += count;
  memcpy (buf, data + offset, count);
  return 0;
}

static int
test_extent (void *opaque, uint64_t offset, uint64_t end, struct extent *ext)
{
  uint64_t stop = offset;

  while (stop < end && type_at (stop) == type_at (offset))
    stop += 512;
  *ext = (struct extent){ offset, stop < end ? stop : end, type_at (offset) };
  return 0;
}

static int
plain_pread (void *opaque, void *buf, size_t count, uint64_t offset)
{
  memcpy (buf, data + offset, count);
  return 0;
}

static int
setup (void **state)
{
  srandom (7);
  for (uint64_t i = 0; i < SIZE; i++)
    data[i] = type_at (i) == EXTENT_DATA ? random () : 0;
  /* Data that is zeros hashes as a hole does. */
  memset (data + 2700000, 0, 200000);
  return 0;
}

static void
expect (const uint8_t *hash, uint64_t offset, uint64_t len)
{
  XXH128_canonical_t want;

  XXH128_canonicalFromHash (&want, XXH3_128bits (data + offset, len));
  assert_memory_equal (hash, want.digest, HASH_SIZE);
}

static void
each_block_size (void **state)
{
  struct hash_source with = { SIZE, NULL, test_pread, test_extent };
  struct hash_source without = { SIZE, NULL, plain_pread, NULL };
  static uint8_t out[SIZE / 4096 + 1][HASH_SIZE], some[3][HASH_SIZE];

  for (uint64_t block = HASH_BLOCK_MIN; block <= HASH_BLOCK_MAX; block *= 4)
    for (int i = 0; i < 2; i++) {
      struct hasher h;

      hasher_init (&h, i ? &with : &without, block);
      assert_int_equal (h.nr, (SIZE + block - 1) / block);
      assert_int_equal (hasher_read (&h, 0, h.nr, out[0]), 0);
      for (uint64_t b = 0; b < h.nr; b++)
        expect (out[b], b * block,
                b == h.nr - 1 ? SIZE - b * block : block);
      /* From the middle, and the end. */
      if (h.nr > 5) {
        assert_int_equal (hasher_read (&h, h.nr / 2, 3, some[0]), 0);
        assert_memory_equal (some, out[h.nr / 2], sizeof some);
        assert_int_equal (hasher_read (&h, h.nr - 1, 1, some[0]), 0);
        assert_memory_equal (some, out[h.nr - 1], HASH_SIZE);
      }
    }
}

static void
reads_once (void **state)
{
  struct hash_source with = { SIZE, NULL, test_pread, test_extent };
  static uint8_t out[SIZE / 4096 + 1][HASH_SIZE];
  struct hasher h;
  uint64_t all = 0;

  for (uint64_t at = 0; at < SIZE; at += 512)
    all += type_at (at) == EXTENT_DATA ? 512 : 0;
  hasher_init (&h, &with, 4096);
  bytes_read = 0;
  assert_int_equal (hasher_read (&h, 0, h.nr, out[0]), 0);
  assert_int_equal (bytes_read, all);
  /* A hole in whole blocks costs no read at all. */
  bytes_read = 0;
  assert_int_equal (hasher_read (&h, 300, 200, out[0]), 0);
  assert_int_equal (bytes_read, 0);
}

static void
errors (void **state)
{
  struct hash_source with = { SIZE, NULL, test_pread, test_extent };
  uint8_t out[HASH_SIZE];
  struct error err;
  struct hasher h;

  hasher_init (&h, &with, 65536);
  fail_errno = ENXIO;
  assert_int_equal (hasher_read (&h, 0, 1, out), -1);
  assert_int_equal (errno, ENXIO);
  fail_errno = 0;
  assert_int_equal (hash_block_ok (4096, &err), 0);
  assert_int_equal (hash_block_ok (64 << 20, &err), 0);
  assert_int_equal (hash_block_ok (2048, &err), -1);
  assert_int_equal (hash_block_ok (128 << 20, &err), -1);
  assert_int_equal (hash_block_ok (12288, &err), -1);
  assert_int_equal (hash_block_ok (0, &err), -1);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (each_block_size),
    cmocka_unit_test (reads_once),
    cmocka_unit_test (errors),
  };

  return cmocka_run_group_tests (tests, setup, NULL);
}
