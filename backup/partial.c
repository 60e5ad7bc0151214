/* nbdferry - a file that is there whole, or not at all
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"
#include "keep-out.h"
#include "partial.h"

/* The file at tmp, with a lock that ends with us.  Whoever had it before may
 * have just renamed it: then it is not this file any more.
 */
static int
open_locked (const char *tmp, struct error *err)
{
  for (int tries = 0; tries < 10; tries++) {
    int fd = open (tmp, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    struct stat mine, there;

    if (fd == -1)
      return error_set (err, errno, "%s: %m", tmp);
    if (flock (fd, LOCK_EX | LOCK_NB) == -1) {
      error_set (err, errno, errno == EWOULDBLOCK
                 ? "%s is being written by another process" : "%s: %m", tmp);
      close (fd);
      return -1;
    }
    if (fstat (fd, &mine) == 0 && lstat (tmp, &there) == 0 &&
        mine.st_ino == there.st_ino && mine.st_dev == there.st_dev) {
      if (!S_ISREG (mine.st_mode))
        error_set (err, EINVAL, "%s is not a regular file", tmp);
      else if (ftruncate (fd, 0) == -1)
        error_set (err, errno, "%s: %m", tmp);
      else
        return fd;
      close (fd);
      return -1;
    }
    close (fd);
  }
  return error_set (err, EBUSY, "%s is being written by another process", tmp);
}

/* A FIFO is opened when there is somebody at its other end.  That may be never,
 * and until then Ctrl-C ends us: nothing has begun.
 */
static int
open_stream (const char *path)
{
  sigset_t set, was;
  int fd;

  sigemptyset (&set);
  sigaddset (&set, SIGINT);
  sigaddset (&set, SIGTERM);
  pthread_sigmask (SIG_UNBLOCK, &set, &was);
  fd = open (path, O_WRONLY | O_CLOEXEC);
  pthread_sigmask (SIG_SETMASK, &was, NULL);
  return fd;
}

int
partial_open (struct partial *p, const char *path, bool replace,
              struct error *err)
{
  struct stat st;

  *p = (struct partial)PARTIAL_NONE;
  p->replace = replace;
  if (strcmp (path, "-") == 0) {
    p->fd = fcntl (STDOUT_FILENO, F_DUPFD_CLOEXEC, 3);
    return p->fd == -1 ? error_set (err, errno, "standard output: %m") : 0;
  }
  p->path = strdup (path);
  if (p->path == NULL)
    return error_set (err, errno, "%m");
  if (stat (path, &st) == 0) {
    if (S_ISFIFO (st.st_mode) || S_ISCHR (st.st_mode)) {
      p->fd = open_stream (path);
      return p->fd == -1 ? error_set (err, errno, "%s: %m", path) : 0;
    }
    if (!S_ISREG (st.st_mode))
      return error_set (err, EINVAL, "%s is not a file", path);
    if (!replace)
      return error_set (err, EEXIST, "%s exists already, and is not touched",
                        path);
    p->replaced = keep_out_of_use (path, err);
    if (p->replaced == -1)
      return -1;
  }
  else if (errno != ENOENT || path[0] == '\0')
    return error_set (err, errno, "%s: %m", path[0] ? path : "''");
  else if (!replace && lstat (path, &st) == 0)
    return error_set (err, EEXIST, "%s is a symbolic link to what does not "
                      "exist", path);
  if (asprintf (&p->tmp, "%s.partial", path) == -1) {
    p->tmp = NULL;
    return error_set (err, ENOMEM, "%m");
  }
  p->fd = open_locked (p->tmp, err);
  if (p->fd == -1)
    free (take_ptr (&p->tmp)); /* not ours to remove */
  return p->fd == -1 ? -1 : 0;
}

int
sync_folder_of (const char *path, struct error *err)
{
  CLEANUP_FREE char *copy = strdup (path);
  CLEANUP_CLOSE int fd = -1;

  if (copy == NULL)
    return error_set (err, errno, "%m");
  fd = open (dirname (copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd == -1 || fsync (fd) == -1)
    return error_set (err, errno, "%s: cannot make its folder durable: %m",
                      path);
  return 0;
}

/* A file system that cannot rename without replacing can make a link. */
static int
give_name (struct partial *p)
{
  if (p->replace)
    return rename (p->tmp, p->path);
  if (renameat2 (AT_FDCWD, p->tmp, AT_FDCWD, p->path, RENAME_NOREPLACE) == 0)
    return 0;
  if (errno != EINVAL && errno != ENOSYS)
    return -1;
  if (link (p->tmp, p->path) == -1)
    return -1;
  unlink (p->tmp);
  return 0;
}

int
partial_commit (struct partial *p, struct error *err)
{
  const char *name = p->path ? p->path : "standard output";

  /* A pipe has nothing to be made durable. */
  if (fsync (p->fd) == -1 && errno != EINVAL && errno != EROFS)
    return error_set (err, errno, "%s: cannot make it durable: %m", name);
  if (p->tmp == NULL) {
    int fd = p->fd;

    p->fd = -1;
    return close (fd) == -1 ? error_set (err, errno, "%s: %m", name) : 0;
  }
  if (give_name (p) == -1)
    return error_set (err, errno, "%s: cannot give it its name: %m", p->tmp);
  free (take_ptr (&p->tmp));
  return sync_folder_of (p->path, err);
}

void
partial_drop (struct partial *p)
{
  if (p->tmp)
    unlink (p->tmp);
  if (p->fd >= 0)
    close (p->fd);
  if (p->replaced >= 0)
    close (p->replaced);
  free (p->tmp);
  free (p->path);
  *p = (struct partial)PARTIAL_NONE;
}
