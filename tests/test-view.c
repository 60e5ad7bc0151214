/* nbdferry - test of views: what is copied aside, limits, errors, transactions
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "drive-test.h"
#include "view-impl.h"
#include "view-test.h"
#include "points.h"

#define GRANULE 65536

static struct drive *d;

static int
open_d (void **state)
{
  tap_reset (state);
  scratch_hold = scratch_held = scratch_let_on = false;
  scratch_tap.writes = scratch_tap.fail = 0;
  d = try_open ("d", DISK_SIZE, false);
  if (d == NULL)
    return -1;
  for (uint64_t at = 0; at < DISK_SIZE; at += GRANULE) {
    uint8_t buf[GRANULE];
    uint64_t n = DISK_SIZE - at < GRANULE ? DISK_SIZE - at : GRANULE;

    memset (buf, 1 + at / GRANULE, n);
    if (drive_pwrite (d, buf, n, at, 0) == -1)
      return -1;
  }
  return 0;
}

static int
close_d (void **state)
{
  while (d->nr_bitmaps > 0)
    if (transact (d, BITMAP_REMOVE, d->bitmaps[0]->name) == -1)
      return -1;
  close_ok (d);
  views_free ();
  return 0;
}

static void
write_at (uint64_t offset, size_t len)
{
  static const uint8_t buf[4 * GRANULE] = { 0 };

  assert_true (len <= sizeof buf);
  assert_int_equal (drive_pwrite (d, buf, len, offset, 0), 0);
}

/* The view has the old content of all granules. */
static void
check_old (struct view *v)
{
  for (uint64_t at = 0; at < DISK_SIZE; at += 512) {
    uint8_t buf[512], want[512];

    memset (want, 1 + at / GRANULE, sizeof want);
    if (view_pread (v, buf, sizeof buf, at, &err) == -1)
      fail_msg ("%s", err.msg);
    assert_memory_equal (buf, want, sizeof buf);
  }
}

static struct view_info
info_of (struct view *v)
{
  struct view_info info;

  view_info (v, &info);
  return info;
}

#define assert_fails(call, words)                                       \
  do {                                                                  \
    assert_int_equal (call, -1);                                        \
    if (strstr (err.msg, words) == NULL)                                \
      fail_msg ("'%s' instead of '%s'", err.msg, words);                \
  } while (0)

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
static int
nothing_to_prepare (struct write_hook *h, const struct named_bitmap *nb,
                    const struct point *parent, struct error *e)
{
  return 0;
}

static int64_t
go_on (struct write_hook *h, uint64_t offset, uint64_t len, uint64_t waited)
{
  return HOOK_GO_ON;
}

static void
write_in_between (struct write_hook *h)
{
  write_at (2 * GRANULE, 512);
  write_at (7 * GRANULE, 512);
}

static void
nothing_to_end (struct write_hook *h, const char *why)
{
}

static void
test_in_between (void **state)
{
  static const struct hook_ops ops = { nothing_to_prepare, go_on,
                                       write_in_between, nothing_to_end };
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
full_one (unsigned n)
{
  end_ok (BEGIN (d, n, .bitmap = "b", .full = true), true);
}

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

/* ---- transactions ---- */

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
    T (test_copied_once),   T (test_zeros),
    T (test_several),       T (test_waits_for_one),
    T (test_overtaken),     T (test_overtaken_exactly),
    T (test_in_between),    T (test_limit_fail),
    T (test_pace),          T (test_limit_slow),
    T (test_scratch_error),
    T (test_needed),        T (test_large_granules),
    T (test_points),        T (test_busy),
    T (test_all_or_none),   T (test_point_not_recorded),
    T (test_handed_over),   T (test_client_gone),
    T (test_direct),        T (test_extents_remembered),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
