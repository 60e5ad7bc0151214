/* nbdferry - qcow2 on disk
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What the qcow2 specification (docs/interop/qcow2.txt in QEMU) lays down:
 * structures, numbers, limits.  All fields are big-endian; the bits of a
 * bitmap are little-endian.  Nothing here is ours but QCOW2_AUTOCLEAR_OURS
 * and QCOW2_EXT_NOTHING.
 */
#ifndef FERRY_QCOW2_FORMAT_H
#define FERRY_QCOW2_FORMAT_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

#define QCOW2_MAGIC 0x514649fbu /* "QFI\xfb" */

/* A header of version 3 without the fields that came later. */
struct qcow2_header {
  uint32_t magic;
  uint32_t version;
  uint64_t backing_file_offset;
  uint32_t backing_file_size;
  uint32_t cluster_bits;
  uint64_t size; /* of the disk, bytes */
  uint32_t crypt_method;
  uint32_t l1_size;
  uint64_t l1_table_offset;
  uint64_t refcount_table_offset;
  uint32_t refcount_table_clusters;
  uint32_t nb_snapshots;
  uint64_t snapshots_offset;
  uint64_t incompatible_features;
  uint64_t compatible_features;
  uint64_t autoclear_features;
  uint32_t refcount_order;
  uint32_t header_length;
} __attribute__ ((packed));

#define QCOW2_HEADER_LENGTH 104
_Static_assert (sizeof (struct qcow2_header) == QCOW2_HEADER_LENGTH,
                "a version 3 header has 104 bytes");

#define QCOW2_MIN_CLUSTER_BITS 9
#define QCOW2_MAX_CLUSTER_BITS 21

/* Incompatible features: who does not know one must not open the file. */
#define QCOW2_INCOMPAT_DIRTY       (UINT64_C (1) << 0)
#define QCOW2_INCOMPAT_CORRUPT     (UINT64_C (1) << 1)
#define QCOW2_INCOMPAT_DATA_FILE   (UINT64_C (1) << 2)
#define QCOW2_INCOMPAT_COMPRESSION (UINT64_C (1) << 3)
#define QCOW2_INCOMPAT_EXTENDED_L2 (UINT64_C (1) << 4)
#define QCOW2_INCOMPAT_KNOWN       UINT64_C (0x1f)

/* Autoclear features: who opens for writing clears those it does not know. */
#define QCOW2_AUTOCLEAR_BITMAPS       (UINT64_C (1) << 0)
#define QCOW2_AUTOCLEAR_DATA_FILE_RAW (UINT64_C (1) << 1)
/* Private: this is our sidecar, and nobody else has written to it since. */
#define QCOW2_AUTOCLEAR_OURS (UINT64_C (1) << 63)

/* Header extensions follow the header; each is padded to 8 bytes. */
struct qcow2_extension {
  uint32_t type;
  uint32_t length;
} __attribute__ ((packed));

#define QCOW2_EXT_END       0x00000000u
#define QCOW2_EXT_DATA_FILE 0x44415441u
#define QCOW2_EXT_BITMAPS   0x23852875u
/* Private: holds the place of the bitmaps extension while there are none,
 * because that extension must not say "0 bitmaps".  Others skip it.
 */
#define QCOW2_EXT_NOTHING 0x46455252u /* "FERR" */

struct qcow2_bitmaps_extension {
  uint32_t nb_bitmaps;
  uint32_t reserved;
  uint64_t directory_size;
  uint64_t directory_offset;
} __attribute__ ((packed));

/* An entry of the bitmap directory; extra data and the name follow, and
 * padding to 8 bytes.
 */
struct qcow2_bitmap_entry {
  uint64_t table_offset;
  uint32_t table_size; /* entries of 8 bytes */
  uint32_t flags;
  uint8_t type;
  uint8_t granularity_bits;
  uint16_t name_size;
  uint32_t extra_data_size;
} __attribute__ ((packed));

#define QCOW2_BITMAP_ENTRY_LENGTH 24
_Static_assert (sizeof (struct qcow2_bitmap_entry)
                == QCOW2_BITMAP_ENTRY_LENGTH,
                "a directory entry begins with 24 bytes");

#define QCOW2_BITMAP_IN_USE 0x1u
#define QCOW2_BITMAP_AUTO   0x2u
#define QCOW2_BITMAP_KNOWN  0x3u
#define QCOW2_BITMAP_DIRTY  1 /* the only type */

/* An entry of a bitmap table: 0 = all zeros, 1 = all ones, else an offset. */
#define QCOW2_TABLE_ALL_ONES UINT64_C (1)
#define QCOW2_TABLE_RESERVED UINT64_C (0xff000000000001fe)

#define QCOW2_OFLAG_COPIED (UINT64_C (1) << 63)

/* QEMU's limits. */
#define QCOW2_MAX_BITMAPS        65535u
#define QCOW2_MAX_NAME           1023u
#define QCOW2_MAX_DIRECTORY      (UINT64_C (1024) * 65535)
#define QCOW2_MIN_SHIFT          9u
#define QCOW2_MAX_SHIFT          31u
#define QCOW2_MAX_BITMAP_BYTES   UINT64_C (0x20000000)

static inline uint32_t
get_be32 (const void *p)
{
  uint32_t v;

  memcpy (&v, p, sizeof v);
  return be32toh (v);
}

static inline uint64_t
get_be64 (const void *p)
{
  uint64_t v;

  memcpy (&v, p, sizeof v);
  return be64toh (v);
}

static inline void
put_be32 (void *p, uint32_t v)
{
  v = htobe32 (v);
  memcpy (p, &v, sizeof v);
}

static inline void
put_be64 (void *p, uint64_t v)
{
  v = htobe64 (v);
  memcpy (p, &v, sizeof v);
}

/* The bits, and bytes of bits, of a bitmap for a disk of 'size' bytes. */
static inline uint64_t
qcow2_nr_bits (uint64_t size, unsigned shift)
{
  return (size >> shift) + ((size & ((UINT64_C (1) << shift) - 1)) != 0);
}

static inline uint64_t
qcow2_nr_words (uint64_t size, unsigned shift)
{
  return (qcow2_nr_bits (size, shift) + 63) / 64;
}

static inline uint64_t
qcow2_div_up (uint64_t n, uint64_t by)
{
  return n / by + (n % by != 0);
}

#endif /* FERRY_QCOW2_FORMAT_H */
