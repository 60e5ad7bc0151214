/* nbdferry - a disk that QEMU has rounded up
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * In a qcow2 image the last cluster is a whole one, even if the disk ends
 * within it.  So when QEMU zeroes or discards it through the sidecar and then
 * writes to it, or resizes the image, the raw file comes to end where the
 * cluster does.  The disk is what the image says that it is.
 *
 * The order.  Cutting the file gives it a new mtime, and the trust rule wants
 * that of a sidecar that QEMU had to be no earlier (store/trust.c).  So that
 * one gets a later time first, durably: killed between any two steps, the next
 * open comes to the same judgement.
 *
 *   1. the sidecar's mtime: soon; fsync
 *   2. the disk is cut; fsync
 *   3. the sidecar's mtime: that of the disk
 *
 * As long as the sidecar is not made anew, which comes later, bit 63 is not in
 * it; killed before 2, all of this is done again, and after 2 there is nothing
 * to cut any more.  Its lock is held throughout: no QEMU has it open.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"
#include "rounded.h"

#define PIECE 65536
#define NS    INT64_C (1000000000)
#define SOON  NS /* enough to cut a file */

/* A disk that was given away, or that comes in, is none that QEMU should write
 * to; it is left to the rules for these.
 */
static bool
is_active_here (const struct drive *d)
{
  CLEANUP_FREE char *path = NULL;
  struct journal_record rec;
  struct error ignored;
  bool active;

  if (asprintf (&path, "%s/journal", d->state_dir) == -1) {
    path = NULL;
    return false;
  }
  if (access (path, F_OK) == -1)
    return errno == ENOENT;
  if (journal_read (path, &rec, &ignored) == -1)
    return false;
  active = rec.state == JOURNAL_ACTIVE;
  journal_record_free (&rec);
  return active;
}

static bool
is_zero_from (struct disk *disk, uint64_t at)
{
  char buf[PIECE];

  while (at < disk->size) {
    size_t n = disk->size - at < PIECE ? disk->size - at : PIECE;

    if (disk->ops->pread (disk, buf, n, at) == -1 || !disk_is_zero (buf, n))
      return false;
    at += n;
  }
  return true;
}

/* Does the file end where the last cluster of a disk of 'size' does, and has
 * nothing there?
 */
static bool
is_rounded (struct disk *disk, uint64_t size, uint64_t cluster)
{
  return size % 512 == 0 && size < disk->size &&
         disk->size % cluster == 0 && disk->size - size < cluster &&
         is_zero_from (disk, size);
}

static int64_t
mtime_of (const struct stat *st)
{
  return st->st_mtim.tv_sec * NS + st->st_mtim.tv_nsec;
}

/* Give the sidecar that time, unless it has a later one. */
static int
move_mtime (int fd, const struct stat *was, int64_t ns)
{
  if (mtime_of (was) > ns)
    ns = mtime_of (was);
  return futimens (fd, (struct timespec[2]){
                         { .tv_nsec = UTIME_OMIT },
                         { ns / NS, ns % NS } });
}

static int
cut (struct drive *d, int sidecar, uint64_t size, struct error *err)
{
  struct disk *disk = d->disk;
  const uint64_t was = disk->size;
  struct disk_times t;
  struct stat st;
  bool good;

  if (fstat (sidecar, &st) == -1 || disk->ops->times (disk, &t) == -1)
    return error_set (err, errno, "stat %s or its sidecar: %m", d->path);
  /* What is not to be trusted must not come to look as if it were. */
  good = trust_sidecar_is_later (t.mtime, mtime_of (&st));
  if (good && (move_mtime (sidecar, &st, trust_now () + SOON) == -1 ||
               fsync (sidecar) == -1))
    return error_set (err, errno, "%s: set its time, before %s is cut back "
                      "from %" PRIu64 " to %" PRIu64 " bytes: %m", d->sidecar,
                      d->path, was, size);
  if (disk->ops->cut (disk, size) == -1)
    return error_set (err, errno, "cut %s back from %" PRIu64 " to %" PRIu64
                      " bytes: %m", d->path, was, size);
  disk->size = size;
  if (good && (disk->ops->times (disk, &t) == -1 ||
               move_mtime (sidecar, &st, t.mtime) == -1))
    return error_set (err, errno, "%s: set its time, after %s was cut back: "
                      "%m", d->sidecar, d->path);
  drive_log ("%s: cut back from %" PRIu64 " to %" PRIu64 " bytes, the size "
             "that the disk has in %s: QEMU had rounded it up", d->path, was,
             size, d->sidecar);
  return 0;
}

int
rounded_cut (struct drive *d, struct error *err)
{
  struct disk *disk = d->disk;
  CLEANUP_CLOSE int sidecar = -1;
  uint64_t size, cluster;

  if (disk->fixed_size || disk->ops->cut == NULL || !is_active_here (d))
    return 0;
  sidecar = qcow2_open_foreign (d->sidecar, !disk->readonly, &size, &cluster);
  if (sidecar == -1 || !is_rounded (disk, size, cluster))
    return 0;
  if (!disk->readonly)
    return cut (d, sidecar, size, err);
  disk->size = size;
  return 0;
}
