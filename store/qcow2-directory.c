/* nbdferry - the sidecar: its bitmap directory
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A new directory never overwrites the one that counts.  The order:
 *
 *   1. tables and bits of new bitmaps, refcounts       (by qcow2_alloc)
 *   2. the new directory, in clusters that nobody uses
 *   3. fsync: all that the new directory refers to is there
 *   4. the first sector of the header, in one write: it now points to the
 *      new directory (or says that there are no bitmaps)
 *   5. fsync
 *   6. the clusters of the old directory are given back
 *
 * A crash before 4 leaves the old directory, after it the new one; the
 * clusters of the other are leaked until the next open.
 *
 * A bitmap that is inconsistent has no bits that anybody would want, but
 * must have a table: an empty one (all absent), in a cluster of its own
 * behind the directory, which costs no space.  That is also how it is told
 * from one that is merely in use when the sidecar is opened after a crash.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <unistd.h>

#include "error.h"
#include "fullio.h"
#include "qcow2-internal.h"

static size_t
entry_length (const char *name)
{
  return (QCOW2_BITMAP_ENTRY_LENGTH + strlen (name) + 7) & ~(size_t) 7;
}

/* The sizes of a new directory, and whether it may be written at all. */
static int
check_entries (struct qcow2 *q, const struct qcow2_entry *entries, size_t nr,
               size_t *len, size_t *nr_empty, struct error *err)
{
  *len = *nr_empty = 0;
  if (nr > QCOW2_MAX_BITMAPS)
    return error_set (err, EFBIG, "%s: Maximum number of persistent bitmaps "
                      "is already reached", q->path);
  for (size_t i = 0; i < nr; ++i) {
    const struct qcow2_entry *e = &entries[i];
    size_t n = strlen (e->name);

    if (n == 0)
      return error_set (err, EINVAL, "Bitmap name cannot be empty");
    if (n > QCOW2_MAX_NAME)
      return error_set (err, ENAMETOOLONG, "Name length exceeds maximum "
                        "(1023 characters)");
    if (!e->inconsistent && (e->bits == NULL || e->bits->shift != e->shift))
      return error_set (err, EINVAL, "%s: bitmap '%s': has no bits to be "
                        "stored", q->path, e->name);
    *len += entry_length (e->name);
    *nr_empty += e->inconsistent;
  }
  return 0;
}

static uint32_t
table_size (const struct qcow2 *q, unsigned shift)
{
  uint64_t n = our_bits_clusters (q->size, shift);
  const uint64_t max = QCOW2_MAX_BITMAP_BYTES >> OUR_CLUSTER_BITS;

  /* A disk that grew may be too large for a bitmap that is inconsistent. */
  return n < max ? n : max;
}

/* All with in_use: the sidecar is open. */
static void
encode (const struct qcow2 *q, const struct qcow2_entry *entries, size_t nr,
        uint64_t first_empty, uint8_t *p)
{
  for (size_t i = 0; i < nr; ++i) {
    const struct qcow2_entry *e = &entries[i];
    size_t n = strlen (e->name);
    uint64_t table = e->inconsistent ? first_empty++ : e->bits->run.first;
    struct qcow2_bitmap_entry d = {
      .table_offset = htobe64 (table << OUR_CLUSTER_BITS),
      .table_size = htobe32 (table_size (q, e->shift)),
      .flags = htobe32 (QCOW2_BITMAP_IN_USE
                        | (e->autoflag ? QCOW2_BITMAP_AUTO : 0)),
      .type = QCOW2_BITMAP_DIRTY,
      .granularity_bits = e->shift,
      .name_size = htobe16 (n),
    };

    memcpy (p, &d, sizeof d);
    memcpy (p + sizeof d, e->name, n);
    p += entry_length (e->name);
  }
}

/* Step 2 for 'run', whose first clusters are the directory. */
static int
write_run (struct qcow2 *q, const struct qcow2_run *run, const uint8_t *dir,
           size_t len)
{
  /* A table has at most 256 entries: larger bitmaps are refused. */
  static const uint8_t empty[(QCOW2_MAX_BITMAP_BYTES >> OUR_CLUSTER_BITS) * 8];
  uint64_t i = qcow2_div_up (len, OUR_CLUSTER);

  if (full_pwrite (q->fd, dir, len, run->first << OUR_CLUSTER_BITS) == -1)
    return -1;
  for (; i < run->nr; ++i)
    if (full_pwrite (q->fd, empty, sizeof empty,
                      (run->first + i) << OUR_CLUSTER_BITS) == -1)
      return -1;
  return 0;
}

/* Steps 4 to 6. */
static int
flip (struct qcow2 *q, uint8_t *dir, size_t len, size_t nr,
      const struct qcow2_run *run, struct error *err)
{
  const struct qcow2_run old = q->dir_run;
  uint8_t sector[OUR_SECTOR];

  free (q->dir);
  q->dir = dir;
  q->dir_len = len;
  q->dir_nr = nr;
  q->dir_run = *run;
  if (qcow2_encode_sector (q, sector) == -1
      || full_pwrite (q->fd, sector, sizeof sector, 0) == -1
      || fsync (q->fd) == -1) {
    /* The old one or the new one counts, who knows. */
    q->failed = true;
    return error_set (err, errno, "%s: writing the header: %m; the bitmaps "
                      "can no longer be stored", q->path);
  }
  if (old.nr)
    qcow2_drop_run (q, &old);
  return 0;
}

static void
note_listed (struct qcow2 *q, const struct qcow2_entry *entries, size_t nr)
{
  for (struct qcow2_bits *b = q->bits; b; b = b->next)
    b->listed = false;
  for (size_t i = 0; i < nr; ++i)
    if (!entries[i].inconsistent)
      entries[i].bits->listed = true;
}

int
qcow2_put_directory (struct qcow2 *q, const struct qcow2_entry *entries,
                     size_t nr, struct error *err)
{
  struct qcow2_run run = { 0, 0 };
  uint8_t *dir = NULL;
  size_t len, nr_empty;

  if (qcow2_has_failed (q))
    return error_set (err, EIO, "%s: cannot be written to any more after an "
                      "earlier error", q->path);
  if (check_entries (q, entries, nr, &len, &nr_empty, err) == -1)
    return -1;
  if (nr > 0) {
    const uint64_t dir_clusters = qcow2_div_up (len, OUR_CLUSTER);

    dir = calloc (1, len);
    if (dir == NULL)
      return error_set (err, ENOMEM, "%s: %m", q->path);
    run.nr = dir_clusters + nr_empty;
    if (qcow2_take_run (q, our_first_free (q->nr_l2), &run, err) == -1) {
      free (dir);
      return -1;
    }
    encode (q, entries, nr, run.first + dir_clusters, dir);
    if (write_run (q, &run, dir, len) == -1) {
      error_set (err, errno, "%s: writing the bitmap directory: %m", q->path);
      goto failed;
    }
  }
  if (qcow2_sync (q, err) == -1)
    goto failed;
  if (flip (q, dir, len, nr, &run, err) == -1)
    return -1;
  note_listed (q, entries, nr);
  return 0;

 failed:
  if (run.nr)
    qcow2_drop_run (q, &run);
  free (dir);
  return -1;
}

int
qcow2_write_directory (struct qcow2 *q, const struct qcow2_entry *entries,
                       size_t nr, struct error *err)
{
  if (qcow2_put_directory (q, entries, nr, err) == -1)
    return -1;
  qcow2_forget_entries (q);
  return 0;
}

int
qcow2_flag_directory (struct qcow2 *q, bool in_use, struct error *err)
{
  size_t at = 0;

  /* Flags are aligned words: no sector holds half of one, and whatever part
   * of this reaches the disk is a valid directory.
   */
  for (size_t i = 0; i < q->dir_nr; ++i) {
    struct qcow2_bitmap_entry d;
    uint64_t table;

    memcpy (&d, q->dir + at, sizeof d);
    table = be64toh (d.table_offset) >> OUR_CLUSTER_BITS;
    if (in_use || table - q->dir_run.first < q->dir_run.nr)
      d.flags |= htobe32 (QCOW2_BITMAP_IN_USE);
    else
      d.flags &= ~htobe32 (QCOW2_BITMAP_IN_USE);
    memcpy (q->dir + at, &d, sizeof d);
    at += (sizeof d + be16toh (d.name_size) + 7) & ~(size_t) 7;
  }
  if (q->dir_nr
      && full_pwrite (q->fd, q->dir, q->dir_len,
                       q->dir_run.first << OUR_CLUSTER_BITS) == -1)
    return error_set (err, errno, "%s: writing the bitmap directory: %m",
                      q->path);
  return 0;
}
