/* nbdferry - a machine that loses its power, for tests
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What is written to a drive's files goes through here (these functions stand
 * before libc's) and is recorded.  Mapped pages are compared with what was
 * seen last at each step.  Of what was written since a file's last sync, a
 * crash leaves each sector in any of the states that it had since then: so
 * later writes may be there without earlier ones, and writes are torn.  The
 * file of points is replaced as a whole; which one is there counts as decided
 * once its directory was synced.  To be included once, after cmocka.h.
 */
#ifndef FERRY_CRASH_MODEL_H
#define FERRY_CRASH_MODEL_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cleanup.h"

#define SECTOR   512
#define PAGE     4096
#define MAX_FILE (UINT64_C (192) << 20)
#define NR_PAGES (MAX_FILE / PAGE)

enum { SIDECAR, JOURNAL, ACTIVITY, NR_FILES, DISK, POINTS, OTHER };

static const char *const file_names[] = { "bitmaps.qcow2", "journal",
                                          "activity" };

struct image {
  uint8_t *bytes; /* MAX_FILE, mostly untouched */
  uint64_t len;
};

struct file {
  char path[PATH_MAX];
  struct image durable, current; /* as of 'synced'; as written last */
  bool touched[NR_PAGES];        /* not zeros in some state */
  size_t synced;                 /* ops before this one are durable */
};

enum op_type { OP_WRITE, OP_LENGTH, OP_ZERO, OP_SYNC, OP_DATA, OP_NOTE,
               OP_REPLACE };

struct op {
  enum op_type type;
  int file;
  uint64_t offset, len; /* of OP_LENGTH: the new one in 'len' */
  uint8_t *data;
  unsigned mask;        /* the test's */
};

#define MAX_OPS 20000
static struct op ops[MAX_OPS];
static size_t nr_ops;
static bool recording;   /* else calls go straight through */
static struct file files[NR_FILES];
static struct {
  char path[PATH_MAX];
  char *durable; /* its text; NULL: it is not there */
  size_t synced; /* as in struct file */
} points;
static char disk_path[PATH_MAX];

/* The test's: before a step of that file, and what is recorded with a step. */
static void step_of (int file);
static unsigned mask_of_step (int file);

static uint64_t rnd_state = UINT64_C (88172645463325252);

UNUSED static uint64_t
rnd (uint64_t n)
{
  rnd_state ^= rnd_state << 13;
  rnd_state ^= rnd_state >> 7;
  rnd_state ^= rnd_state << 17;
  return rnd_state % n;
}

static struct op *
add_op (enum op_type type, int file, uint64_t offset, uint64_t len,
        const void *data)
{
  struct op *o = &ops[nr_ops];

  if (nr_ops++ == MAX_OPS)
    abort ();
  *o = (struct op){ type, file, offset, len, NULL, mask_of_step (file) };
  if (data) {
    o->data = malloc (len);
    memcpy (o->data, data, len);
  }
  return o;
}

static int
file_of (int fd)
{
  char link[40], path[PATH_MAX];
  ssize_t n;

  snprintf (link, sizeof link, "/proc/self/fd/%d", fd);
  n = readlink (link, path, sizeof path - 1);
  if (n < 0)
    return OTHER;
  path[n] = '\0';
  if (strcmp (path, disk_path) == 0)
    return DISK;
  if (strncmp (path, points.path, strlen (path)) == 0 &&
      strcmp (points.path + strlen (path), "/points.json") == 0)
    return POINTS; /* its directory */
  for (int f = 0; f < NR_FILES; f++)
    if (strcmp (path, files[f].path) == 0)
      return f;
  return OTHER;
}

/* ---- images ---- */

static void
touch_pages (struct file *f, uint64_t offset, uint64_t len)
{
  if (offset + len > MAX_FILE)
    abort ();
  for (uint64_t p = offset / PAGE; p * PAGE < offset + len; p++)
    f->touched[p] = true;
}

/* That part of an op that lies in [from, to). */
static void
apply (struct file *f, struct image *im, const struct op *o, uint64_t from,
       uint64_t to)
{
  uint64_t start = o->offset > from ? o->offset : from;
  uint64_t end = o->offset + o->len < to ? o->offset + o->len : to;

  switch (o->type) {
  case OP_WRITE:
    if (start >= end)
      return;
    memcpy (im->bytes + start, o->data + (start - o->offset), end - start);
    if (end > im->len)
      im->len = end;
    break;
  case OP_ZERO:
    for (uint64_t p = start / PAGE; p * PAGE < end; p++) {
      uint64_t a = p * PAGE > start ? p * PAGE : start;
      uint64_t b = (p + 1) * PAGE < end ? (p + 1) * PAGE : end;

      if (f->touched[p] && a < b)
        memset (im->bytes + a, 0, b - a);
    }
    break;
  case OP_LENGTH:
    im->len = o->len;
    break;
  default:
    break;
  }
}

static void
new_image (struct image *im)
{
  im->bytes = mmap (NULL, MAX_FILE, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (im->bytes == MAP_FAILED)
    abort ();
}

static char *file_text (const char *path);

/* Begin with the files as they are, durable. */
static void
load_files (void)
{
  static const uint8_t zeros[PAGE];

  free (points.durable);
  points.durable = file_text (points.path);
  points.synced = 0;
  for (int i = 0; i < NR_FILES; i++) {
    struct file *f = &files[i];
    int fd = open (f->path, O_RDONLY | O_CLOEXEC);
    uint8_t page[PAGE];
    ssize_t n;

    if (f->durable.bytes == NULL) {
      new_image (&f->durable);
      new_image (&f->current);
    }
    for (size_t p = 0; p < NR_PAGES; p++)
      if (f->touched[p]) {
        memset (f->durable.bytes + p * PAGE, 0, PAGE);
        memset (f->current.bytes + p * PAGE, 0, PAGE);
      }
    memset (f->touched, false, sizeof f->touched);
    f->durable.len = 0;
    while (fd >= 0 && (n = read (fd, page, PAGE)) > 0) {
      if (memcmp (page, zeros, n) != 0) {
        touch_pages (f, f->durable.len, n);
        memcpy (f->durable.bytes + f->durable.len, page, n);
        memcpy (f->current.bytes + f->durable.len, page, n);
      }
      f->durable.len += n;
    }
    f->current.len = f->durable.len;
    f->synced = 0;
    if (fd >= 0)
      close (fd);
  }
}

/* ---- mapped pages ---- */

#define MAX_MAPS 64
static struct map { void *addr; uint64_t offset, len; int fd; } maps[MAX_MAPS];

static void
scan_map (const struct map *m)
{
  struct file *f = &files[SIDECAR];
  static uint8_t now[PAGE];

  for (uint64_t at = m->offset; at < m->offset + m->len; at += PAGE) {
    if (syscall (SYS_pread64, m->fd, now, PAGE, at) != PAGE)
      abort ();
    if (memcmp (now, f->current.bytes + at, PAGE) == 0)
      continue;
    touch_pages (f, at, PAGE);
    for (uint64_t s = 0; s < PAGE; s += SECTOR)
      if (memcmp (now + s, f->current.bytes + at + s, SECTOR) != 0) {
        struct op *o = add_op (OP_WRITE, SIDECAR, at + s, SECTOR, now + s);

        apply (f, &f->current, o, 0, MAX_FILE);
      }
  }
}

static void
scan (void)
{
  for (int i = 0; i < MAX_MAPS; i++)
    if (maps[i].addr)
      scan_map (&maps[i]);
}

void *
mmap (void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
  void *p = (void *) syscall (SYS_mmap, addr, len, prot, flags, fd, offset);

  if (fd >= 0 && (flags & MAP_SHARED) && (prot & PROT_WRITE) &&
      file_of (fd) == SIDECAR)
    for (int i = 0; i < MAX_MAPS; i++)
      if (maps[i].addr == NULL) {
        maps[i] = (struct map){ p, offset, len, fd };
        break;
      }
  return p;
}

int
munmap (void *addr, size_t len)
{
  for (int i = 0; i < MAX_MAPS; i++)
    if (maps[i].addr == addr) {
      if (recording)
        scan_map (&maps[i]);
      maps[i].addr = NULL;
    }
  return syscall (SYS_munmap, addr, len);
}

/* ---- what is recorded ---- */

static void
note_change (int file, enum op_type type, uint64_t offset, uint64_t len,
             const void *data)
{
  struct op *o;

  if (file == OTHER)
    return;
  step_of (file);
  scan ();
  if (file == DISK) {
    add_op (OP_DATA, DISK, offset, len, NULL);
    return;
  }
  o = add_op (type, file, offset, len, data);
  if (type == OP_WRITE)
    touch_pages (&files[file], offset, len);
  apply (&files[file], &files[file].current, o, 0, MAX_FILE);
}

ssize_t
pwrite (int fd, const void *buf, size_t len, off_t offset)
{
  if (recording)
    note_change (file_of (fd), OP_WRITE, offset, len, buf);
  return syscall (SYS_pwrite64, fd, buf, len, offset);
}

int
ftruncate (int fd, off_t len)
{
  if (recording)
    note_change (file_of (fd), OP_LENGTH, 0, len, NULL);
  return syscall (SYS_ftruncate, fd, len);
}

int
fallocate (int fd, int mode, off_t offset, off_t len)
{
  int f = recording ? file_of (fd) : OTHER;

  if (f == DISK || (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)))
    note_change (f, OP_ZERO, offset, len, NULL);
  return syscall (SYS_fallocate, fd, mode, offset, len);
}

static int
sync_file (int fd)
{
  int f = recording ? file_of (fd) : OTHER;

  if (f < NR_FILES || f == POINTS) {
    step_of (f);
    scan ();
    add_op (OP_SYNC, f, 0, 0, NULL);
  }
  return 0;
}

int
fsync (int fd)
{
  return sync_file (fd);
}

int
fdatasync (int fd)
{
  return sync_file (fd);
}

/* Files that are played have no times that say anything. */
int
fstat (int fd, struct stat *st)
{
  int r = fstatat (fd, "", st, AT_EMPTY_PATH);

  if (file_of (fd) != OTHER)
    st->st_mtim = (struct timespec){ .tv_sec = 1000000000 };
  return r;
}

/* The text of a small file, NULL if it is not there. */
static char *
file_text (const char *path)
{
  int fd = open (path, O_RDONLY | O_CLOEXEC);
  char text[4096];
  ssize_t n;

  if (fd == -1)
    return NULL;
  n = read (fd, text, sizeof text - 1);
  close (fd);
  if (n < 0)
    abort ();
  text[n] = '\0';
  return strdup (text);
}

static void
note_points (const char *from)
{
  char *text = from ? file_text (from) : NULL;

  step_of (POINTS);
  scan ();
  add_op (OP_REPLACE, POINTS, 0, text ? strlen (text) + 1 : 0, text);
  free (text);
}

int
rename (const char *from, const char *to)
{
  if (recording && strcmp (to, points.path) != 0) /* not played */
    abort ();
  if (recording)
    note_points (from);
  return syscall (SYS_rename, from, to);
}

int
unlink (const char *path)
{
  if (recording && strcmp (path, points.path) == 0)
    note_points (NULL);
  return syscall (SYS_unlink, path);
}

/* Make the file of points what a crash before op 'k' leaves. */
static void
play_points (size_t k, uint64_t seed)
{
  const char *text = points.durable;
  int fd;

  for (size_t n = points.synced; n < k && seed > 0; n++)
    if (ops[n].type == OP_REPLACE && (seed == 1 || seed * 31 % (n + 2) % 2))
      text = (const char *) ops[n].data;
  unlink (points.path);
  if (text == NULL)
    return;
  fd = open (points.path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd == -1 || write (fd, text, strlen (text)) == -1)
    abort ();
  close (fd);
}

/* ---- crashes ---- */

static uint64_t
hash (uint64_t a, uint64_t b, uint64_t c)
{
  uint64_t h = a * UINT64_C (0x9e3779b97f4a7c15) ^ b * UINT64_C (0xc2b2ae3d27d4eb4f) ^ c;

  h ^= h >> 31;
  h *= UINT64_C (0xbf58476d1ce4e5b9);
  h ^= h >> 29;
  h *= UINT64_C (0x94d049bb133111eb);
  return h ^ h >> 32;
}

/* Of the ops before 'k', those before the returned one are in that sector. */
static size_t
cut (uint64_t seed, int i, const struct file *f, uint64_t sector, size_t k)
{
  uint64_t unit = seed & 1 ? sector : sector / (PAGE / SECTOR);
  uint64_t h = hash (seed, i, unit);

  switch (seed) {
  case 0: return f->synced; /* nothing */
  case 1: return k;         /* everything */
  }
  switch (h % 3) {
  case 0: return f->synced;
  case 1: return k;
  }
  return f->synced + h / 3 % (k - f->synced + 1);
}

/* Make the files what a crash before op 'k' leaves. */
static void
play_crash (size_t k, uint64_t seed, struct image *work)
{
  play_points (k, seed);
  for (int i = 0; i < NR_FILES; i++) {
    struct file *f = &files[i];
    struct image *w = &work[i];
    int fd;

    if (w->bytes == NULL)
      new_image (w);
    for (size_t p = 0; p < NR_PAGES; p++)
      if (f->touched[p])
        memcpy (w->bytes + p * PAGE, f->durable.bytes + p * PAGE, PAGE);
    w->len = f->durable.len;
    for (size_t n = f->synced; n < k; n++) {
      const struct op *o = &ops[n];

      if (o->file != i)
        continue;
      if (o->type == OP_LENGTH) {
        if (cut (seed, i, f, MAX_FILE, k) > n)
          apply (f, w, o, 0, 0);
      }
      else
        for (uint64_t s = o->offset / SECTOR; s * SECTOR < o->offset + o->len;
             s++) {
          if (o->type == OP_ZERO && !f->touched[s * SECTOR / PAGE]) {
            s |= PAGE / SECTOR - 1;
            continue;
          }
          if (cut (seed, i, f, s, k) > n)
            apply (f, w, o, s * SECTOR, (s + 1) * SECTOR);
        }
    }
    fd = open (f->path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd == -1 || ftruncate (fd, w->len) == -1)
      abort ();
    for (size_t p = 0; p < NR_PAGES; p++)
      if (f->touched[p] && p * PAGE < w->len)
        if (pwrite (fd, w->bytes + p * PAGE,
                    w->len - p * PAGE < PAGE ? w->len - p * PAGE : PAGE,
                    p * PAGE) == -1)
          abort ();
    close (fd);
  }
}

/* Op 'k' has happened. */
static void
pass_op (size_t k)
{
  const struct op *o = &ops[k];
  struct file *f;

  if (o->type != OP_SYNC)
    return;
  if (o->file == POINTS) {
    for (size_t n = points.synced; n < k; n++)
      if (ops[n].type == OP_REPLACE) {
        free (points.durable);
        points.durable = ops[n].data ? strdup ((char *) ops[n].data) : NULL;
      }
    points.synced = k;
    return;
  }
  f = &files[o->file];
  for (size_t n = f->synced; n < k; n++)
    if (ops[n].file == o->file)
      apply (f, &f->durable, &ops[n], 0, MAX_FILE);
  f->synced = k;
}

static void
forget_ops (void)
{
  while (nr_ops > 0)
    free (ops[--nr_ops].data);
}

#endif /* FERRY_CRASH_MODEL_H */
