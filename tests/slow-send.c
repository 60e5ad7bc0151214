/* nbdferry - have a server take its time between the pieces of a reply
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Preloaded into nbdkit, whose replies come in several pieces (MSG_MORE).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/socket.h>
#include <unistd.h>

ssize_t
send (int fd, const void *buf, size_t len, int flags)
{
  ssize_t (*real) (int, const void *, size_t, int) = dlsym (RTLD_NEXT, "send");
  ssize_t r = real (fd, buf, len, flags & ~MSG_MORE);

  if (flags & MSG_MORE)
    usleep (200);
  return r;
}
