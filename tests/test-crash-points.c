/* nbdferry - test of a loss of power at certain moments
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What the random lives of test-crash-model.c meet too seldom.
 */
#include <config.h>

/* cmocka passes every test a state that most do not want. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "crash-model.h"
#include "crash-drive.h"

#include "qcow2-internal.h"

/* Writes that come between the steps of a command, while there are blocks. */
static int next_block = 16;
static struct marks *marks_of_command;

static void write_block (int i);

static void
step_of (int file)
{
  int i = next_block;

  if (file != SIDECAR || i == 16 || live->marks != marks_of_command ||
      atomic_load (&live->writes.shut))
    return;
  next_block = 16; /* not in the steps of this one */
  write_block (i);
  next_block = i + 1;
}

static unsigned
mask_of_step (int file)
{
  return 0;
}

/* ---- a write that is inside while its region is disarmed ---- */

static sem_t stuck, go_on;
static uint64_t *trap;

/* The first store into the trapped page waits here. */
static void
on_fault (int sig, siginfo_t *info, void *context)
{
  if ((uintptr_t) info->si_addr / PAGE != (uintptr_t) trap / PAGE)
    abort ();
  sem_post (&stuck);
  while (sem_wait (&go_on) == -1)
    ;
  mprotect (trap, PAGE, PROT_READ | PROT_WRITE);
}

static void *
write_trapped (void *arg)
{
  static const char buf[4096];

  return drive_pwrite (live, buf, sizeof buf, 512 * MIB, 0) == 0 ? arg : NULL;
}

static void *
look_twice (void *arg)
{
  keeper_look (live);
  return NULL;
}

static bool
is_synchronizing (void)
{
  bool r;

  pthread_mutex_lock (&live->writes.lock);
  r = live->writes.synchronizing;
  pthread_mutex_unlock (&live->writes.lock);
  return r;
}

static void
test_inside (void **state)
{
  static const char buf[4096];
  struct bitmap_action a = { .type = BITMAP_ADD, .persistent = true };
  struct sigaction sa = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO };
  struct sigaction old;
  pthread_t writer, keeper;
  atomic_bool *done = calloc (1, sizeof *done);
  static struct image work[NR_FILES];
  void *r;

  open_live ();
  for (size_t i = live->nr_bitmaps; i > 0; i--) {
    a = (struct bitmap_action){ .type = BITMAP_REMOVE,
      .target = { live, live->bitmaps[i - 1]->name } };
    assert_int_equal (bitmap_transaction (&a, 1, &err), 0);
  }
  a = (struct bitmap_action){ .type = BITMAP_ADD, .persistent = true,
                              .target = { live, "inside" } };
  assert_int_equal (bitmap_transaction (&a, 1, &err), 0);
  close_live ();
  load_files ();
  recording = true;
  open_live ();
  /* Armed, then found untouched. */
  assert_int_equal (drive_pwrite (live, buf, sizeof buf, 512 * MIB + 65536, 0),
                    0);
  keeper_look (live);
  sem_init (&stuck, 0, 0);
  sem_init (&go_on, 0, 0);
  trap = qcow2_words (live->bitmaps[0]->slot) + 512 * MIB / 65536 / 64;
  trap = (uint64_t *) ((uintptr_t) trap / PAGE * PAGE);
  assert_int_equal (sigaction (SIGSEGV, &sa, &old), 0);
  assert_int_equal (mprotect (trap, PAGE, PROT_READ), 0);
  pthread_create (&writer, NULL, write_trapped, done);
  sem_wait (&stuck);
  /* It has seen its region armed, and was about to set its bit.  The touch
   * that it left is taken away, as a look a moment before would.
   */
  for (size_t i = 0; i < DISK_SIZE / 64 / MIB; i++)
    atomic_store (&((struct activity_hot *) live->activity)->word[i / 64]
                    .touched, 0);
  pthread_create (&keeper, NULL, look_twice, NULL);
  while (!is_synchronizing () && pthread_tryjoin_np (keeper, &r) != 0)
    sched_yield ();
  if (!is_synchronizing ()) /* it did not wait: a bug, found below */
    keeper = 0;
  sem_post (&go_on);
  pthread_join (writer, &r);
  assert_ptr_equal (r, done);
  if (keeper)
    pthread_join (keeper, NULL);
  assert_int_equal (activity_nr_armed (live->activity), 0);
  scan ();
  recording = false;
  drive_free (live);
  live = NULL;
  sigaction (SIGSEGV, &old, NULL);

  for (size_t k = 0; k < nr_ops; k++)
    pass_op (k);
  for (unsigned seed = 0; seed < 20; seed++) {
    struct drive_options opt = { .name = "d", .path = disk_path,
                                 .state_dir = state_dir };
    struct drive *d;

    play_crash (nr_ops, seed, work);
    set_boot (boot + 1);
    d = drive_open (&opt, &err);
    assert_non_null (d);
    if (!bitmap_test (d->bitmaps[0]->bits, 512 * MIB))
      fail_msg ("crash %u: the write has lost its bit", seed);
    drive_free (d);
  }
  forget_ops ();
  free (done);
}

/* ---- not too much either ---- */

/* What was disarmed is exact after a crash. */
static void
test_exact (void **state)
{
  static const char buf[4096];
  static struct image work[NR_FILES];
  struct drive_options opt = { .name = "d", .path = disk_path,
                               .state_dir = state_dir };
  struct drive *d;

  set_boot (++boot);
  load_files ();
  open_live ();
  close_live ();
  load_files ();
  recording = true;
  open_live ();
  assert_int_equal (live->nr_bitmaps, 1);
  bitmap_clear_all (live->bitmaps[0]->bits);
  for (int i = 0; i < 10; i++)
    drive_pwrite (live, buf, sizeof buf, i * 100 * MIB, 0);
  keeper_look (live);
  drive_pwrite (live, buf, sizeof buf, 300 * MIB, 0);
  keeper_look (live);
  assert_int_equal (activity_nr_armed (live->activity), 1);
  /* Nothing syncs that write of the log, so do what the next arming does. */
  fsync (open (files[ACTIVITY].path, O_RDONLY | O_CLOEXEC));
  scan ();
  recording = false;
  drive_free (live);
  for (size_t k = 0; k < nr_ops; k++)
    pass_op (k);
  play_crash (nr_ops, 0, work);
  set_boot (++boot);
  d = drive_open (&opt, &err);
  assert_non_null (d);
  /* The region of 64 MiB at 256 MiB, and nine other granules. */
  assert_int_equal (bitmap_count_bits (d->bitmaps[0]->bits), 1024 + 9);
  drive_free (d);
  forget_ops ();
}

/* ---- bits that move from one bitmap to another ---- */

static void
add_bitmap (const char *name)
{
  struct bitmap_action a = { .type = BITMAP_ADD, .persistent = true,
                             .target = { live, name } };

  assert_int_equal (bitmap_transaction (&a, 1, &err), 0);
}

static void
move_bits (const char *from, const char *to)
{
  struct bitmap_ref source = { live, from };
  struct bitmap_action a[2] = {
    { .type = BITMAP_MERGE, .target = { live, to }, .sources = &source,
      .nr_sources = 1 },
    { .type = BITMAP_CLEAR, .target = { live, from } },
  };

  assert_int_equal (bitmap_transaction (a, 2, &err), 0);
}

/* In one of them each must be, wherever it is crashed. */
static void
test_move (void **state)
{
  static const char buf[4096];
  static struct image work[NR_FILES];

  set_boot (++boot);
  open_live ();
  add_bitmap ("from");
  for (int i = 0; i < 16; i++)
    drive_pwrite (live, buf, sizeof buf, i * 64 * MIB, 0);
  add_bitmap ("to");
  close_live ();
  load_files ();
  recording = true;
  open_live ();
  move_bits ("from", "to");
  scan ();
  recording = false;
  drive_free (live);
  for (size_t k = 0; k <= nr_ops; k++) {
    for (unsigned seed = 0; seed < 12; seed++) {
      struct named_bitmap *from, *to;

      play_crash (k, seed, work);
      set_boot (boot + 1);
      open_live ();
      from = drive_find_bitmap (live, "from");
      to = drive_find_bitmap (live, "to");
      for (int i = 0; i < 16; i++)
        if (!bitmap_test (from->bits, i * 64 * MIB) &&
            !bitmap_test (to->bits, i * 64 * MIB))
          fail_msg ("crash %u before op %zu: write %d is in neither", seed, k,
                    i);
      drive_free (live);
    }
    if (k < nr_ops)
      pass_op (k);
  }
  forget_ops ();
}

/* ---- what nothing but a sync keeps ---- */

static void
write_block (int i)
{
  static const char buf[4096];

  assert_int_equal (drive_pwrite (live, buf, sizeof buf, i * 64 * MIB, 0), 0);
}

static void
write_blocks (void)
{
  for (int i = 0; i < 16; i++)
    write_block (i);
}

/* Begin to record, with a bitmap of that name that has no bits yet. */
static void
begin_with (const char *name)
{
  set_boot (++boot);
  open_live ();
  add_bitmap (name);
  close_live ();
  load_files ();
  recording = true;
  open_live ();
}

static void
power_off (void)
{
  scan ();
  recording = false;
  drive_free (live);
  for (size_t k = 0; k < nr_ops; k++)
    pass_op (k);
}

/* The power goes now, and of the first blocks all that must be there is. */
static void
crash_and_look (const char *name, int blocks)
{
  static struct image work[NR_FILES];

  power_off ();
  for (unsigned seed = 0; seed < 12; seed++) {
    struct named_bitmap *nb;

    play_crash (nr_ops, seed, work);
    set_boot (boot + 1);
    open_live ();
    nb = drive_find_bitmap (live, name);
    assert_non_null (nb);
    for (int i = 0; i < blocks; i++)
      if (!bitmap_test (nb->bits, i * 64 * MIB))
        fail_msg ("crash %u: '%s' lacks write %d", seed, name, i);
    drive_free (live);
  }
  boot++;
  forget_ops ();
}

/* The log dirties what records, and so no bitmap that is disabled.  What its
 * directory was synced with is safe; writes come after that as well.
 */
static void
test_disabled (void **state)
{
  struct bitmap_action a = { .type = BITMAP_DISABLE };
  int blocks;

  begin_with ("disabled");
  a.target = (struct bitmap_ref){ live, "disabled" };
  marks_of_command = live->marks;
  next_block = 0;
  assert_int_equal (bitmap_transaction (&a, 1, &err), 0);
  blocks = next_block;
  next_block = 16;
  assert_true (blocks > 0);
  crash_and_look ("disabled", blocks);
}

static void
test_merged (void **state)
{
  struct bitmap_action a = { .type = BITMAP_ADD, .persistent = true,
                             .disabled = true };
  struct bitmap_ref source;

  begin_with ("source");
  write_blocks ();
  a.target = (struct bitmap_ref){ live, "merged" };
  assert_int_equal (bitmap_transaction (&a, 1, &err), 0);
  source = (struct bitmap_ref){ live, "source" };
  a.type = BITMAP_MERGE;
  a.sources = &source;
  a.nr_sources = 1;
  assert_int_equal (bitmap_transaction (&a, 1, &err), 0);
  crash_and_look ("merged", 16);
}

/* What the log has dirtied after one loss of power is there after the next:
 * that log begins with nothing armed.
 */
static void
test_twice (void **state)
{
  static struct image work[NR_FILES];

  begin_with ("twice");
  write_blocks ();
  power_off ();
  play_crash (nr_ops, 0, work);
  forget_ops ();
  load_files ();
  recording = true;
  set_boot (++boot);
  open_live ();
  crash_and_look ("twice", 16);
}

int
main (void)
{
  static const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_inside),
    cmocka_unit_test (test_exact),
    cmocka_unit_test (test_move),
    cmocka_unit_test (test_disabled),
    cmocka_unit_test (test_merged),
    cmocka_unit_test (test_twice),
  };

  return cmocka_run_group_tests (tests, make_files, remove_files);
}
