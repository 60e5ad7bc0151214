/* nbdferry - the control socket
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A server that speaks QMP, wire-compatible with QEMU's.  One thread listens,
 * one thread serves each client (at most QMP_MAX_CLIENTS), so that none can
 * block another.  docs/control.md has the commands.
 */
#ifndef FERRY_QMP_H
#define FERRY_QMP_H

#include <stdint.h>

#include <jansson.h>

#include "error.h"

#define QMP_MAX_CLIENTS 32

/* Bind and listen (mode 0600; a socket that nobody serves any more is
 * replaced).  Before the fork.
 */
int qmp_listen (const char *path, struct error *err);

/* Start the threads.  After the fork. */
int qmp_start (struct error *err);

/* Turn clients away, end the threads, remove the socket.  No command is
 * running when this returns.
 */
void qmp_stop (void);

/* For a command that takes long: a descriptor that becomes readable when
 * everything is to end, or the client has gone (it is never read).  Of this
 * thread, whose client's command it runs.
 */
int qmp_stop_fd (void);

/* The client whose command this thread runs: a number that no other ever has,
 * and not 0.
 */
uint64_t qmp_client (void);

/* The reply to the command that this thread runs carries these descriptors, too
 * (SCM_RIGHTS), which are taken over.  At most once a command.
 */
#define QMP_FDS 2
void qmp_attach (const int fds[QMP_FDS]);

/* Tell every client.  'data' is borrowed, NULL: none.  Any thread; never
 * blocks: a client that does not read loses its oldest events.
 */
void qmp_event (const char *name, json_t *data);

#endif /* FERRY_QMP_H */
