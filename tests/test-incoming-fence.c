/* nbdferry - test of the destination: what comes late, and what waits
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "incoming-test.h"

#define AT 0x10000

static const uint8_t old_data[4096] = { 0x01 }, new_data[4096] = { 0x02 };

/* The tests open channels of their own. */
static int
begin_closed (void **state)
{
  fresh (1);
  return 0;
}

static int
end_closed (void **state)
{
  stop (true);
  source_free (&src);
  return 0;
}

/* A packet, sent by a thread. */
struct late {
  struct source source; /* the epoch is its own */
  struct incoming_channel *ch;
  const uint8_t *data;
  uint64_t offset;
};

static int
send_late (struct job *job)
{
  struct late *l = job->arg;

  return send_data (&l->source, l->ch, 0, l->offset, l->data, 4096,
                    &job->err);
}

static int
hello_late (struct job *job)
{
  struct late *l = job->arg;

  return send_hello (&l->source, l->ch, &job->err);
}

static int
prepare_late (struct job *job)
{
  struct late *l = job->arg;

  return send_prepare (&l->source, l->ch, 1, &job->err);
}

static int
cancel_late (struct job *job)
{
  struct late *l = job->arg;

  return send_cancel (&l->source, l->ch, &job->err);
}

static int
stop_late (struct job *job)
{
  incoming_stop (in);
  return 0;
}

static uint64_t
epoch_of (struct session *s)
{
  uint64_t epoch;

  pthread_mutex_lock (&s->fence.lock);
  epoch = s->fence.epoch;
  pthread_mutex_unlock (&s->fence.lock);
  return epoch;
}

static bool
disk_has (const uint8_t *data)
{
  uint8_t buf[4096];

  return tap.real->pread (drives[0]->disk, buf, sizeof buf, AT) == 0 &&
         memcmp (buf, data, sizeof buf) == 0;
}

/* ---- epochs ---- */

/* The packet of a dead connection that lands late.  Without the wait in
 * fence_raise the handshake is answered at once; without the look at the
 * epoch in fence_enter the second packet is written.
 */
static void
test_late_packet (void **state)
{
  struct late first = { src, channel (), old_data, AT };
  struct late again = { src, channel (), NULL, 0 };
  struct job writer, greeter;
  struct session *session;

  OK (send_hello (&src, first.ch, &err));
  session = in->drives[0].session;
  tap_hold (AT);
  job_start (&writer, send_late, &first);
  tap_wait_held ();

  /* The connection is dead, and the source connects again. */
  again.source.epoch = 2;
  job_start (&greeter, hello_late, &again);
  WAIT_UNTIL (epoch_of (session) == 2);
  assert_false (job_done_within (&greeter, MOMENT));
  /* What arrives from the old one now is turned away, though it began
   * before the handshake was answered.
   */
  REFUSED (send_data (&src, first.ch, 0, AT + 4096, old_data, 4096, &err),
           ESTALE, "older connection (epoch 1)");
  tap_release ();
  assert_int_equal (job_join (&greeter), 0);
  assert_int_equal (greeter.landed, 1);
  assert_int_equal (job_join (&writer), 0);

  /* The source sends it again, and nothing comes after. */
  OK (send_data (&again.source, again.ch, 0, AT, new_data, 4096, &err));
  REFUSED (send_data (&src, first.ch, 0, AT, old_data, 4096, &err), ESTALE,
           "older connection");
  REFUSED (send_list (&src, first.ch, 0, &err), ESTALE, "older connection");
  REFUSED (send_prepare (&src, first.ch, 1, &err), ESTALE, "older");
  REFUSED (send_cancel (&src, first.ch, &err), ESTALE, "older");
  assert_true (disk_has (new_data));
  assert_int_equal (tap_calls (TAP_WRITE), 2);
  incoming_close (first.ch);
  incoming_close (again.ch);
}

static void
test_epochs (void **state)
{
  struct incoming_channel *a = channel (), *b = channel ();
  struct source s = src;

  s.epoch = 7;
  OK (send_hello (&s, a, &err));
  OK (send_hello (&s, b, &err)); /* another channel of the same */
  OK (send_data (&s, a, 0, AT, old_data, 4096, &err));
  OK (send_data (&s, b, 0, AT, old_data, 4096, &err));
  s.epoch = 6;
  REFUSED (send_hello (&s, a, &err), ESTALE, "older connection");
  s.epoch = 8; /* not announced by a handshake */
  REFUSED (send_data (&s, a, 0, AT, new_data, 4096, &err), ESTALE, "epoch 8");
  s.epoch = SESSION_CLOSED;
  REFUSED (send_hello (&s, a, &err), EBADMSG, "malformed HELLO");
  s.epoch = 0; /* that of a session that has no HELLO yet */
  REFUSED (send_hello (&s, a, &err), EBADMSG, "malformed HELLO");
  REFUSED (send_data (&s, a, 0, AT, new_data, 4096, &err), ESTALE, "epoch 0");
  s.epoch = 7;
  OK (send_data (&s, a, 0, AT, old_data, 4096, &err));
  assert_true (disk_has (old_data));
  incoming_close (a);
  incoming_close (b);
}

static void
test_no_handshake (void **state)
{
  struct incoming_channel *ch = channel ();
  struct source other = src;

  REFUSED (send_data (&src, ch, 0, AT, old_data, 4096, &err), ESTALE,
           "did not open");
  REFUSED (send_list (&src, ch, 0, &err), ESTALE, "did not open");
  REFUSED (send_prepare (&src, ch, 1, &err), ESTALE, "did not open");
  OK (send_hello (&src, ch, &err));
  uuid_new (&other.session);
  REFUSED (send_data (&other, ch, 0, AT, old_data, 4096, &err), ESTALE,
           "did not open");
  assert_int_equal (tap_calls (TAP_WRITE), 0);
  incoming_close (ch);
}

/* A packet with data opens a channel, if the session is there. */
static void
test_opened_by_data (void **state)
{
  struct incoming_channel *a = channel (), *b = channel ();
  struct source s = src;

  s.epoch = 7;
  OK (send_hello (&s, a, &err));
  s.epoch = 6;
  REFUSED (send_data (&s, b, 0, AT, old_data, 4096, &err), ESTALE, "epoch 6");
  s.epoch = 7;
  OK (send_data (&s, b, 0, AT, old_data, 4096, &err));
  assert_true (disk_has (old_data));
  OK (incoming_flush (b, &err));
  /* Nothing else does. */
  incoming_close (b);
  b = channel ();
  REFUSED (send_list (&s, b, 0, &err), ESTALE, "did not open");
  REFUSED (send_prepare (&s, b, 1, &err), ESTALE, "did not open");
  REFUSED (send_cancel (&s, b, &err), ESTALE, "did not open");
  /* And not for a session that has lost its disk. */
  uuid_new (&s.session);
  OK (send_hello (&s, a, &err));
  s.session = src.session;
  REFUSED (send_data (&s, b, 0, AT, new_data, 4096, &err), ESTALE,
           "did not open");
  assert_true (disk_has (old_data));
  incoming_close (a);
  incoming_close (b);
}

/* ---- what waits for handlers that run ---- */

/* Hold a packet in pwrite, run the job, and see that it waits. */
static void
waits (int (*run) (struct job *job), struct late *with)
{
  struct late first = { src, channel (), old_data, AT };
  struct job writer, waiter;

  OK (send_hello (&src, first.ch, &err));
  tap_hold (AT);
  job_start (&writer, send_late, &first);
  tap_wait_held ();
  job_start (&waiter, run, with);
  assert_false (job_done_within (&waiter, MOMENT));
  assert_int_equal (tap_calls (TAP_FLUSH), 0);
  tap_release ();
  if (job_join (&waiter) == -1)
    fail_msg ("%s", waiter.err.msg);
  assert_int_equal (waiter.landed, 1);
  assert_int_equal (job_join (&writer), 0);
  incoming_close (first.ch);
}

static void
test_prepare_waits (void **state)
{
  struct late l = { src, channel (), NULL, 0 };

  OK (send_hello (&src, l.ch, &err));
  waits (prepare_late, &l);
  assert_int_equal (drives[0]->mode, DRIVE_PREPARED);
  assert_int_equal (tap_calls (TAP_FLUSH), 1);
  /* From here on it takes nothing. */
  REFUSED (send_data (&src, l.ch, 0, AT, new_data, 4096, &err), EPROTO,
           "prepared; it takes no data");
  REFUSED (send_list (&src, l.ch, 0, &err), EPROTO, "takes no bitmaps");
  assert_true (disk_has (old_data));
  incoming_close (l.ch);
}

static void
test_cancel_waits (void **state)
{
  struct late l = { src, channel (), NULL, 0 };

  OK (send_hello (&src, l.ch, &err));
  waits (cancel_late, &l);
  incoming_close (l.ch);
}

static void
test_stop_waits (void **state)
{
  struct late l = { src, channel (), NULL, 0 };

  OK (send_hello (&src, l.ch, &err));
  waits (stop_late, &l);
  REFUSED (send_data (&src, l.ch, 0, AT, new_data, 4096, &err), ESTALE, "");
  REFUSED (send_hello (&src, l.ch, &err), ESHUTDOWN, "going down");
  REFUSED (send_commit (&src, l.ch, 1, 0, 1, &err), ESHUTDOWN, "going down");
  incoming_close (l.ch);
}

/* A second session takes the drive from the first. */
static void
test_displaced (void **state)
{
  struct incoming_channel *old = channel ();
  struct late l = { src, channel (), NULL, 0 };
  struct source closed = src;

  source_add (&src, 0, "b", 16, true, true);
  OK (send_hello (&src, old, &err));
  OK (send_list (&src, old, 0, &err));
  uuid_new (&l.source.session);
  waits (hello_late, &l);
  assert_null (drive_find_bitmap (drives[0], "b"));
  REFUSED (send_data (&src, old, 0, AT, new_data, 4096, &err), ESTALE,
           "older connection");
  /* Not even with the epoch that closed its session. */
  closed.epoch = SESSION_CLOSED;
  REFUSED (send_data (&closed, old, 0, AT, new_data, 4096, &err), ESTALE,
           "older connection");
  REFUSED (send_list (&closed, old, 0, &err), ESTALE, "older connection");
  REFUSED (send_cancel (&closed, old, &err), ESTALE, "older connection");
  assert_null (drive_find_bitmap (drives[0], "b"));
  OK (send_data (&l.source, l.ch, 0, AT, new_data, 4096, &err));
  assert_true (disk_has (new_data));
  incoming_close (old);
  incoming_close (l.ch);
}

/* ---- forwarded clients ---- */

/* Has a raise begun? */
static uint64_t
fence_epoch (struct fence *f)
{
  uint64_t epoch;

  pthread_mutex_lock (&f->lock);
  epoch = f->epoch;
  pthread_mutex_unlock (&f->lock);
  return epoch;
}

static int
forward_late (struct job *job)
{
  return incoming_forward (in, drives[0], &src.session,
                           *(uint64_t *) job->arg, &job->err);
}

static void
test_forward (void **state)
{
  struct incoming_channel *ch = channel ();
  struct uuid other;
  struct fence *f = incoming_fence (in, drives[0]);
  uint64_t epoch = 3;
  struct job job;

  uuid_new (&other);
  REFUSED (incoming_forward (in, drives[0], &src.session, 1, &err), EPERM,
           "not handed over");
  OK (send_hello (&src, ch, &err));
  /* Its source may connect early, but not do anything yet. */
  OK (incoming_forward (in, drives[0], &src.session, 1, &err));
  REFUSED (incoming_forward (in, drives[0], &other, 1, &err), EPERM,
           "not handed over");
  assert_false (incoming_is_from (drives[0], &src.session));
  OK (send_prepare (&src, ch, 1, &err));
  OK (incoming_forward (in, drives[0], &src.session, 1, &err));
  assert_false (incoming_is_from (drives[0], &src.session));
  OK (send_commit (&src, ch, 1, 0, 1, &err));
  assert_true (incoming_is_from (drives[0], &src.session));
  assert_false (incoming_is_from (drives[0], &other));
  REFUSED (incoming_forward (in, drives[0], &other, 1, &err), EPERM, "");
  OK (incoming_forward (in, drives[0], &src.session, 2, &err));
  REFUSED (incoming_forward (in, drives[0], &src.session, 1, &err), ESTALE,
           "older connection");
  /* A request of epoch 2 that still runs is waited for. */
  assert_int_equal (fence_enter (f, 2), 0);
  job_start (&job, forward_late, &epoch);
  WAIT_UNTIL (fence_epoch (f) == 3);
  assert_false (job_done_within (&job, MOMENT));
  assert_int_equal (fence_enter (f, 2), -1);
  assert_int_equal (errno, ESTALE);
  fence_leave (f, 2);
  assert_int_equal (job_join (&job), 0);
  assert_int_equal (fence_enter (f, 3), 0);
  fence_leave (f, 3);
  incoming_close (ch);
}

/* ---- the fence alone ---- */

struct raise {
  struct fence *fence;
  uint64_t epoch;
};

static int
raise_it (struct job *job)
{
  struct raise *r = job->arg;

  return fence_raise (r->fence, r->epoch) == -1 ? errno : 0;
}

/* Raised again while it waits: the first is told that it is too old. */
static void
test_raised_twice (void **state)
{
  struct fence f;
  struct raise two = { &f, 2 }, three = { &f, 3 };
  struct job first, second;

  fence_init (&f);
  assert_int_equal (fence_enter (&f, 0), 0);
  job_start (&first, raise_it, &two);
  WAIT_UNTIL (fence_enter (&f, 2) == 0);
  job_start (&second, raise_it, &three);
  WAIT_UNTIL (fence_epoch (&f) == 3);
  assert_false (job_done_within (&second, MOMENT));
  fence_leave (&f, 0);
  assert_false (job_done_within (&second, MOMENT)); /* that of epoch 2 runs */
  fence_leave (&f, 2);
  assert_int_equal (job_join (&first), ESTALE);
  assert_int_equal (job_join (&second), 0);
  fence_drain (&f);
  fence_destroy (&f);
}

#define HANDLERS 4
#define RAISES   300

static struct fence shared;
static atomic_uint running[RAISES + 1];
static atomic_bool over;

static int
handle (struct job *job)
{
  while (!atomic_load (&over))
    for (uint64_t e = 0; e <= RAISES; e++)
      if (fence_enter (&shared, e) == 0) {
        atomic_fetch_add (&running[e], 1);
        sched_yield ();
        atomic_fetch_sub (&running[e], 1);
        fence_leave (&shared, e);
      }
  return 0;
}

static void
test_many (void **state)
{
  struct job job[HANDLERS];

  fence_init (&shared);
  for (size_t i = 0; i < HANDLERS; i++)
    job_start (&job[i], handle, NULL);
  for (uint64_t e = 1; e <= RAISES; e++) {
    assert_int_equal (fence_raise (&shared, e), 0);
    for (uint64_t old = 0; old < e; old++)
      assert_int_equal (atomic_load (&running[old]), 0);
    sched_yield ();
  }
  atomic_store (&over, true);
  for (size_t i = 0; i < HANDLERS; i++)
    job_join (&job[i]);
  fence_drain (&shared);
  fence_destroy (&shared);
}

int
main (void)
{
#define TEST(f) cmocka_unit_test_setup_teardown (f, begin_closed, end_closed)
  static const struct CMUnitTest tests[] = {
    TEST (test_late_packet),
    TEST (test_epochs),
    TEST (test_no_handshake),
    TEST (test_opened_by_data),
    TEST (test_prepare_waits),
    TEST (test_cancel_waits),
    TEST (test_stop_waits),
    TEST (test_displaced),
    TEST (test_forward),
    cmocka_unit_test_setup (test_raised_twice, tap_reset),
    cmocka_unit_test_setup (test_many, tap_reset),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
