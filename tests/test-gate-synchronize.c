/* nbdferry - test of the gate: who synchronizes
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

/* cmocka passes every test a state that most do not want. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "gate.h"

static struct gate gate;

static int
fresh (void **state)
{
  gate_init (&gate);
  return 0;
}

static int
gone (void **state)
{
  gate_destroy (&gate);
  return 0;
}

static atomic_bool done;

static void *
synchronize (void *arg)
{
  gate_synchronize (&gate);
  atomic_store (&done, true);
  return NULL;
}

static bool
is_synchronizing (void)
{
  bool r;

  pthread_mutex_lock (&gate.lock);
  r = gate.synchronizing;
  pthread_mutex_unlock (&gate.lock);
  return r;
}

static void
start (pthread_t *t)
{
  atomic_store (&done, false);
  pthread_create (t, NULL, synchronize, NULL);
  while (!is_synchronizing ())
    sched_yield ();
}

/* Who is inside is waited for; who comes meanwhile is not, nor held. */
static void
test_waits (void **state)
{
  int old = gate_enter (&gate), new;
  pthread_t t;

  start (&t);
  while (atomic_load (&gate.side) == 0)
    sched_yield ();
  new = gate_enter (&gate);
  gate_leave (&gate, gate_enter (&gate));
  assert_false (atomic_load (&done));
  gate_leave (&gate, old);
  pthread_join (t, NULL);
  assert_true (atomic_load (&done));

  /* Those of the other side, too. */
  start (&t);
  assert_false (atomic_load (&done));
  gate_leave (&gate, new);
  pthread_join (t, NULL);
}

/* The side that nobody is sent to is not empty for certain: a request may
 * have read the old one before a flip.
 */
static void
test_late_comer (void **state)
{
  int late = gate_enter (&gate); /* side 0 */
  pthread_t t;

  atomic_store (&gate.side, 1);
  start (&t);
  /* It waits before it flips. */
  assert_int_equal (atomic_load (&gate.side), 1);
  assert_false (atomic_load (&done));
  gate_leave (&gate, late);
  pthread_join (t, NULL);
  assert_int_equal (atomic_load (&gate.side), 0);
}

static void *
shut_and_open (void *arg)
{
  gate_close (&gate);
  gate_open (&gate);
  return NULL;
}

/* Beside a gate_close, which waits for the same. */
static void
test_with_close (void **state)
{
  int token = gate_enter (&gate);
  pthread_t s, c;

  start (&s);
  pthread_create (&c, NULL, shut_and_open, NULL);
  while (!atomic_load (&gate.shut))
    sched_yield ();
  gate_leave (&gate, token);
  pthread_join (s, NULL);
  pthread_join (c, NULL);
  assert_false (atomic_load (&gate.watched));
}

/* ---- many: what a keeper does ---- */

#define THREADS 5
#define PASSES  4000

static atomic_bool armed, ending;
static uint64_t bits[THREADS]; /* set inside by one, read after a
                                  synchronize: no atomics, for tsan */
static atomic_uint slipped;

static void *
mark (void *arg)
{
  uintptr_t me = (uintptr_t) arg;

  for (unsigned i = 0; i < PASSES; i++) {
    int token = gate_enter (&gate);

    if (atomic_load (&armed)) {
      if (i % 16 == 0)
        sched_yield ();
      bits[me]++;
    }
    gate_leave (&gate, token);
    if (i % 64 == 0)
      sched_yield ();
  }
  return NULL;
}

static void *
keep (void *arg)
{
  while (!atomic_load (&ending)) {
    uint64_t sum[2] = { 0, 0 };

    atomic_store (&armed, false);
    gate_synchronize (&gate);
    /* Nobody who saw it armed is inside any more. */
    for (int i = 0; i < 2; i++) {
      for (size_t k = 0; k < THREADS; k++)
        sum[i] += bits[k];
      sched_yield ();
    }
    if (sum[0] != sum[1])
      atomic_fetch_add (&slipped, 1);
    atomic_store (&armed, true);
    sched_yield ();
  }
  return NULL;
}

static void
test_many (void **state)
{
  pthread_t t[THREADS], k, c;

  atomic_store (&armed, true);
  atomic_store (&ending, false);
  pthread_create (&k, NULL, keep, NULL);
  for (uintptr_t i = 0; i < THREADS; i++)
    pthread_create (&t[i], NULL, mark, (void *) i);
  for (int i = 0; i < 50; i++) {
    pthread_create (&c, NULL, shut_and_open, NULL);
    pthread_join (c, NULL);
  }
  for (size_t i = 0; i < THREADS; i++)
    pthread_join (t[i], NULL);
  atomic_store (&ending, true);
  pthread_join (k, NULL);
  assert_int_equal (atomic_load (&slipped), 0);
}

int
main (void)
{
#define TEST(f) cmocka_unit_test_setup_teardown (f, fresh, gone)
  static const struct CMUnitTest tests[] = {
    TEST (test_waits), TEST (test_late_comer), TEST (test_with_close),
    TEST (test_many),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
