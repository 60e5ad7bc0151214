/* nbdferry - the control socket: where it is bound
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_QMP_LISTEN_H
#define FERRY_QMP_LISTEN_H

#include <sys/types.h>
#include <sys/un.h>

#include "error.h"

struct qmp_socket {
  int fd; /* listening, non-blocking */
  struct sockaddr_un addr;
  dev_t dev; /* of the socket, to know it again */
  ino_t ino;
};

/* Bind and listen, mode 0600.  A socket that nobody serves any more is
 * replaced; anything else at that path is left alone and refused.
 */
int qmp_socket_open (struct qmp_socket *s, const char *path,
                     struct error *err);

/* Remove the path, if it is still this socket's.  Does not close 'fd'. */
void qmp_socket_remove (const struct qmp_socket *s);

#endif /* FERRY_QMP_LISTEN_H */
