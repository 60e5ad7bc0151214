/* nbdferry - bitmaps in a qcow2 image of their own
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * An image of a disk of some size, without any data and without a data file,
 * that holds nothing but bitmaps: for those of a disk that goes where bitmaps
 * can't.  qemu-img merges them from there into any other image; nbdferry
 * imports them.
 */
#ifndef FERRY_QCOW2_IMAGE_H
#define FERRY_QCOW2_IMAGE_H

#include <stdbool.h>
#include <stddef.h>

#include "bitmap.h"
#include "error.h"

struct qcow2_image_bitmap {
  const char *name; /* 1-1023 bytes */
  bool recording;
  const struct bitmap *bits; /* of the disk's size; nobody changes it now */
};

/* Write it to the empty file 'fd', and make it durable.  0 or -1. */
int qcow2_write_image (int fd, const char *path, uint64_t size,
                       const struct qcow2_image_bitmap *list, size_t nr,
                       struct error *err);

#endif /* FERRY_QCOW2_IMAGE_H */
