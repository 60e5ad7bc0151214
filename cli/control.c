/* nbdferry - the client of a daemon's control socket
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "cleanup.h"
#include "clock.h"
#include "control.h"

/* How long a daemon may take to accept and greet us. */
#define GREETING_S 10

/* And for all that it is still told after Ctrl-C. */
#define HURRY (3 * NS_PER_S)

/* The longest message that we take: a list of bitmaps is a few hundred bytes
 * for each.
 */
#define MESSAGE_MAX (64 << 20)

struct control {
  char *path;     /* of the socket, for messages */
  int fd;
  char *buf;      /* received, not yet parsed */
  size_t len, capacity;
  size_t scanned; /* so far there is no end of line */
  unsigned last_id;
  uint64_t until; /* nobody waits longer; UINT64_MAX: there is no limit */
  bool hurried;   /* it is for good */
  int hurry_fd;   /* what hurries us; -1: none, or no more */
  int fds[CONTROL_FDS]; /* received */
  size_t nr_fds;
};

static int
connect_failed (const char *path, struct error *err)
{
  struct stat st;
  int errnum = errno;

  if (errnum == ENOENT)
    return error_set (err, errnum, "there is no control socket %s "
                      "(is the daemon running, with control=?)", path);
  if (errnum == EAGAIN)
    return error_set (err, ETIMEDOUT, "%s: the daemon does not answer", path);
  if (errnum == ECONNREFUSED && stat (path, &st) == 0 &&
      !S_ISSOCK (st.st_mode))
    return error_set (err, ENOTSOCK, "%s is not a socket", path);
  if (errnum == ECONNREFUSED)
    return error_set (err, errnum, "nobody listens on %s any more "
                      "(the daemon has ended)", path);
  return error_set (err, errnum, "cannot connect to %s: %m", path);
}

static int
connect_to (const char *path, struct error *err)
{
  struct sockaddr_un addr = { .sun_family = AF_UNIX };
  /* Also bounds connect, should nobody accept. */
  struct timeval limit = { .tv_sec = GREETING_S };
  int fd;

  if (strlen (path) >= sizeof addr.sun_path)
    return error_set (err, ENAMETOOLONG, "%s: the name of a socket has at "
                      "most %zu bytes", path, sizeof addr.sun_path - 1);
  strcpy (addr.sun_path, path);
  fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd == -1)
    return error_set (err, errno, "socket: %m");
  setsockopt (fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  if (connect (fd, (struct sockaddr *) &addr, sizeof addr) == -1) {
    connect_failed (path, err);
    close (fd);
    return -1;
  }
  return fd;
}

static int
greet (struct control *c, struct error *err)
{
  uint64_t deadline = now_ns () + GREETING_S * NS_PER_S;
  json_t *msg = NULL, *result;
  bool is_qmp;
  int r;

  r = control_receive (c, deadline, &msg, err);
  if (r == -1)
    return -1;
  if (r == 0)
    return error_set (err, ETIMEDOUT, "%s: no greeting within %d seconds "
                      "(is it a control socket?)", c->path, GREETING_S);
  is_qmp = json_is_object (json_object_get (msg, "QMP"));
  json_decref (msg);
  if (!is_qmp)
    return error_set (err, EPROTO, "%s is not a control socket: "
                      "it does not speak QMP", c->path);
  result = control_command (c, "qmp_capabilities", json_object (), err);
  json_decref (result);
  return result ? 0 : -1;
}

struct control *
control_open (const char *path, struct error *err)
{
  struct control *c = calloc (1, sizeof *c);

  if (c == NULL || (c->path = strdup (path)) == NULL) {
    error_set (err, errno, "%m");
    free (c);
    return NULL;
  }
  c->until = UINT64_MAX;
  c->hurry_fd = -1;
  c->fd = connect_to (path, err);
  if (c->fd == -1 || greet (c, err) == -1) {
    control_close (c);
    return NULL;
  }
  return c;
}

static void
drop_fds (struct control *c)
{
  while (c->nr_fds > 0)
    close (c->fds[--c->nr_fds]);
}

bool
control_take_fds (struct control *c, int *fds, size_t nr)
{
  if (c->nr_fds != nr)
    return false;
  memcpy (fds, c->fds, nr * sizeof fds[0]);
  c->nr_fds = 0;
  return true;
}

void
control_close (struct control *c)
{
  if (c == NULL)
    return;
  drop_fds (c);
  if (c->fd != -1)
    close (c->fd);
  free (c->buf);
  free (c->path);
  free (c);
}

void
control_set_limit (struct control *c, uint64_t ns)
{
  uint64_t until = ns < UINT64_MAX ? now_ns () + ns : UINT64_MAX;

  if (!c->hurried || until < c->until)
    c->until = until;
}

void
control_hurry (struct control *c)
{
  if (!c->hurried)
    control_set_limit (c, HURRY);
  c->hurried = true;
  c->hurry_fd = -1;
}

void
control_hurry_when (struct control *c, int fd)
{
  c->hurry_fd = fd;
}

int
control_fd (const struct control *c)
{
  return c->fd;
}

static int
connection_lost (struct control *c, int errnum, struct error *err)
{
  if (errnum == 0 || errnum == EPIPE || errnum == ECONNRESET)
    return error_set (err, ECONNRESET, "%s: the daemon closed the connection",
                      c->path);
  if (errnum == EAGAIN)
    return error_set (err, ETIMEDOUT, "%s: the daemon does not answer",
                      c->path);
  return error_set (err, errnum, "%s: %m", c->path);
}

int
control_send (struct control *c, const char *command, json_t *args,
              unsigned *id, struct error *err)
{
  json_t *msg = args ? json_pack ("{s:s, s:o, s:i}", "execute", command,
                                  "arguments", args, "id",
                                  (int) ++c->last_id) : NULL;
  CLEANUP_FREE char *line = msg ? json_dumps (msg, JSON_COMPACT) : NULL;
  size_t len = line ? strlen (line) : 0, done = 0;
  ssize_t n;

  json_decref (msg);
  drop_fds (c);
  if (line == NULL)
    return error_set (err, ENOMEM, "%s: %m", command);
  line[len++] = '\n'; /* over the NUL */
  while (done < len) {
    n = send (c->fd, line + done, len - done, MSG_NOSIGNAL);
    if (n == -1 && errno != EINTR)
      return connection_lost (c, errno, err);
    if (n > 0)
      done += n;
  }
  *id = c->last_id;
  return 0;
}

/* Cut the first line off the buffer and parse it.  1, 0 if there is no whole
 * one, -1.
 */
static int
next_message (struct control *c, json_t **msg, struct error *err)
{
  size_t blank = 0, end;
  char *eol;

  while (blank < c->len && memchr (" \t\r\n", c->buf[blank], 4))
    blank++;
  /* Some servers say something else, then wait for us without a newline. */
  if (blank < c->len && c->buf[blank] != '{')
    return error_set (err, EPROTO, "%s is not a control socket: "
                      "it does not speak QMP", c->path);
  if (c->scanned < blank)
    c->scanned = blank;
  if (c->scanned == c->len)
    return 0;
  eol = memchr (c->buf + c->scanned, '\n', c->len - c->scanned);
  if (eol == NULL) {
    c->scanned = c->len;
    return 0;
  }
  end = eol - c->buf;
  *msg = json_loadb (c->buf + blank, end - blank, 0, NULL);
  c->len -= end + 1;
  memmove (c->buf, eol + 1, c->len);
  c->scanned = 0;
  return *msg ? 1 : error_set (err, EPROTO, "%s: the daemon sent something "
                               "that is not JSON", c->path);
}

/* Keep the descriptors that have come with some bytes. */
static void
keep_fds (struct control *c, struct msghdr *msg)
{
  struct cmsghdr *h;

  for (h = CMSG_FIRSTHDR (msg); h; h = CMSG_NXTHDR (msg, h)) {
    size_t nr = (h->cmsg_len - CMSG_LEN (0)) / sizeof (int);

    if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS)
      continue;
    for (size_t i = 0; i < nr; i++) {
      int fd;

      memcpy (&fd, CMSG_DATA (h) + i * sizeof fd, sizeof fd);
      if (c->nr_fds < CONTROL_FDS)
        c->fds[c->nr_fds++] = fd;
      else
        close (fd);
    }
  }
}

static ssize_t
receive (struct control *c, char *to, size_t len)
{
  union {
    struct cmsghdr header;
    char space[CMSG_SPACE (CONTROL_FDS * sizeof (int))];
  } control;
  struct iovec iov = { to, len };
  struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1,
                        .msg_control = &control,
                        .msg_controllen = sizeof control };
  ssize_t n = recvmsg (c->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

  if (n > 0)
    keep_fds (c, &msg);
  return n;
}

/* Take what has arrived; the socket is readable. */
static int
fill (struct control *c, struct error *err)
{
  size_t capacity = c->capacity ? c->capacity * 2 : 16384;
  char *buf;
  ssize_t n;

  if (c->len == c->capacity) {
    if (capacity > MESSAGE_MAX)
      return error_set (err, EMSGSIZE, "%s: the daemon sent a message "
                        "without an end", c->path);
    buf = realloc (c->buf, capacity);
    if (buf == NULL)
      return error_set (err, errno, "%m");
    c->buf = buf;
    c->capacity = capacity;
  }
  n = receive (c, c->buf + c->len, c->capacity - c->len);
  if (n > 0)
    c->len += n;
  else if (n == 0)
    return connection_lost (c, 0, err);
  else if (errno != EINTR && errno != EAGAIN)
    return connection_lost (c, errno, err);
  return 0;
}

/* The time from now until 'deadline' as poll wants it. */
static int
poll_timeout (uint64_t deadline)
{
  uint64_t now = now_ns (), ms;

  if (deadline == UINT64_MAX)
    return -1;
  if (deadline <= now)
    return 0;
  ms = (deadline - now + NS_PER_MS - 1) / NS_PER_MS;
  return ms < INT_MAX ? ms : INT_MAX;
}

int
control_receive (struct control *c, uint64_t deadline, json_t **msg,
                 struct error *err)
{
  int r, timeout;

  while ((r = next_message (c, msg, err)) == 0) {
    struct pollfd pfd[2] = {
      { .fd = c->fd, .events = POLLIN },
      { .fd = c->hurry_fd, .events = POLLIN }, /* -1 is passed over */
    };

    timeout = poll_timeout (deadline < c->until ? deadline : c->until);
    r = poll (pfd, 2, timeout);
    if (r == -1 && errno != EINTR)
      return error_set (err, errno, "poll: %m");
    if (r == 0 && timeout == 0 && deadline <= c->until)
      return 0;
    if (r == 0 && timeout == 0)
      return error_set (err, ETIMEDOUT, "%s: %sthe daemon does not answer",
                        c->path, c->hurried ? "interrupted, and " : "");
    if (r > 0 && pfd[1].revents)
      control_hurry (c);
    if (r > 0 && pfd[0].revents && fill (c, err) == -1)
      return -1;
  }
  return r;
}

bool
control_is_reply (const json_t *msg, unsigned id)
{
  const json_t *its = json_object_get (msg, "id");

  if (its == NULL) /* a server that could not even read our line has none */
    return json_object_get (msg, "error") || json_object_get (msg, "return");
  return json_is_integer (its) && json_integer_value (its) == (int) id;
}

json_t *
control_result (const json_t *reply, struct error *err)
{
  json_t *result = json_object_get (reply, "return");
  const char *desc;

  if (result)
    return result;
  desc = json_string_value (json_object_get (json_object_get (reply, "error"),
                                             "desc"));
  error_set (err, EIO, "%s", desc ? desc : "the daemon gave no reason");
  return NULL;
}

json_t *
control_command (struct control *c, const char *command, json_t *args,
                 struct error *err)
{
  json_t *msg, *result;
  unsigned id;

  if (control_send (c, command, args, &id, err) == -1)
    return NULL;
  for (;;) {
    if (control_receive (c, UINT64_MAX, &msg, err) != 1)
      return NULL;
    if (control_is_reply (msg, id))
      break;
    json_decref (msg);
  }
  result = json_incref (control_result (msg, err));
  json_decref (msg);
  return result;
}
