/* nbdferry - leaving a server that is about to answer
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A socket that is closed while something in it has not been read resets the
 * connection.  nbdkit before 1.33.10 aborts, as a whole, if that happens
 * between two pieces of a reply (raw_send_socket: Assertion `sock >= 0'), even
 * if it is the only reply that is due.  The end of what we send does no harm:
 * then nobody there reads any more, and who sends the reply finds out by
 * himself.  So that is said first, and what still comes is taken for a moment.
 */
#include <config.h>

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#include "client-impl.h"
#include "clock.h"

#define IDLE_MS  200
#define LONGEST  (500 * NS_PER_MS)

void
client_hang_up (int fd)
{
  struct pollfd p = { .fd = fd, .events = POLLIN };
  uint64_t until = now_ns () + LONGEST;
  char buf[16384];

  if (fd == -1 || shutdown (fd, SHUT_WR) == -1)
    return;
  while (poll (&p, 1, IDLE_MS) == 1 && now_ns () < until) {
    ssize_t n = recv (fd, buf, sizeof buf, MSG_DONTWAIT);

    if (n == 0 || (n == -1 && errno != EAGAIN && errno != EINTR))
      return;
  }
}
