/* nbdferry - what the file systems on a disk say is free
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * libblkid finds the partitions and what is on them, libext2fs reads the maps
 * of ext2, ext3 and ext4.  All is read through the disk's own operations, so
 * it works for any disk; nothing is ever written.  Only a file system that
 * was unmounted cleanly, or is frozen, is believed: the maps of a mounted one
 * lag behind its data.  What is told holds as of a time between the call and
 * the return, if nobody has written to that file system meanwhile; that is
 * for the caller to know.
 */
#ifndef FERRY_HINTS_H
#define FERRY_HINTS_H

#include "bitmap.h"
#include "disk.h"

#define HINTS_MAX_FS 256 /* more partitions are not looked at */

/* A file system, or whatever else a partition or the disk holds. */
struct hints_fs {
  uint64_t offset, size; /* of the partition, bytes */
  char type[32];         /* libblkid's word for it, or "unknown" */
  bool known;            /* what is free in it is in the map */
  char reason[200];      /* why not, in words */
};

struct hints {
  struct hints_fs fs[HINTS_MAX_FS];
  size_t nr;
};

/* Was it built with libext2fs? */
bool hints_supported (void);

/* Look at all of the disk.  In 'vacant', which is of the disk's size and clean,
 * each granule is set that lies in blocks which a file system has to itself
 * and says are free.  'stop' (may be NULL) is asked now and then.  What cannot
 * be read or believed is said in 'h' and left out of the map; -1 only if
 * nothing could be looked at, or with ECANCELED.
 */
int hints_read (struct disk *d, struct bitmap *vacant, struct hints *h,
                bool (*stop) (void *opaque), void *opaque,
                struct error *err);

/* The same for one ext2, ext3 or ext4 file system in [offset, offset + size).
 * 1: its map is in 'vacant'; 0: it is not, fs->reason says why; -1: stopped.
 */
int hints_ext (struct disk *d, struct bitmap *vacant, struct hints_fs *fs,
               bool (*stop) (void *opaque), void *opaque);

#endif /* FERRY_HINTS_H */
