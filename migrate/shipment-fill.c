/* nbdferry - a shipment: filling packets
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Chunks are chosen (shipment.c), read, and put into the packet, zeros as
 * extents; then the bits that the bitmaps have there.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "shipment-impl.h"
#include "wire.h"

/* Zeros that are written out must be read to be found; no more of them than
 * this for one packet, so that its data is not kept waiting.
 */
#define MAX_SCAN (16 << 20)

/* The room for the bits of one bitmap is at least this. */
#define MIN_BITS_ROOM 2048

/* Zeros are looked for in units of this size. */
#define ZERO_UNIT (64 << 10)

/* So much is read at once: it is looked at while it is in the CPU's cache, and
 * data behind zeros is not moved far.  A multiple of the unit.
 */
#define READ_PIECE (128 << 10)

/* ---- blocks ---- */

/* A packet being filled. */
struct filling {
  struct shipment *s;
  struct buffer *b;
  size_t room;             /* of the payload */
  size_t used;             /* of that */
  struct packet_extent *e; /* PACKET_MAX_EXTENTS of them */
  size_t nr;
  uint64_t scanned;        /* bytes that were read and found to be zeros */
  uint64_t longest;        /* bytes of a run whose bits are sure to fit */
  const struct range *only; /* what to take, nr_only of them; NULL: what this
                               round has left */
  size_t nr_only;
  uint64_t cursor;         /* in the first of them; only ascends, as the runs
                              of a packet must */
};

/* The next run to go into the packet: 1, 0 if there is none, -1. */
static int
next_run (struct filling *f, struct range *run, struct range *data,
          struct error *err)
{
  size_t room = f->room - f->used;

  if (f->only == NULL)
    return shipment_take (f->s, &f->s->cursor, f->s->drive->size, room,
                          f->longest, run, data, err);
  while (f->nr_only > 0) {
    int r;

    if (f->cursor < f->only->start)
      f->cursor = f->only->start;
    r = 0;
    if (f->cursor < f->only->end)
      r = shipment_take (f->s, &f->cursor, f->only->end, room, f->longest,
                         run, data, err);
    if (r != 0)
      return r;
    f->only++;
    f->nr_only--;
  }
  return 0;
}

static void
add_extent (struct filling *f, uint64_t start, uint64_t end,
            enum extent_type type)
{
  struct packet_extent *last = f->nr ? &f->e[f->nr - 1] : NULL;

  if (last && last->type == type && last->offset + last->length == start)
    last->length += end - start;
  else
    f->e[f->nr++] = (struct packet_extent){ .offset = start,
                                            .length = end - start,
                                            .type = type };
  if (type != EXTENT_DATA)
    f->b->zero_bytes += end - start;
}

/* Data was read to the end of the payload: leave the zeros out. */
static void
add_data (struct filling *f, uint64_t start, uint64_t end)
{
  uint8_t *p = f->b->payload + f->used; /* where the next data byte goes */
  const uint8_t *in = p;

  while (start < end) {
    uint64_t unit = (start | (ZERO_UNIT - 1)) + 1;
    size_t n = (unit < end ? unit : end) - start;

    if (disk_is_zero (in, n)) {
      add_extent (f, start, start + n, EXTENT_ZERO);
      f->scanned += n;
    }
    else {
      add_extent (f, start, start + n, EXTENT_DATA);
      if (p != in)
        memmove (p, in, n);
      p += n;
      f->used += n;
    }
    in += n;
    start += n;
  }
}

/* Take out what lies at 'stop' or after.  A chunk that is put back may go in
 * another packet, with newer data, and overtake this one: nothing of it may
 * stay in here.
 */
static void
cut_back (struct filling *f, uint64_t stop)
{
  while (f->nr > 0) {
    struct packet_extent *e = &f->e[f->nr - 1];
    uint64_t end = e->offset + e->length;
    uint64_t cut = end - (e->offset > stop ? e->offset : stop);

    if (end <= stop)
      break;
    if (e->type == EXTENT_DATA)
      f->used -= cut;
    else
      f->b->zero_bytes -= cut;
    e->length -= cut;
    if (e->length > 0)
      break;
    f->nr--;
  }
}

/* How many extents a run may take at worst, beside what is there. */
static size_t
worst_extents (const struct range *run)
{
  return 2 + (run->end - run->start) / ZERO_UNIT;
}

/* What to take the disk for at that place of a run. */
static int
look (const struct filling *f, const struct range *run,
      const struct range *data, uint64_t at, struct extent *ext)
{
  struct disk *disk = f->s->drive->disk;

  *ext = (struct extent){ at, run->end, EXTENT_DATA };
  if (run->end - run->start <= SHORT_RUN)
    return 0;
  if (at >= data->start && at < data->end) {
    if (data->end < ext->end)
      ext->end = data->end;
    return 0;
  }
  return disk->ops->extent (disk, at, run->end, ext);
}

/* A read has failed: where exactly? */
static uint64_t
find_bad (const struct filling *f, uint64_t at, uint64_t end)
{
  struct disk *disk = f->s->drive->disk;
  uint8_t sector[512];
  int saved = errno;

  while (at + sizeof sector < end &&
         disk->ops->pread (disk, sector, sizeof sector, at) == 0)
    at += sizeof sector;
  errno = saved;
  return at;
}

/* Read one run into the packet.  Returns where it had to stop. */
static int
add_run (struct filling *f, const struct range *run,
         const struct range *data, uint64_t *stop, struct error *err)
{
  struct disk *disk = f->s->drive->disk;
  uint64_t at = run->start;

  *stop = run->end;
  while (at < run->end) {
    struct extent ext;
    size_t n;

    if (look (f, run, data, at, &ext) == -1)
      goto fail;
    if (ext.type != EXTENT_DATA) {
      if (f->nr == PACKET_MAX_EXTENTS)
        goto full;
      add_extent (f, at, ext.end, ext.type);
      at = ext.end;
      continue;
    }
    n = f->room - f->used;
    if (ext.end - at < n)
      n = ext.end - at;
    /* A piece of data ends at a chunk, unless it is the last of its run. */
    if (n < ext.end - at)
      n -= (at + n) % f->s->granule < n ? (at + n) % f->s->granule : n;
    if (n > READ_PIECE - at % READ_PIECE)
      n = READ_PIECE - at % READ_PIECE;
    if (n == 0 ||
        f->nr + worst_extents (&(struct range){ at, at + n }) >
          PACKET_MAX_EXTENTS)
      goto full;
    if (disk->ops->pread (disk, f->b->payload + f->used, n, at) == -1) {
      at = find_bad (f, at, at + n);
      goto fail;
    }
    add_data (f, at, at + n);
    at += n;
  }
  return 0;

 full:
  /* In whole chunks. */
  *stop = shipment_chunk (f->s, at);
  cut_back (f, *stop);
  return 0;

 fail:
  return error_set (err, errno, "disk '%s': read %s at %" PRIu64 ": %m",
                    f->s->drive->name, f->s->drive->path, at);
}

/* Neighbours become one, so that there are never more than extents. */
static void
add_cover (struct range_list *covers, uint64_t start, uint64_t end)
{
  struct range *last = covers->nr ? &covers->v[covers->nr - 1] : NULL;

  if (last && last->end == start)
    last->end = end;
  else
    covers->v[covers->nr++] = (struct range){ start, end };
}

static int
fill_runs (struct filling *f, struct error *err)
{
  struct range run, data;
  int r = 0;

  while (f->scanned < MAX_SCAN && f->room - f->used >= f->s->granule &&
         f->nr + worst_extents (&(struct range){ 0, f->room }) <=
           PACKET_MAX_EXTENTS &&
         (r = next_run (f, &run, &data, err)) == 1) {
    uint64_t stop;

    if (add_run (f, &run, &data, &stop, err) == -1)
      return -1;
    if (stop < run.end)
      shipment_put_back (f->s, stop, run.end);
    if (stop > run.start)
      add_cover (&f->b->covers, run.start, stop);
    if (stop < run.end)
      break;
  }
  return r == -1 ? -1 : 0;
}

/* ---- bits ---- */

/* The room for the bits of each bitmap that goes along, its section's head
 * included.
 */
static size_t
bits_room (const struct filling *f)
{
  size_t cap = f->b->head - PACKET_HEADER - PACKET_MAX_EXTENTS * PACKET_EXTENT;

  return cap / (f->s->nr_told ? f->s->nr_told : 1);
}

/* How long may one run be, so that the bits of all bitmaps fit even if they
 * are set at random?  They are never coded in much more than their number.
 */
static int
find_longest (struct filling *f, struct error *err)
{
  struct drive *d = f->s->drive;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);
  size_t room = bits_room (f);
  unsigned shift = BITMAP_MAX_SHIFT;

  if (room < MIN_BITS_ROOM)
    return error_set (err, E2BIG, "disk '%s' has got too many bitmaps since "
                      "the migration began", d->name);
  for (size_t i = 0; i < d->nr_bitmaps; i++)
    if (d->bitmaps[i]->shift < shift)
      shift = d->bitmaps[i]->shift;
  room -= packet_section_overhead (PACKET_MAX_NAME);
  f->longest = shipment_chunk (f->s, (uint64_t) room * 8 / 4 * 3 << shift);
  if (f->longest < f->s->granule)
    f->longest = f->s->granule;
  return 0;
}

static const struct shipment_bitmap *
find_told (const struct shipment *s, const struct named_bitmap *nb)
{
  for (size_t i = 0; i < s->nr_told; i++)
    if (s->told[i].id == nb->id)
      return &s->told[i];
  return NULL;
}

/* One bitmap's section for the ranges that the packet covers.  Returns where
 * the next section begins, and lowers *upto to what fitted.
 */
static uint8_t *
add_section (const struct range_list *covers, const struct named_bitmap *nb,
             const char *alias, uint8_t *at, size_t room, uint64_t *upto)
{
  uint64_t first = covers->v[0].start >> nb->shift;
  struct packet_section sec = {
    .name = alias,
    .name_len = strlen (alias),
    .granularity = UINT64_C (1) << nb->shift,
    .first_bit = first,
  };
  size_t overhead = packet_section_overhead (sec.name_len);
  uint8_t *bits = packet_begin_section (at, &sec);
  struct bits_writer w;

  bits_writer_init (&w, bits, room - overhead, first);
  for (size_t i = 0; i < covers->nr && covers->v[i].start < *upto; i++) {
    uint64_t end = covers->v[i].end < *upto ? covers->v[i].end : *upto;
    uint64_t done = bits_write (&w, nb->bits, covers->v[i].start, end);

    if (done < end) {
      *upto = done;
      break;
    }
  }
  if (w.len == 0)
    return at; /* none is set here: it costs nothing */
  return packet_end_section (at, bits, w.next - first, w.len);
}

/* The bits of all bitmaps, at the start of the buffer's head. */
static size_t
add_sections (struct filling *f)
{
  struct shipment *s = f->s;
  struct drive *d = s->drive;
  struct buffer *b = f->b;
  const size_t room = bits_room (f);
  uint64_t upto = d->size;
  uint8_t *at = b->mem;

  pthread_mutex_lock (&d->list);
  for (size_t i = 0; i < d->nr_bitmaps; i++) {
    struct named_bitmap *nb = d->bitmaps[i];
    const struct shipment_bitmap *told = find_told (s, nb);
    uint8_t *next;

    if (nb->bits == NULL || told == NULL)
      continue;
    next = add_section (&b->covers, nb, told->alias ?: nb->name, at, room,
                        &upto);
    if (next > at)
      b->h.nr_sections++;
    at = next;
  }
  pthread_mutex_unlock (&d->list);
  /* Chunks whose bits did not fit are sent again, with their bits. */
  for (size_t i = 0; i < b->covers.nr; i++) {
    const struct range *r = &b->covers.v[i];
    uint64_t from = r->start > upto ? r->start : upto;

    if (from < r->end)
      bitmap_set (s->ship, from, r->end - from);
  }
  return at - b->mem;
}

/* ---- the packet ---- */

/* Put the extent table and the sections right before the payload. */
static void
assemble (struct filling *f, size_t sections)
{
  struct buffer *b = f->b;
  uint8_t *to = b->payload - sections;

  memmove (to, b->mem, sections);
  to -= f->nr * PACKET_EXTENT;
  for (size_t i = 0; i < f->nr; i++)
    packet_put_extent (to + i * PACKET_EXTENT, &f->e[i]);
  b->section_bytes = sections;
  b->h.disk = f->s->index;
  b->h.nr_extents = f->nr;
  b->h.body_size = f->nr * PACKET_EXTENT + sections;
  b->h.raw_size = b->h.payload_size = f->used;
  b->h.flags = PACKET_DEVICE_BLOCK;
  if (f->used > 0)
    b->h.flags |= PACKET_HAS_BLOCK;
  if (b->zero_bytes > 0)
    b->h.flags |= PACKET_ZERO_BLOCK;
  if (b->h.nr_sections > 0)
    b->h.flags |= PACKET_HAS_BITMAPS;
}

static void
compress (struct buffer *b, enum migrate_compression how,
          struct compressor *c)
{
  size_t r = compress_if_it_pays (c, how, b->payload, b->h.payload_size);

  if (r == 0)
    return;
  b->h.payload_size = r;
  b->h.flags |=
    how == MIGRATE_COMPRESSION_ZLIB ? PACKET_ZLIB : PACKET_ZSTD;
}

static int
fill (struct filling *f, enum migrate_compression how, struct compressor *c,
      struct error *err)
{
  CLEANUP_FREE struct packet_extent *extents =
    malloc (PACKET_MAX_EXTENTS * sizeof *extents);
  struct shipment *s = f->s;
  struct buffer *b = f->b;

  if (extents == NULL)
    return error_set (err, ENOMEM, "%m");
  f->e = extents;
  f->room = b->room > s->granule ? b->room : s->granule;
  b->cargo = s;
  pthread_mutex_lock (&s->lock);
  b->sequence = ++s->sequence;
  pthread_mutex_unlock (&s->lock);
  if (find_longest (f, err) == -1)
    return -1;
  if (fill_runs (f, err) == -1)
    return -1;
  if (b->covers.nr == 0)
    return 0;
  assemble (f, add_sections (f));
  compress (b, how, c);
  return 1;
}

int
shipment_fill (struct shipment *s, struct buffer *b,
               enum migrate_compression how, struct compressor *c,
               struct error *err)
{
  struct filling f = { .s = s, .b = b };

  return fill (&f, how, c, err);
}

int
shipment_fill_ranges (struct shipment *s, struct buffer *b,
                      const struct range *ranges, size_t nr,
                      enum migrate_compression how, struct compressor *c,
                      struct error *err)
{
  struct filling f = { .s = s, .b = b, .only = ranges, .nr_only = nr };

  return fill (&f, how, c, err);
}
