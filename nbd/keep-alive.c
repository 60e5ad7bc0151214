/* nbdferry - a peer that is gone without a word
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A host that loses its power, or a link that swallows all there is, ends no
 * connection: who waits for an answer would wait for ever, and who sends for a
 * quarter of an hour.  The kernel can ask, and tells us when nobody answers.
 */
#include <config.h>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include "client-impl.h"

#define IDLE_S     10 /* silence before it asks */
#define INTERVAL_S 5
#define QUESTIONS  4

static void
set (int fd, int level, int option, int value)
{
  /* Not every socket is one of TCP, and those need none of it. */
  setsockopt (fd, level, option, &value, sizeof value);
}

void
client_notice_silence (struct client *c)
{
  int fd = nbd_aio_get_fd (c->nbd);

  set (fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set (fd, IPPROTO_TCP, TCP_KEEPIDLE, IDLE_S);
  set (fd, IPPROTO_TCP, TCP_KEEPINTVL, INTERVAL_S);
  set (fd, IPPROTO_TCP, TCP_KEEPCNT, QUESTIONS);
  set (fd, IPPROTO_TCP, TCP_USER_TIMEOUT,
       (IDLE_S + INTERVAL_S * QUESTIONS) * 1000);
}
