/* nbdferry - test of views: transactions, points, and how they end
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "drive-test.h"
#include "points.h"
#include "view-test.h"
#include "view-drive.h"

static void
test_points (void **state)
{
  struct uuid id = id_of (1), second = id_of (2);
  struct view_info info;
  struct view *v;

  add_bitmap (d, "b", GRANULE, true, false);
  assert_null (try_begin ((struct view_options){
    .drive = d, .id = id, .bitmap = "b" }));
  assert_non_null (strstr (err.msg, "a full one is needed"));
  full_one (1);
  assert_true (uuid_equal (&find_ok (d, "b")->point.id, &id));
  /* One that fails leaves it. */
  v = BEGIN (d, 2, .bitmap = "b");
  info = info_of (v);
  assert_true (uuid_equal (&info.parent.id, &id));
  end_ok (v, false);
  assert_true (uuid_equal (&find_ok (d, "b")->point.id, &id));
  end_ok (BEGIN (d, 2, .bitmap = "b"), true);
  assert_true (uuid_equal (&find_ok (d, "b")->point.id, &second));
  /* It outlives the daemon, whatever its end. */
  close_ok (d);
  d = open_ok ("d", 0, false);
  assert_true (uuid_equal (&find_ok (d, "b")->point.id, &second));
  crash (d);
  d = open_ok ("d", 0, false);
  assert_true (uuid_equal (&find_ok (d, "b")->point.id, &second));
  assert_int_equal (transact (d, BITMAP_ENABLE, "b"), 0); /* it is */
  assert_true (uuid_equal (&find_ok (d, "b")->point.id, &second));
  /* And is gone for good with a disable. */
  assert_int_equal (transact (d, BITMAP_DISABLE, "b"), 0);
  assert_true (point_is_none (&find_ok (d, "b")->point));
  assert_int_equal (transact (d, BITMAP_ENABLE, "b"), 0);
  crash (d);
  d = open_ok ("d", 0, false);
  assert_true (point_is_none (&find_ok (d, "b")->point));
  /* Or with a clear, or when it is made anew. */
  for (int i = 0; i < 2; i++) {
    full_one (3);
    assert_false (point_is_none (&find_ok (d, "b")->point));
    if (i == 0)
      assert_int_equal (transact (d, BITMAP_CLEAR, "b"), 0);
    else {
      assert_int_equal (transact (d, BITMAP_REMOVE, "b"), 0);
      add_bitmap (d, "b", GRANULE, true, false);
    }
    assert_true (point_is_none (&find_ok (d, "b")->point));
    crash (d);
    d = open_ok ("d", 0, false);
    assert_true (point_is_none (&find_ok (d, "b")->point));
  }
}

static void
test_busy (void **state)
{
  static const enum bitmap_action_type types[] = {
    BITMAP_REMOVE, BITMAP_CLEAR, BITMAP_ENABLE, BITMAP_DISABLE,
  };
  struct bitmap_ref source = { d, "other" };
  struct bitmap_action merge = {
    .type = BITMAP_MERGE, .target = { d, "b" }, .sources = &source,
    .nr_sources = 1,
  };
  struct view *v;

  add_bitmap (d, "b", GRANULE, true, false);
  add_bitmap (d, "other", GRANULE, true, false);
  v = BEGIN (d, 1, .bitmap = "b", .full = true);
  for (size_t i = 0; i < 4; i++)
    assert_fails (transact (d, types[i], "b"), "currently in use");
  assert_fails (bitmap_transaction (&merge, 1, &err), "currently in use");
  assert_null (try_begin ((struct view_options){
    .drive = d, .id = id_of (2), .bitmap = "b", .full = true }));
  assert_non_null (strstr (err.msg, "currently in use"));
  assert_null (try_begin ((struct view_options){
    .drive = d, .id = id_of (1), .bitmap = "other", .full = true }));
  assert_non_null (strstr (err.msg, "already"));
  end_ok (v, true);
  add_bitmap (d, "off", GRANULE, true, true);
  assert_null (try_begin ((struct view_options){
    .drive = d, .id = id_of (2), .bitmap = "off", .full = true }));
  assert_non_null (strstr (err.msg, "does not record"));
}

/* Several at one instant, all or none. */
static void
test_all_or_none (void **state)
{
  struct drive *e = open_ok ("e", DISK_SIZE, false);
  struct view_options opt[2] = {
    { .drive = d, .id = id_of (1), .bitmap = "b", .full = true },
    { .drive = e, .id = id_of (1), .bitmap = "b", .full = true },
  };
  struct bitmap_action a[3];
  struct view *v[2];

  add_bitmap (d, "b", GRANULE, true, false);
  for (int i = 0; i < 2; i++)
    assert_non_null (v[i] = views_begin (&opt[i], &a[i], &err));
  assert_fails (bitmap_transaction (a, 2, &err), "not found");
  for (int i = 0; i < 2; i++)
    views_settle (v[i]);
  assert_false (find_ok (d, "b")->busy);
  assert_null (d->hooks);
  /* With the bitmap that is missing. */
  a[0] = (struct bitmap_action){ .type = BITMAP_ADD, .target = { e, "b" },
                                 .persistent = true };
  for (int i = 0; i < 2; i++)
    assert_non_null (v[i] = views_begin (&opt[i], &a[i + 1], &err));
  assert_int_equal (bitmap_transaction (a, 3, &err), 0);
  for (int i = 0; i < 2; i++)
    views_settle (v[i]);
  write_at (0, 512);
  /* One of them cannot end well: neither does. */
  view_fail (v[1], "for the test");
  assert_non_null (v[0] = views_end (d, &opt[0].id, true, &a[0], &err));
  assert_null (views_end (e, &opt[1].id, true, &a[1], &err));
  views_settle (v[0]);
  assert_true (find_ok (d, "b")->busy);
  assert_true (point_is_none (&find_ok (d, "b")->point));
  for (int i = 0; i < 2; i++)
    assert_int_equal (views_give_up (opt[i].drive, &opt[i].id, &err), 0);
  assert_int_equal (bitmap_count_bits (bits_of (d, "b")), 1);
  assert_int_equal (transact (e, BITMAP_REMOVE, "b"), 0);
  close_ok (e);
}

/* A point that cannot be recorded: the backup runs on, nothing is lost. */
static void
test_point_not_recorded (void **state)
{
  char tmp[PATH_MAX];
  struct view *v;

  add_bitmap (d, "b", GRANULE, true, false);
  write_at (0, 512);
  v = BEGIN (d, 1, .bitmap = "b", .full = true);
  strcpy (tmp, drive_file ("d", "points.json.new"));
  assert_int_equal (mkdir (tmp, 0700), 0);
  assert_fails (try_end (v, true), "points.json");
  assert_true (find_ok (d, "b")->busy);
  assert_true (point_is_none (&find_ok (d, "b")->point));
  assert_int_equal (bitmap_count_bits (bits_of (d, "b")), 1);
  assert_int_equal (rmdir (tmp), 0);
  assert_false (info_of (v).failed);
  end_ok (v, true);
  assert_false (point_is_none (&find_ok (d, "b")->point));
  assert_int_equal (bitmap_count_bits (bits_of (d, "b")), 0);
}

/* The drive goes on to another server, or ends. */
static void
test_handed_over (void **state)
{
  struct view *v;
  uint8_t buf[512];

  add_bitmap (d, "b", GRANULE, true, false);
  v = BEGIN (d, 1, .bitmap = "b", .full = true);
  pthread_mutex_lock (&d->control);
  drives_close (&d, 1, true);
  drive_set_mode (d, DRIVE_LEAVING, NULL);
  free (drive_swap_marks (d, NULL));
  drive_end_hooks (d, "it was handed over");
  pthread_mutex_unlock (&d->control);
  /* The gates are shut still, and nobody waits for them. */
  assert_fails (view_pread (v, buf, 512, 0, &err), "handed over");
  assert_fails (try_end (v, true), "handed over");
  assert_int_equal (views_give_up (d, &view_options (v)->id, &err), 0);
  assert_false (find_ok (d, "b")->busy);
  assert_null (views_find (d, &view_options (v)->id));
  view_unref (v);
  drive_set_mode (d, DRIVE_ACTIVE, NULL);
  d->marks = drive_build_marks (d, NULL, 0);
  drives_open (&d, 1, true);
}

static void
test_client_gone (void **state)
{
  struct view *v, *other;

  add_bitmap (d, "b", GRANULE, true, false);
  v = BEGIN (d, 1, .bitmap = "b", .full = true, .client = 7);
  other = BEGIN (d, 2, .client = 8);
  views_client_gone (7);
  assert_false (find_ok (d, "b")->busy);
  assert_null (views_find (d, &view_options (v)->id));
  view_unref (v);
  check_old (other);
  end_ok (other, true);
}

int
main (void)
{
#define T(f) cmocka_unit_test_setup_teardown (f, open_d, close_d)
  static const struct CMUnitTest tests[] = {
    T (test_points),      T (test_busy),
    T (test_all_or_none), T (test_point_not_recorded),
    T (test_handed_over), T (test_client_gone),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
