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

int
main (void)
{
  static const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_given_back),
    cmocka_unit_test (test_damaged),
    cmocka_unit_test (test_not_written),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
