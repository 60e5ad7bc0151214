/* nbdferry - the client of a daemon's control socket
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The socket speaks QMP (docs/control.md): each message is a JSON object on
 * a line.  Commands are answered in order; events come in between.  One
 * thread uses a client.
 */
#ifndef FERRY_CONTROL_H
#define FERRY_CONTROL_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "error.h"

struct control;

/* Connect, and leave when the daemon is ready for commands.  Bounded in time.
 * NULL on error.
 */
struct control *control_open (const char *path, struct error *err);
void control_close (struct control *c); /* NULL is allowed */

/* From now on whoever waits for the daemon waits no longer than that, in all
 * (UINT64_MAX: as long as it takes, as at the start); who comes too late is
 * refused with ETIMEDOUT, and his reply dropped by the next command.  For what
 * must not keep us from heeding a signal.
 */
void control_set_limit (struct control *c, uint64_t ns);

/* The same, for a moment, and for good: only a sooner end may be set after
 * that.  The other: once that descriptor (a signalfd) can be read, which is
 * left to somebody else.
 */
void control_hurry (struct control *c);
void control_hurry_when (struct control *c, int fd);

/* The socket, to be polled for POLLIN before control_receive. */
int control_fd (const struct control *c);

/* Send a command, do not wait for its reply.  'args' is taken over; no
 * arguments are json_object (), while NULL means that there was no memory
 * for them.  0 and the number that the reply will bear, or -1.
 */
int control_send (struct control *c, const char *command, json_t *args,
                  unsigned *id, struct error *err);

/* The next message, be it reply or event, waiting for it until 'deadline'
 * (as now_ns; 0: not at all; UINT64_MAX: for ever, within the limit).  1 and a
 * new reference, 0 if there is none in time, -1 on error, and beyond the limit.
 */
int control_receive (struct control *c, uint64_t deadline, json_t **msg,
                     struct error *err);

/* Is it the reply to that command? */
bool control_is_reply (const json_t *msg, unsigned id);

/* What a reply returns, borrowed; NULL with the daemon's words in 'err' if it
 * is an error.
 */
json_t *control_result (const json_t *reply, struct error *err);

/* Send a command and wait for its reply; events are dropped.  'args' as in
 * control_send.  A new reference to what it returns, or NULL.
 */
json_t *control_command (struct control *c, const char *command, json_t *args,
                         struct error *err);

/* The descriptors that came with the last reply, now the caller's: exactly 'nr'
 * (CONTROL_FDS at most) of them, or none and false.  Those that are not taken
 * are closed when the next command is sent.
 */
#define CONTROL_FDS 2
bool control_take_fds (struct control *c, int *fds, size_t nr);

#endif /* FERRY_CONTROL_H */
