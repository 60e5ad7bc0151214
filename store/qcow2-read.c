/* nbdferry - reading any qcow2's bitmaps
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Everything in the file is a stranger's word.  A size or an offset is
 * compared with the size of the file before memory is taken for it, so that
 * what is allocated is bounded by the file, and by QEMU's own limits.
 * Nothing is ever written here.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/types.h>

#include "cleanup.h"
#include "error.h"
#include "qcow2-internal.h"

#define PIECE 65536 /* bytes of bits handed on at a time */

static bool
is_aligned (const struct qcow2_image *img, uint64_t offset)
{
  return (offset & (image_cluster (img) - 1)) == 0;
}

/* Well-formed UTF-8 (no overlong form, no surrogate) without a NUL. */
static bool
is_utf8 (const uint8_t *s, size_t len)
{
  while (len > 0) {
    uint32_t c = *s;
    size_t more = c < 0x80 ? 0 : (c & 0xe0) == 0xc0 ? 1
      : (c & 0xf0) == 0xe0 ? 2 : (c & 0xf8) == 0xf0 ? 3 : 4;
    static const uint32_t least[] = { 1, 0x80, 0x800, 0x10000 };

    if (more == 4 || more >= len)
      return false;
    c &= more ? 0x3f >> more : 0x7f;
    for (size_t i = 1; i <= more; ++i) {
      if ((s[i] & 0xc0) != 0x80)
        return false;
      c = c << 6 | (s[i] & 0x3f);
    }
    if (c < least[more] || c > 0x10ffff || (c >= 0xd800 && c <= 0xdfff))
      return false;
    s += more + 1;
    len -= more + 1;
  }
  return true;
}

static int
check_dirent (const struct qcow2_image *img, const struct qcow2_dirent *d,
              const struct qcow2_bitmap_entry *e, struct error *err)
{
  uint64_t bytes = (uint64_t) d->table_size << img->h.cluster_bits;

  if (e->type != QCOW2_BITMAP_DIRTY || (d->flags & ~QCOW2_BITMAP_KNOWN)
      || e->extra_data_size != 0)
    return error_set (err, ENOTSUP, "%s: bitmap '%s': is of a kind that is "
                      "not known here (type %u, flags 0x%" PRIx32 ")",
                      img->path, d->name, e->type, d->flags);
  if (d->shift < QCOW2_MIN_SHIFT || d->shift > QCOW2_MAX_SHIFT)
    return error_set (err, EINVAL, "%s: bitmap '%s': has a granularity of "
                      "2^%u bytes " DAMAGED, img->path, d->name, d->shift);
  if (d->table_size == 0 || bytes > QCOW2_MAX_BITMAP_BYTES)
    return error_set (err, EINVAL, "%s: bitmap '%s': has a table of %" PRIu32
                      " entries " DAMAGED, img->path, d->name, d->table_size);
  if (d->table_offset == 0 || !is_aligned (img, d->table_offset)
      || !image_has (img, d->table_offset, (uint64_t) d->table_size * 8))
    return error_set (err, EINVAL, "%s: bitmap '%s': its table at offset 0x%"
                      PRIx64 " lies outside the file " DAMAGED,
                      img->path, d->name, d->table_offset);
  /* What is in use may be of an older size; nobody loads it. */
  if (!(d->flags & QCOW2_BITMAP_IN_USE)
      && qcow2_nr_words (img->h.size, d->shift) * 8 > bytes)
    return error_set (err, EINVAL, "%s: bitmap '%s': its table of %" PRIu32
                      " entries is too small for the disk " DAMAGED,
                      img->path, d->name, d->table_size);
  return 0;
}

/* One entry at 'p' of 'left' bytes; its length on disk, or -1. */
static ssize_t
read_dirent (const struct qcow2_image *img, const uint8_t *p, uint64_t left,
             struct qcow2_dirent *d, struct error *err)
{
  struct qcow2_bitmap_entry e;
  const uint8_t *name;
  uint64_t len;

  if (left < sizeof e)
    goto malformed;
  memcpy (&e, p, sizeof e);
  e.name_size = be16toh (e.name_size);
  e.extra_data_size = be32toh (e.extra_data_size);
  len = sizeof e + (uint64_t) e.extra_data_size + e.name_size;
  len = (len + 7) & ~UINT64_C (7);
  if (len > left || e.name_size == 0 || e.name_size > QCOW2_MAX_NAME)
    goto malformed;
  name = p + sizeof e + e.extra_data_size;
  if (!is_utf8 (name, e.name_size))
    return error_set (err, EILSEQ, "%s: the name of a bitmap is not UTF-8; "
                      "remove it with \"qemu-img bitmap --remove\"",
                      img->path);
  d->name = strndup ((const char *) name, e.name_size);
  if (d->name == NULL)
    return error_set (err, ENOMEM, "%s: %m", img->path);
  d->table_offset = be64toh (e.table_offset);
  d->table_size = be32toh (e.table_size);
  d->flags = be32toh (e.flags);
  d->shift = e.granularity_bits;
  if (check_dirent (img, d, &e, err) == -1)
    return -1;
  return len;

 malformed:
  return error_set (err, EINVAL, "%s: an entry of the bitmap directory is "
                    "malformed " DAMAGED, img->path);
}

static int
compare_names (const void *a, const void *b)
{
  return strcmp (*(char *const *) a, *(char *const *) b);
}

static int
check_unique (const struct qcow2_image *img, const struct qcow2_dirent *d,
              size_t nr, struct error *err)
{
  CLEANUP_FREE const char **names = calloc (nr + 1, sizeof *names);

  if (names == NULL)
    return error_set (err, ENOMEM, "%s: %m", img->path);
  for (size_t i = 0; i < nr; ++i)
    names[i] = d[i].name;
  qsort (names, nr, sizeof *names, compare_names);
  for (size_t i = 1; i < nr; ++i)
    if (strcmp (names[i - 1], names[i]) == 0)
      return error_set (err, EINVAL, "%s: bitmap '%s': is listed twice "
                        DAMAGED, img->path, names[i]);
  return 0;
}

void
qcow2_free_dirents (struct qcow2_dirent *dirents, size_t nr)
{
  for (size_t i = 0; i < nr; ++i)
    free (dirents[i].name);
  free (dirents);
}

int
qcow2_read_directory (const struct qcow2_image *img,
                      struct qcow2_dirent **dirents, size_t *nr,
                      struct error *err)
{
  const struct qcow2_bitmaps_extension *b = &img->bitmaps;
  struct qcow2_dirent *d = NULL;
  uint8_t *buf = NULL;
  uint64_t at = 0;

  *dirents = NULL;
  *nr = 0;
  if (!img->has_bitmaps)
    return 0;
  if (b->nb_bitmaps == 0 || b->nb_bitmaps > QCOW2_MAX_BITMAPS
      || b->reserved != 0 || b->directory_size > QCOW2_MAX_DIRECTORY
      || b->directory_size < b->nb_bitmaps * sizeof (struct qcow2_bitmap_entry)
      || !is_aligned (img, b->directory_offset) || b->directory_offset == 0
      || !image_has (img, b->directory_offset, b->directory_size))
    return error_set (err, EINVAL, "%s: the bitmap directory (%" PRIu32
                      " bitmaps, %" PRIu64 " bytes at offset 0x%" PRIx64
                      ") is impossible or lies outside the file " DAMAGED,
                      img->path, b->nb_bitmaps, b->directory_size,
                      b->directory_offset);
  buf = malloc (b->directory_size);
  d = calloc (b->nb_bitmaps, sizeof *d);
  if (buf == NULL || d == NULL) {
    error_set (err, ENOMEM, "%s: %m", img->path);
    goto failed;
  }
  if (qcow2_pread (img->fd, buf, b->directory_size,
                   b->directory_offset) == -1) {
    error_set (err, errno, "%s: read: %m", img->path);
    goto failed;
  }
  for (uint32_t i = 0; i < b->nb_bitmaps; ++i) {
    ssize_t len = read_dirent (img, buf + at, b->directory_size - at, &d[i],
                               err);

    if (len == -1)
      goto failed;
    at += len;
  }
  if (at != b->directory_size) {
    error_set (err, EINVAL, "%s: the bitmap directory has %" PRIu64 " bytes "
               "too many " DAMAGED, img->path, b->directory_size - at);
    goto failed;
  }
  if (check_unique (img, d, b->nb_bitmaps, err) == -1)
    goto failed;
  free (buf);
  *dirents = d;
  *nr = b->nb_bitmaps;
  return 0;

 failed:
  free (buf);
  if (d)
    qcow2_free_dirents (d, b->nb_bitmaps);
  return -1;
}

int
qcow2_read_table (const struct qcow2_image *img, const struct qcow2_dirent *d,
                  uint64_t **table, struct error *err)
{
  size_t len = d->table_size * sizeof (uint64_t);
  uint64_t *t = malloc (len);

  if (t == NULL)
    return error_set (err, ENOMEM, "%s: %m", img->path);
  if (qcow2_pread (img->fd, t, len, d->table_offset) == -1) {
    free (t);
    return error_set (err, errno, "%s: bitmap '%s': read: %m", img->path,
                      d->name);
  }
  for (uint32_t i = 0; i < d->table_size; ++i) {
    t[i] = be64toh (t[i]);
    /* How much of the last cluster must lie inside the file depends on who
     * reads it: at least its beginning does.
     */
    if (t[i] > QCOW2_TABLE_ALL_ONES
        && ((t[i] & QCOW2_TABLE_RESERVED) || !is_aligned (img, t[i])
            || t[i] >= img->file_size)) {
      error_set (err, EINVAL, "%s: bitmap '%s': its bits at offset 0x%" PRIx64
                 " lie outside the file " DAMAGED, img->path, d->name, t[i]);
      free (t);
      return -1;
    }
  }
  *table = t;
  return 0;
}

bool
qcow2_is_abandoned (const struct qcow2_image *img,
                    const struct qcow2_dirent *d)
{
  const uint64_t flags = img->h.autoclear_features;

  /* Somebody who knows no bitmaps has written since; or it was in use by
   * somebody else than us, whose bits died with him.
   */
  return !(flags & QCOW2_AUTOCLEAR_BITMAPS)
    || ((d->flags & QCOW2_BITMAP_IN_USE) && !(flags & QCOW2_AUTOCLEAR_OURS));
}

bool
qcow2_has_no_bits (const struct qcow2_image *img,
                   const struct qcow2_dirent *d, const uint64_t *table)
{
  return (d->flags & QCOW2_BITMAP_IN_USE)
    && (table[0] == 0
        || qcow2_nr_words (img->h.size, d->shift) * 8
           > (uint64_t) d->table_size << img->h.cluster_bits);
}

static bool
is_all_zeros (const uint8_t *p, size_t len)
{
  return len == 0 || (p[0] == 0 && memcmp (p, p + 1, len - 1) == 0);
}

/* Fill 'buf' with the bits from byte 'at' of the bitmap on. */
static int
read_piece (const struct qcow2_image *img, const struct qcow2_dirent *d,
            const uint64_t *table, uint8_t *buf, size_t len, uint64_t at,
            struct error *err)
{
  while (len > 0) {
    uint64_t entry = table[at >> img->h.cluster_bits];
    uint64_t in = at & (image_cluster (img) - 1);
    size_t n = image_cluster (img) - in;

    if (n > len)
      n = len;
    if (entry <= QCOW2_TABLE_ALL_ONES)
      memset (buf, entry ? 0xff : 0, n);
    else if (!image_has (img, entry + in, n))
      return error_set (err, EINVAL, "%s: bitmap '%s': its bits at offset 0x%"
                        PRIx64 " lie outside the file " DAMAGED,
                        img->path, d->name, entry);
    else if (qcow2_pread (img->fd, buf, n, entry + in) == -1)
      return error_set (err, errno, "%s: bitmap '%s': read: %m", img->path,
                        d->name);
    buf += n;
    at += n;
    len -= n;
  }
  return 0;
}

static int
read_bits (const struct qcow2_image *img, const struct qcow2_dirent *d,
           const uint64_t *table, const struct qcow2_reader *reader,
           void *opaque, struct error *err)
{
  CLEANUP_FREE uint64_t *buf = malloc (PIECE);
  uint64_t bytes = qcow2_nr_words (img->h.size, d->shift) * 8;

  if (buf == NULL)
    return error_set (err, ENOMEM, "%s: %m", img->path);
  for (uint64_t at = 0; at < bytes; at += PIECE) {
    size_t len = bytes - at < PIECE ? bytes - at : PIECE;

    if (read_piece (img, d, table, (uint8_t *) buf, len, at, err) == -1)
      return -1;
    if (!is_all_zeros ((uint8_t *) buf, len)
        && reader->words (opaque, at * 8, buf, len / 8, err) == -1)
      return -1;
  }
  return 0;
}

static int
read_one (const struct qcow2_image *img, const struct qcow2_dirent *d,
          const struct qcow2_reader *reader, void *opaque, struct error *err)
{
  CLEANUP_FREE uint64_t *table = NULL;
  struct qcow2_entry entry = {
    .name = d->name, .shift = d->shift,
    .autoflag = (d->flags & QCOW2_BITMAP_AUTO) != 0,
    .in_use = (d->flags & QCOW2_BITMAP_IN_USE) != 0,
    .inconsistent = qcow2_is_abandoned (img, d),
  };

  if (!entry.inconsistent) {
    if (qcow2_read_table (img, d, &table, err) == -1)
      return -1;
    entry.inconsistent = qcow2_has_no_bits (img, d, table);
  }
  if (reader->found (opaque, &entry, img->h.size, err) == -1)
    return -1;
  if (entry.inconsistent)
    return 0;
  return read_bits (img, d, table, reader, opaque, err);
}

int
qcow2_read_bitmaps (int fd, const char *path,
                    const struct qcow2_reader *reader, void *opaque,
                    struct error *err)
{
  struct qcow2_image img;
  struct qcow2_dirent *d = NULL;
  size_t nr = 0;
  int r = -1;

  if (qcow2_read_header (fd, path, &img, err) == -1)
    return -1;
  /* Without the autoclear bit the extension may point anywhere: what can
   * still be read is named, as inconsistent, and no more.
   */
  if (!(img.h.autoclear_features & QCOW2_AUTOCLEAR_BITMAPS)) {
    struct error ignored;

    if (qcow2_read_directory (&img, &d, &nr, &ignored) == -1)
      nr = 0;
  }
  else if (qcow2_read_directory (&img, &d, &nr, err) == -1)
    goto out;
  for (size_t i = 0; i < nr; ++i)
    if (read_one (&img, &d[i], reader, opaque, err) == -1)
      goto out;
  r = 0;

 out:
  qcow2_free_dirents (d, nr);
  free (img.data_file);
  return r;
}
