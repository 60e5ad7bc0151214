/* nbdferry - files: whole reads and writes, and what makes them durable
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "cleanup.h"
#include "fullio.h"

ssize_t
full_pread (int fd, void *buf, size_t len, uint64_t offset)
{
  size_t done = 0;

  while (done < len) {
    ssize_t r = pread (fd, (uint8_t *) buf + done, len - done, offset + done);

    if (r == -1 && errno == EINTR)
      continue;
    if (r == -1)
      return -1;
    if (r == 0)
      break;
    done += r;
  }
  return done;
}

int
full_pread_zeros (int fd, void *buf, size_t len, uint64_t offset)
{
  ssize_t r = full_pread (fd, buf, len, offset);

  if (r == -1)
    return -1;
  memset ((uint8_t *) buf + r, 0, len - r);
  return 0;
}

int
full_pwrite (int fd, const void *buf, size_t len, uint64_t offset)
{
  size_t done = 0;

  while (done < len) {
    ssize_t r = pwrite (fd, (const uint8_t *) buf + done, len - done,
                        offset + done);

    if (r == -1 && errno == EINTR)
      continue;
    if (r <= 0) {
      if (r == 0)
        errno = EIO;
      return -1;
    }
    done += r;
  }
  return 0;
}

int
sync_directory_of (const char *path)
{
  CLEANUP_FREE char *dir = strdup (path);
  CLEANUP_CLOSE int fd = -1;
  char *slash;

  if (dir == NULL)
    return -1;
  slash = strrchr (dir, '/');
  if (slash)
    slash[slash == dir ? 1 : 0] = '\0';
  fd = open (slash ? dir : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  return fd == -1 ? -1 : fsync (fd);
}
