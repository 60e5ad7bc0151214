/* nbdferry - a file's extents, against what lseek says of it
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "cleanup.h"
#include "disk.h"

/* More than what is looked at in one piece on tmpfs, and no multiple of it. */
#define SIZE (UINT64_C (40) << 20)
#define END  (SIZE - 512)

static char path[64];

/* Is there data at 'offset', and up to where is it so? */
static bool
truth (int fd, uint64_t offset, uint64_t *end)
{
  off_t data = lseek (fd, offset, SEEK_DATA);
  off_t hole = lseek (fd, offset, SEEK_HOLE);
  bool is_data = data == (off_t) offset;

  if (is_data)
    *end = hole;
  else
    *end = data == -1 ? END : (uint64_t) data;
  if (*end > END)
    *end = END;
  return is_data;
}

/* All of the disk, from any places, in one go and cut at 'limit'. */
static void
check (struct disk *d, int fd, uint64_t from, uint64_t limit)
{
  while (from < limit) {
    struct extent ext;
    uint64_t end;
    bool is_data = truth (fd, from, &end);

    assert_int_equal (d->ops->extent (d, from, limit, &ext), 0);
    assert_int_equal (ext.start, from);
    assert_true (ext.end > from && ext.end <= limit);
    assert_int_equal (ext.type == EXTENT_DATA, is_data);
    assert_true (ext.end <= end); /* it may be in pieces */
    if (!is_data)
      assert_int_equal (ext.end, end < limit ? end : limit);
    from = ext.end;
  }
}

static void
put_data (int fd, uint64_t start, uint64_t end)
{
  static char buf[65536];

  for (size_t i = 0; i < sizeof buf; i++)
    buf[i] = i * 7 + 1;
  while (start < end) {
    size_t n = end - start < sizeof buf ? end - start : sizeof buf;

    assert_int_equal (pwrite (fd, buf, n, start), n);
    start += n;
  }
}

static void
test_extents (void **state UNUSED)
{
  static const uint64_t holes[][2] = {
    /* first and last page; one page; around 8 MiB; a long one; the end */
    { 0, 4096 },
    { UINT64_C (5) << 20, (UINT64_C (5) << 20) + 4096 },
    { (UINT64_C (8) << 20) - 4096, UINT64_C (8) << 20 },
    { (UINT64_C (8) << 20) + 4096, (UINT64_C (8) << 20) + 8192 },
    { UINT64_C (17) << 20, UINT64_C (33) << 20 },
    { (UINT64_C (40) << 20) - 4096, UINT64_C (40) << 20 },
  };
  struct error err;
  struct disk *d;
  int fd = open (path, O_RDWR);

  assert_true (fd >= 0);
  d = disk_open_file (path, 0, false, &err);
  assert_non_null (d);
  assert_int_equal (d->size, END);
  check (d, fd, 0, END); /* nothing but a hole */
  put_data (fd, 0, END);
  check (d, fd, 0, END); /* nothing but data */
  for (size_t i = 0; i < sizeof holes / sizeof holes[0]; i++) {
    if (fallocate (fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                   holes[i][0], holes[i][1] - holes[i][0]) == -1)
      break; /* then there is none */
    check (d, fd, 0, END);
    check (d, fd, 4096, END);
    check (d, fd, 512, holes[i][1] < END ? holes[i][1] - 512 : END);
    check (d, fd, UINT64_C (7) << 20, UINT64_C (21) << 20);
  }
  close (fd);
  d->ops->close (d);
}

static void
run_in (const char *folder)
{
  const struct CMUnitTest tests[] = { cmocka_unit_test (test_extents) };
  int fd;

  snprintf (path, sizeof path, "%s/ferry-extents-XXXXXX", folder);
  fd = mkstemp (path);
  if (fd == -1)
    return; /* there is no such folder */
  assert_int_equal (ftruncate (fd, END), 0);
  close (fd);
  if (cmocka_run_group_tests_name (folder, tests, NULL, NULL) != 0) {
    unlink (path);
    exit (1);
  }
  unlink (path);
}

int
main (void)
{
  run_in (".");
  run_in ("/dev/shm"); /* tmpfs, where it is done otherwise */
  return 0;
}
