/* nbdferry - test of a drive's requests
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "drive-test.h"
#include "ship-map.h"

#define AT 0x12000 /* of the requests here; they are 4 KiB */

/* Write, zero or trim 4 KiB at AT; the data is 0x55. */
static int
change (struct drive *d, enum tap_op op)
{
  static uint8_t data[4096];

  memset (data, 0x55, sizeof data);
  switch (op) {
  case TAP_WRITE: return drive_pwrite (d, data, sizeof data, AT, 0);
  case TAP_ZERO: return drive_zero (d, sizeof data, AT, DISK_MAY_TRIM);
  case TAP_TRIM: return drive_trim (d, sizeof data, AT, 0);
  default: return -1;
  }
}

/* Does all of 4 KiB at AT read as that byte? */
static bool
reads_as (struct disk *disk, uint8_t byte)
{
  uint8_t data[4096];

  if (tap.real->pread (disk, data, sizeof data, AT) == -1)
    return false;
  for (size_t i = 0; i < sizeof data; i++)
    if (data[i] != byte)
      return false;
  return true;
}

/* ---- mark, submit, mark again ---- */

/* The sender of a migration, who comes in between the mark and the data. */
struct sender {
  struct drive *drive;
  struct bitmap *ship, *recording;
  bool was_marked;    /* when it came */
  bool read_old;      /* the data that it sent */
};

static void
play_sender (void *opaque, uint64_t offset, uint64_t len)
{
  struct sender *s = opaque;

  s->was_marked = bitmap_test (s->ship, AT) && bitmap_test (s->recording, AT);
  bitmap_clear (s->ship, AT, 4096);
  bitmap_clear (s->recording, AT, 4096); /* so would a backup */
  s->read_old = reads_as (s->drive->disk, 0xaa);
}

/* "Write marks, sender clears, sender reads old data, write lands": the write
 * must not be lost.  This fails without the second mark in drive/io.c.
 */
static void
lost_write (enum tap_op op, int fails)
{
  struct drive *d = open_ok ("lost", DISK_SIZE, false);
  struct bitmap *ship = bitmap_new (d->size, 12, &err);
  struct sender s = { .drive = d, .ship = ship };
  uint8_t old[4096];

  memset (old, 0xaa, sizeof old);
  assert_int_equal (tap.real->pwrite (d->disk, old, sizeof old, AT, 0), 0);
  add_bitmap (d, "r", 512, true, false);
  s.recording = bits_of (d, "r");
  assert_int_equal (drive_set_ship (d, ship, &err), 0);
  tap_reset (NULL);
  tap.before = play_sender;
  tap.opaque = &s;
  tap_fail (op, fails);

  assert_int_equal (change (d, op), fails ? -1 : 0);
  if (fails)
    assert_int_equal (errno, fails);
  assert_int_equal (tap_calls (op), 1);
  assert_true (s.was_marked); /* the mark before */
  assert_true (s.read_old);
  if (!fails)
    assert_true (reads_as (d->disk, op == TAP_WRITE ? 0x55 : 0));
  /* The mark after; what has failed may have landed in part. */
  assert_int_equal (bitmap_count_bits (ship), 1);
  assert_true (bitmap_test (ship, AT));
  assert_int_equal (bitmap_count_bits (s.recording), 8);

  tap_reset (NULL);
  assert_int_equal (drive_set_ship (d, NULL, &err), 0);
  assert_int_equal (transact (d, BITMAP_REMOVE, "r"), 0);
  close_ok (d);
  bitmap_free (ship);
}

static void
test_lost_write (void **state)
{
  lost_write (TAP_WRITE, 0);
}

static void
test_lost_zero (void **state)
{
  lost_write (TAP_ZERO, 0);
}

static void
test_lost_trim (void **state)
{
  lost_write (TAP_TRIM, 0);
}

static void
test_failed_requests (void **state)
{
  lost_write (TAP_WRITE, EIO);
  lost_write (TAP_ZERO, ENOSPC);
  lost_write (TAP_TRIM, EIO);
}

/* When drive_set_ship returns, no write is under way that does not know. */
static int
one_write (struct job *job)
{
  return change (job->arg, TAP_WRITE);
}

struct set_ship {
  struct drive *drive;
  struct bitmap *ship;
};

static int
set_ship (struct job *job)
{
  struct set_ship *s = job->arg;

  return drive_set_ship (s->drive, s->ship, &job->err);
}

static void
test_ship_drains (void **state)
{
  struct drive *d = open_ok ("ship", DISK_SIZE, false);
  struct set_ship s = { d, bitmap_new (d->size, 16, &err) };
  struct job writer, setter;

  tap_hold (AT);
  job_start (&writer, one_write, d);
  tap_wait_held ();
  job_start (&setter, set_ship, &s);
  assert_false (job_done_within (&setter, MOMENT));
  tap_release ();
  assert_int_equal (job_join (&setter), 0);
  assert_int_equal (setter.landed, 1);
  assert_int_equal (job_join (&writer), 0);

  assert_int_equal (change (d, TAP_WRITE), 0);
  assert_true (bitmap_test (s.ship, AT));
  assert_int_equal (drive_set_ship (d, NULL, &err), 0);
  bitmap_clear_all (s.ship);
  assert_int_equal (change (d, TAP_WRITE), 0);
  assert_int_equal (bitmap_count_bits (s.ship), 0);
  close_ok (d);
  bitmap_free (s.ship);
}

/* Recording ones are marked, others are not. */
static void
test_what_is_marked (void **state)
{
  struct drive *d = open_ok ("marks", DISK_SIZE, false);
  uint64_t end = DISK_SIZE - 512;
  uint8_t sector[512] = { 1 };

  add_bitmap (d, "fine", 512, true, false);
  add_bitmap (d, "coarse", UINT64_C (1) << 31, false, false);
  add_bitmap (d, "off", 4096, true, true);
  assert_int_equal (drive_pwrite (d, sector, sizeof sector, end, 0), 0);
  assert_int_equal (bitmap_count_bits (bits_of (d, "fine")), 1);
  assert_true (bitmap_test (bits_of (d, "fine"), end));
  assert_int_equal (bitmap_count_bits (bits_of (d, "coarse")), 1);
  assert_int_equal (bitmap_count_bits (bits_of (d, "off")), 0);

  /* kill -9 loses no bit. */
  crash (d);
  d = open_ok ("marks", 0, false);
  assert_int_equal (d->nr_bitmaps, 2);
  assert_int_equal (bitmap_count_bits (bits_of (d, "fine")), 1);
  assert_true (bitmap_test (bits_of (d, "fine"), end));
  assert_int_equal (bitmap_count_bits (bits_of (d, "off")), 0);
  assert_true (find_ok (d, "fine")->recording);
  assert_false (find_ok (d, "off")->recording);
  close_ok (d);
}

/* What was marked once is known, and is marked again nevertheless where its
 * bit is gone: after a clear, or because its page was lost.
 */
static void
test_known_marks (void **state)
{
  struct drive *d = open_ok ("known", DISK_SIZE, false);
  struct bitmap *fine, *coarse;

  add_bitmap (d, "fine", 4096, true, false);
  add_bitmap (d, "coarse", 65536, true, false);
  fine = bits_of (d, "fine");
  coarse = bits_of (d, "coarse");
  for (int i = 0; i < 3; i++)
    assert_int_equal (change (d, TAP_WRITE), 0);
  assert_true (bitmap_test (fine, AT) && bitmap_test (coarse, AT));

  assert_int_equal (transact (d, BITMAP_CLEAR, "coarse"), 0);
  assert_int_equal (bitmap_count_bits (coarse), 0);
  for (int i = 0; i < 2; i++)
    assert_int_equal (change (d, TAP_WRITE), 0);
  assert_true (bitmap_test (fine, AT) && bitmap_test (coarse, AT));

  bitmap_clear_all (fine); /* nobody does that behind our back */
  assert_int_equal (change (d, TAP_WRITE), 0);
  assert_true (bitmap_test (fine, AT));
  assert_true (bitmap_is_consistent (fine) && bitmap_is_consistent (coarse));

  /* Another granule of the same slot, and a write across two. */
  assert_int_equal (drive_zero (d, 8192, AT + 61440, 0), 0);
  assert_true (bitmap_test (fine, AT + 61440));
  assert_true (bitmap_test (fine, AT + 65536));
  assert_true (bitmap_test (coarse, AT + 65536));

  /* One that is new knows nothing of it. */
  add_bitmap (d, "new", 65536, true, false);
  assert_int_equal (change (d, TAP_WRITE), 0);
  assert_true (bitmap_test (bits_of (d, "new"), AT));
  close_ok (d);
}

/* The second mark, and marking to the top, are for as long as somebody may
 * clear bits.
 */
static void
test_marks_after_a_migration (void **state)
{
  struct drive *d = open_ok ("after", DISK_SIZE, false);
  struct bitmap *map = bitmap_new (d->size, 12, &err);

  add_bitmap (d, "b", 4096, true, false);
  assert_true (d->marks->nr_short == 1 && !d->marks->again);

  assert_int_equal (drive_set_ship (d, map, &err), 0);
  assert_true (d->marks->nr_short == 0 && d->marks->again);
  drive_drop_ship (d);
  assert_true (d->marks->nr_short == 1 && !d->marks->again);
  drive_drop_ship (d);

  assert_int_equal (drive_set_watch (d, map, &err), 0);
  assert_true (d->marks->nr_short == 0 && d->marks->again);
  drive_drop_watch (d);
  assert_true (d->marks->nr_short == 1 && !d->marks->again);

  assert_int_equal (ship_map_make (d, 16, &err), 0);
  assert_int_equal (drive_set_ship (d, map, &err), 0);
  drive_drop_ship (d); /* the other one is left */
  assert_true (d->marks->nr_short == 0 && d->marks->again);
  ship_map_remove (d);
  assert_true (d->marks->nr_short == 1 && !d->marks->again);

  assert_int_equal (change (d, TAP_WRITE), 0);
  assert_int_equal (bitmap_count_bits (map), 0);
  assert_int_equal (bitmap_count_bits (bits_of (d, "b")), 1);
  close_ok (d);
  bitmap_free (map);
}

/* ---- whose disk it is ---- */

static void
switch_mode (struct drive *d, enum drive_mode mode, struct disk *remote)
{
  pthread_mutex_lock (&d->control);
  drives_close (&d, 1, true);
  drive_set_mode (d, mode, remote);
  drives_open (&d, 1, true);
  pthread_mutex_unlock (&d->control);
}

static void
refused (int r)
{
  assert_int_equal (r, -1);
  assert_int_equal (errno, ESHUTDOWN);
}

static void
test_not_served (void **state)
{
  static const enum drive_mode modes[] = { DRIVE_INCOMING, DRIVE_PREPARED,
                                           DRIVE_GONE };
  struct drive *d = open_ok ("closed", DISK_SIZE, false);
  struct extent ext;
  uint8_t buf[512];

  add_bitmap (d, "r", 512, false, false);
  tap_reset (NULL);
  for (size_t i = 0; i < sizeof modes / sizeof modes[0]; i++) {
    switch_mode (d, modes[i], NULL);
    assert_int_equal (drive_may_serve (d, &err), -1);
    refused (change (d, TAP_WRITE));
    refused (change (d, TAP_ZERO));
    refused (change (d, TAP_TRIM));
    refused (drive_flush (d));
    refused (drive_pread (d, buf, sizeof buf, 0));
    refused (drive_extent (d, 0, d->size, &ext));
    refused (drive_cache (d, 512, 0));
  }
  assert_int_equal (tap_calls (TAP_WRITE) + tap_calls (TAP_ZERO) +
                      tap_calls (TAP_TRIM) + tap_calls (TAP_FLUSH), 0);
  assert_int_equal (bitmap_count_bits (bits_of (d, "r")), 0);
  switch_mode (d, DRIVE_ACTIVE, NULL);
  assert_int_equal (drive_may_serve (d, &err), 0);
  assert_int_equal (change (d, TAP_WRITE), 0);
  close_ok (d);
}

static int
one_read (struct job *job)
{
  static uint8_t buf[4096];

  if (drive_pread (job->arg, buf, sizeof buf, AT) == -1)
    return -1;
  return buf[4095];
}

/* Requests that were held go on to where the disk went. */
static void
test_forward (void **state)
{
  struct drive *d = open_ok ("from", DISK_SIZE, false);
  struct disk *remote = disk_open_file (drive_file ("to", NULL), DISK_SIZE,
                                        false, &err);
  struct job writer, reader;
  uint8_t data[4096];

  assert_non_null (remote);
  remote->ops = &tap_ops;
  memset (data, 0x77, sizeof data);
  assert_int_equal (tap.real->pwrite (remote, data, sizeof data, AT, 0), 0);
  add_bitmap (d, "r", 512, false, false);
  tap_reset (NULL);

  pthread_mutex_lock (&d->control);
  drives_close (&d, 1, true);
  job_start (&reader, one_read, d);
  assert_false (job_done_within (&reader, MOMENT));
  drive_set_mode (d, DRIVE_FORWARD, remote);
  gate_open (&d->reads);
  assert_int_equal (job_join (&reader), 0x77);
  job_start (&writer, one_write, d);
  assert_false (job_done_within (&writer, MOMENT));
  gate_open (&d->writes);
  pthread_mutex_unlock (&d->control);
  assert_int_equal (job_join (&writer), 0);

  assert_true (reads_as (remote, 0x55));
  assert_true (reads_as (d->disk, 0));
  assert_int_equal (change (d, TAP_ZERO), 0);
  assert_true (reads_as (remote, 0));
  assert_int_equal (drive_flush (d), 0);
  assert_int_equal (tap_calls (TAP_FLUSH), 1);
  assert_int_equal (drive_may_serve (d, &err), 0);
  /* Its own bitmaps say nothing any more, and are left alone. */
  assert_int_equal (bitmap_count_bits (bits_of (d, "r")), 0);
  close_ok (d);
}

/* ---- ending ---- */

static int
shut_down (struct job *job)
{
  return drive_shutdown (job->arg, &job->err);
}

static void
test_shutdown (void **state)
{
  struct drive *d = open_ok ("end", DISK_SIZE, false);
  struct job writer, ender;

  add_bitmap (d, "r", 512, true, false);
  tap_hold (AT);
  job_start (&writer, one_write, d);
  tap_wait_held ();
  job_start (&ender, shut_down, d);
  /* What is in flight is waited for, what is new is turned away. */
  WAIT_UNTIL (atomic_load (&d->reads.shut));
  refused (change (d, TAP_WRITE));
  refused (drive_flush (d));
  assert_false (job_done_within (&ender, MOMENT));
  tap_release ();
  assert_int_equal (job_join (&writer), 0);
  assert_int_equal (job_join (&ender), 0);
  refused (change (d, TAP_WRITE));
  assert_true (journal_get (d->journal)->clean);
  drive_free (d);

  d = open_ok ("end", 0, false);
  assert_int_equal (bitmap_count_bits (bits_of (d, "r")), 8);
  assert_false (journal_get (d->journal)->clean);
  close_ok (d);
}

static int
no_mirror (struct job *job)
{
  drive_set_mirror (job->arg, NULL);
  return 0;
}

/* A write that hangs holds up nobody who has nothing to change. */
static void
test_no_mirror (void **state)
{
  struct drive *d = open_ok ("mirror", DISK_SIZE, false);
  struct drive_mirror mirror = { .on = false };
  struct job writer, setter;

  drive_set_mirror (d, &mirror);
  tap_hold (AT);
  job_start (&writer, one_write, d);
  tap_wait_held ();
  job_start (&setter, no_mirror, d);
  assert_false (job_done_within (&setter, MOMENT));
  tap_release ();
  assert_int_equal (job_join (&writer), 0);
  assert_int_equal (job_join (&setter), 0);

  tap_reset (NULL);
  tap_hold (AT);
  job_start (&writer, one_write, d);
  tap_wait_held ();
  job_start (&setter, no_mirror, d);
  assert_true (job_done_within (&setter, LONG / 2));
  tap_release ();
  assert_int_equal (job_join (&writer), 0);
  assert_int_equal (job_join (&setter), 0);
  close_ok (d);
}

static void
test_delay (void **state)
{
  struct drive *d = open_ok ("slow", DISK_SIZE, false);
  uint64_t began = now_ns ();

  throttle_set (&d->throttle, 4096 * 200);
  assert_int_equal (change (d, TAP_WRITE), 0);
  assert_true (throttle_delay (&d->throttle) > 0);
  assert_int_equal (change (d, TAP_WRITE), 0);
  assert_true (now_ns () - began >= 5 * NS_PER_MS);
  assert_true (throttle_longest (&d->throttle) > 0);
  throttle_set (&d->throttle, 0);
  assert_int_equal (throttle_delay (&d->throttle), 0);
  close_ok (d);
}

int
main (void)
{
#define TEST(f) cmocka_unit_test_setup (f, tap_reset)
  static const struct CMUnitTest tests[] = {
    TEST (test_lost_write),     TEST (test_lost_zero),
    TEST (test_lost_trim),      TEST (test_failed_requests),
    TEST (test_ship_drains),    TEST (test_what_is_marked),
    TEST (test_known_marks),
    TEST (test_marks_after_a_migration),
    TEST (test_not_served),     TEST (test_forward),
    TEST (test_shutdown),       TEST (test_no_mirror),
    TEST (test_delay),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
