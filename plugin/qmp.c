/* nbdferry - the control socket
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Plain blocking threads.  The listener polls the listening socket; each
 * client has a slot and a thread, which polls the client and an eventfd that
 * says "there are events for you".  All of them also poll one eventfd that is
 * written once, when everything is to end, and never read.
 *
 * Who emits an event only puts a line into the queues, under locks that are
 * never held across I/O.  Who writes to a client that does not read waits
 * SEND_MS at most, in that client's own thread, and then gives it up.
 *
 * A slot is FREE, RUNNING, or ENDED: its thread has done everything but
 * return, and is joined by the listener before the slot is used again, or by
 * qmp_stop.
 */
#include <config.h>

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "cleanup.h"
#include "clock.h"
#include "house.h"
#include "qmp.h"
#include "qmp-dispatch.h"
#include "qmp-frame.h"
#include "qmp-listen.h"
#include "views.h"

#define SEND_MS    5000 /* how long a client may refuse to read */
#define MAX_EVENTS 64   /* that wait for one client */

enum slot_state { FREE, RUNNING, ENDED };

struct client {
  /* Set by the listener before the thread starts. */
  int fd;
  int wake_fd; /* events are waiting */
  pthread_t thread;
  uint64_t number;

  /* The thread's own. */
  struct qmp_session session;
  struct qmp_frame frame;
  int end_fd; /* of qmp_stop_fd, or -1 */

  enum slot_state state; /* protected by server.lock */

  pthread_mutex_t lock;     /* protects what follows; below server.lock */
  bool listening;           /* has negotiated, and gets events */
  char *events[MAX_EVENTS]; /* a ring */
  unsigned first, nr;
};

static struct {
  /* Set by qmp_listen and qmp_start, read-only while the threads run. */
  struct qmp_socket socket;
  int stop_fd;
  bool started;
  pthread_t listener;

  pthread_mutex_t lock; /* protects the state of each client */
  struct client clients[QMP_MAX_CLIENTS];
} server = {
  .socket.fd = -1,
  .stop_fd = -1,
  .lock = PTHREAD_MUTEX_INITIALIZER,
};

/* ---- writing ---- */

static bool
stopping (void)
{
  struct pollfd p = { .fd = server.stop_fd, .events = POLLIN };

  return poll (&p, 1, 0) == 1;
}

/* Wait until the client reads on.  -1 if it does not in time, or if
 * everything ends.
 */
static int
wait_to_send (struct client *c, uint64_t deadline)
{
  uint64_t now = now_ns ();
  struct pollfd p[2] = {
    { .fd = c->fd, .events = POLLOUT },
    { .fd = server.stop_fd, .events = POLLIN },
  };
  int r;

  if (now >= deadline)
    return -1;
  r = poll (p, 2, (deadline - now) / NS_PER_MS + 1);
  if (r == -1 && errno == EINTR)
    return 0;
  return r <= 0 || p[1].revents ? -1 : 0;
}

/* What goes with the next bytes; of the client of this thread. */
static _Thread_local int attached[QMP_FDS];
static _Thread_local bool has_attached;

void
qmp_attach (const int fds[QMP_FDS])
{
  memcpy (attached, fds, sizeof attached);
  has_attached = true;
}

static void
drop_attached (void)
{
  for (size_t i = 0; has_attached && i < QMP_FDS; i++)
    close (attached[i]);
  has_attached = false;
}

static ssize_t
send_bytes (struct client *c, const char *p, size_t len)
{
  union {
    struct cmsghdr header;
    char space[CMSG_SPACE (sizeof attached)];
  } control = { .header = { .cmsg_level = SOL_SOCKET,
                            .cmsg_type = SCM_RIGHTS,
                            .cmsg_len = CMSG_LEN (sizeof attached) } };
  struct iovec iov = { (void *) p, len };
  struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
  ssize_t n;

  if (has_attached) {
    msg.msg_control = &control;
    msg.msg_controllen = sizeof control;
    memcpy (CMSG_DATA (&control.header), attached, sizeof attached);
  }
  n = sendmsg (c->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (n >= 0)
    drop_attached ();
  return n;
}

/* Send a line, and free it.  -1 if the client is to be given up. */
static int
send_line (struct client *c, char *line)
{
  CLEANUP_FREE char *owned = line;
  const char *p = owned;
  uint64_t deadline = now_ns () + SEND_MS * NS_PER_MS;
  size_t len;

  if (p == NULL) /* no memory for it */
    return -1;
  for (len = strlen (p); len > 0; ) {
    ssize_t n = send_bytes (c, p, len);

    if (n >= 0) {
      p += n;
      len -= n;
    }
    else if (errno == EAGAIN) {
      if (wait_to_send (c, deadline) == -1)
        return -1;
    }
    else if (errno != EINTR)
      return -1;
  }
  return 0;
}

/* ---- events ---- */

/* Take the oldest event out of the queue, or NULL. */
static char *
next_event (struct client *c)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);
  char *line;

  if (c->nr == 0)
    return NULL;
  line = c->events[c->first];
  c->first = (c->first + 1) % MAX_EVENTS;
  c->nr--;
  return line;
}

static void
queue_event (struct client *c, const char *line)
{
  static const uint64_t one = 1;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);
  char *copy;

  if (!c->listening || (copy = strdup (line)) == NULL)
    return;
  if (c->nr == MAX_EVENTS) {
    free (c->events[c->first]);
    c->first = (c->first + 1) % MAX_EVENTS;
    c->nr--;
  }
  c->events[(c->first + c->nr++) % MAX_EVENTS] = copy;
  /* It cannot fail: the counter has 64 bits. */
  if (write (c->wake_fd, &one, sizeof one) == -1)
    return;
}

void
qmp_event (const char *name, json_t *data)
{
  CLEANUP_FREE char *line = qmp_event_line (name, data);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server.lock);

  if (line == NULL)
    return;
  for (size_t i = 0; i < QMP_MAX_CLIENTS; i++)
    if (server.clients[i].state == RUNNING)
      queue_event (&server.clients[i], line);
}

static int
send_events (struct client *c)
{
  uint64_t count;
  char *line;

  /* The eventfd does not block; it only has to be emptied before the queue
   * is looked at.
   */
  if (read (c->wake_fd, &count, sizeof count) == -1 && errno != EAGAIN)
    return -1;
  while ((line = next_event (c)) != NULL)
    if (send_line (c, line) == -1)
      return -1;
  return 0;
}

/* ---- a client ---- */

static void
begin_events (struct client *c)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);

  c->listening = c->session.negotiated;
}

/* The reply has been sent: tell everybody, and go. */
static int
quit (struct client *c)
{
  json_auto_t *data = json_pack ("{s:b, s:s}", "guest", 0, "reason",
                                 "host-qmp-quit");

  qmp_event ("SHUTDOWN", data);
  send_events (c);
  house_quit ();
  return -1;
}

/* Answer what was read.  -1 if the conversation is over. */
static int
take_bytes (struct client *c, const char *bytes, size_t len)
{
  while (len > 0) {
    enum qmp_frame_event event;
    size_t n = qmp_frame_feed (&c->frame, bytes, len, &event);
    char *line;
    int r;

    bytes += n;
    len -= n;
    if (event == QMP_FRAME_MORE)
      break;
    if (event == QMP_FRAME_ERROR)
      line = qmp_error_line (c->frame.err.msg);
    else
      line = qmp_dispatch (&c->session, c->frame.text.ptr, c->frame.text.len);
    r = send_line (c, line);
    drop_attached ();
    if (r == -1)
      return -1;
    if (c->session.quit)
      return quit (c);
    begin_events (c);
    if (send_events (c) == -1 || stopping ())
      return -1;
  }
  return 0;
}

static int
read_client (struct client *c)
{
  char bytes[16384];
  ssize_t n = recv (c->fd, bytes, sizeof bytes, MSG_DONTWAIT);

  if (n == -1)
    return errno == EAGAIN || errno == EINTR ? 0 : -1;
  if (n == 0)
    return -1;
  return take_bytes (c, bytes, n);
}

static void
talk (struct client *c)
{
  struct pollfd p[3] = {
    { .fd = c->fd, .events = POLLIN },
    { .fd = c->wake_fd, .events = POLLIN },
    { .fd = server.stop_fd, .events = POLLIN },
  };

  if (send_line (c, qmp_greeting ()) == -1)
    return;
  while (poll (p, 3, -1) >= 0 || errno == EINTR) {
    /* Events first, so that the last ones are sent when all ends. */
    if (p[1].revents && send_events (c) == -1)
      return;
    if (p[2].revents)
      return;
    if (p[0].revents && read_client (c) == -1)
      return;
  }
}

static _Thread_local struct client *self; /* this thread's */

uint64_t
qmp_client (void)
{
  return self->number;
}

/* Readable when there is no use in going on for that client. */
static int
watch_end (const struct client *c)
{
  /* A client that has only said all it had to say waits for the answer: that
   * is no hangup.
   */
  struct epoll_event gone = { .events = 0 }, stop = { .events = EPOLLIN };
  int fd = epoll_create1 (EPOLL_CLOEXEC);

  if (fd >= 0 && epoll_ctl (fd, EPOLL_CTL_ADD, c->fd, &gone) == 0 &&
      epoll_ctl (fd, EPOLL_CTL_ADD, server.stop_fd, &stop) == 0)
    return fd;
  if (fd >= 0)
    close (fd);
  return -1;
}

/* Few commands need it. */
int
qmp_stop_fd (void)
{
  if (self->end_fd == -1)
    self->end_fd = watch_end (self);
  return self->end_fd >= 0 ? self->end_fd : server.stop_fd;
}

static void *
client_main (void *arg)
{
  struct client *c = arg;
  char *line;

  self = c;
  c->end_fd = -1;
  talk (c);
  views_client_gone (c->number);
  if (c->end_fd >= 0)
    close (c->end_fd);

  /* No more events: those are for clients that are RUNNING.  The descriptors
   * are closed under the lock, so that no event is written to another's.
   */
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server.lock);
  while ((line = next_event (c)) != NULL)
    free (line);
  qmp_frame_free (&c->frame);
  close (c->fd);
  close (c->wake_fd);
  c->state = ENDED;
  return NULL;
}

/* ---- the listener ---- */

/* A slot for a new client, with nothing of its last one; or NULL.  Only the
 * listener makes slots RUNNING, so what it returns stays free.
 */
static struct client *
free_slot (void)
{
  for (size_t i = 0; i < QMP_MAX_CLIENTS; i++) {
    struct client *c = &server.clients[i];
    enum slot_state state;

    pthread_mutex_lock (&server.lock);
    state = c->state;
    pthread_mutex_unlock (&server.lock);
    if (state == RUNNING)
      continue;
    if (state == ENDED)
      pthread_join (c->thread, NULL);
    pthread_mutex_lock (&server.lock);
    c->state = FREE;
    pthread_mutex_unlock (&server.lock);
    return c;
  }
  return NULL;
}

/* Say why not, if that can be done at once, and close. */
static void
turn_away (int fd, const char *why)
{
  CLEANUP_FREE char *line = qmp_error_line (why);

  if (line)
    send (fd, line, strlen (line), MSG_NOSIGNAL | MSG_DONTWAIT);
  close (fd);
}

static uint64_t numbers; /* of clients so far; the listener's */

static void
start_client (int fd)
{
  struct client *c = free_slot ();
  int r;

  if (c == NULL) {
    turn_away (fd, "Too many clients are connected to the control socket");
    return;
  }
  c->fd = fd;
  c->wake_fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (c->wake_fd == -1) {
    turn_away (fd, "Too many open files");
    return;
  }
  c->number = ++numbers;
  c->session = (struct qmp_session) { 0 };
  qmp_frame_init (&c->frame);
  c->listening = false;
  c->first = c->nr = 0;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&server.lock);
  r = pthread_create (&c->thread, NULL, client_main, c);
  if (r == 0) {
    c->state = RUNNING;
    return;
  }
  qmp_frame_free (&c->frame);
  close (c->wake_fd);
  turn_away (fd, "Cannot start a thread");
}

static void *
listener_main (void *arg)
{
  struct pollfd p[2] = {
    { .fd = server.stop_fd, .events = POLLIN },
    { .fd = server.socket.fd, .events = POLLIN },
  };

  (void) arg;
  while (poll (p, 2, -1) >= 0 || errno == EINTR) {
    int fd;

    if (p[0].revents)
      break;
    fd = accept4 (server.socket.fd, NULL, NULL, SOCK_CLOEXEC);
    if (fd >= 0)
      start_client (fd);
    else if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
      poll (p, 1, 100); /* no descriptors or memory: try again later */
  }
  return NULL;
}

/* ---- from outside ---- */

int
qmp_listen (const char *path, struct error *err)
{
  server.stop_fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (server.stop_fd == -1)
    return error_set (err, errno, "eventfd: %m");
  if (qmp_socket_open (&server.socket, path, err) == -1) {
    close (server.stop_fd);
    server.stop_fd = -1;
    return -1;
  }
  for (size_t i = 0; i < QMP_MAX_CLIENTS; i++)
    pthread_mutex_init (&server.clients[i].lock, NULL);
  return 0;
}

int
qmp_start (struct error *err)
{
  int r;

  if (server.socket.fd == -1)
    return 0;
  r = pthread_create (&server.listener, NULL, listener_main, NULL);
  if (r != 0)
    return error_set (err, r, "cannot start the control socket's thread: %m");
  server.started = true;
  return 0;
}

void
qmp_stop (void)
{
  static const uint64_t one = 1;

  if (server.socket.fd == -1)
    return;
  /* The path goes first, so that nobody connects to a server that ends. */
  qmp_socket_remove (&server.socket);
  if (write (server.stop_fd, &one, sizeof one) == -1)
    house_log ("control socket: eventfd: %m");
  if (server.started) {
    pthread_join (server.listener, NULL);
    for (size_t i = 0; i < QMP_MAX_CLIENTS; i++) {
      struct client *c = &server.clients[i];
      bool used;

      pthread_mutex_lock (&server.lock);
      used = c->state != FREE;
      pthread_mutex_unlock (&server.lock);
      if (used)
        pthread_join (c->thread, NULL);
      /* A migration that ends may still have an event for us. */
      pthread_mutex_lock (&server.lock);
      c->state = FREE;
      pthread_mutex_unlock (&server.lock);
    }
  }
  server.started = false;
  close (server.socket.fd);
  close (server.stop_fd);
  server.socket.fd = server.stop_fd = -1;
}
