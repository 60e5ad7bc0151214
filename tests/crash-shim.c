/* nbdferry - for tests: die at a chosen sync, and remember what was synced
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Loaded before a daemon's libraries (LD_PRELOAD).  From the time on when the
 * file $SHIM_DIR/armed is there, each fsync, fdatasync and rename is two points
 * at which the process may die: before it and after it.  It dies (SIGKILL) at
 * point $SHIM_DIE.  What a loss of power would leave is kept in $SHIM_DIR: of
 * each file that was synced its content then, as INODE, with its times; of each
 * folder that was synced a list of names and inodes, as INODE.list.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long point; /* under the lock */

static int
armed (const char *dir)
{
  char path[PATH_MAX];

  snprintf (path, sizeof path, "%s/armed", dir);
  return access (path, F_OK) == 0;
}

static void
pass_point (void)
{
  const char *dir = getenv ("SHIM_DIR"), *die = getenv ("SHIM_DIE");

  if (dir == NULL || die == NULL || !armed (dir))
    return;
  pthread_mutex_lock (&lock);
  if (point++ == atol (die))
    kill (getpid (), SIGKILL);
  pthread_mutex_unlock (&lock);
}

/* Our own rename is no point. */
static void
move (const char *from, const char *to)
{
  int (*real) (const char *, const char *) = dlsym (RTLD_NEXT, "rename");

  if (real (from, to) == -1)
    abort ();
}

/* The holes stay holes. */
static void
copy_file (const char *from, const char *to, const struct stat *st)
{
  char tmp[PATH_MAX];
  static char buf[1 << 16]; /* under the lock */
  int in = open (from, O_RDONLY | O_CLOEXEC), out;
  off_t at = 0, end;

  snprintf (tmp, sizeof tmp, "%s.tmp", to);
  out = open (tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (in == -1 || out == -1 || ftruncate (out, st->st_size) == -1)
    abort ();
  while ((at = lseek (in, at, SEEK_DATA)) >= 0 &&
         (end = lseek (in, at, SEEK_HOLE)) >= 0)
    while (at < end) {
      size_t n = end - at < (off_t) sizeof buf ? (size_t) (end - at)
                                               : sizeof buf;
      ssize_t r = pread (in, buf, n, at);

      if (r <= 0)
        break;
      if (pwrite (out, buf, r, at) != r)
        abort ();
      at += r;
    }
  futimens (out, (struct timespec[]){ st->st_atim, st->st_mtim });
  close (in);
  close (out);
  move (tmp, to);
}

static void
list_folder (const char *path, const char *to)
{
  char tmp[PATH_MAX];
  DIR *d = opendir (path);
  struct dirent *e;
  FILE *f;

  snprintf (tmp, sizeof tmp, "%s.tmp", to);
  f = fopen (tmp, "w");
  if (d == NULL || f == NULL)
    abort ();
  while ((e = readdir (d)) != NULL)
    fprintf (f, "%ju %s\n", (uintmax_t) e->d_ino, e->d_name);
  fclose (f);
  closedir (d);
  move (tmp, to);
}

static void
keep (int fd)
{
  const char *dir = getenv ("SHIM_DIR");
  char from[PATH_MAX], to[PATH_MAX];
  struct stat st;
  int saved = errno;

  if (dir == NULL || !armed (dir) || fstat (fd, &st) == -1)
    return;
  snprintf (from, sizeof from, "/proc/self/fd/%d", fd);
  pthread_mutex_lock (&lock);
  if (S_ISDIR (st.st_mode)) {
    snprintf (to, sizeof to, "%s/%ju.list", dir, (uintmax_t) st.st_ino);
    list_folder (from, to);
  }
  else if (S_ISREG (st.st_mode)) {
    snprintf (to, sizeof to, "%s/%ju", dir, (uintmax_t) st.st_ino);
    copy_file (from, to, &st);
  }
  pthread_mutex_unlock (&lock);
  errno = saved;
}

static int
synced (const char *name, int fd)
{
  int (*real) (int) = dlsym (RTLD_NEXT, name);
  int r;

  pass_point ();
  r = real (fd);
  if (r == 0)
    keep (fd);
  pass_point ();
  return r;
}

int
fsync (int fd)
{
  return synced ("fsync", fd);
}

int
fdatasync (int fd)
{
  return synced ("fdatasync", fd);
}

int
rename (const char *from, const char *to)
{
  int (*real) (const char *, const char *) = dlsym (RTLD_NEXT, "rename");
  int r;

  pass_point ();
  r = real (from, to);
  pass_point ();
  return r;
}
