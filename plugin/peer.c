/* nbdferry - who may bring a disk
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A migration overwrites a disk, and whoever can reach the port can begin one.
 * So what comes from another host must have passed nbdkit's own check of who
 * it is, which is TLS.
 */
#include <config.h>

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "house.h"
#include "peer.h"

static bool
is_loopback (const struct in_addr *a)
{
  return ntohl (a->s_addr) >> 24 == 127;
}

static bool
is_local6 (const struct in6_addr *a)
{
  struct in_addr v4;

  if (IN6_IS_ADDR_V4MAPPED (a)) {
    memcpy (&v4, &a->s6_addr[12], sizeof v4);
    return is_loopback (&v4);
  }
  return IN6_IS_ADDR_LOOPBACK (a);
}

bool
peer_is_local (const struct sockaddr *addr, socklen_t len,
               char text[PEER_TEXT])
{
  union {
    struct sockaddr any;
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
  } a = { 0 };

  if (text)
    strcpy (text, "an unknown address");
  memcpy (&a, addr, len < sizeof a ? len : sizeof a);
  switch (a.any.sa_family) {
  case AF_UNIX:
  case AF_VSOCK: /* between a virtual machine and its host */
    return true;
  case AF_INET:
    if (text)
      inet_ntop (AF_INET, &a.in.sin_addr, text, PEER_TEXT);
    return len >= sizeof a.in && is_loopback (&a.in.sin_addr);
  case AF_INET6:
    if (text)
      inet_ntop (AF_INET6, &a.in6.sin6_addr, text, PEER_TEXT);
    return len >= sizeof a.in6 && is_local6 (&a.in6.sin6_addr);
  }
  return false;
}

bool
peer_allowed (struct drive *d)
{
  struct sockaddr_storage addr;
  socklen_t len = sizeof addr;
  char text[PEER_TEXT] = "an unknown address";

  if (house.insecure || nbdkit_is_tls () == 1)
    return true;
  if (nbdkit_peer_name ((struct sockaddr *) &addr, &len) == 0 &&
      peer_is_local ((struct sockaddr *) &addr, len, text))
    return true;
  nbdkit_error ("disk '%s': refused a migration from %s without TLS; start "
                "nbdkit with --tls=require and migrate to nbds://..., or, on "
                "a network where nobody else can be, say incoming=insecure",
                d->name, text);
  errno = EPERM;
  return false;
}
