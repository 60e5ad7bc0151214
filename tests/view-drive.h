/* nbdferry - a drive that views are of, for tests
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Each of its granules is full of another byte.  To be included once, after
 * view-test.h.
 */
#ifndef FERRY_VIEW_DRIVE_H
#define FERRY_VIEW_DRIVE_H

#define GRANULE 65536

static struct drive *d;

static inline int
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

static inline int
close_d (void **state)
{
  while (d->nr_bitmaps > 0)
    if (transact (d, BITMAP_REMOVE, d->bitmaps[0]->name) == -1)
      return -1;
  close_ok (d);
  views_free ();
  return 0;
}

static inline void
write_at (uint64_t offset, size_t len)
{
  static const uint8_t buf[4 * GRANULE] = { 0 };

  assert_true (len <= sizeof buf);
  assert_int_equal (drive_pwrite (d, buf, len, offset, 0), 0);
}

/* The view has the old content of all granules. */
static inline void
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

static inline struct view_info
info_of (struct view *v)
{
  struct view_info info;

  view_info (v, &info);
  return info;
}

/* What the chain of backups of bitmap "b" begins with. */
static inline void
full_one (unsigned n)
{
  end_ok (BEGIN (d, n, .bitmap = "b", .full = true), true);
}

#define assert_fails(call, words)                                       \
  do {                                                                  \
    assert_int_equal (call, -1);                                        \
    if (strstr (err.msg, words) == NULL)                                \
      fail_msg ("'%s' instead of '%s'", err.msg, words);                \
  } while (0)

#endif /* FERRY_VIEW_DRIVE_H */
