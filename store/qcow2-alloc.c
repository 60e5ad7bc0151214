/* nbdferry - the sidecar: clusters
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * One refcount block of one cluster counts the whole sidecar, and a copy of
 * it is in memory.  A refcount is never above 1.  It is raised before the
 * cluster is referred to (the caller's fsync of the directory stands in
 * between), and lowered after the last reference is durably gone: whatever
 * happens in between leaks clusters, and nothing else.  The next open counts
 * anew what is referred to.
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"
#include "error.h"
#include "fullio.h"
#include "qcow2-internal.h"
#include "sigbus.h"

#define REFBLOCK_OFFSET ((uint64_t) OUR_REFBLOCK << OUR_CLUSTER_BITS)
#define ZEROS           (1 << 20) /* written at a time */

bool
qcow2_ref_run (struct qcow2 *q, const struct qcow2_run *run)
{
  if (run->first >= OUR_MAX_CLUSTERS
      || run->nr > OUR_MAX_CLUSTERS - run->first)
    return false;
  for (uint64_t i = 0; i < run->nr; ++i)
    if (q->refs[run->first + i])
      return false;
  for (uint64_t i = 0; i < run->nr; ++i)
    q->refs[run->first + i] = 1;
  return true;
}

/* Put the refcounts of 'run' on disk. */
static int
write_refs (struct qcow2 *q, const struct qcow2_run *run)
{
  CLEANUP_FREE uint16_t *buf = malloc (run->nr * 2);

  if (buf == NULL)
    return -1;
  for (uint64_t i = 0; i < run->nr; ++i)
    buf[i] = htobe16 (q->refs[run->first + i]);
  return full_pwrite (q->fd, buf, run->nr * 2,
                       REFBLOCK_OFFSET + run->first * 2);
}

int
qcow2_repair_refs (struct qcow2 *q, struct error *err)
{
  struct qcow2_run wrong = { 0, OUR_MAX_CLUSTERS };
  CLEANUP_FREE uint16_t *have = malloc (OUR_CLUSTER);
  struct stat st;
  uint64_t i = 0, clusters;

  if (have == NULL)
    return error_set (err, ENOMEM, "%s: %m", q->path);
  if (fstat (q->fd, &st) == -1
      || qcow2_pread (q->fd, have, OUR_CLUSTER, REFBLOCK_OFFSET) == -1)
    return error_set (err, errno, "%s: read: %m", q->path);
  /* Beyond the end of the file nothing is used: both are zeros there. */
  clusters = qcow2_div_up (st.st_size, OUR_CLUSTER);
  if (clusters > OUR_MAX_CLUSTERS)
    clusters = OUR_MAX_CLUSTERS;
  while (i < clusters && be16toh (have[i]) == q->refs[i])
    ++i;
  if (memcmp (have + clusters, q->refs + clusters,
              (OUR_MAX_CLUSTERS - clusters) * 2) == 0) {
    if (i == clusters)
      return 0;
    wrong.nr = clusters; /* the block stays sparse */
  }
  if (write_refs (q, &wrong) == -1)
    return error_set (err, errno, "%s: write: %m", q->path);
  return 0;
}

/* The file must reach to the end of the run: QEMU asks no less. */
static int
grow_file (struct qcow2 *q, uint64_t clusters)
{
  struct stat st;

  if (fstat (q->fd, &st) == -1)
    return -1;
  if ((uint64_t) st.st_size >= clusters << OUR_CLUSTER_BITS)
    return 0;
  return ftruncate (q->fd, clusters << OUR_CLUSTER_BITS);
}

static bool
find_free (struct qcow2 *q, uint64_t from, struct qcow2_run *run)
{
  uint64_t len = 0;

  for (uint64_t i = from; i < OUR_MAX_CLUSTERS; ++i) {
    len = q->refs[i] ? 0 : len + 1;
    if (len == run->nr) {
      run->first = i + 1 - len;
      return true;
    }
  }
  return false;
}

int
qcow2_take_run (struct qcow2 *q, uint64_t from, struct qcow2_run *run,
                struct error *err)
{
  int e;

  if (!find_free (q, from, run))
    return error_set (err, ENOSPC, "%s: is full: it cannot grow beyond "
                      "2 TiB", q->path);
  qcow2_ref_run (q, run);
  if (grow_file (q, run->first + run->nr) == 0 && write_refs (q, run) == 0)
    return 0;
  e = errno;
  qcow2_drop_run (q, run);
  return error_set (err, e, "%s: cannot take %" PRIu64 " clusters: %m",
                    q->path, run->nr);
}

void
qcow2_drop_run (struct qcow2 *q, const struct qcow2_run *run)
{
  for (uint64_t i = 0; i < run->nr; ++i)
    q->refs[run->first + i] = 0;
  /* On failure they are leaked on disk until the next open, no more. */
  if (write_refs (q, run) == 0)
    fallocate (q->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
               run->first << OUR_CLUSTER_BITS, run->nr << OUR_CLUSTER_BITS);
}

static int
do_fallocate (int fd, int mode, uint64_t offset, uint64_t len)
{
  int r;

  do
    r = fallocate (fd, mode, offset, len);
  while (r == -1 && errno == EINTR);
  return r;
}

/* Zeros, and allocated for real, so that no store into the mapped words can
 * fail for want of space.
 */
static int
zero_range (int fd, uint64_t offset, uint64_t len)
{
  CLEANUP_FREE uint8_t *zeros = NULL;

  if (do_fallocate (fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                    offset, len) == 0
      && do_fallocate (fd, 0, offset, len) == 0)
    return 0;
  if (errno != EOPNOTSUPP && errno != ENOSYS && errno != EINVAL)
    return -1;

  zeros = calloc (1, ZEROS);
  if (zeros == NULL)
    return -1;
  while (len > 0) {
    size_t n = len < ZEROS ? len : ZEROS;

    if (full_pwrite (fd, zeros, n, offset) == -1)
      return -1;
    offset += n;
    len -= n;
  }
  return 0;
}

static int
write_table (struct qcow2 *q, const struct qcow2_run *run)
{
  CLEANUP_FREE uint64_t *table = malloc (run->nr * 8);

  if (table == NULL)
    return -1;
  for (uint64_t i = 1; i < run->nr; ++i)
    table[i - 1] = htobe64 ((run->first + i) << OUR_CLUSTER_BITS);
  return full_pwrite (q->fd, table, (run->nr - 1) * 8,
                       run->first << OUR_CLUSTER_BITS);
}

/* Whole pages; one at least, so that there are words to point to. */
static size_t
map_length (const struct qcow2 *q, unsigned shift)
{
  size_t page = sysconf (_SC_PAGESIZE);
  size_t len = our_bits_bytes (q->size, shift);

  return len == 0 ? page : (len + page - 1) / page * page;
}

struct qcow2_bits *
qcow2_map_bits (struct qcow2 *q, const struct qcow2_run *run, unsigned shift,
                struct error *err)
{
  struct qcow2_bits *b = calloc (1, sizeof *b);

  if (b == NULL) {
    error_set (err, ENOMEM, "%s: %m", q->path);
    return NULL;
  }
  b->run = *run;
  b->shift = shift;
  b->map_len = map_length (q, shift);
  b->words = mmap (NULL, b->map_len, PROT_READ | PROT_WRITE, MAP_SHARED,
                   q->fd, (run->first + 1) << OUR_CLUSTER_BITS);
  if (b->words == MAP_FAILED) {
    error_set (err, errno, "%s: cannot map %zu bytes: %m", q->path,
               b->map_len);
    free (b);
    return NULL;
  }
  b->watch = sigbus_watch (b->words, b->map_len, q->lost, err);
  if (b->watch == NULL) {
    munmap (b->words, b->map_len);
    free (b);
    return NULL;
  }
  b->next = q->bits;
  q->bits = b;
  return b;
}

void
qcow2_unmap_bits (struct qcow2_bits *b)
{
  sigbus_unwatch (b->watch);
  munmap (b->words, b->map_len);
  free (b);
}

void
qcow2_report_lost (struct qcow2 *q, atomic_bool *lost)
{
  for (struct qcow2_bits *b = q->bits; b; b = b->next)
    sigbus_report_to (b->watch, lost);
  if (atomic_load (q->lost))
    atomic_store (lost, true);
  q->lost = lost;
}

struct qcow2_bits *
qcow2_alloc (struct qcow2 *q, unsigned shift, struct error *err)
{
  struct qcow2_run run;
  struct qcow2_bits *b;

  if (shift < QCOW2_MIN_SHIFT || shift > QCOW2_MAX_SHIFT) {
    error_set (err, EINVAL, "Granularity must be power of 2 and at least 512");
    return NULL;
  }
  if (qcow2_nr_bits (q->size, shift) > QCOW2_MAX_BITMAP_BYTES * 8) {
    error_set (err, EFBIG, "Too much space will be occupied by the bitmap. "
               "Use larger granularity");
    return NULL;
  }
  run.nr = 1 + our_bits_clusters (q->size, shift);
  if (qcow2_take_run (q, our_first_free (q->nr_l2) + OUR_DIR_PLACES, &run,
                      err) == -1)
    return NULL;
  if (zero_range (q->fd, (run.first + 1) << OUR_CLUSTER_BITS,
                  map_length (q, shift)) == -1
      || write_table (q, &run) == -1) {
    error_set (err, errno, "%s: cannot allocate %zu bytes for a bitmap: %m",
               q->path, map_length (q, shift));
    qcow2_drop_run (q, &run);
    return NULL;
  }
  b = qcow2_map_bits (q, &run, shift, err);
  if (b == NULL)
    qcow2_drop_run (q, &run);
  return b;
}

void
qcow2_free (struct qcow2 *q, struct qcow2_bits *bits)
{
  if (bits == NULL)
    return;
  for (struct qcow2_bits **p = &q->bits; *p; p = &(*p)->next)
    if (*p == bits) {
      *p = bits->next;
      break;
    }
  /* While the directory on disk may still have it, it is leaked rather. */
  if (!bits->listed && !qcow2_has_failed (q))
    qcow2_drop_run (q, &bits->run);
  qcow2_unmap_bits (bits);
}

uint64_t *
qcow2_words (struct qcow2_bits *bits)
{
  return bits->words;
}
