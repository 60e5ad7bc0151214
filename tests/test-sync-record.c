/* nbdferry - samples of a standby: which are kept, and what they notice
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "sync-record.h"

#define SIZE (1 << 20)

struct memory_disk {
  struct disk disk;
  uint8_t data[SIZE];
};

static int
memory_pread (struct disk *d, void *buf, size_t count, uint64_t offset)
{
  memcpy (buf, ((struct memory_disk *) d)->data + offset, count);
  return 0;
}

static const struct disk_ops ops = { .pread = memory_pread };
static struct memory_disk disk = { .disk = { .ops = &ops, .size = SIZE } };

static bool
below_half (void *opaque, uint64_t offset, uint64_t len)
{
  return offset < SIZE / 2;
}

static bool
never (void *opaque, uint64_t offset, uint64_t len)
{
  return false;
}

static int
setup (void **state)
{
  for (size_t i = 0; i < SIZE; i++)
    disk.data[i] = random ();
  return 0;
}

static void
few_are_all_kept (void **state)
{
  struct sync_sampler s;
  uint64_t at;

  sync_sampler_init (&s);
  for (uint64_t i = 0; i < SYNC_FRESH; i++)
    sync_sampler_add (&s, disk.data + i * 4096, 4096, i * 4096);
  assert_int_equal (s.picked.nr, SYNC_FRESH);
  assert_int_equal (sync_samples_check (&s.picked, &disk.disk, NULL, NULL,
                                        &at), 1);
  /* Any byte of them that changes is noticed. */
  for (uint64_t i = 0; i < SYNC_FRESH; i++) {
    disk.data[i * 4096 + 17] ^= 1;
    assert_int_equal (sync_samples_check (&s.picked, &disk.disk, NULL, NULL,
                                          &at), 0);
    assert_int_equal (at, i * 4096);
    assert_int_equal (sync_samples_check (&s.picked, &disk.disk, below_half,
                                          NULL, &at), 1);
    disk.data[i * 4096 + 17] ^= 1;
  }
}

/* Each of many has about the same chance. */
static void
many_are_picked_evenly (void **state)
{
  static unsigned hits[256];

  for (int round = 0; round < 2000; round++) {
    struct sync_sampler s;

    sync_sampler_init (&s);
    for (uint64_t i = 0; i < 256; i++)
      sync_sampler_add (&s, NULL, 512, i * 512);
    assert_int_equal (s.picked.nr, SYNC_FRESH);
    for (size_t i = 0; i < s.picked.nr; i++)
      hits[s.picked.sample[i].offset / 512]++;
  }
  for (int i = 0; i < 256; i++) /* 250 on average, sigma 15 */
    assert_in_range (hits[i], 130, 370);
}

/* A disk of zeros is not taken for one with a little data. */
static void
data_is_found (void **state)
{
  static char piece[1 << 20];

  for (int round = 0; round < 100; round++) {
    struct sync_sampler s;
    bool found = false;

    memset (piece, 0, sizeof piece);
    memset (piece + 512 * (round * 20 + 1), 1, 3);
    sync_sampler_init (&s);
    for (uint64_t i = 0; i < 1000; i++)
      sync_sampler_add (&s, i == 500 ? piece : NULL, sizeof piece,
                        i * sizeof piece);
    assert_int_equal (s.picked.nr, SYNC_FRESH);
    for (size_t i = 0; i < s.picked.nr; i++) {
      const struct sync_sample *a = &s.picked.sample[i];
      const uint64_t at = a->offset % sizeof piece;

      assert_true (at + a->len <= sizeof piece);
      if (a->offset / sizeof piece != 500)
        continue;
      found = true;
      assert_true (a->hash == sync_sample_hash (piece + at, a->len));
      assert_in_range (512 * (round * 20 + 1), at, at + a->len - 1);
    }
    assert_true (found);
    /* And much of it does not drive out all zeros. */
    memset (piece, 1, sizeof piece);
    for (uint64_t i = 1000; i < 2000; i++)
      sync_sampler_add (&s, piece, sizeof piece, i * sizeof piece);
    found = false;
    for (size_t i = 0; i < s.picked.nr; i++)
      found |= s.zero[i];
    assert_true (found);
  }
}

static void
long_ones_are_cut (void **state)
{
  struct sync_sampler s;
  uint64_t at;

  sync_sampler_init (&s);
  for (int i = 0; i < 1000; i++)
    sync_sampler_add (&s, disk.data, SIZE, 0);
  for (size_t i = 0; i < s.picked.nr; i++) {
    assert_int_equal (s.picked.sample[i].len, SYNC_SAMPLE_MAX);
    assert_true (s.picked.sample[i].offset + SYNC_SAMPLE_MAX <= SIZE);
  }
  assert_int_equal (sync_samples_check (&s.picked, &disk.disk, NULL, NULL,
                                        &at), 1);
  /* Zeros, far longer than any buffer. */
  sync_sampler_init (&s);
  sync_sampler_add (&s, NULL, UINT64_C (1) << 40, 4096);
  assert_int_equal (s.picked.nr, 1);
  memset (disk.data, 0, SIZE);
  s.picked.sample[0].offset = 0;
  assert_int_equal (sync_samples_check (&s.picked, &disk.disk, NULL, NULL,
                                        &at), 1);
  setup (NULL);
}

static void
old_ones_stay (void **state)
{
  struct sync_sampler old, fresh;
  struct sync_samples first, merged;
  size_t upper = 0;

  sync_sampler_init (&old);
  for (uint64_t i = 0; i < 100; i++)
    sync_sampler_add (&old, disk.data + i * 8192, 512, i * 8192);
  sync_sampler_init (&fresh);
  sync_samples_merge (&first, &(struct sync_samples){ 0 }, never, NULL, &old);
  assert_int_equal (first.nr, SYNC_FRESH);
  sync_sampler_add (&fresh, disk.data, 512, 0);
  sync_samples_merge (&merged, &first, below_half, NULL, &fresh);
  for (size_t i = 0; i < first.nr; i++)
    upper += first.sample[i].offset >= SIZE / 2;
  assert_int_equal (merged.nr, upper + 1);
  assert_int_equal (merged.sample[0].offset, 0);
  for (size_t i = 1; i < merged.nr; i++)
    assert_true (merged.sample[i].offset >= SIZE / 2);
  /* Never more than there is room for. */
  for (int i = 0; i < 5; i++) {
    sync_samples_merge (&merged, &first, never, NULL, &old);
    first = merged;
  }
  assert_int_equal (merged.nr, SYNC_SAMPLES);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (few_are_all_kept),
    cmocka_unit_test (many_are_picked_evenly),
    cmocka_unit_test (data_is_found),
    cmocka_unit_test (long_ones_are_cut),
    cmocka_unit_test (old_ones_stay),
  };

  return cmocka_run_group_tests (tests, setup, NULL);
}
