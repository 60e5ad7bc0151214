/* nbdferry - test of the gate
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "drive-test.h"

static struct gate gate;

static int
fresh (void **state)
{
  tap_reset (state);
  gate_init (&gate);
  return 0;
}

static int
gone (void **state)
{
  gate_destroy (&gate);
  return 0;
}

static unsigned
inside (void)
{
  unsigned n = 0;

  for (size_t i = 0; i < GATE_SHARDS; i++)
    n += atomic_load (&gate.shard[i].inside[0]) +
         atomic_load (&gate.shard[i].inside[1]);
  return n;
}

/* ---- what threads do ---- */

static int
enter_and_leave (struct job *job)
{
  int token = gate_enter (&gate);

  if (token == -1)
    return errno;
  gate_leave (&gate, token);
  return 0;
}

static int
close_it (struct job *job)
{
  gate_close (&gate);
  return 0;
}

static int
close_and_open (struct job *job)
{
  gate_close (&gate);
  gate_open (&gate);
  return 0;
}

/* ---- one at a time ---- */

static void
test_shared (void **state)
{
  int a = gate_enter (&gate), b = gate_enter (&gate);

  assert_true (a >= 0 && b >= 0);
  assert_int_equal (inside (), 2);
  gate_leave (&gate, a);
  gate_leave (&gate, b);
  assert_int_equal (inside (), 0);
}

/* It is shut only once all are out, and no one comes in until it opens. */
static void
test_drain_and_hold (void **state)
{
  int token = gate_enter (&gate);
  struct job closer, comer;

  job_start (&closer, close_it, NULL);
  WAIT_UNTIL (atomic_load (&gate.shut));
  assert_false (job_done_within (&closer, MOMENT));

  job_start (&comer, enter_and_leave, NULL);
  gate_leave (&gate, token);
  assert_int_equal (job_join (&closer), 0);
  assert_false (job_done_within (&comer, MOMENT));

  /* Opened by another thread than the one that closed it. */
  assert_true (gate_open (&gate) > 0);
  assert_int_equal (job_join (&comer), 0);
  assert_int_equal (inside (), 0);
}

/* Left by another thread than the one that came in. */
static int
leave_it (struct job *job)
{
  gate_leave (&gate, *(int *) job->arg);
  return 0;
}

static void
test_leave_elsewhere (void **state)
{
  int token = gate_enter (&gate);
  struct job closer, leaver;

  job_start (&closer, close_and_open, NULL);
  WAIT_UNTIL (atomic_load (&gate.shut));
  job_start (&leaver, leave_it, &token);
  assert_int_equal (job_join (&closer), 0);
  job_join (&leaver);
}

static void
test_second_closer_waits (void **state)
{
  struct job second;

  gate_close (&gate);
  job_start (&second, close_it, NULL);
  assert_false (job_done_within (&second, MOMENT));
  gate_open (&gate);
  assert_int_equal (job_join (&second), 0);
  assert_true (atomic_load (&gate.shut));
  gate_open (&gate);
  assert_false (atomic_load (&gate.shut));
}

static void
test_longest (void **state)
{
  uint64_t ns, most;

  gate_close (&gate);
  ns = gate_open (&gate);
  assert_true (gate_longest (&gate) > 0 && gate_longest (&gate) <= ns);
  gate_reset_longest (&gate);
  assert_int_equal (gate_longest (&gate), 0);

  /* A handover's hold does not count. */
  gate_close (&gate);
  gate_is_hold (&gate);
  assert_true (gate_open (&gate) > 0);
  assert_int_equal (gate_longest (&gate), 0);
  gate_close (&gate);
  gate_open (&gate);
  most = gate_longest (&gate);
  assert_true (most > 0);
}

/* ---- stopping ---- */

static void
test_stop_wakes (void **state)
{
  struct job held[3];

  gate_close (&gate);
  for (size_t i = 0; i < 3; i++)
    job_start (&held[i], enter_and_leave, NULL);
  assert_false (job_done_within (&held[0], MOMENT));
  gate_stop (&gate);
  for (size_t i = 0; i < 3; i++)
    assert_int_equal (job_join (&held[i]), ESHUTDOWN);
  /* For good, also after it was opened. */
  gate_open (&gate);
  assert_int_equal (gate_enter (&gate), -1);
  assert_int_equal (errno, ESHUTDOWN);
  assert_int_equal (inside (), 0);
}

/* Who is inside goes on, and is waited for. */
static void
test_stop_drains (void **state)
{
  int token = gate_enter (&gate);
  struct job closer;

  gate_stop (&gate);
  job_start (&closer, close_it, NULL);
  assert_false (job_done_within (&closer, MOMENT));
  gate_leave (&gate, token);
  assert_int_equal (job_join (&closer), 0);
  gate_open (&gate);
}

static int
delay_long (struct job *job)
{
  gate_delay (&gate, LONG);
  return 0;
}

static void
test_delay (void **state)
{
  uint64_t began = now_ns ();
  struct job slow;

  gate_delay (&gate, 2 * NS_PER_MS);
  assert_true (now_ns () - began >= 2 * NS_PER_MS);

  /* An opening is no reason to go on early, a stop is. */
  job_start (&slow, delay_long, NULL);
  gate_close (&gate);
  gate_open (&gate);
  assert_false (job_done_within (&slow, MOMENT));
  began = now_ns ();
  gate_stop (&gate);
  job_join (&slow);
  assert_true (now_ns () - began < LONG / 2);
}

/* ---- many ---- */

#define SHARED    6
#define EXCLUSIVE 3
#define PASSES    3000
#define SHUTS     60

static atomic_uint sharers, excluders, broken;
static uint64_t plain[SHARED]; /* each written inside by one, read by who has
                                  shut the gate: no atomics, for tsan */

static int
share (struct job *job)
{
  uint64_t *mine = job->arg;

  for (unsigned i = 0; i < PASSES; i++) {
    int token = gate_enter (&gate);

    atomic_fetch_add (&sharers, 1);
    if (atomic_load (&excluders) != 0)
      atomic_fetch_add (&broken, 1);
    ++*mine;
    if (i % 64 == 0)
      sched_yield ();
    if (atomic_load (&excluders) != 0)
      atomic_fetch_add (&broken, 1);
    atomic_fetch_sub (&sharers, 1);
    gate_leave (&gate, token);
  }
  return 0;
}

static int
exclude (struct job *job)
{
  uint64_t last = 0;

  for (unsigned i = 0; i < SHUTS; i++) {
    uint64_t sum = 0;

    gate_close (&gate);
    if (atomic_fetch_add (&excluders, 1) != 0 || atomic_load (&sharers) != 0)
      atomic_fetch_add (&broken, 1);
    for (size_t k = 0; k < SHARED; k++)
      sum += plain[k];
    sched_yield ();
    if (atomic_load (&sharers) != 0 || sum < last)
      atomic_fetch_add (&broken, 1);
    last = sum;
    atomic_fetch_sub (&excluders, 1);
    gate_open (&gate);
  }
  return 0;
}

static void
test_many (void **state)
{
  struct job s[SHARED], x[EXCLUSIVE];

  memset (plain, 0, sizeof plain);
  atomic_store (&broken, 0);
  for (size_t i = 0; i < SHARED; i++)
    job_start (&s[i], share, &plain[i]);
  for (size_t i = 0; i < EXCLUSIVE; i++)
    job_start (&x[i], exclude, NULL);
  for (size_t i = 0; i < SHARED; i++)
    job_join (&s[i]);
  for (size_t i = 0; i < EXCLUSIVE; i++)
    job_join (&x[i]);
  assert_int_equal (atomic_load (&broken), 0);
  assert_int_equal (inside (), 0);
  for (size_t i = 0; i < SHARED; i++)
    assert_int_equal (plain[i], PASSES);
}

int
main (void)
{
#define TEST(f) cmocka_unit_test_setup_teardown (f, fresh, gone)
  static const struct CMUnitTest tests[] = {
    TEST (test_shared),        TEST (test_drain_and_hold),
    TEST (test_leave_elsewhere), TEST (test_second_closer_waits),
    TEST (test_longest),       TEST (test_stop_wakes),
    TEST (test_stop_drains),   TEST (test_delay),
    TEST (test_many),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
