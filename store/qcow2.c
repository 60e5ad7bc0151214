/* nbdferry - the sidecar: persistent bitmaps in a valid qcow2
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What is found at open decides what is done:
 *
 *   no file                      made new
 *   refused (not one of ours     left alone
 *    by its nature, or damaged)
 *   bit 63, our header, tables   mapped where it is
 *   anything else                read by the general reader into a new file
 *
 * Bit 63 of the autoclear features is set in every header that we write, and
 * every other program that opens the file for writing must clear it: as long
 * as it stands, the places of the bits are as we left them.  The tables are
 * compared all the same unless the file's time says that nobody wrote to it:
 * somebody may have changed them by hand, and QEMU would see another disk.
 *
 * The bits are durable by fsync of the file, which includes the mapped pages
 * on Linux.  Nothing is kept in memory that the file does not have, except
 * refcounts, which an open makes anew.
 *
 * See qcow2-directory.c for the order of the writes, qcow2-alloc.c for
 * clusters, qcow2-create.c for a new file.
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"
#include "error.h"
#include "fullio.h"
#include "lock.h"
#include "qcow2-internal.h"

#define TRIES 10 /* to lock what is renamed under us */

/* Open and lock; a file that has lost its name meanwhile is not what we
 * wanted.  -1 with errno ENOENT alone if there is none and 'flags' do not
 * create it.
 */
static int
open_locked (const char *path, int flags, struct error *err)
{
  for (int i = 0; i < TRIES; ++i) {
    struct stat st, st2;
    /* O_NONBLOCK: not to hang at a FIFO before it is seen to be one. */
    int fd = open (path, O_RDWR | O_CLOEXEC | O_NONBLOCK | flags, 0600);

    if (fd == -1)
      return error_set (err, errno, "%s: open: %m", path);
    if (fstat (fd, &st) == -1) {
      error_set (err, errno, "%s: %m", path);
      close (fd);
      return -1;
    }
    if (!S_ISREG (st.st_mode)) {
      close (fd);
      return error_set (err, EINVAL, "%s: is not a regular file", path);
    }
    if (lock_file (fd, path, true, err) == -1) {
      int e = errno;

      close (fd);
      errno = e;
      return -1;
    }
    if (stat (path, &st2) == 0 && st.st_ino == st2.st_ino
        && st.st_dev == st2.st_dev)
      return fd;
    close (fd);
  }
  return error_set (err, EAGAIN, "%s: is being replaced by another process",
                    path);
}

static int
check_arguments (const char *path, const char *data_file, uint64_t size,
                 struct error *err)
{
  if (size % 512 != 0)
    return error_set (err, EINVAL, "%s: a disk of %" PRIu64 " bytes is not a "
                      "multiple of 512", path, size);
  if (size > OUR_MAX_SIZE)
    return error_set (err, EFBIG, "%s: a disk of %" PRIu64 " bytes is too "
                      "large for persistent bitmaps", path, size);
  if (data_file[0] == '\0')
    return error_set (err, EINVAL, "%s: no disk is named", path);
  /* It must fit into the header cluster; QEMU takes no more than this. */
  if (strlen (data_file) >= PATH_MAX)
    return error_set (err, ENAMETOOLONG, "%s: the disk's path is too long "
                      "for a qcow2 header", path);
  return 0;
}

/* Is this a sidecar, by its nature?  Whatever else it may hold must not be
 * lost by our taking it over.
 */
static int
check_sidecar (const struct qcow2_image *img, struct error *err)
{
  const char *why = NULL;

  if (img->h.crypt_method != 0)
    why = "is encrypted";
  else if (img->h.backing_file_offset != 0)
    why = "has a backing file";
  else if (img->h.nb_snapshots != 0)
    why = "has internal snapshots";
  else if (!(img->h.incompatible_features & QCOW2_INCOMPAT_DATA_FILE))
    why = "holds a disk of its own";
  else if (!(img->h.autoclear_features & QCOW2_AUTOCLEAR_DATA_FILE_RAW))
    why = "has a data file that is not raw";
  if (why == NULL)
    return 0;
  return error_set (err, EINVAL, "%s: is a qcow2 image that %s, and not the "
                    "bitmaps of a raw disk (data_file_raw=on); move it away "
                    "to start without bitmaps", img->path, why);
}

/* List 'd', whose name is taken over. */
static void
add_entry (struct qcow2 *q, struct qcow2_dirent *d, struct qcow2_bits *bits)
{
  struct qcow2_entry *e = &q->entries[q->nr_entries++];

  e->name = take_ptr (&d->name);
  e->shift = d->shift;
  e->autoflag = (d->flags & QCOW2_BITMAP_AUTO) != 0;
  e->in_use = (d->flags & QCOW2_BITMAP_IN_USE) != 0;
  e->inconsistent = bits == NULL;
  e->bits = bits;
}

static void
clear_tail (struct qcow2 *q, struct qcow2_bits *b)
{
  const uint64_t bits = qcow2_nr_bits (q->size, b->shift);
  const uint64_t mask = (UINT64_C (1) << bits % 64) - 1;

  if (bits % 64 && (b->words[bits / 64] & ~mask))
    b->words[bits / 64] &= mask;
}

/* Are the bits of 'd' where we put them? */
static bool
is_our_run (const struct qcow2 *q, const struct qcow2_image *img,
            const struct qcow2_dirent *d, const uint64_t *table)
{
  if (d->table_size != our_bits_clusters (q->size, d->shift))
    return false;
  for (uint32_t i = 0; i < d->table_size; ++i)
    if (table[i] != d->table_offset + (i + 1) * OUR_CLUSTER)
      return false;
  /* The file is whole clusters long: nothing of the map lies beyond it. */
  return image_has (img, d->table_offset, (d->table_size + 1) * OUR_CLUSTER);
}

/* The bitmap 'd': 1 if it is as we lay it out, 0 if not, -1 on error. */
static int
attach_bitmap (struct qcow2 *q, const struct qcow2_image *img,
               struct qcow2_dirent *d, size_t *nr_empty, struct error *err)
{
  CLEANUP_FREE uint64_t *table = NULL;
  struct qcow2_run run;
  struct qcow2_bits *b;

  if (qcow2_read_table (img, d, &table, err) == -1)
    return -1;
  if (qcow2_has_no_bits (img, d, table)) {
    uint64_t place = q->dir_run.first + q->dir_run.nr + (*nr_empty)++;

    if (d->table_offset >> OUR_CLUSTER_BITS != place)
      return 0;
    add_entry (q, d, NULL);
    return 1;
  }
  if (!is_our_run (q, img, d, table))
    return 0;
  run.first = d->table_offset >> OUR_CLUSTER_BITS;
  run.nr = 1 + d->table_size;
  if (!qcow2_ref_run (q, &run))
    return error_set (err, EINVAL, "%s: bitmap '%s': its clusters at offset "
                      "0x%" PRIx64 " are used twice " DAMAGED, q->path,
                      d->name, d->table_offset);
  b = qcow2_map_bits (q, &run, d->shift, err);
  if (b == NULL)
    return -1;
  b->listed = true;
  add_entry (q, d, b);
  return 1;
}

/* The directory as 'img' has it, as q's own. */
static int
load_directory (struct qcow2 *q, const struct qcow2_image *img,
                struct error *err)
{
  const struct qcow2_bitmaps_extension *b = &img->bitmaps;

  if (!img->has_bitmaps)
    return 0;
  q->dir = malloc (b->directory_size);
  if (q->dir == NULL)
    return error_set (err, ENOMEM, "%s: %m", q->path);
  if (qcow2_pread (q->fd, q->dir, b->directory_size,
                   b->directory_offset) == -1)
    return error_set (err, errno, "%s: read: %m", q->path);
  q->dir_nr = b->nb_bitmaps;
  q->dir_len = b->directory_size;
  q->dir_run.first = b->directory_offset >> OUR_CLUSTER_BITS;
  q->dir_run.nr = qcow2_div_up (q->dir_len, OUR_CLUSTER);
  return 0;
}

/* Map what is in our layout; 1, or 0 if it is not, or -1.  Nothing is
 * written.
 */
static int
attach (struct qcow2 *q, const struct qcow2_image *img, bool as_closed,
        struct error *err)
{
  struct qcow2_dirent *d = NULL;
  size_t nr, nr_empty = 0;
  int r = -1;

  if (qcow2_read_directory (img, &d, &nr, err) == -1
      || load_directory (q, img, err) == -1)
    goto out;
  r = 0;
  if (!qcow2_is_our_header (q)
      || !image_has (img, 0, our_first_free (q->nr_l2) << OUR_CLUSTER_BITS)
      || !(as_closed || qcow2_are_our_tables (q)))
    goto out;
  q->entries = calloc (nr + 1, sizeof *q->entries);
  if (q->entries == NULL) {
    r = error_set (err, ENOMEM, "%s: %m", q->path);
    goto out;
  }
  for (size_t i = 0; i < nr; ++i) {
    r = attach_bitmap (q, img, &d[i], &nr_empty, err);
    if (r != 1)
      goto out;
  }
  q->dir_run.nr += nr_empty;
  if (!qcow2_ref_run (q, &q->dir_run))
    r = error_set (err, EINVAL, "%s: the clusters of the bitmap directory at "
                   "offset 0x%" PRIx64 " are used twice " DAMAGED, q->path,
                   img->bitmaps.directory_offset);
  else
    r = 1;

 out:
  qcow2_free_dirents (d, nr);
  return r;
}

/* First writes to a file that was taken as it is. */
static int
start_using (struct qcow2 *q, struct error *err)
{
  if (qcow2_repair_refs (q, err) == -1)
    return -1;
  for (struct qcow2_bits *b = q->bits; b; b = b->next)
    clear_tail (q, b);
  if (qcow2_has_failed (q))
    return error_set (err, EIO, "%s: the bits of its bitmaps cannot be read: "
                      "%m", q->path);
  if (qcow2_flag_directory (q, true, err) == -1)
    return -1;
  return q->dir_nr ? qcow2_sync (q, err) : 0;
}

/* A new file beside 'path' with the bitmaps of 'old' (if that is not -1),
 * renamed to it once it is durable.
 */
static struct qcow2 *
build (const char *path, const char *data_file, uint64_t size, int old,
       bool *in_use, struct error *err)
{
  CLEANUP_FREE char *new_path = NULL;
  struct qcow2 *q;
  struct stat st;
  int fd;

  if (asprintf (&new_path, "%s.new", path) == -1) {
    new_path = NULL;
    error_set (err, ENOMEM, "%s: %m", path);
    return NULL;
  }
  fd = open_locked (new_path, O_CREAT | O_NOFOLLOW, err);
  if (fd == -1)
    return NULL;
  q = qcow2_new (fd, path, data_file, size, err);
  if (q == NULL)
    goto failed;
  /* It may be the rest of a crash. */
  if (ftruncate (fd, 0) == -1) {
    error_set (err, errno, "%s: %m", new_path);
    goto failed;
  }
  if (old != -1 && fstat (old, &st) == 0) {
    /* As well as we may; QEMU may run as another user. */
    if (fchown (fd, st.st_uid, st.st_gid) == 0)
      fchmod (fd, st.st_mode & 0777);
  }
  if (qcow2_create_layout (q, err) == -1)
    goto failed;
  if (old != -1 && qcow2_convert (q, old, in_use, err) == -1)
    goto failed;
  /* Killed before this open is recorded, the next one must still see when the
   * old file was closed (store/trust.c).
   */
  if (old != -1 && fstat (old, &st) == 0)
    futimens (fd, (struct timespec[2]){ st.st_atim, st.st_mtim });
  if (fsync (fd) == -1 || rename (new_path, path) == -1) {
    error_set (err, errno, "%s: cannot put the new file in place: %m", path);
    goto failed;
  }
  if (sync_directory_of (path) == -1) {
    error_set (err, errno, "%s: fsync of its folder: %m", path);
    qcow2_destroy (q);
    return NULL;
  }
  return q;

 failed:
  unlink (new_path);
  if (q)
    qcow2_destroy (q);
  return NULL;
}

/* Is a bitmap of ours still as it was when we died? */
static bool
any_in_use (const struct qcow2 *q)
{
  for (size_t i = 0; i < q->nr_entries; ++i)
    if (q->entries[i].in_use && !q->entries[i].inconsistent)
      return true;
  return false;
}

/* It is damaged, or none of ours. */
static void
what_to_do (struct error *err)
{
  size_t len;

  if (err == NULL || err->errnum != EINVAL)
    return;
  len = strlen (err->msg);
  snprintf (err->msg + len, sizeof err->msg - len, "; restore the file, or "
            "move it away to start without bitmaps");
}

/* The file 'fd', locked (taken over). */
static struct qcow2 *
open_existing (int fd, const char *path, const char *data_file, uint64_t size,
               bool as_closed, enum qcow2_found *found, struct error *err)
{
  struct qcow2 *q = NULL, *newq;
  struct qcow2_image img = { .data_file = NULL };
  bool ours, in_use = false, lost = false;
  int r;

  q = qcow2_new (fd, path, data_file, size, err);
  if (q == NULL)
    return NULL;
  if (qcow2_read_header (fd, path, &img, err) == -1) {
    what_to_do (err);
    goto failed;
  }
  if (check_sidecar (&img, err) == -1)
    goto failed;
  ours = (img.h.autoclear_features & QCOW2_AUTOCLEAR_OURS) != 0;
  /* Were writes lost since we died?  The kernel says so once. */
  if (ours && fsync (fd) == -1) {
    lost = true;
    if (fsync (fd) == -1) {
      error_set (err, errno, "%s: fsync: %m", path);
      goto failed;
    }
  }

  r = ours ? attach (q, &img, as_closed, err) : 0;
  if (r == -1) {
    what_to_do (err);
    goto failed;
  }
  if (r == 1) {
    in_use = any_in_use (q);
    if (start_using (q, err) == -1) {
      if (!in_use)
        qcow2_flag_directory (q, false, NULL);
      goto failed;
    }
  }
  else {
    newq = build (path, data_file, size, fd, &in_use, err);
    if (newq == NULL) {
      what_to_do (err);
      goto failed;
    }
    qcow2_destroy (q); /* unlocks the old file, now nameless */
    q = newq;
  }
  free (img.data_file);
  *found = !ours ? QCOW2_FOREIGN : !in_use ? QCOW2_CLEAN
    : lost ? QCOW2_LOST : QCOW2_UNCLEAN;
  return q;

 failed:
  free (img.data_file);
  qcow2_destroy (q);
  return NULL;
}

struct qcow2 *
qcow2_open (const char *path, const char *data_file, uint64_t size,
            bool as_closed, enum qcow2_found *found, struct error *err)
{
  struct error e;
  int fd;

  if (check_arguments (path, data_file, size, err) == -1)
    return NULL;
  fd = open_locked (path, 0, &e);
  if (fd >= 0)
    return open_existing (fd, path, data_file, size, as_closed, found, err);
  if (e.errnum != ENOENT) {
    error_set (err, e.errnum, "%s", e.msg);
    return NULL;
  }
  *found = QCOW2_CREATED;
  return build (path, data_file, size, -1, NULL, err);
}

int
qcow2_open_foreign (const char *path, bool writable, uint64_t *size,
                    uint64_t *cluster)
{
  struct qcow2_image img = { .data_file = NULL };
  struct error ignored;
  bool foreign;
  int fd = writable ? open_locked (path, 0, &ignored)
                    : open (path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

  if (fd == -1)
    return -1;
  foreign = qcow2_read_header (fd, path, &img, &ignored) == 0
            && check_sidecar (&img, &ignored) == 0
            && !(img.h.autoclear_features & QCOW2_AUTOCLEAR_OURS);
  free (img.data_file);
  if (!foreign) {
    close (fd);
    return -1;
  }
  *size = img.h.size;
  *cluster = image_cluster (&img);
  return fd;
}

const struct qcow2_entry *
qcow2_entries (struct qcow2 *q, size_t *nr)
{
  *nr = q->nr_entries;
  return q->entries;
}

int
qcow2_sync (struct qcow2 *q, struct error *err)
{
  if (qcow2_has_failed (q))
    return error_set (err, EIO, "%s: cannot be made durable any more after an "
                      "earlier error", q->path);
  if (fsync (q->fd) == -1) {
    /* The kernel tells this once, and may have dropped the pages: no later
     * fsync that succeeds makes it good.
     */
    q->failed = true;
    return error_set (err, errno, "%s: fsync: %m", q->path);
  }
  if (atomic_load (q->lost))
    return error_set (err, EIO, "%s: has lost a page of a bitmap", q->path);
  return 0;
}

bool
qcow2_failed (const struct qcow2 *q)
{
  return qcow2_has_failed (q);
}

static int
close_in_order (struct qcow2 *q, struct error *err)
{
  if (qcow2_has_failed (q))
    return error_set (err, EIO, "%s: is left marked in use after an earlier "
                      "error", q->path);
  if (qcow2_sync (q, err) == -1
      || qcow2_flag_directory (q, false, err) == -1)
    return -1;
  for (struct qcow2_bits *b = q->bits; b; b = b->next)
    if (!b->listed)
      qcow2_drop_run (q, &b->run);
  return qcow2_sync (q, err);
}

int
qcow2_close (struct qcow2 *q, struct error *err)
{
  int r = close_in_order (q, err);

  qcow2_destroy (q);
  return r;
}

void
qcow2_abandon (struct qcow2 *q)
{
  qcow2_destroy (q);
}
