/* nbdferry - who may bring a disk
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_PEER_H
#define FERRY_PEER_H

#include <stdbool.h>
#include <sys/socket.h>

#include "drive.h"

/* May the client of this thread's connection migrate a disk to the drive, or
 * be forwarded to it?  Over TCP from another host only with TLS, unless
 * incoming=insecure.  If not, that is reported, and errno set.
 */
bool peer_allowed (struct drive *d);

/* Is that address this machine's own: a Unix socket, the hypervisor's, or
 * loopback?  'text' (may be NULL) is the address for people.
 */
#define PEER_TEXT 64
bool peer_is_local (const struct sockaddr *addr, socklen_t len,
                    char text[PEER_TEXT]);

#endif /* FERRY_PEER_H */
