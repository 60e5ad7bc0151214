/* nbdferry - test of a clear in which the daemon dies
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "clear-note.h"
#include "drive-test.h"

#define GRANULE 4096

static const uint64_t some[64] = { 0x11, [3] = 1 };
#define SOME_BITS 3

/* As if it had died when block 0 of "b", which says that, had been cleared. */
static struct drive *
die_clearing (struct drive *d, const uint64_t words[64])
{
  struct clear_note n;

  assert_int_equal (clear_note_open (&n, d), 0);
  clear_note_begin (&n, find_ok (d, "b"));
  assert_true (clear_note_block (&n, 0, words));
  close (n.fd);
  bitmap_clear_all (find_ok (d, "b")->bits);
  crash (d);
  return open_ok ("d", 0, false);
}

static uint64_t
count (struct drive *d, const char *name)
{
  assert_null (find_ok (d, name)->reason);
  return bitmap_count (find_ok (d, name)->bits) / GRANULE;
}

static struct drive *
prepare (void)
{
  struct drive *d = open_ok ("d", DISK_SIZE, false);

  add_bitmap (d, "b", GRANULE, true, false);
  add_bitmap (d, "other", GRANULE, true, false);
  bitmap_set (find_ok (d, "b")->bits, 0, DISK_SIZE);
  return d;
}

static struct drive *
finish (struct drive *d)
{
  assert_int_equal (access (drive_file ("d", "clearing"), F_OK), -1);
  assert_int_equal (transact (d, BITMAP_REMOVE, "b"), 0);
  assert_int_equal (transact (d, BITMAP_REMOVE, "other"), 0);
  close_ok (d);
  return NULL;
}

static void
test_given_back (void **state)
{
  struct drive *d = prepare ();

  (void) state;
  d = die_clearing (d, some);
  assert_int_equal (count (d, "b"), SOME_BITS);
  assert_true (bitmap_test (find_ok (d, "b")->bits, 192 * GRANULE));
  /* And nothing of any other; nor a second time. */
  assert_int_equal (count (d, "other"), 0);
  assert_int_equal (transact (d, BITMAP_CLEAR, "b"), 0);
  crash (d);
  d = open_ok ("d", 0, false);
  assert_int_equal (count (d, "b"), 0);
  finish (d);
}

/* A note that is not whole was being written. */
static void
test_damaged (void **state)
{
  struct drive *d = prepare ();
  struct clear_note n;
  uint8_t byte = 1;

  (void) state;
  for (unsigned i = 0; i < 4; i++) {
    assert_int_equal (clear_note_open (&n, d), 0);
    clear_note_begin (&n, find_ok (d, "other"));
    assert_true (clear_note_block (&n, 0, some));
    if (i == 0)
      assert_int_equal (pwrite (n.fd, &byte, 1, 40), 1);
    if (i == 1)
      assert_int_equal (ftruncate (n.fd, 1000), 0);
    close (n.fd);
    /* Another one, of the same name. */
    if (i == 2) {
      assert_int_equal (transact (d, BITMAP_REMOVE, "other"), 0);
      add_bitmap (d, "other", 2 * GRANULE, true, false);
    }
    if (i == 3)
      assert_int_equal (transact (d, BITMAP_REMOVE, "other"), 0);
    crash (d);
    d = open_ok ("d", 0, false);
    if (i < 3)
      assert_int_equal (count (d, "other"), 0);
    assert_int_equal (access (drive_file ("d", "clearing"), F_OK), -1);
  }
  add_bitmap (d, "other", GRANULE, true, false);
  finish (d);
}

/* Where it cannot be written, the activity log says that a clear is under way,
 * as it did before there were notes: the clear itself goes on.
 */
static void
test_not_written (void **state)
{
  struct drive *d = prepare ();

  (void) state;
  assert_int_equal (mkdir (drive_file ("d", "clearing"), 0700), 0);
  assert_int_equal (transact (d, BITMAP_CLEAR, "b"), 0);
  assert_int_equal (count (d, "b"), 0);
  assert_int_equal (rmdir (drive_file ("d", "clearing")), 0);
  finish (d);
}

/* ---- what is told before bits are cleared ---- */

struct told {
  struct bitmap *bm, *keep;
  unsigned blocks, refuse;   /* so many; one more than which is refused */
  uint64_t words[2][64];
};

/* Somebody writes just here: to a granule that was dirty, and to a clean one,
 * in blocks that were seen as they were before.
 */
static bool
told (void *opaque, uint64_t block, const uint64_t words[64])
{
  struct told *t = opaque;

  assert_in_range (block, 0, 1);
  memcpy (t->words[block], words, sizeof t->words[block]);
  for (uint64_t bit = block * 4096 + 5; bit < block * 4096 + 8; bit += 2) {
    bitmap_set (t->keep, bit << 9, 1);
    bitmap_set (t->bm, bit << 9, 1);
  }
  return ++t->blocks != t->refuse;
}

/* Two blocks, the second of 4000 bits: every third bit set, of which the keeper
 * has every fifth.
 */
static void
test_retain_told (void **state)
{
  const uint64_t bits = 4096 + 4000;

  (void) state;
  for (unsigned refuse = 0; refuse <= 2; refuse++) {
    struct told t = { .refuse = refuse };
    struct bitmap *undone = bitmap_new (bits << 9, 9, &err);

    t.bm = bitmap_new (bits << 9, 9, &err);
    t.keep = bitmap_new (bits << 9, 9, &err);
    for (uint64_t i = 0; i < bits; i += 3)
      bitmap_set (t.bm, i << 9, 1);
    for (uint64_t i = 0; i < bits; i += 15)
      bitmap_set (t.keep, i << 9, 1);
    bitmap_retain (t.bm, t.keep, told, &t);
    assert_int_equal (t.blocks, 2);
    assert_true (bitmap_is_consistent (t.bm));
    for (uint64_t b = 0; b < 2; b++)
      bitmap_restore_block (undone, b, t.words[b]);
    bitmap_restore_block (undone, 2, t.words[0]);
    bitmap_restore_block (undone, UINT64_MAX, t.words[0]);
    assert_true (bitmap_is_consistent (undone));
    for (uint64_t i = 0; i < bits; i++) {
      const bool written = i % 4096 == 5 || i % 4096 == 7;
      const bool left = refuse == i / 4096 + 1;

      assert_int_equal (bitmap_test (t.bm, i << 9),
                        i % 15 == 0 || written || (left && i % 3 == 0));
      assert_int_equal (bitmap_test (undone, i << 9), i % 3 == 0);
    }
    /* Nothing is told of what is kept anyway. */
    t.blocks = 0;
    bitmap_merge (t.keep, t.bm);
    bitmap_retain (t.bm, t.keep, told, &t);
    assert_int_equal (t.blocks, 0);
    /* What is no bit is not set. */
    memset (t.words, 0xff, sizeof t.words);
    bitmap_restore_block (undone, 1, t.words[1]);
    assert_true (bitmap_is_consistent (undone));
    assert_int_equal (bitmap_count (undone), (4096 / 3 + 1 + 4000) << 9);
    bitmap_free (t.bm);
    bitmap_free (t.keep);
    bitmap_free (undone);
  }
}

int
main (void)
{
  static const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_given_back),
    cmocka_unit_test (test_damaged),
    cmocka_unit_test (test_not_written),
    cmocka_unit_test (test_retain_told),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
