/* nbdferry - the control socket: where it is bound
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"
#include "qmp-listen.h"

#define BACKLOG 16

/* Two daemons that find the same dead socket must not remove each other's
 * new one: the folder is locked meanwhile.  Somebody else's lock on it, or a
 * file system without locks, is no reason to fail.
 */
static int
lock_folder (const char *path)
{
  char dir[sizeof ((struct sockaddr_un *) 0)->sun_path + 2];
  const char *slash = strrchr (path, '/');
  int fd;

  snprintf (dir, sizeof dir, "%.*s", slash ? (int) (slash - path + 1) : 1,
            slash ? path : ".");
  fd = open (dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  for (int i = 0; fd >= 0 && i < 100; i++) {
    if (flock (fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK)
      break;
    usleep (10000);
  }
  return fd;
}

/* The path is taken: may it be replaced?  Only if it is a socket, and the
 * kernel says that nobody listens.
 */
static int
remove_stale (const struct sockaddr_un *addr, struct error *err)
{
  CLEANUP_CLOSE int fd = -1;
  struct stat st;

  if (lstat (addr->sun_path, &st) == -1)
    return errno == ENOENT ? 0
      : error_set (err, errno, "%s: %m", addr->sun_path);
  if (!S_ISSOCK (st.st_mode))
    return error_set (err, EEXIST, "%s exists and is not a socket",
                      addr->sun_path);
  fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd == -1)
    return error_set (err, errno, "socket: %m");
  if (connect (fd, (const struct sockaddr *) addr, sizeof *addr) == 0 ||
      errno != ECONNREFUSED)
    return error_set (err, EADDRINUSE, "%s is in use by another process",
                      addr->sun_path);
  if (unlink (addr->sun_path) == -1 && errno != ENOENT)
    return error_set (err, errno, "cannot replace %s, which nobody serves: %m",
                      addr->sun_path);
  return 0;
}

/* The mode that the socket has when it is bound becomes the file's, so that
 * there is no time at which others could connect.
 */
static int
bind_and_listen (struct qmp_socket *s, struct error *err)
{
  const struct sockaddr *addr = (const struct sockaddr *) &s->addr;
  const char *path = s->addr.sun_path;
  struct stat st;
  int r;

  if (fchmod (s->fd, 0600) == -1)
    return error_set (err, errno, "%s: fchmod: %m", path);
  r = bind (s->fd, addr, sizeof s->addr);
  if (r == -1 && errno == EADDRINUSE) {
    if (remove_stale (&s->addr, err) == -1)
      return -1;
    r = bind (s->fd, addr, sizeof s->addr);
  }
  if (r == -1)
    return error_set (err, errno, "cannot bind the control socket %s: %m",
                      path);
  if (lstat (path, &st) == -1)
    return error_set (err, errno, "%s: %m", path);
  s->dev = st.st_dev;
  s->ino = st.st_ino;
  if (listen (s->fd, BACKLOG) == -1)
    return error_set (err, errno, "%s: listen: %m", path);
  return 0;
}

int
qmp_socket_open (struct qmp_socket *s, const char *path, struct error *err)
{
  CLEANUP_CLOSE int folder = -1;

  memset (s, 0, sizeof *s);
  s->fd = -1;
  s->addr.sun_family = AF_UNIX;
  if (strlen (path) >= sizeof s->addr.sun_path)
    return error_set (err, ENAMETOOLONG, "the path of the control socket is "
                      "too long: %s has %zu bytes, at most %zu are possible",
                      path, strlen (path), sizeof s->addr.sun_path - 1);
  strcpy (s->addr.sun_path, path);

  s->fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (s->fd == -1)
    return error_set (err, errno, "socket: %m");
  folder = lock_folder (path);
  if (bind_and_listen (s, err) == 0)
    return 0;
  close (s->fd);
  s->fd = -1;
  return -1;
}

void
qmp_socket_remove (const struct qmp_socket *s)
{
  struct stat st;

  if (lstat (s->addr.sun_path, &st) == 0 && S_ISSOCK (st.st_mode) &&
      st.st_dev == s->dev && st.st_ino == s->ino)
    unlink (s->addr.sun_path);
}
