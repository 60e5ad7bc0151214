/* nbdferry - test of the bitmap under many threads
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Each of these fails, within a run or a few, if the step of the protocol
 * (bitmap/tree.c) that it is named for is taken out.
 */
#include <config.h>

/* cmocka passes every test a state that most do not want. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <cmocka.h>

#include "bitmap.h"

#define SEED  UINT64_C (20240607)
#define SHIFT 16
#define G     (UINT64_C (1) << SHIFT)

/* How long threads hammer at most.  What is asserted does not depend on it. */
#define HAMMER_MS 700
#define LATE_MS   1500

static uint64_t
rnd (uint64_t *s, uint64_t n)
{
  *s ^= *s >> 12;
  *s ^= *s << 25;
  *s ^= *s >> 27;
  return (*s * UINT64_C (0x2545f4914f6cdd1d)) % n;
}

static uint64_t
now_ms (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return ts.tv_sec * UINT64_C (1000) + ts.tv_nsec / 1000000;
}

static bool stop;        /* atomic */
static unsigned running; /* atomic */
static unsigned wrong;   /* atomic; cmocka's asserts are for the main thread */

static bool
stopped (void)
{
  return __atomic_load_n (&stop, __ATOMIC_RELAXED);
}

static void
must (bool ok)
{
  if (!ok)
    __atomic_fetch_add (&wrong, 1, __ATOMIC_RELAXED);
}

static struct bitmap *
new_bits (uint64_t nr)
{
  struct error err;
  struct bitmap *bm = bitmap_new (nr << SHIFT, SHIFT, &err);

  assert_non_null (bm);
  return bm;
}

static void
set_bit (struct bitmap *bm, uint64_t bit)
{
  bitmap_set (bm, bit << SHIFT, G);
}

static void
clear_bit (struct bitmap *bm, uint64_t bit)
{
  bitmap_clear (bm, bit << SHIFT, G);
}

/* Run threads until all have returned; after 'ms' they are told to stop. */
static void
run_threads (unsigned n, void *(*const fn[]) (void *), void *const arg[],
             unsigned ms)
{
  const struct timespec nap = { .tv_nsec = 200000 };
  const uint64_t end = now_ms () + ms;
  pthread_t t[8];

  stop = false;
  wrong = running = 0;
  for (unsigned i = 0; i < n; i++) {
    __atomic_fetch_add (&running, 1, __ATOMIC_SEQ_CST);
    assert_int_equal (pthread_create (&t[i], NULL, fn[i], arg[i]), 0);
  }
  while (now_ms () < end && __atomic_load_n (&running, __ATOMIC_SEQ_CST) > 0)
    nanosleep (&nap, NULL);
  __atomic_store_n (&stop, true, __ATOMIC_RELAXED);
  for (unsigned i = 0; i < n; i++)
    pthread_join (t[i], NULL);
  assert_int_equal (wrong, 0);
}

/* What every thread returns with. */
static void *
finished (void)
{
  __atomic_fetch_sub (&running, 1, __ATOMIC_SEQ_CST);
  return NULL;
}

struct job {
  struct bitmap *bm, *other;
  uint64_t bit, nr, seed, done;
};

/* Random short ranges, set and cleared, anywhere. */
static void *
scribble (void *arg)
{
  struct job *j = arg;
  uint64_t at, len;

  for (unsigned i = 0; i < 15000 && !stopped (); i++) {
    at = rnd (&j->seed, j->nr);
    len = i % 500 == 0 ? j->nr : rnd (&j->seed, i % 7 ? 3 : 200) + 1;
    if (rnd (&j->seed, 2))
      bitmap_set (j->bm, at << SHIFT, len << SHIFT);
    else
      bitmap_clear (j->bm, at << SHIFT, len << SHIFT);
    if (i % 900 == 0)
      bitmap_clear_all (j->bm);
  }
  return finished ();
}

/* Whatever setters and clearers did to each other: the tree and the count
 * agree with the leaves in the end.
 */
static void
test_settles (void **state)
{
  static const uint64_t sizes[] = { 3, 64, 66, 130, 4096, 4099, 20000 };
  void *(*const fn[]) (void *) = { scribble, scribble, scribble };

  for (unsigned s = 0; s < 7; s++)
    for (unsigned round = 0; round < 3; round++) {
      struct job j[3];
      void *const arg[] = { &j[0], &j[1], &j[2] };
      struct bitmap *bm = new_bits (sizes[s]);

      for (unsigned i = 0; i < 3; i++)
        j[i] = (struct job){ .bm = bm,
                             .nr = sizes[s],
                             .seed = SEED + i + 10 * round };
      run_threads (3, fn, arg, HAMMER_MS);
      assert_true (bitmap_is_consistent (bm));
      bitmap_free (bm);
    }
}

static void *
flip_one (void *arg)
{
  struct job *j = arg;

  for (unsigned i = 0; i < 30000; i++) {
    set_bit (j->bm, j->bit);
    clear_bit (j->bm, j->bit);
  }
  if (j->done)
    set_bit (j->bm, j->bit);
  return finished ();
}

/* Two threads, a bit each in the same leaf, one ending set and one clear. */
static void
test_settles_in_one_leaf (void **state)
{
  void *(*const fn[]) (void *) = { flip_one, flip_one };

  for (unsigned round = 0; round < 12; round++) {
    struct bitmap *bm = new_bits (round % 3 == 0 ? 2 : 300);
    struct job a = { .bm = bm, .bit = 0, .done = round & 1 };
    struct job b = { .bm = bm, .bit = 1, .done = round & 2 };
    void *const arg[] = { &a, &b };

    run_threads (2, fn, arg, HAMMER_MS);
    assert_true (bitmap_is_consistent (bm));
    assert_int_equal (bitmap_count_bits (bm), !!a.done + !!b.done);
    bitmap_free (bm);
  }
}

static void *
set_range (void *arg)
{
  struct job *j = arg;

  for (uint64_t i = j->bit; i < j->bit + j->nr; i += 50)
    bitmap_set (j->bm, i << SHIFT, 90 << SHIFT);
  return finished ();
}

/* Overlapping setters: the count is exact, and all of it is full. */
static void
test_setters_count (void **state)
{
  const uint64_t nr = 64 * 4096 + 70;
  void *(*const fn[]) (void *) = { set_range, set_range, set_range };

  for (unsigned round = 0; round < 10; round++) {
    struct bitmap *bm = new_bits (nr);
    struct job j[3];
    void *const arg[] = { &j[0], &j[1], &j[2] };
    struct range run;

    for (unsigned i = 0; i < 3; i++)
      j[i] = (struct job){ .bm = bm,
                           .bit = nr * i / 3 * (round & 1),
                           .nr = round & 1 ? nr / 3 + 1 : nr };
    run_threads (3, fn, arg, HAMMER_MS);
    assert_int_equal (bitmap_count_bits (bm), nr);
    assert_true (bitmap_is_consistent (bm));
    assert_true (bitmap_next_dirty (bm, 0, UINT64_MAX, &run));
    assert_int_equal (run.end - run.start, nr << SHIFT);
    bitmap_free (bm);
  }
}

/* Set our bit, look for it from the start of the disk, clear it. */
static void *
set_and_look (void *arg)
{
  struct job *j = arg;
  struct range run;

  while (!stopped ()) {
    set_bit (j->bm, j->bit);
    for (unsigned i = 0; i < 4; i++)
      must (bitmap_next_dirty (j->bm, 0, (j->bit + 1) << SHIFT, &run) &&
            run.start == j->bit << SHIFT);
    must (bitmap_count_bits (j->bm) > 0);
    clear_bit (j->bm, j->bit);
  }
  return finished ();
}

static void *
set_and_clear (void *arg)
{
  struct job *j = arg;

  while (!stopped ()) {
    set_bit (j->bm, j->bit);
    clear_bit (j->bm, j->bit);
  }
  return finished ();
}

/* A mark that has returned is seen while others, to the right of it, set and
 * clear what shares its leaf, its block, and so on.
 */
static void
test_visible_beside_clearers (void **state)
{
  const uint64_t nr = 64 * 4096 * 3;
  /* Not in the first leaf, which a search reads without asking the tree. */
  static const uint64_t bits[4][3] = {
    { 64 * 5, 64 * 5 + 1, 64 * 5 + 2 },
    { 64 * 5, 64 * 6, 64 * 7 },
    { 4096 * 3 + 64, 4096 * 3 + 65, 4096 * 3 + 640 },
    { 4096 * 70, 4096 * 71, 4096 * 72 },
  };
  void *(*const fn[]) (void *) = { set_and_look, set_and_clear,
                                   set_and_clear };

  for (unsigned i = 0; i < 4; i++) {
    struct bitmap *bm = new_bits (nr);
    struct job j[3];
    void *const arg[] = { &j[0], &j[1], &j[2] };

    for (unsigned k = 0; k < 3; k++)
      j[k] = (struct job){ .bm = bm, .bit = bits[i][k] };
    run_threads (3, fn, arg, HAMMER_MS);
    assert_int_equal (bitmap_count_bits (bm), 0);
    assert_true (bitmap_is_consistent (bm));
    bitmap_free (bm);
  }
}

#define MEET_ROUNDS 20000
#define LATE_ROUNDS 2000000
static unsigned met; /* atomic */

/* Two threads leave here at the same time, for the i-th time; or it is time
 * to stop.
 */
static bool
meet (uint64_t i)
{
  __atomic_fetch_add (&met, 1, __ATOMIC_SEQ_CST);
  for (unsigned spin = 0; __atomic_load_n (&met, __ATOMIC_SEQ_CST) < 2 * i;
       spin++) {
    if (stopped ())
      return false;
    if (spin > 200)
      sched_yield ();
  }
  return true;
}

static void *
set_the_same (void *arg)
{
  struct job *j = arg;
  struct range run;

  for (uint64_t i = 0; i < MEET_ROUNDS && meet (i + 1); i++) {
    /* Ascending would show us the summaries of the round before. */
    const uint64_t bit = j->nr - 1 - i * 4096;

    set_bit (j->bm, bit);
    must (bitmap_next_dirty (j->bm, 0, j->nr << SHIFT, &run) &&
          run.start == bit << SHIFT);
  }
  return finished ();
}

/* Two threads set the same bit in an untouched part of the tree.  He who
 * finds it set must not return before the other one has reached the top.
 */
static void
test_visible_to_the_second_setter (void **state)
{
  const uint64_t nr = UINT64_C (4096) * (MEET_ROUNDS + 1);
  struct bitmap *bm = new_bits (nr);
  struct job j = { .bm = bm, .nr = nr };
  void *(*const fn[]) (void *) = { set_the_same, set_the_same };
  void *const arg[] = { &j, &j };

  met = 0;
  run_threads (2, fn, arg, HAMMER_MS);
  assert_true (bitmap_is_consistent (bm));
  bitmap_free (bm);
}

/* A few ns. */
static void
short_pause (void)
{
  static unsigned dummy;

  __atomic_store_n (&dummy, 0, __ATOMIC_RELAXED);
}

static void *
set_second (void *arg)
{
  struct job *j = arg;

  for (uint64_t i = 0; i < LATE_ROUNDS && meet (i + 1); i++) {
    for (unsigned delay = rnd (&j->seed, 30); delay > 0; delay--)
      short_pause ();
    set_bit (j->bm, i * 64 + 1);
  }
  return finished ();
}

static void *
set_first_and_clear (void *arg)
{
  struct job *j = arg;

  for (uint64_t i = 0; i < LATE_ROUNDS && meet (i + 1); i++) {
    set_bit (j->bm, i * 64);
    bitmap_clear (j->bm, (i * 64) << SHIFT, 64 * G);
  }
  return finished ();
}

/* A mark is cleared again before its summary bit is there.  The bit that
 * comes too late must go (each leaf meets this once, so that it would stay).
 */
static void
test_late_summary_bit (void **state)
{
  struct bitmap *bm = new_bits (UINT64_C (64) * LATE_ROUNDS);
  struct job j = { .bm = bm, .seed = SEED };
  void *(*const fn[]) (void *) = { set_first_and_clear, set_second };
  void *const arg[] = { &j, &j };

  met = 0;
  run_threads (2, fn, arg, LATE_MS);
  assert_true (bitmap_is_consistent (bm));
  bitmap_free (bm);
}

static void *
set_up (void *arg)
{
  struct job *j = arg;

  for (uint64_t i = 0; !stopped () && i < j->nr; i++) {
    set_bit (j->bm, j->bit + i);
    must (bitmap_count_bits (j->bm) >= i + 1);
  }
  return finished ();
}

/* The count never falls below the marks that have returned. */
static void
test_count_is_never_low (void **state)
{
  const uint64_t nr = 64 * 4096;
  struct bitmap *bm = new_bits (nr + 64);
  struct job a = { .bm = bm, .bit = 64, .nr = nr }, b = { .bm = bm, .bit = 1 };
  void *(*const fn[]) (void *) = { set_up, set_and_clear, set_and_clear };
  void *const arg[] = { &a, &b, &b };

  run_threads (3, fn, arg, HAMMER_MS);
  assert_true (bitmap_is_consistent (bm));
  bitmap_free (bm);
}

/* A disk of numbers, its bitmap, and a copy made by rounds. */
#define BLOCKS 6000
struct disk {
  struct bitmap *dirty, *round;
  uint64_t data[BLOCKS]; /* atomic */
  uint64_t copy[BLOCKS]; /* the sender's */
};

struct writer {
  struct disk *d;
  unsigned first;
  uint64_t seed, writes;
};

static void *
writer (void *arg)
{
  struct writer *w = arg;

  for (uint64_t n = 1; !stopped (); n++) {
    /* Few blocks at a time, so that the sender meets them. */
    const unsigned b =
      (n / 1000 * 64 + rnd (&w->seed, 8)) % (BLOCKS / 2) * 2 + w->first;

    set_bit (w->d->dirty, b);
    if (n % 64 == 0)
      sched_yield ();
    __atomic_store_n (&w->d->data[b], n, __ATOMIC_SEQ_CST);
    set_bit (w->d->dirty, b);
  }
  return finished ();
}

static void
send_round (struct disk *d)
{
  struct range run;
  uint64_t at = 0;

  bitmap_take (d->round, d->dirty);
  while (bitmap_next_dirty (d->round, at, UINT64_MAX, &run)) {
    for (uint64_t b = run.start >> SHIFT; b < run.end >> SHIFT; b++)
      d->copy[b] = __atomic_load_n (&d->data[b], __ATOMIC_SEQ_CST);
    bitmap_clear (d->round, run.start, run.end - run.start);
    at = run.end;
  }
}

static void *
take_sender (void *arg)
{
  while (!stopped ())
    send_round (arg);
  return finished ();
}

/* The sender that clears a run in place, then reads. */
static void *
clear_sender (void *arg)
{
  struct disk *d = arg;
  struct range run;

  while (!stopped ())
    for (uint64_t at = 0; bitmap_next_dirty (d->dirty, at, UINT64_MAX, &run);
         at = run.end) {
      bitmap_clear (d->dirty, run.start, run.end - run.start);
      for (uint64_t b = run.start >> SHIFT; b < run.end >> SHIFT; b++)
        d->copy[b] = __atomic_load_n (&d->data[b], __ATOMIC_SEQ_CST);
    }
  return finished ();
}

/* Mark, write, mark again: no write is lost. */
static void
no_lost_write (void *(*sender) (void *) )
{
  struct disk *d = calloc (1, sizeof *d);
  struct writer w[2] = { { d, 0, SEED, 0 }, { d, 1, SEED + 1, 0 } };
  void *(*const fn[]) (void *) = { writer, writer, sender };
  void *const arg[] = { &w[0], &w[1], d };

  assert_non_null (d);
  d->dirty = new_bits (BLOCKS);
  d->round = new_bits (BLOCKS);
  run_threads (3, fn, arg, HAMMER_MS);
  send_round (d);
  assert_int_equal (bitmap_count_bits (d->dirty), 0);
  assert_int_equal (bitmap_count_bits (d->round), 0);
  assert_true (bitmap_is_consistent (d->dirty));
  assert_true (bitmap_is_consistent (d->round));
  assert_memory_equal (d->copy, d->data, sizeof d->data);
  bitmap_free (d->dirty);
  bitmap_free (d->round);
  free (d);
}

static void
test_no_lost_write_take (void **state)
{
  no_lost_write (take_sender);
}

static void
test_no_lost_write_clear (void **state)
{
  no_lost_write (clear_sender);
}

static void *
mark_both (void *arg)
{
  struct job *j = arg;

  for (j->done = 0; j->done < j->nr && !stopped (); j->done++)
    for (unsigned again = 0; again < 2; again++) {
      set_bit (j->bm, j->done);
      set_bit (j->other, j->done);
    }
  return finished ();
}

static void *
retainer (void *arg)
{
  struct job *j = arg;

  while (!stopped () && bitmap_count_bits (j->other) < j->nr) {
    bitmap_set (j->bm, j->nr << SHIFT, G); /* something to clear */
    bitmap_retain (j->bm, j->other, NULL, NULL);
  }
  return finished ();
}

/* What was marked in both (twice, as writers do) survives a retain that was
 * under way.
 */
static void
test_retain_beside_writers (void **state)
{
  const uint64_t nr = 30000;
  void *(*const fn[]) (void *) = { mark_both, retainer };

  for (unsigned round = 0; round < 12; round++) {
    struct bitmap *bm = new_bits (nr + 1), *keep = new_bits (nr + 1);
    struct job j = { .bm = bm, .other = keep, .nr = nr };
    void *const arg[] = { &j, &j };

    run_threads (2, fn, arg, HAMMER_MS);
    bitmap_retain (bm, keep, NULL, NULL);
    assert_int_equal (bitmap_count_bits (keep), j.done);
    assert_int_equal (bitmap_count_bits (bm), j.done);
    assert_true (bitmap_is_consistent (bm));
    bitmap_free (bm);
    bitmap_free (keep);
  }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_settles),
    cmocka_unit_test (test_settles_in_one_leaf),
    cmocka_unit_test (test_setters_count),
    cmocka_unit_test (test_visible_beside_clearers),
    cmocka_unit_test (test_visible_to_the_second_setter),
    cmocka_unit_test (test_late_summary_bit),
    cmocka_unit_test (test_count_is_never_low),
    cmocka_unit_test (test_no_lost_write_take),
    cmocka_unit_test (test_no_lost_write_clear),
    cmocka_unit_test (test_retain_beside_writers),
  };

  printf ("seed %llu\n", (unsigned long long) SEED);
  return cmocka_run_group_tests (tests, NULL, NULL);
}
