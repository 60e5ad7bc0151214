/* nbdferry - the sidecar: our layout, made new
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * docs/sidecar.md has the picture.  A sidecar is made in a file of its own,
 * which takes the name only when it is whole and durable.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <unistd.h>

#include "cleanup.h"
#include "error.h"
#include "fullio.h"
#include "qcow2-internal.h"

#if __BYTE_ORDER != __LITTLE_ENDIAN
#error "the bits of a qcow2 are little-endian, and are mapped as words"
#endif

struct qcow2 *
qcow2_new (int fd, const char *path, const char *data_file, uint64_t size,
           struct error *err)
{
  struct qcow2 *q = calloc (1, sizeof *q);

  if (q == NULL) {
    close (fd);
    error_set (err, ENOMEM, "%s: %m", path);
    return NULL;
  }
  q->fd = fd;
  q->lost = &q->lost_page;
  q->size = size;
  q->nr_l2 = our_nr_l2 (size);
  q->path = strdup (path);
  q->data_file = strdup (data_file);
  q->refs = calloc (OUR_MAX_CLUSTERS, sizeof *q->refs);
  if (q->path == NULL || q->data_file == NULL || q->refs == NULL) {
    qcow2_destroy (q);
    error_set (err, ENOMEM, "%s: %m", path);
    return NULL;
  }
  qcow2_ref_run (q, &(struct qcow2_run) { 0, our_first_free (q->nr_l2) });
  if (q->nr_l2 == 0)
    q->refs[OUR_L1] = 0; /* an L1 table without entries is none */
  return q;
}

void
qcow2_forget_entries (struct qcow2 *q)
{
  for (size_t i = 0; i < q->nr_entries; ++i)
    free (q->entries[i].name);
  free (q->entries);
  q->entries = NULL;
  q->nr_entries = 0;
}

void
qcow2_destroy (struct qcow2 *q)
{
  struct qcow2_bits *b, *next;

  for (b = q->bits; b; b = next) {
    next = b->next;
    qcow2_unmap_bits (b);
  }
  qcow2_forget_entries (q);
  free (q->dir);
  free (q->refs);
  free (q->data_file);
  free (q->path);
  close (q->fd);
  free (q);
}

static size_t
header_length (const struct qcow2 *q)
{
  size_t n = strlen (q->data_file);

  /* The extension of the data file, and the one that ends them. */
  return OUR_EXT_DATA_FILE + 8 + ((n + 7) & ~(size_t) 7) + 8;
}

/* The whole header with its extensions, for the directory in 'q'. */
static uint8_t *
encode_header (const struct qcow2 *q)
{
  const struct qcow2_header h = {
    .magic = htobe32 (QCOW2_MAGIC),
    .version = htobe32 (3),
    .cluster_bits = htobe32 (OUR_CLUSTER_BITS),
    .size = htobe64 (q->size),
    .l1_size = htobe32 (q->nr_l2),
    .l1_table_offset = htobe64 (OUR_L1 * OUR_CLUSTER),
    .refcount_table_offset = htobe64 (OUR_REFTABLE * OUR_CLUSTER),
    .refcount_table_clusters = htobe32 (1),
    .incompatible_features = htobe64 (QCOW2_INCOMPAT_DATA_FILE),
    .autoclear_features
      = htobe64 (QCOW2_AUTOCLEAR_OURS | QCOW2_AUTOCLEAR_DATA_FILE_RAW
                 | (q->dir_nr ? QCOW2_AUTOCLEAR_BITMAPS : 0)),
    .refcount_order = htobe32 (4),
    .header_length = htobe32 (QCOW2_HEADER_LENGTH),
  };
  size_t len = header_length (q);
  uint8_t *p = calloc (1, len < OUR_SECTOR ? OUR_SECTOR : len);

  if (p == NULL)
    return NULL;
  memcpy (p, &h, sizeof h);
  put_be32 (p + OUR_EXT_BITMAPS,
            q->dir_nr ? QCOW2_EXT_BITMAPS : QCOW2_EXT_NOTHING);
  put_be32 (p + OUR_EXT_BITMAPS + 4, sizeof (struct qcow2_bitmaps_extension));
  if (q->dir_nr) {
    put_be32 (p + OUR_EXT_BITMAPS + 8, q->dir_nr);
    put_be64 (p + OUR_EXT_BITMAPS + 16, q->dir_len);
    put_be64 (p + OUR_EXT_BITMAPS + 24, q->dir_run.first << OUR_CLUSTER_BITS);
  }
  put_be32 (p + OUR_EXT_DATA_FILE, QCOW2_EXT_DATA_FILE);
  put_be32 (p + OUR_EXT_DATA_FILE + 4, strlen (q->data_file));
  memcpy (p + OUR_EXT_DATA_FILE + 8, q->data_file, strlen (q->data_file));
  return p;
}

int
qcow2_encode_sector (const struct qcow2 *q, uint8_t sector[OUR_SECTOR])
{
  CLEANUP_FREE uint8_t *header = encode_header (q);

  if (header == NULL)
    return -1;
  memcpy (sector, header, OUR_SECTOR);
  return 0;
}

bool
qcow2_is_our_header (const struct qcow2 *q)
{
  size_t len = header_length (q);
  CLEANUP_FREE uint8_t *want = encode_header (q);
  CLEANUP_FREE uint8_t *have = malloc (len);

  return want && have && qcow2_pread (q->fd, have, len, 0) == 0
    && memcmp (have, want, len) == 0;
}

/* Does something with 'len' bytes that belong at 'offset' of q's file; false
 * ends the walk.
 */
typedef bool table_function (struct qcow2 *q, const void *table, size_t len,
                             uint64_t offset);

/* The tables that do not depend on the bitmaps: the refcount table, and the
 * L1 and L2 tables, by which the disk's clusters are at their own offsets.
 */
static bool
for_each_table (struct qcow2 *q, table_function *fn)
{
  CLEANUP_FREE uint64_t *buf = calloc (1, OUR_CLUSTER);
  const uint64_t clusters = qcow2_div_up (q->size, OUR_CLUSTER);
  const uint64_t per_table = OUR_CLUSTER / 8;

  if (buf == NULL)
    return false;
  buf[0] = htobe64 (OUR_REFBLOCK * OUR_CLUSTER);
  if (!fn (q, buf, 8, OUR_REFTABLE * OUR_CLUSTER))
    return false;
  for (uint64_t c = 0; c < clusters; c += per_table) {
    uint64_t n = clusters - c < per_table ? clusters - c : per_table;

    for (uint64_t i = 0; i < n; ++i)
      buf[i] = htobe64 ((c + i) << OUR_CLUSTER_BITS | QCOW2_OFLAG_COPIED);
    if (!fn (q, buf, n * 8, (OUR_L2 + c / per_table) << OUR_CLUSTER_BITS))
      return false;
  }
  for (uint64_t i = 0; i < q->nr_l2; ++i)
    buf[i] = htobe64 ((OUR_L2 + i) << OUR_CLUSTER_BITS | QCOW2_OFLAG_COPIED);
  return fn (q, buf, q->nr_l2 * 8, OUR_L1 * OUR_CLUSTER);
}

static bool
write_table (struct qcow2 *q, const void *table, size_t len, uint64_t offset)
{
  return full_pwrite (q->fd, table, len, offset) == 0;
}

static bool
is_table (struct qcow2 *q, const void *table, size_t len, uint64_t offset)
{
  CLEANUP_FREE void *have = malloc (len);

  return have && qcow2_pread (q->fd, have, len, offset) == 0
    && memcmp (have, table, len) == 0;
}

bool
qcow2_are_our_tables (struct qcow2 *q)
{
  return for_each_table (q, is_table);
}

int
qcow2_create_layout (struct qcow2 *q, struct error *err)
{
  CLEANUP_FREE uint8_t *header = encode_header (q);

  if (header == NULL)
    return error_set (err, ENOMEM, "%s: %m", q->path);
  if (ftruncate (q->fd, our_first_free (q->nr_l2) << OUR_CLUSTER_BITS) == -1
      || !for_each_table (q, write_table)
      || full_pwrite (q->fd, header, header_length (q), 0) == -1)
    return error_set (err, errno, "%s: cannot write the sidecar of a disk of "
                      "%" PRIu64 " bytes: %m", q->path, q->size);
  return qcow2_repair_refs (q, err);
}

/* What qcow2_convert has in hand. */
struct convert {
  struct qcow2 *q;
  size_t room;       /* for entries */
  uint64_t *words;   /* of the bitmap that comes in; NULL: none */
  uint64_t old_bits; /* that count in the old file */
  bool in_use;
};

static void
set_bits (uint64_t *words, uint64_t from, uint64_t to)
{
  for (; from < to && from % 64; ++from)
    words[from / 64] |= UINT64_C (1) << from % 64;
  for (; to - from >= 64 && from < to; from += 64)
    words[from / 64] = UINT64_MAX;
  for (; from < to; ++from)
    words[from / 64] |= UINT64_C (1) << from % 64;
}

static int
convert_found (void *opaque, const struct qcow2_entry *entry, uint64_t size,
               struct error *err)
{
  struct convert *c = opaque;
  struct qcow2 *q = c->q;
  struct qcow2_entry *e;
  const uint64_t bits = qcow2_nr_bits (q->size, entry->shift);

  if (q->nr_entries == c->room) {
    size_t room = c->room ? c->room * 2 : 16;
    struct qcow2_entry *p = realloc (q->entries, room * sizeof *p);

    if (p == NULL)
      return error_set (err, ENOMEM, "%s: %m", q->path);
    q->entries = p;
    c->room = room;
  }
  e = &q->entries[q->nr_entries];
  *e = *entry;
  e->name = strdup (entry->name);
  if (e->name == NULL)
    return error_set (err, ENOMEM, "%s: %m", q->path);
  q->nr_entries++;

  c->words = NULL;
  /* The disk may have grown beyond what a bitmap can have. */
  if (bits > QCOW2_MAX_BITMAP_BYTES * 8)
    e->inconsistent = true;
  if (e->inconsistent)
    return 0;
  e->bits = qcow2_alloc (q, e->shift, err);
  if (e->bits == NULL)
    return error_prefix (err, "bitmap '%s'", e->name);
  c->in_use |= e->in_use;
  c->words = e->bits->words;
  c->old_bits = qcow2_nr_bits (size, e->shift);
  if (e->autoflag && q->size > size)
    set_bits (c->words, size >> e->shift, bits);
  return 0;
}

static int
convert_words (void *opaque, uint64_t first_bit, const uint64_t *words,
               size_t nr, struct error *err)
{
  struct convert *c = opaque;
  const struct qcow2_entry *e = &c->q->entries[c->q->nr_entries - 1];
  const uint64_t bits = qcow2_nr_bits (c->q->size, e->shift);
  const uint64_t end = bits < c->old_bits ? bits : c->old_bits;

  (void) err;
  if (c->words == NULL)
    return 0;
  for (size_t i = 0; i < nr && first_bit + i * 64 < end; ++i) {
    uint64_t left = end - (first_bit + i * 64), w = words[i];

    if (left < 64)
      w &= (UINT64_C (1) << left) - 1;
    c->words[first_bit / 64 + i] |= w;
  }
  return 0;
}

int
qcow2_convert (struct qcow2 *q, int fd, bool *in_use, struct error *err)
{
  static const struct qcow2_reader reader = { convert_found, convert_words };
  struct convert c = { .q = q };

  if (qcow2_read_bitmaps (fd, q->path, &reader, &c, err) == -1)
    return -1;
  *in_use = c.in_use;
  if (q->nr_entries == 0)
    return 0;
  return qcow2_put_directory (q, q->entries, q->nr_entries, err);
}
