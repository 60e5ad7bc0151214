/* nbdferry - is a file or a block device used by the system?
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * For a block device the kernel knows: who mounts it, swaps on it, or builds
 * another device on it, has it exclusively, and a second one gets EBUSY; so
 * does one who asks for a whole disk while somebody has a partition.  What is
 * read in /proc and /sys is only to say who it is.  For files there is no
 * such rule: those are looked for among the loop devices and the swap files.
 */
#include <config.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "claim.h"
#include "cleanup.h"

#define MAX_DEVICES 64 /* a disk and its partitions */
#define USER_TEXT   512

struct devices {
  dev_t dev[MAX_DEVICES];
  char name[MAX_DEVICES][64]; /* of a partition; "" for the device itself */
  size_t nr;
};

/* ---- reading /proc and /sys ---- */

/* The first line of a file, without its end; false if there is none. */
static bool
read_line (const char *path, char *line, size_t size)
{
  FILE *f = fopen (path, "re");
  bool there = f && fgets (line, size, f) != NULL;

  if (f)
    fclose (f);
  if (there)
    line[strcspn (line, "\n")] = '\0';
  return there;
}

/* /proc writes blanks and the like as \ooo. */
static void
unescape (char *s)
{
  char *to = s;
  unsigned c;

  while (*s) {
    if (s[0] == '\\' && sscanf (s + 1, "%3o", &c) == 1 && c < 256 &&
        strspn (s + 1, "01234567") >= 3) {
      *to++ = c;
      s += 4;
    }
    else
      *to++ = *s++;
  }
  *to = '\0';
}

static int
sys_path (char *path, size_t size, dev_t dev, const char *rest)
{
  return snprintf (path, size, "/sys/dev/block/%u:%u/%s", major (dev),
                   minor (dev), rest);
}

/* A device, and the partitions on it. */
static void
find_devices (dev_t dev, struct devices *all)
{
  char path[256], line[64];
  struct dirent *e;
  DIR *dir;

  all->dev[0] = dev;
  all->name[0][0] = '\0';
  all->nr = 1;
  sys_path (path, sizeof path, dev, "");
  dir = opendir (path);
  while (dir && all->nr < MAX_DEVICES && (e = readdir (dir)) != NULL) {
    unsigned a, b;
    char sub[512];

    if (strlen (e->d_name) >= sizeof all->name[0] || e->d_name[0] == '.')
      continue;
    snprintf (sub, sizeof sub, "%s/%s/partition", path, e->d_name);
    if (access (sub, F_OK) == -1)
      continue;
    snprintf (sub, sizeof sub, "%s/%s/dev", path, e->d_name);
    if (!read_line (sub, line, sizeof line) ||
        sscanf (line, "%u:%u", &a, &b) != 2)
      continue;
    all->dev[all->nr] = makedev (a, b);
    strcpy (all->name[all->nr++], e->d_name);
  }
  if (dir)
    closedir (dir);
}

/* Which of the devices it is, or -1. */
static int
among (const struct devices *all, dev_t dev)
{
  for (size_t i = 0; i < all->nr; i++)
    if (all->dev[i] == dev)
      return i;
  return -1;
}

/* ---- who uses a block device ---- */

static void
tell (const struct devices *all, int i, char who[USER_TEXT],
      const char *what, const char *where)
{
  const char *part = all->name[i];

  snprintf (who, USER_TEXT, "%s%s%s%s%s", part[0] ? "its partition " : "",
            part, part[0] ? " " : "", what, where);
}

static bool
is_mounted (const struct devices *all, char who[USER_TEXT])
{
  FILE *f = fopen ("/proc/self/mountinfo", "re");
  CLEANUP_FREE char *line = NULL;
  size_t size = 0;
  int i = -1;

  while (f && i == -1 && getline (&line, &size, f) != -1) {
    CLEANUP_FREE char *where = NULL, *source = NULL;
    char *rest = strstr (line, " - ");
    unsigned a, b;
    struct stat st;

    if (rest == NULL ||
        sscanf (line, "%*d %*d %u:%u %*s %ms", &a, &b, &where) != 3)
      continue;
    i = among (all, makedev (a, b));
    /* Some file systems have device numbers of their own. */
    if (i == -1 && sscanf (rest, " - %*s %ms", &source) == 1) {
      unescape (source);
      if (source[0] == '/' && stat (source, &st) == 0 &&
          S_ISBLK (st.st_mode))
        i = among (all, st.st_rdev);
    }
    if (i >= 0) {
      unescape (where);
      tell (all, i, who, "is mounted on ", where);
    }
  }
  if (f)
    fclose (f);
  return i >= 0;
}

/* Swap on one of the devices, or (all NULL) on that file. */
static bool
is_swap (const struct devices *all, const struct stat *file,
         char who[USER_TEXT])
{
  FILE *f = fopen ("/proc/swaps", "re");
  CLEANUP_FREE char *line = NULL;
  bool found = false;
  size_t size = 0;

  while (f && !found && getline (&line, &size, f) != -1) {
    struct stat st;

    line[strcspn (line, " \t\n")] = '\0';
    unescape (line);
    if (line[0] != '/' || stat (line, &st) == -1)
      continue;
    if (all && S_ISBLK (st.st_mode) && among (all, st.st_rdev) >= 0) {
      tell (all, among (all, st.st_rdev), who, "is swap space in use", "");
      found = true;
    }
    if (all == NULL && st.st_dev == file->st_dev &&
        st.st_ino == file->st_ino) {
      snprintf (who, USER_TEXT, "it is swap space in use");
      found = true;
    }
  }
  if (f)
    fclose (f);
  return found;
}

/* Devices that stand upon one of these. */
static bool
is_held (const struct devices *all, char who[USER_TEXT])
{
  bool found = false;

  for (size_t i = 0; !found && i < all->nr; i++) {
    char path[256], name[128], by[400];
    struct dirent *e;
    DIR *dir;

    sys_path (path, sizeof path, all->dev[i], "holders");
    dir = opendir (path);
    while (dir && !found && (e = readdir (dir)) != NULL) {
      if (e->d_name[0] == '.' || strlen (e->d_name) > 64)
        continue;
      snprintf (path, sizeof path, "/sys/block/%s/dm/name", e->d_name);
      if (read_line (path, name, sizeof name))
        snprintf (by, sizeof by, "/dev/%s (%s)", e->d_name, name);
      else
        snprintf (by, sizeof by, "/dev/%s", e->d_name);
      tell (all, i, who, "is a part of ", by);
      found = true;
    }
    if (dir)
      closedir (dir);
  }
  return found;
}

static bool
find_user (dev_t dev, char who[USER_TEXT])
{
  struct devices all;

  find_devices (dev, &all);
  return is_mounted (&all, who) || is_swap (&all, NULL, who) ||
         is_held (&all, who);
}

/* Who is not the exclusive user cannot discard, or zero, what has dirty pages.
 * So 'fd' itself becomes one, whoever uses it meanwhile; what it was, and with
 * it the locks that belong to it, goes on in '*claim'.
 */
static int
swap_fd (int fd, int excl, const char *path, int *claim, struct error *err)
{
  int r = 0;

  *claim = fcntl (fd, F_DUPFD_CLOEXEC, 0);
  if (*claim == -1 || dup3 (excl, fd, O_CLOEXEC) == -1) {
    r = error_set (err, errno, "%s: cannot claim it: %m", path);
    if (*claim >= 0)
      close (*claim);
    *claim = -1;
  }
  close (excl);
  return r;
}

void
claim_release (int fd, int claim)
{
  if (claim == -1)
    return;
  dup3 (claim, fd, O_CLOEXEC);
  close (claim);
}

static int
claim_device (int fd, const char *path, dev_t dev, int *claim,
              struct error *err)
{
  char self[64], who[USER_TEXT];
  int excl;

  snprintf (self, sizeof self, "/proc/self/fd/%d", fd);
  excl = open (self, O_RDWR | O_EXCL | O_CLOEXEC);
  if (excl >= 0)
    return swap_fd (fd, excl, path, claim, err);
  if (errno != EBUSY)
    return error_set (err, errno, "%s: cannot see whether it is in use: %m",
                      path);
  if (!find_user (dev, who))
    snprintf (who, sizeof who, "another program has it exclusively, or it is "
              "mounted in another name space");
  return error_set (err, EBUSY, "%s is in use: %s", path, who);
}

/* ---- who uses a file ---- */

static bool
has_loop (const struct stat *file, char who[USER_TEXT])
{
  DIR *dir = opendir ("/sys/block");
  bool found = false;
  struct dirent *e;

  while (dir && !found && (e = readdir (dir)) != NULL) {
    char path[512], line[4200], more[USER_TEXT] = "";
    unsigned a, b;
    struct stat st;

    if (strncmp (e->d_name, "loop", 4) != 0)
      continue;
    snprintf (path, sizeof path, "/sys/block/%s/loop/backing_file",
              e->d_name);
    if (!read_line (path, line, sizeof line) || stat (line, &st) == -1 ||
        st.st_dev != file->st_dev || st.st_ino != file->st_ino)
      continue;
    found = true;
    snprintf (path, sizeof path, "/sys/block/%s/dev", e->d_name);
    if (read_line (path, line, sizeof line) &&
        sscanf (line, "%u:%u", &a, &b) == 2)
      find_user (makedev (a, b), more);
    snprintf (who, USER_TEXT, "the loop device /dev/%.64s stands upon it%s%.*s",
              e->d_name, more[0] ? ", and " : "", 300, more);
  }
  if (dir)
    closedir (dir);
  return found;
}

int
claim_fd (int fd, const char *path, int *claim, struct error *err)
{
  char who[USER_TEXT];
  struct stat st;

  *claim = -1;
  if (fstat (fd, &st) == -1)
    return error_set (err, errno, "%s: %m", path);
  if (S_ISBLK (st.st_mode))
    return claim_device (fd, path, st.st_rdev, claim, err);
  if (has_loop (&st, who) || is_swap (NULL, &st, who))
    return error_set (err, EBUSY, "%s is in use: %s", path, who);
  return 0;
}
