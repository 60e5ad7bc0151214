/* nbdferry - test of pacing
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What must not be too fast is checked closely; what must not be too slow only
 * roughly, because a machine may have other things to do.
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "pacer.h"

#define THREADS 4
#define LONG    (10 * NS_PER_S)

static struct pacer pacer;

static int
begin (void **state)
{
  pacer_init (&pacer);
  return 0;
}

static int
end (void **state)
{
  pacer_destroy (&pacer);
  return 0;
}

struct sender {
  pthread_t thread;
  size_t len;
  unsigned n;
};

static void *
sender_thread (void *arg)
{
  struct sender *s = arg;

  for (unsigned i = 0; i < s->n; i++)
    pacer_wait (&pacer, s->len);
  return NULL;
}

/* How long do that many threads take to send n pieces each? */
static uint64_t
send_all (unsigned threads, unsigned n, size_t len)
{
  struct sender s[THREADS];
  uint64_t began = now_ns ();

  for (unsigned i = 0; i < threads; i++) {
    s[i] = (struct sender){ .len = len, .n = n };
    assert_int_equal (pthread_create (&s[i].thread, NULL, sender_thread,
                                      &s[i]), 0);
  }
  for (unsigned i = 0; i < threads; i++)
    pthread_join (s[i].thread, NULL);
  return now_ns () - began;
}

static void
test_rate (void **state)
{
  uint64_t ns;

  pacer_set_rate (&pacer, 10 << 20);
  /* 400 ms' worth.  The last piece need not be waited for, and there is a
   * credit.
   */
  ns = send_all (1, 40, (10 << 20) / 100);
  assert_true (ns >= 390 * NS_PER_MS - PACER_CREDIT - NS_PER_MS);
  assert_true (ns < LONG);
  ns = send_all (THREADS, 10, (10 << 20) / 100);
  assert_true (ns >= 390 * NS_PER_MS - PACER_CREDIT - NS_PER_MS);
  assert_true (ns < LONG);
}

static void
test_no_limit (void **state)
{
  assert_true (send_all (THREADS, 1000, 32 << 20) < LONG);
  assert_true (pacer_piece (&pacer, NS_PER_S, 1) == SIZE_MAX);
}

static void
test_idle_has_no_credit (void **state)
{
  struct timespec pause = { .tv_nsec = 300 * NS_PER_MS };

  pacer_set_rate (&pacer, 1 << 20);
  pacer_wait (&pacer, 1);
  nanosleep (&pause, NULL);
  assert_true (send_all (1, 30, (1 << 20) / 100) >=
               290 * NS_PER_MS - PACER_CREDIT - NS_PER_MS);
}

/* Who waits for an hour's turn goes at once. */
static void
test_changes_at_once (void **state)
{
  struct sender s = { .len = 1 << 20, .n = 2 };
  uint64_t began = now_ns ();

  pacer_set_rate (&pacer, 256);
  assert_int_equal (pthread_create (&s.thread, NULL, sender_thread, &s), 0);
  /* Whether it waits already or not: it must not wait in the end. */
  pacer_set_rate (&pacer, UINT64_C (1) << 40);
  pthread_join (s.thread, NULL);
  assert_true (now_ns () - began < LONG);

  pacer_set_rate (&pacer, 256);
  s.n = 3;
  assert_int_equal (pthread_create (&s.thread, NULL, sender_thread, &s), 0);
  pacer_lend (&pacer, 3 << 20);
  pthread_join (s.thread, NULL);
  assert_true (now_ns () - began < LONG);

  s.n = 1000;
  assert_int_equal (pthread_create (&s.thread, NULL, sender_thread, &s), 0);
  pacer_stop (&pacer);
  pthread_join (s.thread, NULL);
  assert_true (now_ns () - began < LONG);
}

/* Small enough for any second, and large enough for the round trip. */
static void
test_deadline (void **state)
{
  uint64_t began = now_ns ();

  pacer_set_rate (&pacer, 1);
  pacer_turn (&pacer);
  pacer_take (&pacer, 1 << 20); /* the next turn comes in twelve days */
  pacer_set_deadline (&pacer, began + 50 * NS_PER_MS);
  pacer_turn (&pacer);
  assert_true (now_ns () - began >= 50 * NS_PER_MS);
  assert_true (now_ns () - began < LONG);
}

static void
test_piece (void **state)
{
  const uint64_t rate = 100 << 20;

  pacer_set_rate (&pacer, rate);
  for (uint64_t rtt = 0; rtt < 300; rtt += 10)
    for (unsigned lanes = 1; lanes <= 64; lanes *= 2) {
      size_t piece = pacer_piece (&pacer, rtt * NS_PER_MS, lanes);
      double second = (double) PACER_CREDIT / NS_PER_S * rate + piece;

      assert_true (piece > 0 && second <= rate * 0.05);
      if (rtt <= 50 && lanes >= 4)
        assert_true ((double) piece * lanes >= rate * rtt / 1e3);
    }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup_teardown (test_rate, begin, end),
    cmocka_unit_test_setup_teardown (test_no_limit, begin, end),
    cmocka_unit_test_setup_teardown (test_idle_has_no_credit, begin, end),
    cmocka_unit_test_setup_teardown (test_changes_at_once, begin, end),
    cmocka_unit_test_setup_teardown (test_deadline, begin, end),
    cmocka_unit_test_setup_teardown (test_piece, begin, end),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
