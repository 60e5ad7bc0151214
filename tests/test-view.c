/* nbdferry - test of views: what is copied aside and what is in them, limits
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "drive-test.h"
#include "hook-test.h"
#include "view-impl.h"
#include "view-test.h"
#include "view-drive.h"

/* ---- copying ---- */

static void
test_copied_once (void **state)
{
  struct view *v = BEGIN (d, 1);

  check_old (v);
  assert_int_equal (scratch_tap.writes, 0);
  write_at (3 * GRANULE + 512, 512);
  assert_int_equal (scratch_tap.writes, 1);
  write_at (3 * GRANULE, GRANULE);
  write_at (3 * GRANULE + 1024, 512);
  assert_int_equal (scratch_tap.writes, 1);
  assert_int_equal (drive_zero (d, 2 * GRANULE, 4 * GRANULE, 0), 0);
  assert_int_equal (drive_trim (d, GRANULE, 6 * GRANULE, 0), 0);
  assert_int_equal (scratch_tap.writes, 4);
  /* The last one is short. */
  write_at (DISK_SIZE - 512, 512);
  assert_int_equal (scratch_tap.writes, 5);
  assert_int_equal (info_of (v).scratch_used, 5 * GRANULE);
  check_old (v);
  end_ok (v, true);
  write_at (7 * GRANULE, 512);
  assert_int_equal (scratch_tap.writes, 5);
}

/* What is zeros needs no space; a large request is copied in batches. */
static void
test_zeros (void **state)
{
  struct view *v;
  struct extent ext;
  uint8_t buf[512];

  assert_int_equal (drive_trim (d, 2 * GRANULE, 0, 0), 0);
  assert_int_equal (drive_zero (d, GRANULE, 2 * GRANULE, 0), 0);
  v = BEGIN (d, 1);
  assert_int_equal (drive_zero (d, DISK_SIZE, 0, 0), 0);
  assert_int_equal (scratch_tap.writes,
                    (DISK_SIZE + GRANULE - 1) / GRANULE - 3);
  assert_int_equal (view_extent (v, 0, DISK_SIZE, &ext, &err), 0);
  assert_int_equal (ext.end, 3 * GRANULE);
  assert_int_equal (ext.type, EXTENT_ZERO);
  assert_int_equal (view_extent (v, ext.end, DISK_SIZE, &ext, &err), 0);
  assert_int_equal (ext.end, DISK_SIZE);
  assert_int_equal (ext.type, EXTENT_DATA);
  assert_int_equal (view_pread (v, buf, 512, GRANULE, &err), 0);
  assert_true (disk_is_zero (buf, 512));
  end_ok (v, false);
}

static void
test_several (void **state)
{
  struct view *v[3];
  uint8_t buf[512];

  v[0] = BEGIN (d, 1);
  write_at (0, 512);
  v[1] = BEGIN (d, 2);
  v[2] = BEGIN (d, 3);
  write_at (0, GRANULE);
  check_old (v[0]);
  for (int i = 1; i < 3; i++) {
    assert_int_equal (view_pread (v[i], buf, 512, 0, &err), 0);
    assert_true (disk_is_zero (buf, 512));
    assert_int_equal (view_pread (v[i], buf, 512, 512, &err), 0);
    assert_int_equal (buf[0], 1);
  }
  end_ok (v[1], true);
  write_at (GRANULE, 512);
  check_old (v[0]);
  end_ok (v[0], true);
  end_ok (v[2], true);
}

static int
write_in_thread (struct job *job)
{
  static const uint8_t buf[512];

  return drive_pwrite (d, buf, sizeof buf, (uintptr_t) job->arg, 0);
}

/* Who writes to a granule that is being copied waits for that copy; others,
 * and readers of the view, do not.
 */
static void
test_waits_for_one (void **state)
{
  struct view *v = BEGIN (d, 1);
  struct job a, b;

  scratch_hold = true;
  job_start (&a, write_in_thread, (void *) (uintptr_t) 0);
  pthread_mutex_lock (&tap.lock);
  assert_true (tap_await (&scratch_held, LONG));
  pthread_mutex_unlock (&tap.lock);
  job_start (&b, write_in_thread, (void *) (uintptr_t) 512);
  assert_false (job_done_within (&b, MOMENT));
  write_at (GRANULE, 512);
  write_at (64 * GRANULE % (DISK_SIZE - GRANULE), 512); /* its shard, perhaps */
  check_old (v);
  pthread_mutex_lock (&tap.lock);
  scratch_let_on = true;
  pthread_cond_broadcast (&tap.changed);
  pthread_mutex_unlock (&tap.lock);
  assert_int_equal (job_join (&a), 0);
  assert_int_equal (job_join (&b), 0);
  assert_int_equal (scratch_tap.writes, 3);
  check_old (v);
  end_ok (v, true);
}

/* A read that the write overtakes is done again: the disk is changed while it
 * is read.
 */
static void
test_overtaken (void **state)
{
  uint8_t buf[GRANULE];

  for (int i = 0; i < 200; i++) {
    uint64_t at = i % 40 * GRANULE;
    struct view *raced = BEGIN (d, i);
    struct job a;

    job_start (&a, write_in_thread, (void *) (uintptr_t) at);
    for (int k = 0; k < 5; k++) {
      assert_int_equal (view_pread (raced, buf, GRANULE, at, &err), 0);
      assert_int_equal (buf[0], i < 40 ? 1 + at / GRANULE : 0);
    }
    assert_int_equal (job_join (&a), 0);
    end_ok (raced, true);
  }
}

/* The same, at the worst moment: the write lands after the view has seen where
 * the granule is, and before the disk is read.
 */
static const struct disk_ops *usual;
static bool overtake;

static int
overtaken_pread (struct disk *disk, void *buf, size_t count, uint64_t offset)
{
  if (overtake) {
    overtake = false;
    write_at (offset, count);
  }
  return usual->pread (disk, buf, count, offset);
}

static int
overtaken_extent (struct disk *disk, uint64_t offset, uint64_t end,
                  struct extent *ext)
{
  if (overtake) {
    overtake = false;
    if (drive_trim (d, 3 * GRANULE, offset & -(uint64_t) GRANULE, 0) == -1)
      return -1;
  }
  return usual->extent (disk, offset, end, ext);
}

static void
test_overtaken_exactly (void **state)
{
  struct view *v = BEGIN (d, 1);
  struct disk_ops ops = *d->disk->ops;
  struct extent ext;
  uint8_t buf[512];

  usual = d->disk->ops;
  ops.pread = overtaken_pread;
  ops.extent = overtaken_extent;
  d->disk->ops = &ops;
  overtake = true;
  assert_int_equal (view_pread (v, buf, sizeof buf, 5 * GRANULE, &err), 0);
  assert_false (overtake);
  assert_int_equal (buf[0], 6);
  overtake = true;
  assert_int_equal (view_extent (v, 8 * GRANULE, DISK_SIZE, &ext, &err), 0);
  assert_false (overtake);
  assert_int_equal (ext.type, EXTENT_DATA);
  /* Or further on. */
  overtake = true;
  assert_int_equal (view_extent (v, 20 * GRANULE + 512, DISK_SIZE, &ext,
                                 &err), 0);
  assert_int_equal (ext.type, EXTENT_DATA);
  d->disk->ops = usual;
  check_old (v);
  end_ok (v, true);
}

/* A write after the instant, and before it is known what is in the backup. */
static void
write_in_between (struct write_hook *h)
{
  write_at (2 * GRANULE, 512);
  write_at (7 * GRANULE, 512);
}

static void
test_in_between (void **state)
{
  static const struct hook_ops ops = { nothing_to_prepare, go_on,
                                       write_in_between, nothing_ended };
  struct write_hook early = { &ops };
  struct bitmap_action a[2] = {
    { .type = BITMAP_BACKUP_BEGIN, .target = { d, NULL }, .hook = &early },
  };
  struct view_options opt = { .drive = d, .id = id_of (2), .bitmap = "b",
                              .needed = true };
  uint8_t buf[GRANULE];
  struct view *v;
  struct extent ext;

  add_bitmap (d, "b", GRANULE, true, false);
  end_ok (BEGIN (d, 1, .bitmap = "b", .full = true), true);
  write_at (2 * GRANULE, 512);
  assert_non_null (v = views_begin (&opt, &a[1], &err));
  view_ref (v);
  assert_int_equal (bitmap_transaction (a, 2, &err), 0);
  views_settle (v);
  /* What was dirty at the instant, and no more. */
  assert_int_equal (view_extent (v, 0, DISK_SIZE, &ext, &err), 0);
  assert_int_equal (ext.end, 2 * GRANULE);
  assert_int_equal (view_extent (v, ext.end, DISK_SIZE, &ext, &err), 0);
  assert_int_not_equal (ext.type, EXTENT_HOLE);
  assert_int_equal (ext.end, 3 * GRANULE);
  assert_int_equal (view_extent (v, ext.end, DISK_SIZE, &ext, &err), 0);
  assert_int_equal (ext.end, DISK_SIZE);
  assert_int_equal (view_pread (v, buf, GRANULE, 2 * GRANULE, &err), 0);
  assert_int_equal (buf[GRANULE - 1], 3);
  end_ok (v, true);
  a[0].type = BITMAP_BACKUP_END;
  assert_int_equal (bitmap_transaction (a, 1, &err), 0);
  assert_true (d->hooks == NULL || d->hooks->nr == 0);
  assert_int_equal (bitmap_count_bits (bits_of (d, "b")), 2);
}

/* ---- limits and errors ---- */

static void
test_limit_fail (void **state)
{
  struct view *v, *other;
  uint8_t buf[512];

  add_bitmap (d, "b", GRANULE, true, false);
  other = BEGIN (d, 2);
  v = BEGIN (d, 1, .bitmap = "b", .full = true,
             .scratch_limit = 2 * GRANULE + 100);
  write_at (0, 512);
  write_at (GRANULE, 512);
  assert_false (info_of (v).failed);
  write_at (2 * GRANULE, 512); /* succeeds */
  assert_true (info_of (v).failed);
  assert_non_null (strstr (info_of (v).error, "is used up"));
  assert_int_equal (info_of (v).scratch_used, 0);
  assert_fails (view_pread (v, buf, 512, 5 * GRANULE, &err), "used up");
  assert_int_equal (err.errnum, EIO);
  /* It can only end badly, and the bitmap has everything. */
  assert_fails (try_end (v, true), "has failed");
  assert_true (find_ok (d, "b")->busy);
  end_ok (v, false);
  assert_false (find_ok (d, "b")->busy);
  assert_int_equal (bitmap_count_bits (bits_of (d, "b")), 3);
  check_old (other);
  end_ok (other, true);
}

/* Before the bound writers wait, the longer the less is left; each once.  And
 * nobody keeps those waiting who shut the gate: much is copied in batches.
 */
static void
test_pace (void **state)
{
  struct view *v = BEGIN (d, 1, .scratch_limit = 8 * GRANULE, .slow = true);
  struct write_hook *h = view_hook (v);
  int64_t was = 0;

  for (int i = 0; i < 5; i++) {
    assert_int_equal (h->ops->before (h, i * GRANULE, 512, 0), HOOK_GO_ON);
  }
  for (int i = 5; i < 8; i++) {
    int64_t wait = h->ops->before (h, i * GRANULE, 512, 0);

    assert_true (wait > was && wait <= (int64_t) (100 * NS_PER_MS));
    was = wait;
    assert_int_equal (h->ops->before (h, i * GRANULE, 512, wait), HOOK_GO_ON);
    /* It is there already. */
    assert_int_equal (h->ops->before (h, i * GRANULE, 512, 0), HOOK_GO_ON);
  }
  end_ok (v, false);
  v = BEGIN (d, 1);
  h = view_hook (v);
  assert_int_equal (h->ops->before (h, 0, DISK_SIZE, 0), 0);
  assert_true (info_of (v).scratch_used < DISK_SIZE / GRANULE * GRANULE);
  assert_int_equal (h->ops->before (h, 0, DISK_SIZE, 0), HOOK_GO_ON);
  check_old (v);
  end_ok (v, false);
}

/* The writer waits, in vain: then the view is given up.  With space that is
 * released meanwhile it goes on.
 */
static void
test_limit_slow (void **state)
{
  struct view *v = BEGIN (d, 1, .scratch_limit = 2 * GRANULE, .slow = true);
  uint8_t buf[512];
  struct job a;

  write_at (0, 512);
  write_at (GRANULE, 512);
  job_start (&a, write_in_thread, (void *) (uintptr_t) (2 * GRANULE));
  assert_false (job_done_within (&a, MOMENT));
  /* A control operation is not held up by that. */
  add_bitmap (d, "b", GRANULE, true, false);
  view_release (v, DISK_SIZE, UINT64_MAX);
  view_release (v, 512, GRANULE); /* no granule wholly */
  view_release (v, 0, GRANULE);
  assert_int_equal (job_join (&a), 0);
  assert_false (info_of (v).failed);
  assert_fails (view_pread (v, buf, 512, 0, &err), "was not kept");
  assert_int_equal (view_pread (v, buf, 512, 2 * GRANULE, &err), 0);
  assert_int_equal (buf[0], 3);
  write_at (3 * GRANULE, 512);
  assert_true (info_of (v).failed);
  end_ok (v, false);
  v = BEGIN (d, 1);
  write_at (20 * GRANULE, 512);
  view_release (v, 5, UINT64_MAX - 2);
  assert_int_equal (info_of (v).scratch_used, 0);
  write_at (30 * GRANULE, 512);
  assert_int_equal (info_of (v).scratch_used, 0);
  assert_int_equal (view_pread (v, buf, 512, 0, &err), 0);
  assert_fails (view_pread (v, buf, 512, DISK_SIZE - 512, &err), "not kept");
  end_ok (v, true);
}

static void
test_scratch_error (void **state)
{
  struct view *v = BEGIN (d, 1);
  uint8_t buf[512];

  scratch_tap.fail = ENOSPC;
  write_at (0, 512);
  assert_true (info_of (v).failed);
  assert_non_null (strstr (info_of (v).error, "No space left"));
  assert_fails (view_pread (v, buf, 512, 0, &err), "No space left");
  end_ok (v, false);
}

/* ---- what is in the backup ---- */

static void
check_dirty (struct view *v, uint64_t start, uint64_t end)
{
  struct extent ext;

  for (uint64_t at = 0; at < DISK_SIZE; at = ext.end) {
    assert_int_equal (view_extent (v, at, DISK_SIZE, &ext, &err), 0);
    assert_int_equal (ext.type != EXTENT_HOLE,
                      at >= start && at < end);
  }
}

static void
test_needed (void **state)
{
  struct view *v;
  uint8_t buf[512];

  add_bitmap (d, "b", 4096, true, false);
  full_one (1);
  write_at (8192, 512);
  v = BEGIN (d, 2, .bitmap = "b", .needed = true);
  check_dirty (v, 8192, 3 * 4096);
  write_at (8192, 512);
  assert_int_equal (scratch_tap.writes, 1);
  write_at (16384, 512);
  assert_int_equal (scratch_tap.writes, 1);
  check_dirty (v, 8192, 3 * 4096);
  assert_int_equal (view_pread (v, buf, 512, 8192 + 512, &err), 0);
  assert_int_equal (buf[0], 1);
  assert_int_equal (view_pread (v, buf, 512, 20480, &err), 0);
  assert_fails (view_pread (v, buf, 512, 16384, &err), "was not kept");
  end_ok (v, true);
  assert_int_equal (bitmap_count (bits_of (d, "b")), 2 * 4096);
}

/* A bitmap whose granules are larger than what is copied. */
static void
test_large_granules (void **state)
{
  struct view *v;

  add_bitmap (d, "b", UINT64_C (2) << 20, true, false);
  full_one (1);
  write_at (DISK_SIZE - 512, 512);
  v = BEGIN (d, 2, .bitmap = "b", .needed = true);
  check_dirty (v, UINT64_C (2) << 20, DISK_SIZE);
  write_at (0, 512);
  write_at (UINT64_C (2) << 20, 512);
  assert_int_equal (info_of (v).scratch_used, GRANULE);
  end_ok (v, true);
}

/* To find the end of data takes long on some file systems. */
static void
test_extents_remembered (void **state)
{
  struct view *v;
  struct extent ext;
  unsigned data = 0;

  add_bitmap (d, "b", 4096, true, false);
  v = BEGIN (d, 1, .bitmap = "b", .full = true);
  end_ok (v, true);
  for (uint64_t at = 0; at < DISK_SIZE; at += 16384)
    write_at (at, 512);
  v = BEGIN (d, 2, .bitmap = "b");
  write_at (40 * 16384, 512);
  tap.extents = 0;
  for (uint64_t at = 0; at < DISK_SIZE; at = ext.end) {
    assert_int_equal (view_extent (v, at, DISK_SIZE, &ext, &err), 0);
    data += ext.type == EXTENT_DATA;
  }
  assert_int_equal (data, DISK_SIZE / 16384 + 1);
  assert_int_equal (tap.extents, 1);
  end_ok (v, true);
}

static bool
gone (struct direct *direct, uint64_t start, uint64_t end)
{
  struct range run;

  if (!direct_next_gone (direct, 0, DISK_SIZE, &run))
    return start == end;
  return run.start == start && run.end == end &&
         !direct_next_gone (direct, end, DISK_SIZE, &run);
}

static void
test_direct (void **state)
{
  static const uint8_t x[512] = "x";
  struct view *v, *failed;
  struct direct *direct, *other;
  struct range run;
  uint8_t buf[512];
  int fds[2];

  v = BEGIN (d, 1);
  failed = BEGIN (d, 2);
  direct = get_direct (v);
  other = get_direct (failed);
  assert_true (gone (direct, 0, 0));
  assert_int_equal (drive_pwrite (d, x, 512, 5 * GRANULE + 512, 0), 0);
  assert_true (gone (direct, 5 * GRANULE, 6 * GRANULE));
  /* Long enough for holes to be looked for. */
  assert_int_equal (drive_trim (d, 40 * GRANULE, 5 * GRANULE, 0), 0);
  assert_true (gone (direct, 5 * GRANULE, 45 * GRANULE));
  assert_int_equal (direct_pread (direct, buf, 512, 4 * GRANULE), 0);
  /* What was released is not kept either. */
  view_release (v, 0, 5 * GRANULE);
  assert_true (gone (direct, 0, 45 * GRANULE));
  /* As somebody leaves it for an instant who has found a hole there. */
  atomic_store (&v->place[46], PLACE_ZERO);
  assert_int_equal (drive_pwrite (d, x, 512, 46 * GRANULE, 0), 0);
  assert_int_equal (direct_next_gone (direct, 46 * GRANULE, DISK_SIZE, &run),
                    1);
  assert_int_equal (run.start, 46 * GRANULE);
  /* The descriptors are for reading. */
  assert_int_equal (view_direct (v, fds, &err), 0);
  assert_int_equal (pwrite (fds[0], x, 512, 0), -1);
  assert_int_equal (pwrite (fds[1], x, 512, 0), -1);
  assert_int_equal (ftruncate (fds[1], 0), -1);
  close (fds[0]);
  close (fds[1]);

  view_fail (failed, "for a test");
  assert_true (gone (other, 0, DISK_SIZE));
  assert_fails (view_direct (failed, fds, &err), "failed");
  end_ok (failed, false);
  end_ok (v, true);
  assert_true (gone (direct, 0, DISK_SIZE));
  direct_close (direct);
  direct_close (other);
}

int
main (void)
{
#define T(f) cmocka_unit_test_setup_teardown (f, open_d, close_d)
  static const struct CMUnitTest tests[] = {
    T (test_copied_once),   T (test_zeros),
    T (test_several),       T (test_waits_for_one),
    T (test_overtaken),     T (test_overtaken_exactly),
    T (test_in_between),    T (test_limit_fail),
    T (test_pace),          T (test_limit_slow),
    T (test_scratch_error), T (test_needed),
    T (test_large_granules),
    T (test_direct),        T (test_extents_remembered),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
