/* nbdferry - a raw file or a block device as a disk
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What the kernel or the file system can't do (punch holes, zero ranges,
 * find extents) is learned at the first refusal and remembered in an atomic
 * flag; relaxed order is enough, since a stale value costs one more refused
 * system call.
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "claim.h"
#include "cleanup.h"
#include "disk.h"
#include "lock.h"

/* Newer than some headers; it has that number almost everywhere. */
#if !defined SYS_cachestat && !defined __alpha__
#define SYS_cachestat 451
#endif

/* Data of a file in memory is looked for in pieces of this size. */
#define WALK (UINT64_C (8) << 20)

struct file {
  struct disk disk;
  int fd;
  char *path;
  int claim;                /* or -1; changed under the caller's lock */
  bool is_block;
  bool is_memory;           /* it is on tmpfs */
  unsigned sector;          /* of a block device, bytes */
  atomic_bool no_punch;     /* FALLOC_FL_PUNCH_HOLE is refused */
  atomic_bool no_zero;      /* FALLOC_FL_ZERO_RANGE is refused */
  atomic_bool no_zeroout;   /* BLKZEROOUT is refused, or not a device */
};

static inline bool
not_supported (int err)
{
  return err == EOPNOTSUPP || err == ENOTSUP || err == ENODEV ||
         err == ENOTTY || err == EINVAL;
}

static int
file_pread (struct disk *d, void *buf, size_t count, uint64_t offset)
{
  struct file *f = (struct file *) d;

  while (count > 0) {
    ssize_t r = pread (f->fd, buf, count, offset);

    if (r == -1) {
      if (errno == EINTR)
        continue;
      return -1;
    }
    if (r == 0) {
      /* Somebody cut the file behind our back. */
      errno = EIO;
      return -1;
    }
    buf = (char *) buf + r;
    count -= r;
    offset += r;
  }
  return 0;
}

static int
file_flush (struct disk *d)
{
  struct file *f = (struct file *) d;

  return fdatasync (f->fd);
}

static int
file_settle (struct disk *d)
{
  struct file *f = (struct file *) d;

  return fsync (f->fd);
}

/* File systems whose times another machine's clock, or a user's program, may
 * have made.
 */
bool
disk_has_local_times (int fd)
{
  static const uint32_t foreign[] = {
    NFS_SUPER_MAGIC, SMB_SUPER_MAGIC, CIFS_SUPER_MAGIC, SMB2_SUPER_MAGIC,
    FUSE_SUPER_MAGIC, CEPH_SUPER_MAGIC, V9FS_MAGIC, AFS_FS_MAGIC,
    AFS_SUPER_MAGIC, CODA_SUPER_MAGIC, OCFS2_SUPER_MAGIC,
    0x01161970, /* GFS2 */
    0x0bd00bd0, /* Lustre */
    0x786f4256, /* VirtualBox' shared folders */
  };
  struct statfs st;

  if (fstatfs (fd, &st) == -1)
    return false;
  for (size_t i = 0; i < sizeof foreign / sizeof foreign[0]; i++)
    if ((uint32_t) st.f_type == foreign[i])
      return false;
  return true;
}

static int
file_times (struct disk *d, struct disk_times *t)
{
  struct file *f = (struct file *) d;
  struct stat st;

  if (f->is_block)
    return 1;
  if (fstat (f->fd, &st) == -1)
    return -1;
  t->size = st.st_size;
  t->inode = st.st_ino;
  t->device = st.st_dev;
  t->mtime = st.st_mtim.tv_sec * INT64_C (1000000000) + st.st_mtim.tv_nsec;
  t->local = disk_has_local_times (f->fd);
  return 0;
}

static int
finish (struct disk *d, unsigned flags)
{
  return flags & DISK_FUA ? file_flush (d) : 0;
}

static int
file_pwrite (struct disk *d, const void *buf, size_t count, uint64_t offset,
             unsigned flags)
{
  struct file *f = (struct file *) d;

  while (count > 0) {
    ssize_t r = pwrite (f->fd, buf, count, offset);

    if (r == -1) {
      if (errno == EINTR)
        continue;
      return -1;
    }
    buf = (const char *) buf + r;
    count -= r;
    offset += r;
  }
  return finish (d, flags);
}

/* One fallocate mode; 1 = done, 0 = not supported (and remembered), -1. */
static int
try_fallocate (struct file *f, int mode, uint64_t offset, uint64_t len,
               atomic_bool *refused)
{
  int r;

  if (atomic_load_explicit (refused, memory_order_relaxed))
    return 0;
  do
    r = fallocate (f->fd, mode | FALLOC_FL_KEEP_SIZE, offset, len);
  while (r == -1 && errno == EINTR);
  if (r == 0)
    return 1;
  if (!not_supported (errno))
    return -1;
  /* EINVAL may be the fault of this one range (a device's alignment). */
  if (errno != EINVAL)
    atomic_store_explicit (refused, true, memory_order_relaxed);
  return 0;
}

static int
try_zeroout (struct file *f, uint64_t offset, uint64_t len)
{
  uint64_t range[2] = { offset, len };

  if (atomic_load_explicit (&f->no_zeroout, memory_order_relaxed) ||
      (offset | len) % f->sector != 0)
    return 0;
  if (ioctl (f->fd, BLKZEROOUT, range) == 0)
    return 1;
  if (!not_supported (errno))
    return -1;
  atomic_store_explicit (&f->no_zeroout, true, memory_order_relaxed);
  return 0;
}

static int
write_zeros (struct disk *d, uint64_t offset, uint64_t len)
{
  static const char zeros[64 * 1024];

  while (len > 0) {
    size_t n = len < sizeof zeros ? len : sizeof zeros;

    if (file_pwrite (d, zeros, n, offset, 0) == -1)
      return -1;
    offset += n;
    len -= n;
  }
  return 0;
}

static int
file_zero (struct disk *d, uint64_t len, uint64_t offset, unsigned flags)
{
  struct file *f = (struct file *) d;
  int r = 0;

  if (flags & DISK_MAY_TRIM)
    r = try_fallocate (f, FALLOC_FL_PUNCH_HOLE, offset, len, &f->no_punch);
  if (r == 0)
    r = try_fallocate (f, FALLOC_FL_ZERO_RANGE, offset, len, &f->no_zero);
  if (r == 0 && !f->is_block) {
    /* tmpfs cannot zero a range, but a hole that is allocated again is one. */
    atomic_bool never = false;

    r = try_fallocate (f, FALLOC_FL_PUNCH_HOLE, offset, len, &f->no_punch);
    if (r == 1 && try_fallocate (f, 0, offset, len, &never) == -1)
      r = -1;
  }
  if (r == 0)
    r = try_zeroout (f, offset, len);
  if (r == 0) {
    if (flags & DISK_FAST) {
      errno = EOPNOTSUPP;
      return -1;
    }
    r = write_zeros (d, offset, len);
  }
  return r == -1 ? -1 : finish (d, flags);
}

static int
file_trim (struct disk *d, uint64_t len, uint64_t offset, unsigned flags)
{
  struct file *f = (struct file *) d;

  /* Advice: only a broken disk is worth a failure. */
  if (try_fallocate (f, FALLOC_FL_PUNCH_HOLE, offset, len, &f->no_punch) ==
        -1 &&
      (errno == EIO || errno == EPERM))
    return -1;
  return finish (d, flags);
}

static int
file_cut (struct disk *d, uint64_t size)
{
  struct file *f = (struct file *) d;

  /* Should it be a device, this fails. */
  return ftruncate (f->fd, size) == -1 ? -1 : fsync (f->fd);
}

static int
file_cache (struct disk *d, uint64_t len, uint64_t offset)
{
  struct file *f = (struct file *) d;

  return posix_fadvise (f->fd, offset, len, POSIX_FADV_WILLNEED) == 0 ? 0 : -1;
}

/* The file offset that lseek moves is used by nobody: no lock is needed. */
static int
file_next_data (struct disk *d, uint64_t offset, uint64_t end,
                uint64_t *data)
{
  struct file *f = (struct file *) d;
  off_t pos = offset;

  if (d->can_extents) {
    pos = lseek (f->fd, offset, SEEK_DATA);
    if (pos == -1 && errno == ENXIO)
      pos = end; /* a hole up to the end of the file */
    if (pos == -1)
      return -1;
  }
  *data = (uint64_t) pos < end ? (uint64_t) pos : end;
  return 0;
}

/* Are all pages of that range in memory, or swapped out?  On tmpfs they are the
 * file: there is no hole then.  False also if the kernel does not tell.
 */
static bool
is_populated (struct file *f, uint64_t offset, uint64_t end)
{
  const uint64_t page = sysconf (_SC_PAGESIZE);
  const uint64_t range[2] = { offset, end - offset };
  struct {
    uint64_t cache, dirty, writeback, evicted, recently_evicted;
  } stat = { 0 };

  return syscall (SYS_cachestat, f->fd, range, &stat, 0) == 0 &&
         stat.cache + stat.evicted >=
           (end + page - 1) / page - offset / page;
}

/* On tmpfs SEEK_HOLE takes time in proportion to the data that it walks, in
 * one go: 10 ms a GiB, in which a CPU does nothing else, so that others wait
 * for it.  So it is asked only once it is known that there is a hole nearby.
 */
static int
file_extent (struct disk *d, uint64_t offset, uint64_t end,
             struct extent *ext)
{
  struct file *f = (struct file *) d;
  uint64_t data;
  off_t pos;

  *ext = (struct extent){ offset, end, EXTENT_DATA };
  if (!d->can_extents)
    return 0;
  if (file_next_data (d, offset, end, &data) == -1)
    return -1;
  if (data > offset) {
    ext->type = EXTENT_HOLE;
    ext->end = data;
    return 0;
  }
  if (f->is_memory) {
    uint64_t near = end - offset < WALK ? end : offset + WALK;

    if (is_populated (f, offset, near)) {
      ext->end = near;
      return 0;
    }
  }
  pos = lseek (f->fd, offset, SEEK_HOLE);
  if (pos == -1) {
    if (errno != ENXIO)
      return -1;
    return 0; /* the file was cut; reading it will tell */
  }
  if ((uint64_t) pos < end && (uint64_t) pos > offset)
    ext->end = pos;
  return 0;
}

/* One of its own, which shares neither locks nor the right to write. */
static int
file_reader (struct disk *d)
{
  struct file *f = (struct file *) d;
  char path[40];

  snprintf (path, sizeof path, "/proc/self/fd/%d", f->fd);
  return open (path, O_RDONLY | O_CLOEXEC);
}

static int
file_claim (struct disk *d, struct error *err)
{
  struct file *f = (struct file *) d;

  return f->claim >= 0 ? 1 : claim_fd (f->fd, f->path, &f->claim, err);
}

static void
file_release (struct disk *d)
{
  struct file *f = (struct file *) d;

  claim_release (f->fd, f->claim);
  f->claim = -1;
}

static void
file_close (struct disk *d)
{
  struct file *f = (struct file *) d;

  file_release (d);
  close (f->fd);
  free (f->path);
  free (f);
}

static const struct disk_ops file_ops = {
  .pread = file_pread,
  .pwrite = file_pwrite,
  .zero = file_zero,
  .trim = file_trim,
  .flush = file_flush,
  .settle = file_settle,
  .times = file_times,
  .cut = file_cut,
  .cache = file_cache,
  .extent = file_extent,
  .next_data = file_next_data,
  .reader = file_reader,
  .claim = file_claim,
  .release = file_release,
  .close = file_close,
};

/* Open, falling back to reading only; creates the file if asked to. */
static int
open_fd (const char *path, uint64_t create, bool *readonly, struct error *err)
{
  int fd;

  if (!*readonly) {
    fd = open (path, O_RDWR | O_CLOEXEC);
    if (fd >= 0)
      return fd;
    if (errno == ENOENT && create > 0) {
      fd = open (path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
      if (fd == -1)
        return error_set (err, errno, "create %s: %m", path);
      if (ftruncate (fd, create) == -1) {
        error_set (err, errno, "%s: cannot make it %" PRIu64 " bytes: %m",
                   path, create);
        close (fd);
        unlink (path);
        return -1;
      }
      return fd;
    }
    if (errno != EACCES && errno != EROFS && errno != EPERM)
      return error_set (err, errno, "open %s: %m", path);
    *readonly = true;
  }
  fd = open (path, O_RDONLY | O_CLOEXEC);
  if (fd == -1)
    return error_set (err, errno, "open %s: %m", path);
  return fd;
}

static int
probe_size (struct file *f, const char *path, struct error *err)
{
  struct statfs fs;
  struct stat st;
  off_t size;

  if (fstat (f->fd, &st) == -1)
    return error_set (err, errno, "stat %s: %m", path);
  f->is_block = f->disk.fixed_size = S_ISBLK (st.st_mode);
  if (!f->is_block && !S_ISREG (st.st_mode))
    return error_set (err, EINVAL,
                      "%s: neither a regular file nor a block device", path);
  size = lseek (f->fd, 0, SEEK_END);
  if (size == -1)
    return error_set (err, errno, "%s: cannot find its size: %m", path);
  if (size % 512 != 0)
    return error_set (err, EINVAL,
                      "%s: its size, %jd bytes, is not a multiple of 512; "
                      "extend it with: truncate -s %%512 %s",
                      path, (intmax_t) size, path);
  f->disk.size = size;
  f->sector = 512;
  f->no_zeroout = !f->is_block;
  if (f->is_block) {
    unsigned short rotational = 0;
    int sector = 512;

    if (ioctl (f->fd, BLKSSZGET, &sector) == 0 && sector > 0)
      f->sector = sector;
    if (ioctl (f->fd, BLKROTATIONAL, &rotational) == 0)
      f->disk.rotational = rotational;
  }
  /* Not SEEK_HOLE: see file_extent. */
  f->disk.can_extents = lseek (f->fd, 0, SEEK_DATA) >= 0 || errno == ENXIO;
  f->is_memory = fstatfs (f->fd, &fs) == 0 && fs.f_type == TMPFS_MAGIC;
  return 0;
}

struct disk *
disk_open_file (const char *path, uint64_t create, bool readonly,
                struct error *err)
{
  struct file *f = calloc (1, sizeof *f);

  if (f == NULL) {
    error_set (err, ENOMEM, "%s: %m", path);
    return NULL;
  }
  f->disk.ops = &file_ops;
  f->claim = -1;
  f->path = strdup (path);
  if (f->path == NULL) {
    error_set (err, ENOMEM, "%s: %m", path);
    goto free_it;
  }
  f->fd = open_fd (path, create, &readonly, err);
  if (f->fd == -1)
    goto free_it;
  f->disk.readonly = readonly;
  if (lock_file (f->fd, path, !readonly, err) == -1)
    goto close_it;
  if (probe_size (f, path, err) == -1)
    goto close_it;
  return &f->disk;

 close_it:
  close (f->fd);
 free_it:
  free (f->path);
  free (f);
  return NULL;
}

bool
disk_is_zero (const void *buf, size_t len)
{
  const char *p = buf;

  /* The first bytes are looked at one by one, then the rest is compared with
   * itself, shifted: memcmp is as fast as memory is.
   */
  for (size_t i = 0; i < 16; i++) {
    if (i == len)
      return true;
    if (p[i] != 0)
      return false;
  }
  return memcmp (p, p + 16, len - 16) == 0;
}
