/* nbdferry - test of hints: a hint never hides a write
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Threads mark as a write does, while chunks are cleared from the ship map.
 */
#include <config.h>

/* cmocka passes every test a state that most do not want. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "outgoing-impl.h"

#define G      UINT64_C (4096)
#define CHUNKS (UINT64_C (1) << 20)
#define SIZE   (CHUNKS * G)
#define ROUNDS 60
#define WRITES 3000

struct setting {
  struct bitmap *ship, *watch, *vacant;
  atomic_bool go;
  uint32_t seed;
  uint32_t at[WRITES]; /* chunks that were written */
};

/* What drive/io.c does around a write. */
static void *
writer (void *arg)
{
  struct setting *s = arg;
  uint32_t x = s->seed | 1;

  while (!atomic_load (&s->go))
    ;
  for (unsigned i = 0; i < WRITES; i++) {
    uint64_t at;

    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    s->at[i] = x % CHUNKS;
    at = s->at[i] * G;
    for (unsigned twice = 0; twice < 2; twice++) {
      bitmap_set (s->watch, at, G);
      bitmap_set (s->ship, at, G);
    }
  }
  return NULL;
}

static void
test_race (void **state)
{
  struct setting s = { 0 };
  unsigned used = 0;

  for (unsigned round = 0; round < ROUNDS; round++) {
    struct hints_fs fs = { .size = SIZE, .known = true };
    uint64_t cleared;
    pthread_t t;

    s.ship = bitmap_new (SIZE, 12, NULL);
    s.watch = bitmap_new (SIZE, 12, NULL);
    s.vacant = bitmap_new (SIZE, 12, NULL);
    assert_true (s.ship && s.watch && s.vacant);
    bitmap_set (s.ship, 0, SIZE);
    bitmap_set (s.vacant, 0, SIZE);
    s.seed = round * 7919 + 1;
    atomic_store (&s.go, false);
    assert_int_equal (pthread_create (&t, NULL, writer, &s), 0);
    atomic_store (&s.go, true);
    cleared = hints_clear (s.ship, s.watch, s.vacant, &fs);
    pthread_join (t, NULL);
    used += fs.known;
    for (unsigned i = 0; i < WRITES; i++)
      if (!bitmap_test (s.ship, s.at[i] * G))
        fail_msg ("round %u: the write to chunk %u is lost", round, s.at[i]);
    if (!fs.known) {
      assert_int_equal (cleared, 0);
      assert_int_equal (bitmap_count_bits (s.ship), CHUNKS);
      assert_string_equal (fs.reason,
                           "it was written to while its maps were read");
    }
    else
      assert_true (cleared <= SIZE);
    bitmap_free (s.ship);
    bitmap_free (s.watch);
    bitmap_free (s.vacant);
  }
  printf ("%u of %u were used\n", used, ROUNDS);
  assert_true (used > 0);
}

/* Only what is free, in the place of a file system that is believed. */
static void
test_clear (void **state)
{
  struct bitmap *ship = bitmap_new (SIZE, 12, NULL);
  struct bitmap *watch = bitmap_new (SIZE, 12, NULL);
  struct bitmap *vacant = bitmap_new (SIZE, 12, NULL);
  struct hints_fs fs = { .offset = 100 * G, .size = 1000 * G };

  bitmap_set (ship, 0, SIZE);
  bitmap_set (vacant, 200 * G, 50 * G);
  bitmap_set (vacant, 300 * G, G);
  bitmap_set (vacant, 1099 * G, 2 * G); /* beyond its end */
  bitmap_set (watch, 99 * G, G);
  bitmap_set (watch, 1100 * G, G);
  assert_int_equal (hints_clear (ship, watch, vacant, &fs), 0);
  assert_int_equal (bitmap_count_bits (ship), CHUNKS);
  fs.known = true;
  assert_int_equal (hints_clear (ship, watch, vacant, &fs), 52 * G);
  assert_true (fs.known);
  assert_int_equal (bitmap_count_bits (ship), CHUNKS - 52);
  assert_false (bitmap_test (ship, 200 * G));
  assert_true (bitmap_test (ship, 1100 * G));
  bitmap_set (ship, 0, SIZE);
  bitmap_set (watch, 1099 * G, G);
  assert_int_equal (hints_clear (ship, watch, vacant, &fs), 0);
  assert_false (fs.known);
  assert_int_equal (bitmap_count_bits (ship), CHUNKS);
  bitmap_free (ship);
  bitmap_free (watch);
  bitmap_free (vacant);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_clear),
    cmocka_unit_test (test_race),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
