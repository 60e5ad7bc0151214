/* nbdferry - a view: reading the disk as it was
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A granule that is on the disk is read from there, and then its place is
 * looked at again.  A write comes only after the place has changed; so if it
 * has not, what was read is old.  If it has, it is read once more, from there.
 * A slot may be released, and used for another granule, while it is read; the
 * second look finds that as well.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "view-impl.h"

#define LONGEST_RUN 16384 /* granules that one look for extents goes through */

static int
failed (struct view *v, struct error *err)
{
  struct view_info info;

  view_info (v, &info);
  if (info.failed)
    return error_set (err, EIO, "the backup has failed: %s", info.error);
  return error_set (err, EIO, "the backup has ended");
}

static int
lost (const struct view *v, uint64_t offset, struct error *err)
{
  return error_set (err, EIO, "what was at %" PRIu64 " of disk '%s' was not "
                    "kept, because it is not in this backup, or was read "
                    "already", offset, v->opt.drive->name);
}

/* 1 if it is there no more, and must be read from elsewhere. */
static int
read_place (struct view *v, uint32_t place, void *buf, size_t count,
            uint64_t offset, struct error *err)
{
  const uint64_t granule = offset >> v->shift;
  const uint32_t skip = offset - (granule << v->shift);
  struct drive *d = v->opt.drive;
  int r = 0;

  if (place == PLACE_LOST)
    return lost (v, offset, err);
  if (place == PLACE_ZERO)
    memset (buf, 0, count);
  else if (place == PLACE_DISK)
    r = drive_pread (d, buf, count, offset);
  else
    r = scratch_read (v->scratch, place - PLACE_SLOT, skip, buf, count);
  if (r == -1)
    error_set (err, errno, "read %s: %m", place == PLACE_DISK
                                            ? d->path : "the scratch file");
  atomic_thread_fence (memory_order_seq_cst);
  if (atomic_load (&v->over))
    return failed (v, err);
  if (place_of (v, granule) != place)
    return 1;
  return r;
}

/* From 'offset' on to the end of what is of one kind, *count at most. */
static uint32_t
run_of_disk (struct view *v, uint64_t offset, size_t *count)
{
  uint64_t next = ((offset >> v->shift) + 1) << v->shift;
  uint32_t place = place_of (v, offset >> v->shift);

  if (next - offset < *count)
    *count = next - offset;
  return place;
}

int
view_pread (struct view *v, void *buf, size_t count, uint64_t offset,
            struct error *err)
{
  if (atomic_load (&v->over))
    return failed (v, err);
  while (count > 0) {
    size_t n = count;
    uint32_t place = run_of_disk (v, offset, &n);
    int r = read_place (v, place, buf, n, offset, err);

    if (r == -1)
      return -1;
    if (r == 1)
      continue;
    buf = (char *) buf + n;
    offset += n;
    count -= n;
  }
  return 0;
}

/* ---- extents ---- */

/* The run of granules that have left the disk and are of one type. */
static void
settled_extent (struct view *v, uint64_t end, struct extent *ext)
{
  uint64_t g = ext->start >> v->shift, at = ext->start;
  const bool zero = place_of (v, g) == PLACE_ZERO;
  uint32_t place;
  unsigned n = 0;

  do {
    at = (g << v->shift) + granule_len (v, g);
    g++;
  } while (at < end && n++ < LONGEST_RUN &&
           (place = place_of (v, g)) != PLACE_DISK &&
           (place == PLACE_ZERO) == zero);
  ext->end = at < end ? at : end;
  ext->type = zero ? EXTENT_ZERO : EXTENT_DATA;
}

/* What the disk has at 'start', cut at 'end'.  How far data goes is expensive
 * to find on some file systems (disk/file.c), and a bitmap has many runs; so it
 * is asked for all of it once, and remembered.  What was data since the instant
 * is data as long as it is not settled, which the caller sees to.
 */
static int
map_disk (struct view *v, uint64_t start, uint64_t end, struct extent *ext)
{
  pthread_mutex_lock (&v->lock);
  *ext = v->known;
  pthread_mutex_unlock (&v->lock);
  if (start >= ext->start && start < ext->end)
    ext->start = start;
  else if (drive_extent (v->opt.drive, start, v->size, ext) == -1)
    return -1;
  else if (ext->type == EXTENT_DATA) {
    pthread_mutex_lock (&v->lock);
    v->known = *ext;
    pthread_mutex_unlock (&v->lock);
  }
  if (ext->end > end)
    ext->end = end;
  return 0;
}

/* What is at ext->start of the disk, if it is there still. */
static int
disk_extent (struct view *v, uint64_t end, struct extent *ext,
             struct error *err)
{
  const uint64_t start = ext->start;
  struct range run;

  if (bitmap_next_dirty (v->settled, start, end, &run)) {
    if (run.start == start)
      return 1; /* since its place was looked at */
    end = run.start;
  }
  if (v->opt.drive->disk->can_extents) {
    if (map_disk (v, start, end, ext) == -1)
      return error_set (err, errno, "map %s: %m", v->opt.drive->path);
  }
  else
    *ext = (struct extent){ start, end, EXTENT_DATA };
  atomic_thread_fence (memory_order_seq_cst);
  /* What was found may be there because of a write since. */
  if (!bitmap_next_dirty (v->settled, start, ext->end, &run))
    return 0;
  if (run.start == start)
    return 1;
  ext->end = run.start;
  return 0;
}

int
view_extent (struct view *v, uint64_t offset, uint64_t end,
             struct extent *ext, struct error *err)
{
  struct range run;
  int r;

  *ext = (struct extent){ .start = offset, .end = end, .type = EXTENT_HOLE };
  if (v->frozen) {
    if (!bitmap_next_dirty (v->frozen, offset, end, &run))
      return 0;
    if (run.start > offset) {
      ext->end = run.start;
      return 0;
    }
    end = run.end;
  }
  do {
    r = 0;
    if (atomic_load (&v->over))
      return failed (v, err);
    if (place_of (v, offset >> v->shift) != PLACE_DISK)
      settled_extent (v, end, ext);
    else
      r = disk_extent (v, end, ext, err);
  } while (r == 1);
  if (r == -1)
    return -1;
  if (atomic_load (&v->over))
    return failed (v, err);
  /* In the backup: whoever copies it must write zeros. */
  if (v->frozen && ext->type == EXTENT_HOLE)
    ext->type = EXTENT_ZERO;
  return 0;
}
