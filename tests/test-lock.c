/* nbdferry - test of the locks, against QEMU itself
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

/* cmocka passes every test a state that most do not want. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include <cmocka.h>

#include "lock.h"
#include "qcow2-test.h"

static int
open_disk (int flags)
{
  int fd = open (disk, flags | O_CLOEXEC);

  assert_true (fd >= 0);
  return fd;
}

/* QEMU with the disk open, as 'flags' of qemu-io say, until stop_qemu. */
static pid_t qemu;
static int qemu_in;

static void
start_qemu (const char *mode, const char *format)
{
  int in[2], out[2];
  char buf[256] = "";
  size_t len = 0;

  assert_int_equal (pipe2 (in, O_CLOEXEC), 0);
  assert_int_equal (pipe2 (out, O_CLOEXEC), 0);
  qemu = fork ();
  if (qemu == 0) {
    dup2 (in[0], 0);
    dup2 (out[1], 1);
    alarm (60);
    execlp ("qemu-io", "qemu-io", "-f", format, mode, disk, (char *) NULL);
    _exit (127);
  }
  close (in[0]);
  close (out[1]);
  qemu_in = in[1];
  /* It answers a command only once the disk is open. */
  dprintf (qemu_in, "length\n");
  while (len < sizeof buf - 1 && strstr (buf, "MiB") == NULL) {
    ssize_t r = read (out[0], buf + len, sizeof buf - 1 - len);

    assert_true (r > 0);
    len += r;
    buf[len] = '\0';
  }
  close (out[0]);
}

static void
stop_qemu (void)
{
  close (qemu_in);
  kill (qemu, SIGKILL);
  waitpid (qemu, NULL, 0);
}

static void
test_ours (void **state)
{
  int a = open_disk (O_RDWR), b = open_disk (O_RDWR);

  make_disk (1 << 20);
  assert_int_equal (lock_file (a, disk, true, &err), 0);
  assert_int_equal (lock_file (b, disk, true, &err), -1);
  assert_int_equal (err.errnum, EAGAIN);
  assert_non_null (strstr (err.msg, "is in use by another process"));
  assert_non_null (strstr (err.msg, disk));
  /* A reader gets in beside it, and it again beside a reader. */
  assert_int_equal (lock_file (b, disk, false, &err), 0);
  close (a);
  a = open_disk (O_RDWR);
  assert_int_equal (lock_file (a, disk, true, &err), 0);
  close (a);
  close (b);
  /* What failed has left no lock behind. */
  a = open_disk (O_RDWR);
  b = open_disk (O_RDWR);
  assert_int_equal (lock_file (a, disk, true, &err), 0);
  assert_int_equal (lock_file (b, disk, true, &err), -1);
  close (a);
  a = open_disk (O_RDWR);
  assert_int_equal (lock_file (a, disk, true, &err), 0);
  close (a);
  close (b);
}

/* We have it: QEMU does not, in QEMU's usual words. */
static void
test_against_qemu (void **state)
{
  int fd, status;
  char *out;

  make_disk (1 << 20);
  RUN_OK ("qemu-io", "-f", "raw", "-c", "write 0 512", disk);
  fd = open_disk (O_RDWR);
  assert_int_equal (lock_file (fd, disk, true, &err), 0);
  out = run (&status, "qemu-io", "-f", "raw", "-c", "write 0 512", disk,
             NULL);
  assert_int_not_equal (status, 0);
  assert_non_null (strstr (out, "Failed to get \"write\" lock"));
  free (out);
  close (fd);
  RUN_OK ("qemu-io", "-f", "raw", "-c", "write 0 512", disk);

  /* As a reader, we let QEMU write. */
  fd = open_disk (O_RDONLY);
  assert_int_equal (lock_file (fd, disk, false, &err), 0);
  RUN_OK ("qemu-io", "-f", "raw", "-c", "write 0 512", disk);
  close (fd);
}

/* QEMU reads a raw file beside a writer, but no qcow2. */
static void
test_qcow2_against_qemu (void **state)
{
  int fd, status;
  char *out;

  RUN_OK ("qemu-img", "create", "-q", "-f", "qcow2", disk, "1M");
  fd = open_disk (O_RDWR);
  assert_int_equal (lock_file (fd, disk, true, &err), 0);
  out = run (&status, "qemu-img", "info", "-f", "qcow2", disk, NULL);
  assert_int_not_equal (status, 0);
  assert_non_null (strstr (out, "Failed to get shared \"write\" lock"));
  free (out);
  RUN_OK ("qemu-img", "info", "-U", "-f", "qcow2", disk);
  close (fd);
  RUN_OK ("qemu-img", "info", "-f", "qcow2", disk);
}

/* QEMU has it: we do not. */
static void
test_qemu_first (void **state)
{
  int fd;

  make_disk (1 << 20);
  fd = open_disk (O_RDWR);
  start_qemu ("-n", "raw");
  assert_int_equal (lock_file (fd, disk, true, &err), -1);
  assert_int_equal (err.errnum, EAGAIN);
  stop_qemu ();
  assert_int_equal (lock_file (fd, disk, true, &err), 0);
  close (fd);

  /* A reader of a qcow2 does not want writers either. */
  RUN_OK ("qemu-img", "create", "-q", "-f", "qcow2", disk, "1M");
  fd = open_disk (O_RDWR);
  start_qemu ("-r", "qcow2");
  assert_int_equal (lock_file (fd, disk, true, &err), -1);
  assert_int_equal (lock_file (fd, disk, false, &err), 0);
  stop_qemu ();
  close (fd);
}

static void
test_no_locks_here (void **state)
{
  int fds[2];

  /* Nothing that could be locked: let pass. */
  assert_int_equal (pipe2 (fds, O_CLOEXEC), 0);
  assert_int_equal (lock_file (fds[0], "pipe", false, &err), 0);
  close (fds[0]);
  close (fds[1]);
}

int
main (void)
{
  static const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_ours),
    cmocka_unit_test (test_against_qemu),
    cmocka_unit_test (test_qcow2_against_qemu),
    cmocka_unit_test (test_qemu_first),
    cmocka_unit_test (test_no_locks_here),
  };

  if (!have ("qemu-io") || !have ("qemu-img")) {
    printf ("qemu-io and qemu-img are needed\n");
    return 77;
  }
  make_dir (NULL);
  make_disk (1 << 20);
  return cmocka_run_group_tests (tests, NULL, remove_dir);
}
