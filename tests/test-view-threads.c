/* nbdferry - test of views with writers throughout
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Writers, each in an area of its own, write, zero and trim at random and keep
 * a model of what they have done.  Views begin in the midst of it: of all of
 * it, and of what a bitmap has.  Each must show one instant (the model, if the
 * writers were held for that moment; in any case the same at each look), and
 * each incremental one must, put over the one before, be what the disk was.
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "drive-test.h"
#include "view-test.h"

#define WRITERS 3
#define AREA    (DISK_SIZE / 512 / WRITERS * 512)

static struct drive *d;
static uint8_t model[DISK_SIZE];

struct writer {
  struct job job;
  unsigned n;
  uint64_t random;
  pthread_mutex_t held; /* between two requests */
  atomic_bool stop;
  atomic_uint done;
  uint8_t buf[300 * 512];
};

static struct writer writers[WRITERS];

static uint64_t
pick (struct writer *w, uint64_t n)
{
  w->random ^= w->random << 13;
  w->random ^= w->random >> 7;
  w->random ^= w->random << 17;
  return w->random % n;
}

static int
one_request (struct writer *w)
{
  const uint64_t sectors = AREA / 512;
  uint64_t at = pick (w, sectors), most = sectors - at, len;
  uint64_t offset;
  int r;

  if (most > (pick (w, 8) ? 20 : 300))
    most = pick (w, 8) ? 20 : 300;
  if (most > sectors - at)
    most = sectors - at;
  len = (1 + pick (w, most)) * 512;
  offset = w->n * AREA + at * 512;
  if (pick (w, 4) == 0) {
    r = pick (w, 2) ? drive_zero (d, len, offset, DISK_MAY_TRIM)
                    : drive_trim (d, len, offset, 0);
    memset (model + offset, 0, len);
  }
  else {
    memset (w->buf, 1 + pick (w, 255), len);
    r = drive_pwrite (d, w->buf, len, offset, 0);
    memcpy (model + offset, w->buf, len);
  }
  return r;
}

static int
write_on (struct job *job)
{
  struct writer *w = job->arg;
  int r = 0;

  while (r == 0 && !atomic_load (&w->stop)) {
    pthread_mutex_lock (&w->held);
    r = one_request (w);
    pthread_mutex_unlock (&w->held);
    atomic_fetch_add (&w->done, 1);
    sched_yield ();
  }
  return r;
}

static void
hold (bool yes)
{
  for (unsigned i = 0; i < WRITERS; i++)
    if (yes)
      pthread_mutex_lock (&writers[i].held);
    else
      pthread_mutex_unlock (&writers[i].held);
}

static void
let_write (unsigned n)
{
  for (unsigned i = 0; i < WRITERS; i++) {
    unsigned until = atomic_load (&writers[i].done) + n;

    WAIT_UNTIL (atomic_load (&writers[i].done) >= until);
  }
}

static void
read_view (struct view *v, uint8_t *buf, uint64_t step)
{
  for (uint64_t at = 0; at < DISK_SIZE; at += step) {
    uint64_t n = DISK_SIZE - at < step ? DISK_SIZE - at : step;

    if (view_pread (v, buf + at, n, at, &err) == -1)
      fail_msg ("%s", err.msg);
  }
}

/* The same as who has the disk and the map does. */
static void
read_directly (struct view *v, uint8_t *buf, uint64_t step)
{
  struct direct *direct = get_direct (v);
  struct range run;

  for (uint64_t at = 0, n; at < DISK_SIZE; at += n) {
    n = DISK_SIZE - at < step ? DISK_SIZE - at : step;
    assert_int_equal (direct_pread (direct, buf + at, n, at), 0);
    for (uint64_t from = at; direct_next_gone (direct, from, at + n, &run);
         from = run.end)
      if (view_pread (v, buf + run.start, run.end - run.start, run.start,
                      &err) == -1)
        fail_msg ("%s", err.msg);
  }
  direct_close (direct);
}

/* Put what is in the backup over 'base'.  What is said to be zeros must be. */
static void
apply (struct view *v, const uint8_t *whole, uint8_t *base)
{
  struct extent ext;

  for (uint64_t at = 0; at < DISK_SIZE; at = ext.end) {
    if (view_extent (v, at, DISK_SIZE, &ext, &err) == -1)
      fail_msg ("%s", err.msg);
    assert_true (ext.start == at && ext.end > at && ext.end <= DISK_SIZE);
    if (ext.type == EXTENT_ZERO)
      assert_true (disk_is_zero (whole + at, ext.end - at));
    if (ext.type != EXTENT_HOLE)
      memcpy (base + at, whole + at, ext.end - at);
  }
}

static void
start_writers (void)
{
  for (unsigned i = 0; i < WRITERS; i++) {
    struct writer *w = &writers[i];

    w->n = i;
    w->random = 88172645463325252 + i;
    pthread_mutex_init (&w->held, NULL);
    atomic_store (&w->stop, false);
    job_start (&w->job, write_on, w);
  }
}

static void
stop_writers (void)
{
  for (unsigned i = 0; i < WRITERS; i++)
    atomic_store (&writers[i].stop, true);
  for (unsigned i = 0; i < WRITERS; i++)
    assert_int_equal (job_join (&writers[i].job), 0);
}

/* One view, looked at twice while it is written on, and put over 'base'. */
static void
one_view (unsigned n, bool full, bool needed, bool held, uint8_t *base)
{
  static uint8_t was[DISK_SIZE], first[DISK_SIZE], again[DISK_SIZE];
  struct view *v;

  if (held) {
    hold (true);
    memcpy (was, model, sizeof was);
  }
  v = BEGIN (d, n, .bitmap = "b", .full = full, .needed = needed);
  if (held)
    hold (false);
  /* While most of it has yet to be overwritten. */
  if (!needed) {
    read_directly (v, again, 21 * 512);
    if (held)
      assert_memory_equal (again, was, sizeof again);
  }
  if (needed) {
    /* Only what is in it can be read. */
    struct extent ext;

    let_write (3);
    for (uint64_t at = 0; at < DISK_SIZE; at = ext.end) {
      assert_int_equal (view_extent (v, at, DISK_SIZE, &ext, &err), 0);
      if (ext.type != EXTENT_HOLE &&
          view_pread (v, base + at, ext.end - at, at, &err) == -1)
        fail_msg ("%s", err.msg);
    }
    if (held)
      assert_memory_equal (base, was, sizeof was);
    end_ok (v, true);
    return;
  }
  read_view (v, first, 100 * 512);
  let_write (3);
  read_view (v, again, 37 * 512);
  assert_memory_equal (first, again, sizeof first);
  if (held)
    assert_memory_equal (first, was, sizeof first);
  read_directly (v, again, 29 * 512);
  assert_memory_equal (first, again, sizeof first);
  apply (v, first, base);
  assert_memory_equal (base, first, sizeof first);
  end_ok (v, true);
}

static void
run_chain (uint64_t granularity, unsigned links)
{
  static uint8_t base[DISK_SIZE], beside[DISK_SIZE], again[DISK_SIZE];
  struct view *other;

  memset (base, 0, sizeof base);
  memset (model, 0, sizeof model);
  assert_int_equal (drive_zero (d, DISK_SIZE, 0, 0), 0);
  add_bitmap (d, "b", granularity, true, false);
  start_writers ();
  let_write (5);
  /* Another one, all the time. */
  other = BEGIN (d, 1000);
  read_view (other, beside, 65536);
  one_view (0, true, false, true, base);
  for (unsigned i = 1; i <= links; i++) {
    let_write (2);
    one_view (i, false, i % 4 == 3, i % 2 == 0, base);
    if (i % 3 == 0) {
      /* One that fails in between. */
      struct view *v = BEGIN (d, 2000, .bitmap = "b");

      let_write (2);
      end_ok (v, false);
    }
  }
  read_view (other, again, 65536);
  assert_memory_equal (beside, again, sizeof beside);
  end_ok (other, true);
  stop_writers ();
  assert_int_equal (transact (d, BITMAP_REMOVE, "b"), 0);
}

static void
test_chain (void **state)
{
  const char *sanitizer = getenv ("FERRY_SANITIZE");
  const bool slow = sanitizer && strstr (sanitizer, "thread");
  static const uint64_t granularities[] = { 512, 4096, 65536, 1 << 20 };

  for (size_t i = 0; i < 4; i++)
    run_chain (granularities[i],
               getenv ("CHECK_LONG") ? 200 : slow ? 6 : 16);
}

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
  close_ok (d);
  views_free ();
  return 0;
}

int
main (void)
{
  static const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup_teardown (test_chain, open_d, close_d),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
