/* nbdferry - locks as QEMU's file-posix driver takes them
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * QEMU never locks for writing: an opener takes *read* locks on the bytes
 * that tell its wishes, and then looks whether somebody else's tell the
 * contrary.  Two that come at the same moment may both give way; never do
 * both get in, because each locks before it looks.
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <unistd.h>

#include "error.h"
#include "lock.h"

#define PERM_BASE   100 /* + permission: it is used */
#define SHARED_BASE 200 /* + permission: it is not shared */

/* QEMU's permissions that matter for a file (include/block/block-common.h). */
#define PERM_CONSISTENT_READ 0
#define PERM_WRITE           1
#define PERM_WRITE_UNCHANGED 2
#define PERM_RESIZE          3
#define NR_PERMS             4

#define BIT(n) (1u << (n))

static const char *const perm_name[NR_PERMS] = {
  [PERM_CONSISTENT_READ] = "consistent read",
  [PERM_WRITE] = "write",
  [PERM_WRITE_UNCHANGED] = "write unchanged",
  [PERM_RESIZE] = "resize",
};

static int
lock_byte (int fd, int cmd, short type, off_t byte, bool *met)
{
  struct flock fl = {
    .l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1,
  };
  int r;

  do
    r = fcntl (fd, cmd, &fl);
  while (r == -1 && errno == EINTR);
  if (r == 0 && met)
    *met = fl.l_type != F_UNLCK;
  return r;
}

/* There are no OFD locks here: an old kernel, or a file system without. */
static bool
is_unsupported (int e)
{
  return e == EINVAL || e == ENOLCK || e == ENOSYS || e == EOPNOTSUPP;
}

static void
unlock_all (int fd)
{
  for (unsigned p = 0; p < NR_PERMS; ++p) {
    lock_byte (fd, F_OFD_SETLK, F_UNLCK, PERM_BASE + p, NULL);
    lock_byte (fd, F_OFD_SETLK, F_UNLCK, SHARED_BASE + p, NULL);
  }
}

static int
in_use (int fd, const char *path, unsigned perm, struct error *err)
{
  unlock_all (fd);
  return error_set (err, EAGAIN,
                    "%s: is in use by another process (QEMU, or another "
                    "nbdferry: its \"%s\" lock is taken)",
                    path, perm_name[perm]);
}

int
lock_file (int fd, const char *path, bool writable, struct error *err)
{
  const unsigned all = BIT (NR_PERMS) - 1;
  const unsigned used = writable ? BIT (PERM_CONSISTENT_READ)
    | BIT (PERM_WRITE) | BIT (PERM_RESIZE) : BIT (PERM_CONSISTENT_READ);
  const unsigned kept = writable ? all & ~BIT (PERM_CONSISTENT_READ) : 0;
  unsigned p;
  bool met;

  for (p = 0; p < NR_PERMS; ++p) {
    if ((used & BIT (p))
        && lock_byte (fd, F_OFD_SETLK, F_RDLCK, PERM_BASE + p, NULL) == -1)
      goto failed;
    if ((kept & BIT (p))
        && lock_byte (fd, F_OFD_SETLK, F_RDLCK, SHARED_BASE + p, NULL) == -1)
      goto failed;
  }

  /* A write lock is asked for in the question only: it meets the read locks
   * of others, and never our own.
   */
  for (p = 0; p < NR_PERMS; ++p) {
    if (used & BIT (p)) {
      if (lock_byte (fd, F_OFD_GETLK, F_WRLCK, SHARED_BASE + p, &met) == -1)
        goto failed;
      if (met)
        return in_use (fd, path, p, err);
    }
    if (kept & BIT (p)) {
      if (lock_byte (fd, F_OFD_GETLK, F_WRLCK, PERM_BASE + p, &met) == -1)
        goto failed;
      if (met)
        return in_use (fd, path, p, err);
    }
  }
  return 0;

 failed:
  if (errno == EAGAIN || errno == EACCES)
    return in_use (fd, path, p, err);
  if (is_unsupported (errno))
    return 0;
  return error_set (err, errno, "%s: cannot lock the file: %m", path);
}
