/* nbdferry - test of marks while bits are cleared
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Writers go over a few granules again and again, so that nearly all of these
 * are known to be marked, while bitmaps are cleared, come and go, and ship maps
 * are attached.  Two copies are kept of the disk, from nothing but what a
 * bitmap and a ship map say.  A write whose mark was lost is missing in one.
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "drive-test.h"

#define WRITERS 3
#define GRANULE 4096u
#define MINE    16 /* granules of each writer */
#define HOT     (WRITERS * MINE * GRANULE)
#define ROUNDS  6

static struct drive *d;
static struct bitmap *tmp; /* its bits */
static atomic_bool ending;

static unsigned
rnd (unsigned *seed, unsigned n)
{
  *seed = *seed * 1103515245 + 12345;
  return (*seed >> 16) % n;
}

static int
write_on (struct job *job)
{
  const unsigned me = (uintptr_t) job->arg;
  uint8_t data[2 * GRANULE];
  unsigned seed = me + 1, n = 0;

  while (!atomic_load (&ending)) {
    const unsigned len = rnd (&seed, 8) ? 512 : 2 * GRANULE;
    const uint64_t at =
      ((uint64_t) me * MINE + rnd (&seed, MINE - 1)) * GRANULE;
    int r;

    memset (data, ++n, len);
    r = rnd (&seed, 16) ? drive_pwrite (d, data, len, at, 0)
                        : drive_zero (d, len, at, 0);
    if (r == -1)
      return -1;
  }
  return 0;
}

/* What is dirty goes into a copy. */
static int
copy_dirty (struct bitmap *bm, bool clear, uint8_t *copy)
{
  struct range run = { 0 };

  while (bitmap_next_dirty (bm, run.end, HOT, &run)) {
    run.end = run.start + GRANULE;
    if (clear)
      bitmap_clear (bm, run.start, GRANULE);
    if (tap.real->pread (d->disk, copy + run.start, GRANULE, run.start) == -1)
      return -1;
  }
  return 0;
}

static bool
is_copy (const uint8_t *copy)
{
  static uint8_t now[HOT];

  return tap.real->pread (d->disk, now, HOT, 0) == 0 &&
         memcmp (now, copy, HOT) == 0;
}

/* What 'inc' has moves to 'tmp', and from there into the copy. */
static int
synchronize (uint8_t *copy, struct error *e)
{
  const struct bitmap_ref inc = { d, "inc" };
  const struct bitmap_action actions[] = {
    { .type = BITMAP_CLEAR, .target = { d, "tmp" } },
    { .type = BITMAP_MERGE,
      .target = { d, "tmp" },
      .sources = &inc,
      .nr_sources = 1 },
    { .type = BITMAP_CLEAR, .target = inc },
  };

  if (bitmap_transaction (actions, 3, e) == -1)
    return -1;
  return copy_dirty (tmp, false, copy);
}

static int
sync_on (struct job *job)
{
  while (!atomic_load (&ending))
    if (synchronize (job->arg, &job->err) == -1)
      return -1;
  return 0;
}

/* One migration after the other, each up to the hold. */
static int
ship_on (struct job *job)
{
  uint8_t *copy = job->arg;

  while (!atomic_load (&ending)) {
    struct bitmap *ship = bitmap_new (d->size, 12, &job->err);
    bool same;

    if (ship == NULL)
      return -1;
    bitmap_set_alone (ship, 0, d->size);
    if (drive_set_ship (d, ship, &job->err) == -1)
      return -1;
    for (int i = 0; i < 20; i++)
      if (copy_dirty (ship, true, copy) == -1)
        return -1;
    gate_close (&d->writes);
    same = copy_dirty (ship, true, copy) == 0 && is_copy (copy);
    gate_open (&d->writes);
    drive_drop_ship (d);
    same &= bitmap_is_consistent (ship);
    bitmap_free (ship);
    if (!same)
      return error_set (&job->err, EIO, "a write is missing at the hold");
  }
  return 0;
}

static int
change_on (struct job *job)
{
  struct bitmap_action a = { .target = { d, "more" }, .granularity = 1024 };
  static const enum bitmap_action_type types[] = {
    BITMAP_ADD, BITMAP_DISABLE, BITMAP_CLEAR, BITMAP_ENABLE, BITMAP_REMOVE,
  };

  while (!atomic_load (&ending))
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
      a.type = types[i];
      if (bitmap_transaction (&a, 1, &job->err) == -1)
        return -1;
    }
  return 0;
}

static void
test_nothing_is_lost (void **state)
{
  static uint8_t copy[HOT], shipped[HOT];
  static const char *const names[] = { "inc", "tmp", "coarse" };

  d = open_ok ("marks", DISK_SIZE, false);
  add_bitmap (d, "inc", GRANULE, true, false);
  add_bitmap (d, "tmp", GRANULE, false, true);
  add_bitmap (d, "coarse", 65536, true, false);
  tmp = bits_of (d, "tmp");
  for (int round = 0; round < ROUNDS; round++) {
    static struct job jobs[WRITERS + 3];
    const struct timespec some = { .tv_nsec = 250 * NS_PER_MS };
    size_t nr = 0;

    atomic_store (&ending, false);
    for (uintptr_t i = 0; i < WRITERS; i++)
      job_start (&jobs[nr++], write_on, (void *) i);
    /* Alone, with one that changes the list, and with migrations. */
    job_start (&jobs[nr++], sync_on, copy);
    if (round % 3 > 0)
      job_start (&jobs[nr++], change_on, NULL);
    if (round % 3 > 1)
      job_start (&jobs[nr++], ship_on, shipped);
    nanosleep (&some, NULL);
    atomic_store (&ending, true);
    for (size_t i = 0; i < nr; i++)
      if (job_join (&jobs[i]) == -1)
        fail_msg ("thread %zu: %s", i, jobs[i].err.msg);
    assert_int_equal (synchronize (copy, &err), 0);
    assert_true (is_copy (copy));
    for (size_t i = 0; i < 3; i++)
      assert_true (bitmap_is_consistent (bits_of (d, names[i])));
  }
  close_ok (d);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup (test_nothing_is_lost, tap_reset),
  };

  return cmocka_run_group_tests_name ("marks", tests, make_dir, remove_dir);
}
