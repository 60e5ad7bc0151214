/* nbdferry - test of transactions on bitmaps
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "drive-test.h"

#define GRANULE 4096

static struct drive *d;

static int
open_d (void **state)
{
  tap_reset (state);
  d = try_open ("d", DISK_SIZE, false);
  return d ? 0 : -1;
}

static int
close_d (void **state)
{
  while (d->nr_bitmaps > 0)
    if (transact (d, BITMAP_REMOVE, d->bitmaps[0]->name) == -1)
      return -1;
  close_ok (d);
  return 0;
}

static void
write_at (uint64_t offset)
{
  static const uint8_t sector[512] = { 1 };

  assert_int_equal (drive_pwrite (d, sector, sizeof sector, offset, 0), 0);
}

/* Shorter to write, and to read. */
#define A(what, bitmap) { .type = BITMAP_##what, .target = { d, bitmap } }
#define A_MERGE(from, to)                                               \
  { .type = BITMAP_MERGE, .target = { d, to },                          \
    .sources = &(struct bitmap_ref){ d, from }, .nr_sources = 1 }
#define A_ADD(bitmap, ...)                                              \
  { .type = BITMAP_ADD, .target = { d, bitmap },                        \
    .granularity = GRANULE, __VA_ARGS__ }
#define RUN(...)                                                        \
  do {                                                                  \
    struct bitmap_action a_[] = { __VA_ARGS__ };                        \
                                                                        \
    if (bitmap_transaction (a_, sizeof a_ / sizeof a_[0], &err) == -1)  \
      fail_msg ("%s", err.msg);                                         \
  } while (0)

static uint64_t
count (const char *name)
{
  return bitmap_count_bits (bits_of (d, name));
}

/* ---- in order ---- */

/* a has granules 0 and 1, b has granule 7; both record, and persist. */
static void
make_two (void)
{
  RUN (A_ADD ("a", .persistent = true), A_ADD ("b", .persistent = true));
  bitmap_set (bits_of (d, "a"), 0, 2 * GRANULE);
  bitmap_set (bits_of (d, "b"), 7 * GRANULE, 1);
}

static void
test_move (void **state)
{
  make_two ();
  RUN (A_ADD ("c", .disabled = true), A_MERGE ("a", "c"), A (CLEAR, "a"));
  assert_int_equal (count ("a"), 0);
  assert_int_equal (count ("c"), 2);
  assert_true (bitmap_test (bits_of (d, "c"), GRANULE));
  write_at (5 * GRANULE);
  assert_int_equal (count ("a"), 1);
  assert_int_equal (count ("c"), 2);
}

static void
test_clear_then_merge (void **state)
{
  make_two ();
  RUN (A (CLEAR, "b"), A_MERGE ("a", "b"));
  assert_true (same_bits (bits_of (d, "a"), bits_of (d, "b")));
  RUN (A_MERGE ("a", "b"), A (CLEAR, "b"));
  assert_int_equal (count ("b"), 0);
  RUN (A (CLEAR, "a"), A_MERGE ("a", "b"));
  assert_int_equal (count ("a") + count ("b"), 0);
}

static void
test_clear_merge_clear (void **state)
{
  make_two ();
  RUN (A (CLEAR, "b"), A_MERGE ("a", "b"), A (CLEAR, "b"), A_MERGE ("b", "a"));
  assert_int_equal (count ("a"), 2);
  assert_int_equal (count ("b"), 0);
}

static void
test_disable_and_clear (void **state)
{
  make_two ();
  RUN (A (CLEAR, "a"), A (DISABLE, "a"));
  write_at (3 * GRANULE);
  assert_int_equal (count ("a"), 0);
  assert_int_equal (count ("b"), 2);
  RUN (A (DISABLE, "b"), A (ENABLE, "a"), A (CLEAR, "b"), A (ENABLE, "b"),
       A (DISABLE, "b"));
  write_at (4 * GRANULE);
  assert_int_equal (count ("a"), 1);
  assert_int_equal (count ("b"), 0);
  assert_true (find_ok (d, "a")->recording);
  assert_false (find_ok (d, "b")->recording);
}

static void
test_add_and_remove (void **state)
{
  make_two ();
  RUN (A_ADD ("c", .persistent = true), A_MERGE ("a", "c"), A (REMOVE, "c"));
  assert_null (drive_find_bitmap (d, "c"));
  assert_int_equal (d->nr_bitmaps, 2);
  RUN (A_ADD ("c"), A (DISABLE, "c"), A (ENABLE, "c"), A (REMOVE, "b"));
  write_at (0);
  assert_int_equal (count ("c"), 1);
  assert_null (drive_find_bitmap (d, "b"));
}

static void
test_merge_granularities (void **state)
{
  make_two ();
  RUN ({ .type = BITMAP_ADD, .target = { d, "fine" }, .granularity = 512 },
       { .type = BITMAP_ADD, .target = { d, "coarse" },
         .granularity = 1 << 16 },
       A_MERGE ("a", "fine"), A_MERGE ("b", "coarse"),
       A_MERGE ("fine", "coarse"), A_MERGE ("a", "a"));
  assert_int_equal (count ("fine"), 16);
  assert_int_equal (count ("coarse"), 1);
  assert_int_equal (count ("a"), 2);
}

/* A migration sees from the version that bits changed without a write. */
static void
test_versions (void **state)
{
  uint64_t list, a, b;

  make_two ();
  list = d->list_version;
  a = atomic_load (&find_ok (d, "a")->version);
  b = atomic_load (&find_ok (d, "b")->version);
  RUN (A (CLEAR, "a"));
  assert_int_not_equal (atomic_load (&find_ok (d, "a")->version), a);
  assert_int_equal (atomic_load (&find_ok (d, "b")->version), b);
  RUN (A_MERGE ("a", "b"));
  assert_int_not_equal (atomic_load (&find_ok (d, "b")->version), b);
  assert_int_equal (d->list_version, list);
  RUN (A (DISABLE, "a"));
  assert_int_not_equal (d->list_version, list);
}

/* ---- all or nothing ---- */

/* Two drives with a bitmap each, "old" (recording, persistent, 3 bits). */
static struct drive *two[2];

static void
open_two (uint64_t size)
{
  two[0] = open_ok ("one", size, false);
  two[1] = open_ok ("two", size, false);
}

static void
check_two (void)
{
  for (size_t i = 0; i < 2; i++) {
    assert_int_equal (two[i]->nr_bitmaps, 1);
    assert_int_equal (bitmap_count_bits (bits_of (two[i], "old")), 3);
    assert_true (find_ok (two[i], "old")->recording);
  }
}

/* Everything at once, and last an action that cannot be. */
static void
fail_all (const char *name, int errnum)
{
  struct bitmap_ref one = { two[0], "old" }, other = { two[1], "old" };
  struct bitmap_action actions[] = {
    { .type = BITMAP_ADD, .target = { two[0], "new" }, .persistent = true },
    { .type = BITMAP_ADD, .target = { two[1], "new" }, .persistent = true },
    { .type = BITMAP_MERGE, .target = { two[0], "new" }, .sources = &other,
      .nr_sources = 1 },
    { .type = BITMAP_CLEAR, .target = one },
    { .type = BITMAP_DISABLE, .target = one },
    { .type = BITMAP_REMOVE, .target = other },
    { .type = BITMAP_CLEAR, .target = { two[1], name } },
  };
  uint64_t versions[] = { two[0]->list_version, two[1]->list_version };

  assert_int_equal (bitmap_transaction (actions, 7, &err), -1);
  assert_int_equal (err.errnum, errnum);
  check_two ();
  assert_int_equal (two[0]->list_version, versions[0]);
  assert_int_equal (two[1]->list_version, versions[1]);
}

static void
test_all_or_nothing (void **state)
{
  open_two (DISK_SIZE);
  for (size_t i = 0; i < 2; i++) {
    add_bitmap (two[i], "old", GRANULE, true, false);
    bitmap_set (bits_of (two[i], "old"), GRANULE, 3 * GRANULE);
  }
  fail_all ("missing", ENOENT);
  fail_all ("old", EBUSY); /* removed just before */

  /* What is on disk says the same, after a crash and after a good end. */
  crash (two[0]);
  crash (two[1]);
  open_two (0);
  check_two ();

  /* The sidecar of either cannot be written: that of the other is as it was.
   * (A folder stands where a file must go away.)
   */
  for (size_t i = 0; i < 2; i++) {
    const char *name = two[i]->name;

    assert_int_equal (mkdir (drive_file (name, "incoming.json"), 0700), 0);
    fail_all ("new", EISDIR);
    assert_int_equal (rmdir (drive_file (name, "incoming.json")), 0);
    crash (two[0]);
    crash (two[1]);
    open_two (0);
    check_two ();
    /* Nor does the log say that all is to be dirty. */
    assert_int_equal (activity_was_flags (two[0]->activity), 0);
    assert_int_equal (activity_was_flags (two[1]->activity), 0);
  }
  close_ok (two[0]);
  close_ok (two[1]);
}

/* ---- beside writes ---- */

struct work {
  const struct bitmap_action *actions;
  size_t nr;
};

static int
run_work (struct job *job)
{
  const struct work *w = job->arg;

  return bitmap_transaction (w->actions, w->nr, &job->err);
}

static int
write_granule (struct job *job)
{
  static const uint8_t sector[512] = { 2 };

  return drive_pwrite (d, sector, sizeof sector, *(uint64_t *) job->arg, 0);
}

/* A clear waits for the write in flight, and is one as of a moment after. */
static void
test_clear_waits (void **state)
{
  struct bitmap_action clear = A (CLEAR, "a");
  struct work w = { &clear, 1 };
  uint64_t at = 9 * GRANULE;
  struct job writer, clearer;

  make_two ();
  tap_hold (at);
  job_start (&writer, write_granule, &at);
  tap_wait_held ();
  job_start (&clearer, run_work, &w);
  assert_false (job_done_within (&clearer, MOMENT));
  assert_int_equal (count ("a"), 3); /* nothing has changed yet */
  tap_release ();
  assert_int_equal (job_join (&writer), 0);
  assert_int_equal (job_join (&clearer), 0);
  assert_int_equal (clearer.landed, 1);
  assert_int_equal (count ("a"), 0);
}

/* A write that comes in after the instant of a clear, and is in flight while
 * the bits are cleared, keeps its bit all the time: a crash now must find it.
 * A slow merge stands before the clear so that the write has time to come.
 */
static void
test_clear_beside_write (void **state)
{
  struct drive *small = d;
  uint64_t at = UINT64_C (1) << 30;
  struct job writer, clearer;
  int token;

  d = open_ok ("large", UINT64_C (4) << 30, false);
  struct bitmap_action actions[] = { A_MERGE ("half", "fine"),
                                     A (CLEAR, "fine"), A (CLEAR, "a") };
  struct work w = { actions, 3 };

  make_two ();
  RUN (A_ADD ("half"),
       { .type = BITMAP_ADD, .target = { d, "fine" }, .granularity = 512 });
  for (uint64_t i = 0; i < d->size; i += 2 * GRANULE)
    bitmap_set (bits_of (d, "half"), i, 1);

  token = gate_enter (&d->writes);
  tap_hold (at);
  job_start (&clearer, run_work, &w);
  WAIT_UNTIL (atomic_load (&d->writes.shut));
  job_start (&writer, write_granule, &at);
  gate_leave (&d->writes, token);
  tap_wait_held ();
  /* The bits are cleared when the gate is shut for the second time, to take
   * the companions away; it waits for the write.
   */
  WAIT_UNTIL (atomic_load (&d->writes.shut));
  assert_true (bitmap_test (bits_of (d, "a"), at));
  assert_true (bitmap_test (bits_of (d, "fine"), at));
  assert_int_equal (count ("a"), 1);
  tap_release ();
  assert_int_equal (job_join (&writer), 0);
  assert_int_equal (job_join (&clearer), 0);
  assert_int_equal (count ("a"), 1);
  assert_int_equal (count ("fine"), 1);
  close_ok (d);
  d = small;
}

#define WRITERS 3
#define WRITES  4000
#define NR      (DISK_SIZE / GRANULE)

/* How many clears had returned when the last write to a granule began, + 1;
 * 0: never written.
 */
static atomic_uint began[NR], cleared;

static int
keep_writing (struct job *job)
{
  static const uint8_t sector[512] = { 3 };
  uint64_t random = (uintptr_t) job->arg;

  /* However slow clears are beside writes, some come between them. */
  for (unsigned i = 0;
       i < WRITES || (atomic_load (&cleared) < 2 && i < 1000 * WRITES); i++) {
    unsigned now = atomic_load (&cleared) + 1, was;
    uint64_t n;

    random = random * UINT64_C (6364136223846793005) + 1442695040888963407;
    n = (random >> 33) % NR;
    if (drive_pwrite (d, sector, sizeof sector, n * GRANULE, 0) == -1)
      return -1;
    was = atomic_load (&began[n]);
    while (was < now && !atomic_compare_exchange_weak (&began[n], &was, now))
      ;
  }
  return 0;
}

static void
test_writers (void **state)
{
  struct job writer[WRITERS];
  bool writing = true;

  make_two ();
  RUN (A_ADD ("all", .disabled = true), A (CLEAR, "a"), A (CLEAR, "b"));
  for (size_t i = 0; i < NR; i++)
    atomic_store (&began[i], 0);
  for (size_t i = 0; i < WRITERS; i++)
    job_start (&writer[i], keep_writing, (void *) (uintptr_t) (i + 1));
  while (writing) {
    /* b is handed on to "all" at each turn; a is just cleared. */
    RUN (A_MERGE ("b", "all"), A (CLEAR, "b"), A (CLEAR, "a"));
    atomic_fetch_add (&cleared, 1);
    writing = false;
    for (size_t i = 0; i < WRITERS; i++)
      writing |= !job_done_within (&writer[i], 0);
  }
  for (size_t i = 0; i < WRITERS; i++)
    assert_int_equal (job_join (&writer[i]), 0);
  assert_true (atomic_load (&cleared) > 1);
  for (size_t i = 0; i < NR; i++) {
    unsigned when = atomic_load (&began[i]);
    uint64_t at = i * GRANULE;

    /* Never lost between the two. */
    if (when > 0 && !bitmap_test (bits_of (d, "b"), at) &&
        !bitmap_test (bits_of (d, "all"), at))
      fail_msg ("granule %zu is lost", i);
    /* Written after the last clear. */
    if (when == atomic_load (&cleared) + 1 &&
        !bitmap_test (bits_of (d, "a"), at))
      fail_msg ("granule %zu is lost from a", i);
  }
  assert_true (bitmap_is_consistent (bits_of (d, "a")));
  assert_true (bitmap_is_consistent (bits_of (d, "b")));
}

int
main (void)
{
#define TEST(f) cmocka_unit_test_setup_teardown (f, open_d, close_d)
  static const struct CMUnitTest tests[] = {
    TEST (test_move),
    TEST (test_clear_then_merge),
    TEST (test_clear_merge_clear),
    TEST (test_disable_and_clear),
    TEST (test_add_and_remove),
    TEST (test_merge_granularities),
    TEST (test_versions),
    TEST (test_all_or_nothing),
    TEST (test_clear_waits),
    TEST (test_clear_beside_write),
    TEST (test_writers),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
