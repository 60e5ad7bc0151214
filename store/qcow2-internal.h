/* nbdferry - the sidecar, inside
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Shared by the files store/qcow2*.c only.
 */
#ifndef FERRY_QCOW2_INTERNAL_H
#define FERRY_QCOW2_INTERNAL_H

#include <inttypes.h>
#include <stdbool.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/types.h>

#include "error.h"
#include "qcow2-format.h"
#include "qcow2.h"

/* ---- qcow2-header.c, qcow2-read.c: any qcow2, checked ---- */

struct qcow2_image {
  int fd;           /* not owned */
  const char *path; /* not owned */
  uint64_t file_size;
  struct qcow2_header h; /* in host order */
  char *data_file;       /* NULL if there is no such extension */
  bool has_bitmaps;
  struct qcow2_bitmaps_extension bitmaps; /* in host order */
};

struct qcow2_dirent {
  char *name;
  uint64_t table_offset;
  uint32_t table_size;
  uint32_t flags;
  unsigned shift;
};

/* How messages about a damaged file (EINVAL) end. */
#define DAMAGED "(damaged?)"

static inline uint64_t
image_cluster (const struct qcow2_image *img)
{
  return UINT64_C (1) << img->h.cluster_bits;
}

static inline bool
image_has (const struct qcow2_image *img, uint64_t offset, uint64_t len)
{
  return offset <= img->file_size && len <= img->file_size - offset;
}

/* Header and extensions.  On success the caller owns img->data_file. */
int qcow2_read_header (int fd, const char *path, struct qcow2_image *img,
                       struct error *err);

/* The directory (*nr is 0 and *dirents NULL if there is none).  It is the
 * caller's to free, with qcow2_free_dirents.
 */
int qcow2_read_directory (const struct qcow2_image *img,
                          struct qcow2_dirent **dirents, size_t *nr,
                          struct error *err);
void qcow2_free_dirents (struct qcow2_dirent *dirents, size_t nr);

/* The table of a bitmap in host order, each entry checked; to be freed. */
int qcow2_read_table (const struct qcow2_image *img,
                      const struct qcow2_dirent *d, uint64_t **table,
                      struct error *err);

/* Can nobody vouch for the bits of this one?  Its table is not to be read. */
bool qcow2_is_abandoned (const struct qcow2_image *img,
                         const struct qcow2_dirent *d);
/* Is it one of ours whose bits were given up?  'table' as read. */
bool qcow2_has_no_bits (const struct qcow2_image *img,
                        const struct qcow2_dirent *d, const uint64_t *table);

/* A whole read; -1 with errno (EIO at the end of the file). */
int qcow2_pread (int fd, void *buf, size_t len, uint64_t offset);

/* ---- our own layout ---- */

#define OUR_CLUSTER_BITS 21
#define OUR_CLUSTER      (UINT64_C (1) << OUR_CLUSTER_BITS)

/* Clusters 0 to 3; the L2 tables come next, then the bitmaps. */
#define OUR_REFTABLE 1
#define OUR_REFBLOCK 2
#define OUR_L1       3
#define OUR_L2       4

/* One refcount block covers this many clusters: a sidecar of 2 TiB. */
#define OUR_MAX_CLUSTERS (OUR_CLUSTER / 2)

/* One L1 table of one cluster of L2 tables of one cluster. */
#define OUR_MAX_SIZE \
  ((OUR_CLUSTER / 8) * (OUR_CLUSTER / 8) * OUR_CLUSTER)

/* The part of the header that changes is in the first sector, so that one
 * write of it is atomic: autoclear bits, and the bitmaps extension, which
 * comes first for that reason.
 */
#define OUR_SECTOR        512
#define OUR_EXT_BITMAPS   QCOW2_HEADER_LENGTH
#define OUR_EXT_DATA_FILE (OUR_EXT_BITMAPS + 8 + 24)

/* Clusters behind the L2 tables that bitmaps leave to the directory, so that
 * it alternates between them and does not break up the space of the bitmaps.
 */
#define OUR_DIR_PLACES 2

/* A run of clusters. */
struct qcow2_run {
  uint64_t first, nr;
};

struct qcow2_bits {
  struct qcow2_bits *next; /* in q->bits */
  struct qcow2_run run;    /* one cluster of table, then the bits */
  unsigned shift;
  uint64_t *words;         /* mapped, or NULL if there are none */
  size_t map_len;
  struct sigbus_range *watch; /* of the map */
  bool listed;             /* in the directory on disk */
};

struct qcow2 {
  int fd;
  char *path;
  char *data_file;
  uint64_t size;
  uint64_t nr_l2;
  uint16_t *refs;   /* OUR_MAX_CLUSTERS refcounts, in host order */
  /* The directory as it is on disk: its bytes and, in the clusters after it,
   * an empty table for each inconsistent bitmap.  nr == 0: none.
   */
  uint8_t *dir;
  size_t dir_len, dir_nr;
  struct qcow2_run dir_run;
  struct qcow2_bits *bits;
  struct qcow2_entry *entries; /* as found; NULL once forgotten */
  size_t nr_entries;
  bool failed; /* an fsync failed: what is on disk is not known; no more
                  directories, and no close in good order */
  atomic_bool lost_page;   /* a page of the map could not be had */
  atomic_bool *lost;       /* that one, or whose qcow2_report_lost gave */
};

/* May nothing be said any more about what the file holds? */
static inline bool
qcow2_has_failed (const struct qcow2 *q)
{
  return q->failed || atomic_load (q->lost);
}

static inline uint64_t
our_bits_bytes (uint64_t size, unsigned shift)
{
  return qcow2_nr_words (size, shift) * 8;
}

/* Clusters for the bits, at least one. */
static inline uint64_t
our_bits_clusters (uint64_t size, unsigned shift)
{
  uint64_t n = qcow2_div_up (our_bits_bytes (size, shift), OUR_CLUSTER);

  return n ? n : 1;
}

static inline uint64_t
our_nr_l2 (uint64_t size)
{
  return qcow2_div_up (size, OUR_CLUSTER * (OUR_CLUSTER / 8));
}

static inline uint64_t
our_first_free (uint64_t nr_l2)
{
  return OUR_L2 + nr_l2;
}

/* ---- qcow2-create.c ---- */

/* An empty struct for a sidecar that is open as 'fd' (taken over). */
struct qcow2 *qcow2_new (int fd, const char *path, const char *data_file,
                         uint64_t size, struct error *err);
/* Unmap, close and free everything; writes nothing. */
void qcow2_destroy (struct qcow2 *q);
void qcow2_forget_entries (struct qcow2 *q);

/* The first sector of the header for q's directory; -1 with errno. */
int qcow2_encode_sector (const struct qcow2 *q, uint8_t sector[OUR_SECTOR]);

/* Fill the empty file with our layout, without bitmaps; not yet durable. */
int qcow2_create_layout (struct qcow2 *q, struct error *err);

/* Is the header of q's file, byte for byte, ours for this disk and for the
 * directory in 'q'?
 */
bool qcow2_is_our_header (const struct qcow2 *q);

/* And the refcount table, L1 and L2 tables?  Reads 4 MiB for a TiB of disk. */
bool qcow2_are_our_tables (struct qcow2 *q);

/* Bring all bitmaps of the file 'fd' into the new and empty 'q', and write
 * the directory.  '*in_use': some were, and are as good as they were.
 */
int qcow2_convert (struct qcow2 *q, int fd, bool *in_use, struct error *err);

/* ---- qcow2-alloc.c ---- */

/* Count a run as used in memory; false if any of it is used already. */
bool qcow2_ref_run (struct qcow2 *q, const struct qcow2_run *run);

/* Make the refcounts on disk what they are in memory. */
int qcow2_repair_refs (struct qcow2 *q, struct error *err);

/* The first free run of run->nr clusters from cluster 'from' on: inside the
 * file, and counted as used, on disk too (not yet durable).
 */
int qcow2_take_run (struct qcow2 *q, uint64_t from, struct qcow2_run *run,
                    struct error *err);
/* Nobody refers to it any more: refcounts 0, space back to the file system. */
void qcow2_drop_run (struct qcow2 *q, const struct qcow2_run *run);

/* Bits in the run 'run', mapped; added to q->bits. */
struct qcow2_bits *qcow2_map_bits (struct qcow2 *q,
                                   const struct qcow2_run *run,
                                   unsigned shift, struct error *err);

/* Unmap and free; the caller has taken it out of q->bits. */
void qcow2_unmap_bits (struct qcow2_bits *b);

/* ---- qcow2-directory.c ---- */

/* qcow2_write_directory, but q's entries stay. */
int qcow2_put_directory (struct qcow2 *q, const struct qcow2_entry *entries,
                         size_t nr, struct error *err);

/* Set or drop in_use in the directory in place; not yet durable. */
int qcow2_flag_directory (struct qcow2 *q, bool in_use, struct error *err);

#endif /* FERRY_QCOW2_INTERNAL_H */
