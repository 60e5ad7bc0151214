/* nbdferry - test of storage errors under the mapped bitmaps
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A file that is cut under its map stands for all errors of the storage: the
 * kernel raises the same signal.
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "qcow2-test.h"

#include "drive.h"
#include "sigbus.h"
#include "transaction.h"

#define PAGES 16

static long page;
static atomic_bool failed;

/* A file of some pages, mapped. */
static uint8_t *
map_file (const char *name, int *fd)
{
  char path[PATH_MAX * 2];
  uint8_t *p;

  snprintf (path, sizeof path, "%s/%s", dir, name);
  *fd = open (path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (*fd == -1 || ftruncate (*fd, PAGES * page) == -1)
    abort ();
  p = mmap (NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
  if (p == MAP_FAILED)
    abort ();
  return p;
}

/* Run in a child, which has handlers of its own: its wait status. */
static int
in_child (void (*fn) (void))
{
  int status;
  pid_t pid;

  fflush (NULL);
  pid = fork ();
  if (pid == 0) {
    const struct rlimit none = { 0, 0 };

    setrlimit (RLIMIT_CORE, &none);
    signal (SIGBUS, SIG_DFL); /* not cmocka's */
    alarm (20);
    fn ();
    _exit (0);
  }
  assert_int_equal (waitpid (pid, &status, 0), pid);
  return status;
}

static void
assert_killed (void (*fn) (void))
{
  int status = in_child (fn);

  assert_true (WIFSIGNALED (status));
  assert_int_equal (WTERMSIG (status), SIGBUS);
}

/* ---- whose signal it is ---- */

static volatile sig_atomic_t seen;
static sigjmp_buf away;

static void
earlier_handler (int sig, siginfo_t *info, void *context)
{
  seen = info->si_code == BUS_ADRERR ? 1 : 2;
  siglongjmp (away, 1);
}

static void
chain (void)
{
  const struct sigaction sa = { .sa_sigaction = earlier_handler,
                                .sa_flags = SA_SIGINFO };
  int ours_fd, other_fd;
  uint8_t *ours = map_file ("ours", &ours_fd);
  uint8_t *other = map_file ("other", &other_fd);

  sigaction (SIGBUS, &sa, NULL);
  if (sigbus_watch (ours, PAGES * page, &failed, NULL) == NULL ||
      ftruncate (ours_fd, 0) == -1 || ftruncate (other_fd, 0) == -1)
    _exit (1);
  ours[0] = 1;
  if (seen || !failed)
    _exit (2);
  if (sigsetjmp (away, 1) == 0) {
    other[0] = 1;
    _exit (3);
  }
  _exit (seen == 1 ? 0 : 4);
}

/* First of all tests: nobody has watched anything yet. */
static void
test_chain (void **state)
{
  assert_int_equal (in_child (chain), 0);
}

static void
foreign_fault (void)
{
  int ours_fd, other_fd;
  uint8_t *ours = map_file ("ours", &ours_fd);
  uint8_t *other = map_file ("other", &other_fd);

  if (sigbus_watch (ours, PAGES * page, &failed, NULL) == NULL ||
      ftruncate (other_fd, 0) == -1)
    _exit (1);
  other[0] = 1;
}

static void
just_outside (void)
{
  int fd;
  uint8_t *p = map_file ("ours", &fd);

  /* All but the last page. */
  if (sigbus_watch (p, (PAGES - 1) * page, &failed, NULL) == NULL ||
      ftruncate (fd, 0) == -1)
    _exit (1);
  p[(PAGES - 1) * page - 1] = 1;
  if (!failed)
    _exit (2);
  p[(PAGES - 1) * page] = 1;
}

static void
sent (void)
{
  int fd;
  uint8_t *p = map_file ("ours", &fd);

  if (sigbus_watch (p, PAGES * page, &failed, NULL) == NULL)
    _exit (1);
  kill (getpid (), SIGBUS);
}

static void
no_longer_watched (void)
{
  int fd;
  uint8_t *p = map_file ("ours", &fd);
  struct sigbus_range *r = sigbus_watch (p, PAGES * page, &failed, NULL);

  sigbus_unwatch (r);
  if (ftruncate (fd, 0) == -1)
    _exit (1);
  p[0] = 1;
}

static void
test_foreign (void **state)
{
  assert_killed (foreign_fault);
  assert_killed (just_outside);
  assert_killed (sent);
  assert_killed (no_longer_watched);
}

/* ---- what is seen ---- */

/* cmocka handles SIGBUS anew for each test: put ours in place again. */
static void
our_handler (void)
{
  static struct sigaction ours;
  static atomic_bool flag;
  struct sigbus_range *r;

  if (ours.sa_sigaction == NULL) {
    signal (SIGBUS, SIG_DFL);
    r = sigbus_watch (&flag, 1, &flag, NULL);
    assert_non_null (r);
    sigaction (SIGBUS, NULL, &ours);
    sigbus_unwatch (r);
  }
  sigaction (SIGBUS, &ours, NULL);
}

static void
test_page (void **state)
{
  atomic_bool other = false;
  struct sigbus_range *r;
  int fd;
  uint8_t *p = map_file ("ours", &fd);

  our_handler ();
  failed = false;
  r = sigbus_watch (p, PAGES * page, &failed, &err);
  assert_non_null (r);
  memset (p, 0x55, PAGES * page);
  assert_int_equal (ftruncate (fd, 3 * page), 0);
  p[2 * page] = 1;
  assert_false (failed);

  /* The page is all ones, takes what is stored, and is private. */
  errno = 77;
  p[5 * page + 8] = 7;
  assert_int_equal (errno, 77);
  assert_true (failed);
  assert_int_equal (p[5 * page + 8], 7);
  assert_int_equal (p[5 * page], 0xff);
  assert_int_equal (p[6 * page - 1], 0xff);
  assert_int_equal (p[2 * page], 1);
  assert_int_equal (p[2 * page + 1], 0x55);
  /* Reading is no different. */
  assert_int_equal (p[7 * page], 0xff);

  sigbus_report_to (r, &other);
  assert_true (other);
  failed = other = false;
  p[9 * page] = 1;
  assert_true (other);
  assert_false (failed);
  sigbus_unwatch (r);
  munmap (p, PAGES * page);
  close (fd);
}

/* Ranges come and go, more than one block of them has. */
static void
test_many (void **state)
{
  static struct sigbus_range *r[300];
  static atomic_bool flag[300];
  int fd;
  uint8_t *p = map_file ("ours", &fd);

  our_handler ();
  munmap (p, PAGES * page);
  assert_int_equal (ftruncate (fd, 0), 0);
  p = mmap (NULL, 300 * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  for (int round = 0; round < 2; round++) {
    /* Without the pages that the first round put there. */
    assert_ptr_not_equal (p, MAP_FAILED);
    p = mmap (p, 300 * page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
              fd, 0);
    for (int i = 0; i < 300; i++) {
      flag[i] = false;
      if (round == 0 || i % 3 == 0)
        r[i] = sigbus_watch (p + i * page, page, &flag[i], &err);
      assert_non_null (r[i]);
    }
    for (int i = 0; i < 300; i += 3) {
      p[i * page + 1] = 0;
      assert_true (flag[i]);
      assert_false (flag[i + 1]);
      sigbus_unwatch (r[i]);
    }
  }
  for (int i = 0; i < 300; i++)
    if (i % 3)
      sigbus_unwatch (r[i]);
  munmap (p, 300 * page);
  close (fd);
}

/* Threads mark while the file is cut, and others watch other maps: whoever
 * finds the flag false has stored into the file.
 */
static uint8_t *shared;
static atomic_uint wrong;

static void *
hammer (void *arg)
{
  uintptr_t seed = (uintptr_t) arg;

  for (int i = 0; i < 20000; i++) {
    uint64_t *word = (uint64_t *) (shared + (seed + i) % PAGES * page);
    uint64_t bit = UINT64_C (1) << (seed % 64);

    __atomic_fetch_or (word, bit, __ATOMIC_SEQ_CST);
    if ((__atomic_load_n (word, __ATOMIC_SEQ_CST) & bit) == 0 && !failed)
      wrong++;
  }
  return NULL;
}

static void *
come_and_go (void *arg)
{
  void *p = mmap (NULL, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  static atomic_bool flag;

  for (int i = 0; i < 20000; i++)
    sigbus_unwatch (sigbus_watch (p, page, &flag, NULL));
  if (flag)
    wrong++;
  munmap (p, page);
  return NULL;
}

static void
test_threads (void **state)
{
  pthread_t t[6];
  struct sigbus_range *r;
  int fd;

  our_handler ();
  failed = false;
  shared = map_file ("ours", &fd);
  r = sigbus_watch (shared, PAGES * page, &failed, &err);
  assert_non_null (r);
  for (uintptr_t i = 0; i < 6; i++)
    assert_int_equal (pthread_create (&t[i], NULL,
                                      i < 4 ? hammer : come_and_go,
                                      (void *) i), 0);
  for (int i = 0; i < PAGES; i++) {
    usleep (500);
    assert_int_equal (ftruncate (fd, (PAGES - 1 - i) * page), 0);
  }
  for (int i = 0; i < 6; i++)
    pthread_join (t[i], NULL);
  shared[0] = 1;
  assert_true (failed);
  assert_int_equal (wrong, 0);
  sigbus_unwatch (r);
  munmap (shared, PAGES * page);
  close (fd);
}

/* ---- a sidecar ---- */

static void
test_sidecar (void **state)
{
  struct qcow2_entry entry = { .name = "b", .shift = 9, .autoflag = true };
  atomic_bool lost = false;
  enum qcow2_found found;
  struct qcow2 *q;
  uint64_t *words;

  our_handler ();
  make_disk (UINT64_C (1) << 30); /* 256 KiB of bits */
  q = qcow2_open (sidecar, disk, UINT64_C (1) << 30, false, &found, &err);
  assert_non_null (q);
  entry.bits = qcow2_alloc (q, 9, &err);
  assert_non_null (entry.bits);
  words = qcow2_words (entry.bits);
  assert_int_equal (qcow2_write_directory (q, &entry, 1, &err), 0);
  words[0] = 1;
  /* Cut off the bits of the bitmap, which is the last. */
  assert_int_equal (truncate (sidecar, 7 * (2 << 20)), 0);
  words[1000] = 1;

  /* Said also to who asks afterwards. */
  qcow2_report_lost (q, &lost);
  assert_true (lost);
  lost = false;
  words[20000] = 1;
  assert_true (lost);
  /* No more promises. */
  assert_int_equal (qcow2_write_directory (q, &entry, 1, &err), -1);
  assert_int_equal (err.errnum, EIO);
  assert_int_equal (qcow2_close (q, &err), -1);
  assert_non_null (strstr (err.msg, "left marked in use"));
  /* It is found to be broken, and is left alone. */
  q = qcow2_open (sidecar, disk, UINT64_C (1) << 30, false, &found, &err);
  assert_null (q);
  assert_non_null (strstr (err.msg, "without bitmaps"));
  unlink (sidecar);
}

/* ---- a drive ---- */

static void
test_drive (void **state)
{
  char state_dir[PATH_MAX * 2], bits[PATH_MAX * 3];
  struct drive_options opt = { .name = "d", .path = disk,
                               .state_dir = state_dir };
  struct bitmap_action add = { .type = BITMAP_ADD, .granularity = 512,
                               .persistent = true };
  char buf[512] = "data", got[512];
  struct drive *d;

  our_handler ();
  snprintf (state_dir, sizeof state_dir, "%s/state", dir);
  snprintf (bits, sizeof bits, "%s/bitmaps.qcow2", state_dir);
  make_disk (UINT64_C (1) << 30);
  d = drive_open (&opt, &err);
  if (d == NULL)
    fail_msg ("%s", err.msg);
  add.target.drive = d;
  add.target.name = "b";
  assert_int_equal (bitmap_transaction (&add, 1, &err), 0);
  assert_int_equal (drive_pwrite (d, buf, 512, 0, 0), 0);

  assert_int_equal (truncate (bits, 7 * (2 << 20)), 0);
  /* Neither what is marked already nor what is not. */
  for (int i = 0; i < 3; i++) {
    const uint64_t at = (uint64_t) i * 100 << 20;

    errno = 0;
    assert_int_equal (drive_pwrite (d, "other", 5, at, 0), -1);
    assert_int_equal (errno, EIO);
    errno = 0;
    assert_int_equal (drive_zero (d, 512, at, 0), -1);
    assert_int_equal (errno, EIO);
    errno = 0;
    assert_int_equal (drive_trim (d, 512, at, 0), -1);
    assert_int_equal (errno, EIO);
  }
  assert_int_equal (drive_pread (d, got, 512, 0), 0);
  assert_memory_equal (got, buf, 512);
  assert_int_equal (drive_flush (d), 0);
  /* Nor is any bitmap changed any more. */
  add.target.name = "c";
  assert_int_equal (bitmap_transaction (&add, 1, &err), -1);
  assert_int_equal (err.errnum, EIO);
  assert_int_equal (drive_shutdown (d, &err), -1);
  drive_free (d);
  RUN_OK ("rm", "-r", state_dir);
}

/* Somebody has put back what the file held before: nothing tells but the
 * activity log, which says that the store has failed.
 */
static void
test_drive_next_open (void **state)
{
  char state_dir[PATH_MAX * 2], bits[PATH_MAX * 3], copy[PATH_MAX * 2];
  char from[PATH_MAX * 4], to[PATH_MAX * 4];
  struct drive_options opt = { .name = "d", .path = disk,
                               .state_dir = state_dir };
  struct bitmap_action add = { .type = BITMAP_ADD, .granularity = 512,
                               .persistent = true };
  struct named_bitmap *nb;
  struct drive *d;

  our_handler ();
  snprintf (state_dir, sizeof state_dir, "%s/state", dir);
  snprintf (bits, sizeof bits, "%s/bitmaps.qcow2", state_dir);
  snprintf (copy, sizeof copy, "%s/copy", dir);
  snprintf (from, sizeof from, "if=%s", copy);
  snprintf (to, sizeof to, "of=%s", bits);
  make_disk (UINT64_C (1) << 30);
  d = drive_open (&opt, &err);
  assert_non_null (d);
  add.target.drive = d;
  add.target.name = "b";
  assert_int_equal (bitmap_transaction (&add, 1, &err), 0);
  add.target.name = "frozen";
  add.disabled = true;
  assert_int_equal (bitmap_transaction (&add, 1, &err), 0);
  RUN_OK ("cp", bits, copy);
  assert_int_equal (drive_pwrite (d, "x", 1, 0, 0), 0);
  assert_int_equal (truncate (bits, 7 * (2 << 20)), 0);
  assert_int_equal (drive_pwrite (d, "x", 1, 4096, 0), -1);
  RUN_OK ("dd", "bs=1M", "conv=notrunc", from, to);
  assert_int_equal (drive_shutdown (d, &err), -1);
  drive_free (d);

  d = drive_open (&opt, &err);
  if (d == NULL)
    fail_msg ("%s", err.msg);
  else {
    for (int i = 0; i < 2; i++) {
      nb = drive_find_bitmap (d, i ? "frozen" : "b");
      assert_non_null (nb);
      assert_int_equal (bitmap_count (nb->bits), d->size);
      assert_non_null (nb->reason);
    }
    assert_int_equal (drive_shutdown (d, &err), 0);
    drive_free (d);
  }
  RUN_OK ("rm", "-r", state_dir);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_chain),
    cmocka_unit_test (test_foreign),
    cmocka_unit_test (test_page),
    cmocka_unit_test (test_many),
    cmocka_unit_test (test_threads),
    cmocka_unit_test (test_sidecar),
    cmocka_unit_test (test_drive),
    cmocka_unit_test (test_drive_next_open),
  };

  const char *preload = getenv ("LD_PRELOAD");

  if (preload && strstr (preload, "vgpreload")) {
    printf ("valgrind does not follow a page that is put in another's place\n");
    return 77;
  }
  page = sysconf (_SC_PAGESIZE);
  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
