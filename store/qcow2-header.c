/* nbdferry - any qcow2's header, checked
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The header and its extensions, as far as bitmaps and a data file go; and
 * the whole reads and writes that all of store/qcow2*.c use.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"
#include "error.h"
#include "fullio.h"
#include "qcow2-internal.h"

int
qcow2_pread (int fd, void *buf, size_t len, uint64_t offset)
{
  ssize_t r = full_pread (fd, buf, len, offset);

  if (r != -1 && (size_t) r < len) {
    errno = EIO;
    return -1;
  }
  return r == -1 ? -1 : 0;
}

static void
header_to_host (struct qcow2_header *h)
{
  h->magic = be32toh (h->magic);
  h->version = be32toh (h->version);
  h->backing_file_offset = be64toh (h->backing_file_offset);
  h->backing_file_size = be32toh (h->backing_file_size);
  h->cluster_bits = be32toh (h->cluster_bits);
  h->size = be64toh (h->size);
  h->crypt_method = be32toh (h->crypt_method);
  h->l1_size = be32toh (h->l1_size);
  h->l1_table_offset = be64toh (h->l1_table_offset);
  h->refcount_table_offset = be64toh (h->refcount_table_offset);
  h->refcount_table_clusters = be32toh (h->refcount_table_clusters);
  h->nb_snapshots = be32toh (h->nb_snapshots);
  h->snapshots_offset = be64toh (h->snapshots_offset);
  h->incompatible_features = be64toh (h->incompatible_features);
  h->compatible_features = be64toh (h->compatible_features);
  h->autoclear_features = be64toh (h->autoclear_features);
  h->refcount_order = be32toh (h->refcount_order);
  h->header_length = be32toh (h->header_length);
}

static int
check_header (const struct qcow2_image *img, struct error *err)
{
  const struct qcow2_header *h = &img->h;

  if (h->magic != QCOW2_MAGIC)
    return error_set (err, EINVAL, "%s: is not a qcow2 image", img->path);
  if (h->version == 2)
    return error_set (err, EINVAL, "%s: is a qcow2 image of version 2, which "
                      "cannot hold bitmaps; convert it with \"qemu-img amend "
                      "-o compat=1.1\"", img->path);
  if (h->version != 3)
    return error_set (err, EINVAL, "%s: is a qcow2 image of the unknown "
                      "version %" PRIu32, img->path, h->version);
  if (h->incompatible_features & ~QCOW2_INCOMPAT_KNOWN)
    return error_set (err, ENOTSUP, "%s: uses qcow2 features that are not "
                      "known here (incompatible feature bits 0x%" PRIx64 ")",
                      img->path,
                      h->incompatible_features & ~QCOW2_INCOMPAT_KNOWN);
  if (h->incompatible_features & QCOW2_INCOMPAT_CORRUPT)
    return error_set (err, EIO, "%s: is marked corrupt; repair it with "
                      "\"qemu-img check -r all\"", img->path);
  if (h->cluster_bits < QCOW2_MIN_CLUSTER_BITS
      || h->cluster_bits > QCOW2_MAX_CLUSTER_BITS)
    return error_set (err, EINVAL, "%s: has clusters of 2^%" PRIu32 " bytes "
                      DAMAGED, img->path, h->cluster_bits);
  if (h->header_length < QCOW2_HEADER_LENGTH || h->header_length % 8 != 0
      || h->header_length > image_cluster (img)
      || h->header_length > img->file_size)
    return error_set (err, EINVAL, "%s: has a header of %" PRIu32 " bytes "
                      DAMAGED, img->path, h->header_length);
  if (h->size > INT64_MAX)
    return error_set (err, EINVAL, "%s: has a disk size of %" PRIu64 " bytes "
                      DAMAGED, img->path, h->size);
  return 0;
}

static int
read_bitmaps_extension (struct qcow2_image *img, const uint8_t *p,
                        uint32_t len, struct error *err)
{
  struct qcow2_bitmaps_extension *b = &img->bitmaps;

  if (len != sizeof *b || img->has_bitmaps)
    return error_set (err, EINVAL, "%s: its bitmaps header extension is "
                      "malformed " DAMAGED, img->path);
  memcpy (b, p, sizeof *b);
  b->nb_bitmaps = be32toh (b->nb_bitmaps);
  b->reserved = be32toh (b->reserved);
  b->directory_size = be64toh (b->directory_size);
  b->directory_offset = be64toh (b->directory_offset);
  img->has_bitmaps = true;
  return 0;
}

static int
read_data_file_extension (struct qcow2_image *img, const uint8_t *p,
                          uint32_t len, struct error *err)
{
  if (img->data_file || len == 0 || memchr (p, 0, len))
    return error_set (err, EINVAL, "%s: its data file extension is malformed "
                      DAMAGED, img->path);
  img->data_file = strndup ((const char *) p, len);
  if (img->data_file == NULL)
    return error_set (err, ENOMEM, "%s: %m", img->path);
  return 0;
}

static int
read_extensions (struct qcow2_image *img, struct error *err)
{
  uint64_t end = image_cluster (img), at = img->h.header_length;
  CLEANUP_FREE uint8_t *buf = NULL;

  /* Extensions end where the name of a backing file begins. */
  if (img->h.backing_file_offset > at && img->h.backing_file_offset < end)
    end = img->h.backing_file_offset;
  if (end > img->file_size)
    end = img->file_size;
  buf = malloc (end);
  if (buf == NULL)
    return error_set (err, ENOMEM, "%s: %m", img->path);

  while (at + sizeof (struct qcow2_extension) <= end) {
    uint32_t type, len;
    int r = 0;

    if (qcow2_pread (img->fd, buf, 8, at) == -1)
      return error_set (err, errno, "%s: read: %m", img->path);
    type = get_be32 (buf);
    len = get_be32 (buf + 4);
    at += 8;
    if (type == QCOW2_EXT_END)
      break;
    if (len > end - at)
      return error_set (err, EINVAL, "%s: a header extension (0x%08" PRIx32
                        ") reaches beyond the header " DAMAGED,
                        img->path, type);
    if (type == QCOW2_EXT_BITMAPS || type == QCOW2_EXT_DATA_FILE) {
      if (qcow2_pread (img->fd, buf, len, at) == -1)
        return error_set (err, errno, "%s: read: %m", img->path);
      if (type == QCOW2_EXT_BITMAPS)
        r = read_bitmaps_extension (img, buf, len, err);
      else
        r = read_data_file_extension (img, buf, len, err);
    }
    if (r == -1)
      return -1;
    at += (uint64_t) len + (-len & 7);
  }
  return 0;
}

int
qcow2_read_header (int fd, const char *path, struct qcow2_image *img,
                   struct error *err)
{
  struct stat st;

  memset (img, 0, sizeof *img);
  img->fd = fd;
  img->path = path;
  if (fstat (fd, &st) == -1)
    return error_set (err, errno, "%s: %m", path);
  if (S_ISBLK (st.st_mode)) {
    off_t end = lseek (fd, 0, SEEK_END);

    if (end == -1)
      return error_set (err, errno, "%s: %m", path);
    img->file_size = end;
  }
  else
    img->file_size = st.st_size;

  if (img->file_size < sizeof img->h)
    return error_set (err, EINVAL, "%s: is too short for a qcow2 image "
                      DAMAGED, path);
  if (qcow2_pread (fd, &img->h, sizeof img->h, 0) == -1)
    return error_set (err, errno, "%s: read: %m", path);
  header_to_host (&img->h);
  if (check_header (img, err) == -1)
    return -1;
  if (read_extensions (img, err) == -1) {
    free (img->data_file);
    img->data_file = NULL;
    return -1;
  }
  return 0;
}
