/* nbdferry - one connection to an NBD server, among the files of nbd/
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_CLIENT_IMPL_H
#define FERRY_CLIENT_IMPL_H

#include <libnbd.h>

#include "client.h"

struct client {
  struct nbd_handle *nbd;
  const struct stop *stop;
  unsigned timeout_ms;
  uint64_t deadline; /* ns, of all requests; 0: none */
  uint64_t connect_deadline; /* ns, of the negotiation; 0: none */
  bool given_up;
  bool in_pieces; /* so is what answers the request that is under way */
  char *export; /* to be chosen by client_open */
};

/* Begin to connect: the server's address is known.  'simple': of the export
 * no more will be asked than reads, writes and flushes.  Then, as far as the
 * choice of the export.
 */
struct client *client_start (const char *uri, const char *context,
                             bool simple, const struct stop *stop,
                             unsigned timeout_ms, struct error *err);
int client_greet (struct client *c, const char *uri, const char *export,
                  struct error *err);

/* Connect as far as the choice of the export, or farther if the server is too
 * old for that; 'context' is asked for (NULL: none).
 */
struct client *client_negotiate (const char *uri, const char *export,
                                 const char *context, const struct stop *stop,
                                 unsigned timeout_ms, struct error *err);

/* Then choose it; 0 or -1. */
int client_go (struct client *c, const char *uri, struct error *err);

/* Drive the connection until there () is true; 'deadline' in ns, 0: none. */
int client_drive_until (struct client *c, int (*there) (struct nbd_handle *),
                        uint64_t deadline, const char *uri,
                        struct error *err);

/* Drive a request to its end; -1 with errno. */
int client_finish (struct client *c, int64_t cookie);

/* hang-up.c: before a connection is closed that was given up while a reply in
 * several pieces was due.
 */
void client_hang_up (int fd);

#endif /* FERRY_CLIENT_IMPL_H */
