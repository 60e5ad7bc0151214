/* nbdferry - test of the activity log
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What happens after a crash is test-crash-model's matter.  Here: the file,
 * what damage means, faults, and many threads.
 */
#include <config.h>

/* cmocka passes every test a state that most do not want. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmocka.h>

#include "activity-format.h"
#include "activity.h"

#define MIB    (UINT64_C (1) << 20)
#define REGION (64 * MIB)
#define SIZE   (1000 * REGION - 512) /* more than one word, and a part */

static char dir[PATH_MAX - 16], path[PATH_MAX];
static struct error err;
static struct activity *a;

/* ---- faults, and what is durable ---- */

static atomic_int fail_sync, fail_write; /* errno, or 0 */
static atomic_uint nr_syncs;

/* For the test of many threads: the file as it was when it was synced. */
static pthread_mutex_t disk_lock = PTHREAD_MUTEX_INITIALIZER;
static uint8_t written[65536], durable[65536];

/* The next sync stays under way until 'sync_may_go'. */
static atomic_bool hold_sync;
static sem_t sync_began, sync_may_go;

int
fdatasync (int fd)
{
  uint8_t copy[sizeof written];

  if (atomic_exchange (&hold_sync, false)) {
    sem_post (&sync_began);
    sem_wait (&sync_may_go);
  }
  if (atomic_load (&fail_sync)) {
    errno = atomic_load (&fail_sync);
    return -1;
  }
  atomic_fetch_add (&nr_syncs, 1);
  pthread_mutex_lock (&disk_lock);
  memcpy (copy, written, sizeof copy);
  pthread_mutex_unlock (&disk_lock);
  sched_yield (); /* what is written now may be too late */
  pthread_mutex_lock (&disk_lock);
  memcpy (durable, copy, sizeof copy);
  pthread_mutex_unlock (&disk_lock);
  return 0;
}

ssize_t
pwrite (int fd, const void *buf, size_t len, off_t offset)
{
  if (atomic_load (&fail_write)) {
    errno = atomic_load (&fail_write);
    return -1;
  }
  sched_yield ();
  pthread_mutex_lock (&disk_lock);
  if (offset + len <= sizeof written)
    memcpy (written + offset, buf, len);
  pthread_mutex_unlock (&disk_lock);
  return syscall (SYS_pwrite64, fd, buf, len, offset);
}

/* ---- helpers ---- */

static void
open_log (uint64_t size)
{
  a = activity_open (path, size, &err);
  if (a == NULL)
    fail_msg ("%s", err.msg);
}

static void
start_log (unsigned flags)
{
  if (activity_start (a, flags, &err) == -1)
    fail_msg ("%s", err.msg);
}

static void
close_log (void)
{
  activity_close (a);
  a = NULL;
}

static int
fresh (void **state)
{
  unlink (path);
  atomic_store (&fail_sync, 0);
  atomic_store (&fail_write, 0);
  open_log (SIZE);
  start_log (0);
  return 0;
}

static int
gone (void **state)
{
  close_log ();
  return 0;
}

/* Open it as after a crash, and look whether exactly [from, to) is armed. */
static void
assert_was (uint64_t from, uint64_t to)
{
  struct range run = { 0, 0 };

  close_log ();
  open_log (SIZE);
  if (from == to) {
    assert_false (activity_was_armed (a, 0, &run));
    return;
  }
  assert_true (activity_was_armed (a, 0, &run));
  assert_int_equal (run.start, from);
  assert_int_equal (run.end, to);
  assert_false (activity_was_armed (a, run.end, &run));
}

static void
flip_byte (off_t at)
{
  int fd = open (path, O_RDWR | O_CLOEXEC);
  uint8_t b;

  assert_int_equal (pread (fd, &b, 1, at), 1);
  b ^= 0x10;
  assert_int_equal (pwrite (fd, &b, 1, at), 1);
  close (fd);
}

/* ---- arming ---- */

static void
test_arm (void **state)
{
  unsigned syncs = atomic_load (&nr_syncs);

  assert_false (activity_is_armed (a, 0, 1));
  assert_int_equal (activity_arm (a, 3 * REGION + 5, 10), 0);
  assert_int_equal (atomic_load (&nr_syncs), syncs + 1);
  assert_true (activity_is_armed (a, 3 * REGION, REGION));
  assert_false (activity_is_armed (a, 3 * REGION - 1, 1));
  assert_false (activity_is_armed (a, 3 * REGION - 1, 2));
  assert_false (activity_is_armed (a, 4 * REGION - 1, 2));
  /* What is armed needs no sync. */
  assert_int_equal (activity_arm (a, 3 * REGION, 1), 0);
  assert_int_equal (atomic_load (&nr_syncs), syncs + 1);
  assert_was (3 * REGION, 4 * REGION);
}

/* Over words, and to the end, which is not on a region's boundary. */
static void
test_arm_range (void **state)
{
  assert_int_equal (activity_arm (a, 60 * REGION, SIZE - 60 * REGION), 0);
  assert_true (activity_is_armed (a, 60 * REGION, SIZE - 60 * REGION));
  assert_false (activity_is_armed (a, 59 * REGION, SIZE - 59 * REGION));
  assert_false (activity_is_armed (a, 60 * REGION - 1, 2));
  assert_int_equal (activity_nr_armed (a), 940);
  assert_was (60 * REGION, SIZE);
}

static void
test_large_disk (void **state)
{
  uint64_t size = UINT64_C (1) << 57;
  struct stat st;

  close_log ();
  unlink (path);
  open_log (size);
  start_log (0);
  assert_int_equal (activity_arm (a, size - 512, 512), 0);
  assert_true (activity_is_armed (a, size - 512, 512));
  assert_int_equal (stat (path, &st), 0);
  assert_true (st.st_size < 64 * 1024);
}

/* ---- disarming ---- */

static void
test_disarm (void **state)
{
  assert_int_equal (activity_arm (a, 0, 2 * REGION), 0);
  /* Touched by the arming. */
  assert_int_equal (activity_begin_disarm (a), 0);
  assert_true (activity_is_armed (a, 0, 1));
  assert_int_equal (activity_begin_disarm (a), 1);
  assert_true (activity_is_armed (a, 0, 1));
  assert_false (activity_is_armed (a, REGION, 1));
  assert_int_equal (activity_nr_armed (a), 2);
  assert_int_equal (activity_end_disarm (a, &err), 0);
  assert_int_equal (activity_nr_armed (a), 1);
  assert_was (0, REGION);
}

static void
test_cancel (void **state)
{
  assert_int_equal (activity_arm (a, 0, 1), 0);
  activity_begin_disarm (a);
  assert_int_equal (activity_begin_disarm (a), 1);
  activity_cancel_disarm (a);
  assert_true (activity_is_armed (a, 0, 1));
  assert_int_equal (activity_end_disarm (a, &err), 0);
  assert_was (0, REGION);
}

/* A write in between wins, and needs no sync. */
static void
test_arm_wins (void **state)
{
  unsigned syncs;

  assert_int_equal (activity_arm (a, 0, 1), 0);
  activity_begin_disarm (a);
  assert_int_equal (activity_begin_disarm (a), 1);
  syncs = atomic_load (&nr_syncs);
  assert_int_equal (activity_arm (a, 0, 1), 0);
  assert_int_equal (atomic_load (&nr_syncs), syncs);
  assert_int_equal (activity_end_disarm (a, &err), 0);
  assert_true (activity_is_armed (a, 0, 1));
  assert_was (0, REGION);
}

/* ---- flags, ends and beginnings ---- */

static void
test_flags (void **state)
{
  assert_int_equal (activity_flag (a, ACTIVITY_EVERY | ACTIVITY_FAILED, 0,
                                   true, &err), 0);
  assert_int_equal (activity_flag (a, 0, ACTIVITY_EVERY, false, &err), 0);
  close_log ();
  open_log (SIZE);
  assert_int_equal (activity_was_flags (a), ACTIVITY_FAILED);
  start_log (ACTIVITY_UNLOGGED);
  assert_true (activity_is_armed (a, 0, SIZE));
  assert_int_equal (activity_begin_disarm (a), 0);
  assert_was (0, SIZE);
  assert_int_equal (activity_was_flags (a), ACTIVITY_UNLOGGED);
  start_log (0);
  assert_false (activity_is_armed (a, 0, 1));
  assert_was (0, 0);
}

static void *
arm_first (void *arg)
{
  activity_arm (a, 0, 1);
  return NULL;
}

static void *
flag_failed (void *arg)
{
  activity_flag (a, ACTIVITY_FAILED, 0, true, NULL);
  return NULL;
}

static void *
flag_others (void *arg)
{
  activity_flag (a, 0, ACTIVITY_EVERY | ACTIVITY_CLEARING, false, NULL);
  return NULL;
}

/* While the log is being written, one says that the store has failed and
 * another has other flags dropped: both are done, whoever comes first.
 */
static void
test_flags_at_once (void **state)
{
  void *(*const fn[3]) (void *) = { arm_first, flag_failed, flag_others };
  pthread_t t[3];

  sem_init (&sync_began, 0, 0);
  sem_init (&sync_may_go, 0, 0);
  for (int i = 0; i < 10; i++) {
    activity_flag (a, ACTIVITY_EVERY, ACTIVITY_FAILED, true, &err);
    atomic_store (&hold_sync, true);
    pthread_create (&t[0], NULL, fn[0], NULL);
    sem_wait (&sync_began);
    for (int k = 1; k < 3; k++) {
      pthread_create (&t[k], NULL, fn[(i + k) % 2 + 1], NULL);
      usleep (2000); /* if it is not there by then, it meets nobody */
    }
    sem_post (&sync_may_go);
    for (int k = 0; k < 3; k++)
      pthread_join (t[k], NULL);
    close_log ();
    open_log (SIZE);
    assert_int_equal (activity_was_flags (a), ACTIVITY_FAILED);
    start_log (0);
  }
}

static void
test_finish (void **state)
{
  assert_int_equal (activity_arm (a, 0, SIZE), 0);
  assert_int_equal (activity_finish (a, &err), 0);
  assert_false (activity_is_armed (a, 0, 1));
  assert_int_equal (activity_arm (a, 0, 1), -1);
  assert_int_equal (errno, ESHUTDOWN);
  assert_was (0, 0);
}

/* A flag that was written without a sync is synced when that is asked for. */
static void
test_flag_synced_later (void **state)
{
  unsigned syncs = atomic_load (&nr_syncs);

  activity_flag (a, ACTIVITY_EVERY, 0, false, &err);
  assert_int_equal (atomic_load (&nr_syncs), syncs);
  activity_flag (a, ACTIVITY_EVERY, 0, true, &err);
  assert_int_equal (atomic_load (&nr_syncs), syncs + 1);
  activity_flag (a, ACTIVITY_EVERY, 0, true, &err);
  assert_int_equal (atomic_load (&nr_syncs), syncs + 1);
}

static void
test_other_size (void **state)
{
  struct range run;

  assert_int_equal (activity_arm (a, 10 * REGION, 1), 0);
  assert_int_equal (activity_arm (a, SIZE - 1, 1), 0);
  close_log ();
  open_log (10 * REGION + 512); /* cut */
  assert_true (activity_was_armed (a, 0, &run));
  assert_int_equal (run.start, 10 * REGION);
  assert_int_equal (run.end, 10 * REGION + 512);
  start_log (0);
  assert_int_equal (activity_arm (a, 0, 1), 0);
  close_log ();
  open_log (SIZE); /* grown */
  assert_true (activity_was_armed (a, 0, &run));
  assert_int_equal (run.end, REGION);
  assert_false (activity_was_armed (a, run.end, &run));
}

/* ---- damage ---- */

static void
test_missing (void **state)
{
  close_log ();
  unlink (path);
  open_log (SIZE);
  assert_int_equal (activity_was_flags (a),
                    ACTIVITY_EVERY | ACTIVITY_UNREADABLE);
  unlink (path);
  assert_was (0, SIZE);
}

static void
test_damaged (void **state)
{
  static const off_t places[] = { 0, 8, 15, 16, 27, 300, 496, 511 };

  for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
    flip_byte (places[i]);
    assert_was (0, SIZE);
    assert_int_equal (activity_was_flags (a),
                      ACTIVITY_EVERY | ACTIVITY_UNREADABLE);
    flip_byte (places[i]);
    assert_was (0, 0);
    flip_byte (ACTIVITY_SECTOR + places[i]);
    assert_was (0, SIZE); /* all are in the one record */
    assert_int_equal (activity_was_flags (a), 0);
    flip_byte (ACTIVITY_SECTOR + places[i]);
  }
  assert_int_equal (truncate (path, ACTIVITY_SECTOR + 100), 0);
  assert_was (0, SIZE);
  /* It is made anew. */
  flip_byte (0);
  close_log ();
  open_log (SIZE);
  start_log (0);
  assert_was (0, 0);
}

static void
test_not_a_file (void **state)
{
  close_log ();
  unlink (path);
  assert_int_equal (mkfifo (path, 0600), 0);
  a = activity_open (path, SIZE, &err);
  assert_null (a);
  unlink (path);
}

/* ---- faults ---- */

static void
test_faults (void **state)
{
  atomic_store (&fail_sync, EIO);
  assert_int_equal (activity_arm (a, 0, 1), -1);
  assert_int_equal (errno, EIO);
  assert_false (activity_is_armed (a, 0, 1));
  atomic_store (&fail_sync, 0);
  atomic_store (&fail_write, ENOSPC);
  assert_int_equal (activity_arm (a, REGION, 1), -1);
  assert_int_equal (errno, ENOSPC);
  atomic_store (&fail_write, 0);
  assert_int_equal (activity_arm (a, REGION, 1), 0);
  /* Those that failed are written anew, and armed with it. */
  assert_true (activity_is_armed (a, 0, 2 * REGION));
  assert_was (0, 2 * REGION);
}

/* ---- many ---- */

#define THREADS 6
#define PASSES  400

static bool
is_durable (uint64_t region)
{
  bool r;

  pthread_mutex_lock (&disk_lock);
  r = activity_record_word (durable + ACTIVITY_SECTOR, region / 64)
        >> region % 64 & 1;
  pthread_mutex_unlock (&disk_lock);
  return r;
}

static pthread_rwlock_t inside = PTHREAD_RWLOCK_INITIALIZER;
static atomic_uint lost, armings;

static void *
arm_some (void *arg)
{
  uint64_t x = (uintptr_t) arg * 2654435761u + 1;

  for (unsigned i = 0; i < PASSES; i++) {
    uint64_t region;

    x = x * UINT64_C (6364136223846793005) + 1442695040888963407;
    region = (x >> 33) % 300;
    for (;;) {
      pthread_rwlock_rdlock (&inside);
      if (activity_is_armed (a, region * REGION, 1))
        break;
      pthread_rwlock_unlock (&inside);
      atomic_fetch_add (&armings, 1);
      if (activity_arm (a, region * REGION, 1) == -1)
        atomic_fetch_add (&lost, 1);
    }
    if (!is_durable (region))
      atomic_fetch_add (&lost, 1);
    pthread_rwlock_unlock (&inside);
  }
  return NULL;
}

static atomic_bool ending;

static void *
disarm (void *arg)
{
  while (!atomic_load (&ending)) {
    activity_begin_disarm (a);
    /* Stands for gate_synchronize. */
    pthread_rwlock_wrlock (&inside);
    pthread_rwlock_unlock (&inside);
    activity_end_disarm (a, NULL);
    activity_flag (a, ACTIVITY_CLEARING, 0, false, NULL);
    activity_flag (a, 0, ACTIVITY_CLEARING, false, NULL);
    sched_yield ();
  }
  return NULL;
}

/* The file as it was synced always has what counts as armed. */
static void
test_many (void **state)
{
  pthread_t t[THREADS], keeper;
  unsigned syncs;

  memset (durable, 0, sizeof durable);
  memset (written, 0, sizeof written);
  assert_int_equal (activity_finish (a, &err), 0);
  close_log ();
  open_log (SIZE);
  start_log (0);
  syncs = atomic_load (&nr_syncs);
  atomic_store (&lost, 0);
  atomic_store (&ending, false);
  pthread_create (&keeper, NULL, disarm, NULL);
  for (uintptr_t i = 0; i < THREADS; i++)
    pthread_create (&t[i], NULL, arm_some, (void *) i);
  for (size_t i = 0; i < THREADS; i++)
    pthread_join (t[i], NULL);
  atomic_store (&ending, true);
  pthread_join (keeper, NULL);
  assert_int_equal (atomic_load (&lost), 0);
  /* Who waits shares. */
  assert_true (atomic_load (&nr_syncs) - syncs <= atomic_load (&armings));
}

static void *
wait_for_armed (void *arg)
{
  bool *r = arg;

  r[0] = activity_wait (a, 1);
  r[1] = activity_wait (a, UINT64_C (1000000000) * 3600);
  return NULL;
}

/* Sleeps while nothing is armed; ends when it is told to. */
static void
test_wait (void **state)
{
  bool r[2] = { false, true };
  pthread_t t;

  pthread_create (&t, NULL, wait_for_armed, r);
  assert_int_equal (activity_arm (a, 0, 1), 0);
  activity_wake_up (a);
  pthread_join (t, NULL);
  assert_false (r[1]);
}

static int
make_dir (void **state)
{
  const char *tmp = getenv ("TMPDIR");

  snprintf (dir, sizeof dir, "%s/ferry-activity.XXXXXX",
            tmp ? tmp : "/var/tmp");
  if (mkdtemp (dir) == NULL)
    return -1;
  snprintf (path, sizeof path, "%s/activity", dir);
  return 0;
}

static int
remove_dir (void **state)
{
  unlink (path);
  return rmdir (dir);
}

int
main (void)
{
#define TEST(f) cmocka_unit_test_setup_teardown (f, fresh, gone)
  static const struct CMUnitTest tests[] = {
    TEST (test_arm),     TEST (test_arm_range),  TEST (test_large_disk),
    TEST (test_disarm),  TEST (test_cancel),     TEST (test_arm_wins),
    TEST (test_flags),   TEST (test_flags_at_once),
    TEST (test_finish),  TEST (test_flag_synced_later),
    TEST (test_other_size), TEST (test_missing), TEST (test_damaged),
    TEST (test_not_a_file), TEST (test_faults),  TEST (test_many),
    TEST (test_wait),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
