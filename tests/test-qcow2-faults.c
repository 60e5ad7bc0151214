/* nbdferry - test of the sidecar: faults of the file system
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "qcow2-test.h"
#include "qcow2-tap.h"

#define MIB (UINT64_C (1) << 20)

/* Before open returns, all bitmaps are durably in use. */
static void
test_in_use_at_open (void **state)
{
  const struct qcow2_entry *f;
  struct qcow2_entry e;
  struct qcow2 *q;
  uint64_t directory;
  uint32_t flags;
  size_t nr;

  unlink (sidecar);
  make_disk (MIB);
  q = create_with (MIB, &e, "a", 16, true);
  close_ok (q);
  directory = peek64 (QCOW2_HEADER_LENGTH + 8 + 16);
  peek (directory + 12, &flags, 4);
  assert_int_equal (be32toh (flags), QCOW2_BITMAP_AUTO);
  nr_ops = syncs = 0;
  recording = true;
  q = open_ok (MIB, QCOW2_CLEAN);
  recording = false;
  peek (directory + 12, &flags, 4);
  assert_int_equal (be32toh (flags), QCOW2_BITMAP_AUTO | QCOW2_BITMAP_IN_USE);
  assert_true (nr_ops > 0 && ops[nr_ops - 1].syncs < syncs);
  forget_ops ();
  qcow2_abandon (q);
  q = open_ok (MIB, QCOW2_UNCLEAN);
  f = qcow2_entries (q, &nr);
  assert_true (f[0].in_use);
  close_ok (q);
}

/* After an fsync that failed, nothing is said to be in good order. */
static void
test_failed_sync (void **state)
{
  enum qcow2_found found;
  struct qcow2_entry e;
  struct qcow2 *q;

  for (int how = 0; how < 3; ++how) {
    unlink (sidecar);
    q = create_with (MIB, &e, "a", 16, true);
    fail_syncs = 1;
    if (how == 0)
      assert_int_equal (qcow2_sync (q, &err), -1);
    if (how == 1)
      assert_int_equal (qcow2_write_directory (q, &e, 1, &err), -1);
    assert_int_equal (qcow2_close (q, &err), -1); /* how == 2: here */
    assert_int_equal (fail_syncs, 0);
    fail_syncs = how == 2;
    q = open_ok (MIB, how == 2 ? QCOW2_LOST : QCOW2_UNCLEAN);
    close_ok (q);
    check_clean ();
  }
  fail_syncs = 2;
  assert_null (qcow2_open (sidecar, disk, MIB, false, &found, &err));
  close_ok (open_ok (MIB, QCOW2_CLEAN));
}

/* Without fallocate, zeros are written; also over old bits. */
static void
test_no_fallocate (void **state)
{
  struct qcow2_bits *b;
  struct qcow2 *q;

  unlink (sidecar);
  q = open_ok (64 * MIB, QCOW2_CREATED);
  no_fallocate = true;
  for (int i = 0; i < 2; ++i) {
    b = qcow2_alloc (q, 9, &err);
    assert_non_null (b);
    for (int w = 0; w < 2048; ++w)
      assert_int_equal (qcow2_words (b)[w], 0);
    memset (qcow2_words (b), 0xff, 16384);
    qcow2_free (q, b);
  }
  no_fallocate = false;
  /* Nor is it old bits if they could not be punched out when freed. */
  b = qcow2_alloc (q, 9, &err);
  assert_int_equal (qcow2_words (b)[2047], 0);
  qcow2_free (q, b);
  close_ok (q);
}

/* Another process puts a new sidecar in place between our open and lock. */
static void
test_renamed_meanwhile (void **state)
{
  char other[PATH_MAX + 8];
  struct qcow2_entry e;
  struct qcow2 *q;
  size_t nr;

  snprintf (other, sizeof other, "%s.other", sidecar);
  unlink (sidecar);
  q = create_with (MIB, &e, "theirs", 16, true);
  close_ok (q);
  assert_int_equal (rename (sidecar, other), 0);
  close_ok (open_ok (MIB, QCOW2_CREATED));
  rename_first = other;
  q = open_ok (MIB, QCOW2_CLEAN);
  assert_string_equal (qcow2_entries (q, &nr)[0].name, "theirs");
  close_ok (q);
}

int
main (void)
{
  static const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_in_use_at_open),
    cmocka_unit_test (test_failed_sync),
    cmocka_unit_test (test_no_fallocate),
    cmocka_unit_test (test_renamed_meanwhile),
  };

  if (!have ("qemu-img")) {
    printf ("qemu-img is needed\n");
    return 77;
  }
  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
