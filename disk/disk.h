/* nbdferry - what a disk can do
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A disk is a file, a block device (file.c) or another NBD server (nbd/).
 * Each has one const table of operations.  All of them may be called from any
 * number of threads at once.  Offsets and lengths are bytes, inside the disk.
 * They return 0, or -1 with errno set; no short reads or writes.
 */
#ifndef FERRY_DISK_H
#define FERRY_DISK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

#define DISK_FUA      0x1 /* durable before it returns */
#define DISK_MAY_TRIM 0x2 /* zero: may leave a hole */
#define DISK_FAST     0x4 /* zero: ENOTSUP at once if writing is not slower */

enum extent_type {
  EXTENT_DATA = 0,
  EXTENT_ZERO = 1, /* allocated, reads as zeros */
  EXTENT_HOLE = 2, /* not allocated, reads as zeros */
};

struct extent {
  uint64_t start, end; /* bytes */
  enum extent_type type;
};

struct disk;

/* What tells whether somebody has changed a file meanwhile. */
struct disk_times {
  uint64_t size, inode, device;
  int64_t mtime; /* ns since 1970 */
  bool local;    /* the times are those of this machine's clock */
};

struct disk_ops {
  int (*pread) (struct disk *d, void *buf, size_t count, uint64_t offset);
  int (*pwrite) (struct disk *d, const void *buf, size_t count,
                 uint64_t offset, unsigned flags);
  int (*zero) (struct disk *d, uint64_t len, uint64_t offset, unsigned flags);
  int (*trim) (struct disk *d, uint64_t len, uint64_t offset, unsigned flags);
  int (*flush) (struct disk *d);
  /* Flush, and make the file's times durable as well.  NULL: flush will do. */
  int (*settle) (struct disk *d);
  /* The file's times; 1 if it has none that say anything.  NULL: none. */
  int (*times) (struct disk *d, struct disk_times *t);
  /* Cut the file there, durably; 'size' is for the caller to change, who has
   * just opened it for writing.  NULL: there is nothing to cut.
   */
  int (*cut) (struct disk *d, uint64_t size);
  /* Advice: that range will be read soon. */
  int (*cache) (struct disk *d, uint64_t len, uint64_t offset);
  /* What lies at 'offset', cut at 'end': ext->start = offset < ext->end <=
   * end.  Two neighbours may be of one type.
   */
  int (*extent) (struct disk *d, uint64_t offset, uint64_t end,
                 struct extent *ext);
  /* A new descriptor, for reading alone, of what has the disk's bytes at the
   * disk's offsets.  NULL: there is nothing like that.
   */
  int (*reader) (struct disk *d);
  /* Where data begins, at 'offset' or after: *data <= end; what lies before is
   * a hole.  Cheaper than 'extent', which must find the end of the data as
   * well.  May be NULL: unknown.
   */
  int (*next_data) (struct disk *d, uint64_t offset, uint64_t end,
                    uint64_t *data);
  /* The end is near: wait for nothing that may never come.  Requests that are
   * under way get until the deadline (ns).  NULL: there is no such thing.
   */
  void (*hurry) (struct disk *d, uint64_t deadline);
  /* How often writes that were acknowledged, and not flushed, may have been
   * lost.  NULL: that does not happen.
   */
  unsigned (*losses) (struct disk *d);
  /* See that the system does not use it otherwise (disk/claim.h), and keep it
   * so until it is released or closed.  1: that is so already; 0; or -1 with
   * EBUSY and who uses it.  The caller serialises.  NULL, both of them: who
   * uses it is somebody else's business.
   */
  int (*claim) (struct disk *d, struct error *err);
  void (*release) (struct disk *d);
  void (*close) (struct disk *d); /* frees it */
};

/* Each kind of disk begins with this.  Read-only after it was opened. */
struct disk {
  const struct disk_ops *ops;
  uint64_t size; /* bytes, a multiple of 512 */
  bool readonly;
  bool can_extents;
  bool rotational;
  bool fixed_size; /* a device, or a server's: it may be larger than what is
                      kept on it */
};

/* Open a raw file or a block device, and lock it as QEMU does.  If 'create'
 * is not 0 and the file does not exist, it is created with that size.  A file
 * that may not be written is opened for reading.  NULL on error.
 */
struct disk *disk_open_file (const char *path, uint64_t create, bool readonly,
                             struct error *err);

/* Is the file on a file system that stamps with this machine's clock? */
bool disk_has_local_times (int fd);

/* Is that memory all zeros? */
bool disk_is_zero (const void *buf, size_t len);

#endif /* FERRY_DISK_H */
