/* nbdferry - what is done to the sidecar: recorded, or made to fail
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Every write, truncate and fallocate of a test goes through here, and every
 * fsync.  To be included once, after qcow2-test.h.
 */
#ifndef FERRY_QCOW2_TAP_H
#define FERRY_QCOW2_TAP_H

#include <sys/syscall.h>

struct op {
  enum { OP_WRITE, OP_TRUNCATE, OP_PUNCH } what;
  uint64_t offset, len; /* of a truncate: the new size in 'len' */
  uint8_t *data;
  unsigned syncs; /* before it */
};

static struct op ops[1000];
static size_t nr_ops;
static unsigned syncs;
static bool recording;

/* Faults. */
static bool no_fallocate;        /* a file system without */
static unsigned fail_syncs;      /* so many of the next fail */
static const char *rename_first; /* to the sidecar, before it is locked */

static inline void
record (int what, uint64_t offset, uint64_t len, const void *data)
{
  struct op *o = &ops[nr_ops];

  if (!recording)
    return;
  if (nr_ops++ == sizeof ops / sizeof ops[0])
    abort ();
  *o = (struct op) { what, offset, len, NULL, syncs };
  if (data) {
    o->data = malloc (len);
    memcpy (o->data, data, len);
  }
}

/* These stand before libc's for all that is linked into this test. */
ssize_t
pwrite (int fd, const void *buf, size_t len, off_t offset)
{
  record (OP_WRITE, offset, len, buf);
  return syscall (SYS_pwrite64, fd, buf, len, offset);
}

int
ftruncate (int fd, off_t len)
{
  record (OP_TRUNCATE, 0, len, NULL);
  return syscall (SYS_ftruncate, fd, len);
}

int
fallocate (int fd, int mode, off_t offset, off_t len)
{
  if (no_fallocate) {
    errno = EOPNOTSUPP;
    return -1;
  }
  if (mode & FALLOC_FL_PUNCH_HOLE)
    record (OP_PUNCH, offset, len, NULL);
  return syscall (SYS_fallocate, fd, mode, offset, len);
}

int
fsync (int fd)
{
  if (recording)
    syncs++;
  if (fail_syncs > 0) {
    fail_syncs--;
    errno = EIO;
    return -1;
  }
  return syscall (SYS_fsync, fd);
}

int
fstat (int fd, struct stat *st)
{
  if (rename_first) {
    assert_int_equal (rename (rename_first, sidecar), 0);
    rename_first = NULL;
  }
  return fstatat (fd, "", st, AT_EMPTY_PATH);
}

static inline void
forget_ops (void)
{
  for (size_t i = 0; i < nr_ops; ++i)
    free (ops[i].data);
  nr_ops = 0;
}

#endif /* FERRY_QCOW2_TAP_H */
