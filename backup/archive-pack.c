/* nbdferry - one packet of an archive, as it is filled
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "archive-pack.h"
#include "cleanup.h"
#include "disk.h"

/* Zeros are looked for in pieces of this size, at multiples of it. */
#define ZERO_UNIT (32 << 10)

/* An extent is cut at its ends and at each multiple within. */
_Static_assert (2 * PACK_EXTENTS + PACK_DATA / ZERO_UNIT <=
                  PACKET_MAX_EXTENTS, "room for zeros that are found");

int
pack_init (struct pack *p, struct error *err)
{
  *p = (struct pack){ 0 };
  p->extents = malloc (PACKET_MAX_EXTENTS * sizeof p->extents[0]);
  p->raw = malloc (PACK_DATA);
  p->packet = malloc (PACKET_HEADER + PACKET_MAX_EXTENTS * PACKET_EXTENT);
  if (p->extents && p->raw && p->packet)
    return 0;
  pack_destroy (p);
  return error_set (err, ENOMEM, "%m");
}

void
pack_destroy (struct pack *p)
{
  compressor_free (&p->compressor);
  free (p->extents);
  free (p->raw);
  free (p->packet);
  free (p->compressed);
  *p = (struct pack){ 0 };
}

void
pack_clear (struct pack *p)
{
  p->nr = 0;
  p->raw_size = 0;
}

uint64_t
pack_room (const struct pack *p, enum extent_type type)
{
  if (p->nr == PACK_EXTENTS)
    return 0;
  return type == EXTENT_DATA ? PACK_DATA - p->raw_size : UINT64_MAX;
}

/* Append, or make the last one longer. */
static void
append (struct pack *p, uint64_t offset, uint64_t length,
        enum extent_type type)
{
  struct packet_extent *last = p->nr > 0 ? &p->extents[p->nr - 1] : NULL;

  if (last && last->type == type && last->offset + last->length == offset)
    last->length += length;
  else
    p->extents[p->nr++] = (struct packet_extent){ offset, length, type };
}

uint8_t *
pack_add (struct pack *p, uint64_t offset, uint64_t length,
          enum extent_type type)
{
  uint8_t *at = p->raw + p->raw_size;

  append (p, offset, length, type);
  if (type == EXTENT_DATA)
    p->raw_size += length;
  return at;
}

/* One extent of data, piece by piece; what is not zeros moves down to *to. */
static void
split (struct pack *p, const struct packet_extent *e, const uint8_t *from,
       size_t *to)
{
  uint64_t end = e->offset + e->length, n;

  for (uint64_t at = e->offset; at < end; at += n, from += n) {
    n = ZERO_UNIT - at % ZERO_UNIT;
    n = n < end - at ? n : end - at;
    if (disk_is_zero (from, n))
      append (p, at, n, EXTENT_ZERO);
    else {
      if (p->raw + *to != from)
        memmove (p->raw + *to, from, n);
      append (p, at, n, EXTENT_DATA);
      *to += n;
    }
  }
}

int
pack_find_zeros (struct pack *p, struct error *err)
{
  size_t nr = p->nr, from = 0, to = 0;
  CLEANUP_FREE struct packet_extent *old =
    malloc (nr * sizeof old[0] + 1);

  if (old == NULL)
    return error_set (err, ENOMEM, "%m");
  memcpy (old, p->extents, nr * sizeof old[0]);
  p->nr = 0;
  for (size_t i = 0; i < nr; i++) {
    if (old[i].type == EXTENT_DATA) {
      split (p, &old[i], p->raw + from, &to);
      from += old[i].length;
    }
    else
      append (p, old[i].offset, old[i].length, old[i].type);
  }
  p->raw_size = to;
  return 0;
}

/* Returns the packet's flag. */
static uint32_t
compress_it (struct pack *p, const struct pack_compression *c)
{
  size_t n = 0, cap = p->raw_size - p->raw_size / 16; /* or it isn't worth it */

  p->payload = p->raw;
  p->payload_size = p->raw_size;
  if (c->how == MIGRATE_COMPRESSION_NONE || p->raw_size == 0)
    return 0;
  if (p->compressed == NULL && (p->compressed = malloc (PACK_DATA)) == NULL)
    return 0;
  p->compressor.level = c->level ? c->level + 1 : 0;
  n = compress_payload (&p->compressor, c->how, p->compressed, cap, p->raw,
                        p->raw_size);
  if (n == 0)
    return 0;
  p->payload = p->compressed;
  p->payload_size = n;
  return c->how == MIGRATE_COMPRESSION_ZLIB ? PACKET_ZLIB : PACKET_ZSTD;
}

int
pack_seal (struct pack *p, const struct uuid *id, uint64_t number,
           const struct pack_compression *c, struct error *err)
{
  struct packet_header h = {
    .type = PACKET_DATA,
    .flags = PACKET_DEVICE_BLOCK,
    .session = *id,
    .number = number,
    .nr_extents = p->nr,
    .body_size = p->nr * PACKET_EXTENT,
    .raw_size = p->raw_size,
  };

  if (p->nr > PACKET_MAX_EXTENTS)
    return error_set (err, EOVERFLOW, "%zu extents in a packet", p->nr);
  h.flags |= compress_it (p, c);
  h.payload_size = p->payload_size;
  if (p->raw_size > 0)
    h.flags |= PACKET_HAS_BLOCK;
  for (size_t i = 0; i < p->nr; i++) {
    if (p->extents[i].type != EXTENT_DATA)
      h.flags |= PACKET_ZERO_BLOCK;
    packet_put_extent (p->packet + PACKET_HEADER + i * PACKET_EXTENT,
                       &p->extents[i]);
  }
  packet_seal (p->packet, &h, p->payload);
  p->packet_size = PACKET_HEADER + h.body_size;
  return 0;
}
