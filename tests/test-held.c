/* nbdferry - test of what the destination holds: held.c and ship-map.c
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "drive-test.h"
#include "held.h"
#include "ship-map.h"

#define CHUNK 4096
#define SIZE  (UINT64_C (1) << 20)

static struct drive *d;
static struct shipment s;

static void
begin_shipment (void)
{
  if (shipment_init (&s, d, 0, "nbd://nowhere", "vda", &err) == -1 ||
      drive_set_ship (d, s.ship, &err) == -1)
    fail_msg ("%s", err.msg);
}

static int
begin (void **state)
{
  tap_reset (NULL);
  remove (drive_file ("vda", NULL));
  nftw (drive_file ("vda", ""), remove_one, 16, FTW_DEPTH | FTW_PHYS);
  d = open_ok ("vda", SIZE, false);
  if (ship_map_make (d, 12, &err) == -1)
    fail_msg ("%s", err.msg);
  begin_shipment ();
  held_lost (&s);
  return 0;
}

static int
end (void **state)
{
  if (d) {
    drive_drop_ship (d);
    shipment_destroy (&s);
    close_ok (d);
  }
  d = NULL;
  return 0;
}

/* kill -9, and the next start. */
static void
kill_and_open (void)
{
  drive_drop_ship (d);
  shipment_destroy (&s);
  crash (d);
  d = open_ok ("vda", 0, false);
  assert_non_null (d->unheld);
  begin_shipment ();
}

static struct bitmap *
unheld (void)
{
  return d->unheld->bits;
}

/* A producer has taken the range to send it. */
static void
take (uint64_t start, uint64_t len)
{
  pthread_mutex_lock (&s.lock);
  bitmap_clear (s.ship, start, len);
  bitmap_set (s.in_flight, start, len);
  pthread_mutex_unlock (&s.lock);
}

static void
ack (uint64_t start, uint64_t len)
{
  struct range r = { start, start + len };
  struct buffer b = { .covers = { &r, 1, 1 } };

  shipment_acked (&s, &b);
}

static void
flush (void)
{
  held_flushing (&s);
  held_flushed (&s);
}

static void
send_all (void)
{
  take (0, SIZE);
  ack (0, SIZE);
  flush ();
}

/* ---- */

static void
test_order (void **state)
{
  assert_int_equal (bitmap_count (unheld ()), SIZE);
  take (0, 4 * CHUNK);
  flush ();
  assert_int_equal (bitmap_count (unheld ()), SIZE); /* not acknowledged */
  ack (0, CHUNK);
  held_flushing (&s);
  ack (CHUNK, CHUNK); /* after the flush was sent */
  held_flushed (&s);
  assert_int_equal (bitmap_count (unheld ()), SIZE - CHUNK);
  assert_false (bitmap_test (unheld (), 0));
  flush ();
  assert_int_equal (bitmap_count (unheld ()), SIZE - 2 * CHUNK);
  /* Lost: what was in flight, or not flushed, is sent again. */
  ack (2 * CHUNK, CHUNK);
  held_lost (&s);
  assert_int_equal (bitmap_count (s.ship), SIZE - 2 * CHUNK);
  assert_int_equal (bitmap_count (s.in_flight) + bitmap_count (s.acked), 0);
  flush ();
  assert_int_equal (bitmap_count (unheld ()), SIZE - 2 * CHUNK);
}

/* Written again, taken again, acknowledged again: never held in between. */
static void
test_again (void **state)
{
  uint8_t data[512] = { 1 };

  take (0, CHUNK);
  ack (0, CHUNK);
  held_flushing (&s);
  for (int step = 0; step < 3; step++) {
    if (step == 0)
      assert_int_equal (drive_pwrite (d, data, 512, 512, 0), 0);
    else if (step == 1)
      take (0, CHUNK);
    else
      ack (0, CHUNK);
    held_flushed (&s);
    assert_true (bitmap_test (unheld (), 0));
    bitmap_set (s.flushing, 0, CHUNK);
  }
  bitmap_clear_all (s.flushing);
  flush ();
  assert_false (bitmap_test (unheld (), 0));
}

static void
test_kill (void **state)
{
  uint8_t data[512] = { 1 };

  send_all ();
  assert_int_equal (bitmap_count (unheld ()), 0);
  assert_int_equal (drive_pwrite (d, data, 512, 5 * CHUNK, 0), 0);
  kill_and_open ();
  assert_int_equal (bitmap_count (unheld ()), CHUNK);
  assert_true (bitmap_test (unheld (), 5 * CHUNK));
  /* Nobody sees it. */
  assert_int_equal (d->nr_bitmaps, 0);
  held_lost (&s);
  assert_int_equal (bitmap_count (s.ship), CHUNK);

  /* Killed when a bit was off: it is on again. */
  assert_int_equal (ship_map_clearing (d, 4 * CHUNK, 7 * CHUNK), 0);
  bitmap_clear (unheld (), 4 * CHUNK, 3 * CHUNK);
  kill_and_open ();
  assert_int_equal (bitmap_count (unheld ()), 3 * CHUNK);
  assert_true (bitmap_test (unheld (), 6 * CHUNK));

  /* And once it was struck out, no more. */
  send_all ();
  kill_and_open ();
  assert_int_equal (bitmap_count (unheld ()), 0);
}

/* What stands in the file makes no sense, or it is gone: all is sent. */
static void
test_no_note (void **state)
{
  for (int i = 0; i < 2; i++) {
    send_all ();
    drive_drop_ship (d);
    shipment_destroy (&s);
    crash (d);
    if (i == 0)
      assert_int_equal (truncate (drive_file ("vda", "ship-clearing"), 7), 0);
    else
      assert_int_equal (remove (drive_file ("vda", "ship-clearing")), 0);
    d = open_ok ("vda", 0, false);
    assert_null (d->unheld);
    assert_int_equal (ship_map_make (d, 12, &err), 0);
    begin_shipment ();
    held_lost (&s);
    assert_int_equal (bitmap_count (s.ship), SIZE);
  }
}

/* Not to be trusted: somebody has written to the disk. */
static void
test_broken (void **state)
{
  int fd;

  send_all ();
  drive_drop_ship (d);
  shipment_destroy (&s);
  close_ok (d);
  fd = open (drive_file ("vda", NULL), O_WRONLY | O_CLOEXEC);
  assert_int_equal (pwrite (fd, "x", 1, 0), 1);
  /* Clocks tick slowly. */
  assert_int_equal (futimens (fd, (struct timespec[]){ { 2000000000, 0 },
                                                       { 2000000000, 0 } }),
                    0);
  close (fd);
  d = open_ok ("vda", 0, false);
  begin_shipment ();
  assert_null (d->unheld);
}

static void
test_remove (void **state)
{
  send_all ();
  ship_map_remove (d);
  assert_null (d->unheld);
  drive_drop_ship (d);
  shipment_destroy (&s);
  crash (d);
  d = open_ok ("vda", 0, false);
  assert_null (d->unheld);
  assert_int_equal (transact (d, BITMAP_REMOVE, SHIP_MAP_NAME), -1);
  {
    struct bitmap_action a = { .type = BITMAP_ADD,
                               .target = { d, SHIP_MAP_NAME } };

    assert_int_equal (bitmap_transaction (&a, 1, &err), -1);
    assert_non_null (strstr (err.msg, "reserved"));
  }
  begin_shipment ();
}

/* ---- a write that is under way ---- */

static atomic_bool flushed;

static void *
flush_thread (void *arg)
{
  held_flushed (&s);
  atomic_store (&flushed, true);
  return NULL;
}

static void *
write_thread (void *arg)
{
  static const uint8_t data[512] = { 2 };

  return drive_pwrite (d, data, 512, 0, 0) == 0 ? NULL : &flushed;
}

/* It has marked the chunk, which is then taken, sent and flushed with the old
 * data.  As long as it has not ended, the chunk is not held.
 */
static void
test_under_way (void **state)
{
  pthread_t writer, flusher;
  uint64_t until;
  void *r;

  send_all ();
  tap_hold (0);
  pthread_create (&writer, NULL, write_thread, NULL);
  tap_wait_held ();
  assert_true (bitmap_test (s.ship, 0));
  take (0, CHUNK);
  ack (0, CHUNK);
  held_flushing (&s);
  atomic_store (&flushed, false);
  pthread_create (&flusher, NULL, flush_thread, NULL);
  until = now_ns () + MOMENT;
  while (now_ns () < until) {
    assert_false (atomic_load (&flushed));
    assert_true (bitmap_test (unheld (), 0));
    sched_yield ();
  }
  tap_release ();
  pthread_join (writer, &r);
  assert_null (r);
  pthread_join (flusher, NULL);
  assert_true (bitmap_test (unheld (), 0));
  assert_true (bitmap_test (s.ship, 0));
}

/* ---- all at once ---- */

#define WRITERS 3
#define LOOPS   300

static atomic_bool over;
static uint8_t sent[SIZE], durable[SIZE];

static void *
scribble (void *arg)
{
  unsigned seed = (uintptr_t) arg;
  uint8_t data[512];

  while (!atomic_load (&over)) {
    memset (data, rand_r (&seed), sizeof data);
    drive_pwrite (d, data, sizeof data,
                  rand_r (&seed) % (SIZE / 512) * 512, 0);
  }
  return NULL;
}

/* Whatever is not in the map is as it is on the disk. */
static void
check_world (void)
{
  static uint8_t disk[SIZE];

  gate_close (&d->writes);
  assert_int_equal (d->disk->ops->pread (d->disk, disk, SIZE, 0), 0);
  for (uint64_t at = 0; at < SIZE; at += CHUNK) {
    if (!bitmap_test (unheld (), at))
      assert_memory_equal (durable + at, disk + at, CHUNK);
    else
      continue;
    assert_false (bitmap_test (s.ship, at));
  }
  gate_open (&d->writes);
}

static void
test_all_at_once (void **state)
{
  pthread_t writer[WRITERS];
  unsigned seed = 7;
  uint64_t held = 0;

  atomic_store (&over, false);
  for (uintptr_t i = 0; i < WRITERS; i++)
    pthread_create (&writer[i], NULL, scribble, (void *) (i + 1));
  for (int loop = 0; loop < LOOPS; loop++) {
    struct range run;

    for (uint64_t at = 0; at < SIZE; at = run.end) {
      if (!bitmap_next_dirty (s.ship, at, SIZE, &run))
        break;
      if (run.end - run.start > 16 * CHUNK)
        run.end = run.start + 16 * CHUNK;
      take (run.start, run.end - run.start);
      assert_int_equal (d->disk->ops->pread (d->disk, sent + run.start,
                                             run.end - run.start, run.start),
                        0);
      if (rand_r (&seed) % 8 > 0)
        ack (run.start, run.end - run.start);
      else { /* it was not: back */
        pthread_mutex_lock (&s.lock);
        bitmap_set (s.ship, run.start, run.end - run.start);
        bitmap_clear (s.in_flight, run.start, run.end - run.start);
        pthread_mutex_unlock (&s.lock);
      }
    }
    held_flushing (&s);
    memcpy (durable, sent, SIZE);
    held += held_flushed (&s);
    if (loop % 10 == 0)
      check_world ();
    if (loop % 50 == 49)
      held_lost (&s);
  }
  atomic_store (&over, true);
  for (int i = 0; i < WRITERS; i++)
    pthread_join (writer[i], NULL);
  assert_true (held > 0);
  check_world ();
}

int
main (void)
{
#define TEST(name) cmocka_unit_test_setup_teardown (name, begin, end)
  const struct CMUnitTest tests[] = {
    TEST (test_order),     TEST (test_again),     TEST (test_kill),
    TEST (test_no_note),   TEST (test_broken),    TEST (test_remove),
    TEST (test_under_way), TEST (test_all_at_once),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
