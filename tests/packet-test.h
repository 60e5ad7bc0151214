/* nbdferry - what the tests of packets share
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Where things lie on the wire, written down here a second time (from
 * docs/protocol.md), and packets with checksums that are put right after they
 * were changed.
 */
#ifndef FERRY_PACKET_TEST_H
#define FERRY_PACKET_TEST_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

#include <xxhash.h>

#include "packet.h"

/* Offsets in the header. */
enum {
  AT_MAGIC = 0,
  AT_VERSION = 8,
  AT_TYPE = 10,
  AT_FLAGS = 12,
  AT_SESSION = 16,
  AT_EPOCH = 32,
  AT_CHANNEL = 40,
  AT_DISK = 44,
  AT_NUMBER = 48,
  AT_HEADER_SIZE = 56,
  AT_NR_EXTENTS = 60,
  AT_NR_SECTIONS = 64,
  AT_BODY_SIZE = 68,
  AT_PAYLOAD_SIZE = 72,
  AT_RAW_SIZE = 76,
  AT_BODY_HASH = 80,
  AT_PAYLOAD_HASH = 88,
  AT_RESERVED = 96,
  AT_HEADER_HASH = 120,
};

static inline uint64_t
get_be (const uint8_t *p, unsigned bytes)
{
  uint64_t v = 0;

  while (bytes-- > 0)
    v = v << 8 | *p++;
  return v;
}

static inline void
put_be (uint8_t *p, unsigned bytes, uint64_t v)
{
  while (bytes-- > 0) {
    p[bytes] = v;
    v >>= 8;
  }
}

/* Put the checksums right, of as much as there is of 'len' bytes. */
static inline void
repair (uint8_t *p, size_t len)
{
  size_t rest = len - PACKET_HEADER, body, payload;

  if (len < PACKET_HEADER)
    return;
  body = get_be (p + AT_BODY_SIZE, 4);
  body = body < rest ? body : rest;
  payload = get_be (p + AT_PAYLOAD_SIZE, 4);
  payload = payload < rest - body ? payload : rest - body;
  put_be (p + AT_BODY_HASH, 8, XXH3_64bits (p + PACKET_HEADER, body));
  put_be (p + AT_PAYLOAD_HASH, 8,
          XXH3_64bits (p + PACKET_HEADER + body, payload));
  put_be (p + AT_HEADER_HASH, 8, XXH3_64bits (p, AT_HEADER_HASH));
}

/* A packet to be built.  Names are C strings. */
#define PARCEL_MAX 8

struct parcel {
  struct packet_header h; /* its counts and sizes are filled in */
  const char *json;       /* for control packets, or NULL */
  struct packet_extent extents[PARCEL_MAX];
  struct packet_section sections[PARCEL_MAX]; /* bits and size included */
  const void *payload;
};

/* Returns the packet's length.  The extents end with one of length 0 (unless
 * nr_extents says otherwise), the sections with one without a name.
 */
static inline size_t
parcel_build (uint8_t *buf, struct parcel *p)
{
  uint8_t *at = buf + PACKET_HEADER;

  if (p->json) {
    p->h.body_size = strlen (p->json);
    memcpy (at, p->json, p->h.body_size);
    packet_seal (buf, &p->h, at + p->h.body_size);
    return PACKET_HEADER + p->h.body_size;
  }
  if (p->h.nr_extents == 0)
    while (p->extents[p->h.nr_extents].length > 0)
      p->h.nr_extents++;
  for (uint32_t i = 0; i < p->h.nr_extents; i++, at += PACKET_EXTENT)
    packet_put_extent (at, &p->extents[i]);
  p->h.nr_sections = 0;
  for (struct packet_section *s = p->sections; s->name; s++) {
    uint8_t *bits;

    s->name_len = s->name_len ? s->name_len : strlen (s->name);
    bits = packet_begin_section (at, s);
    memcpy (bits, s->bits, s->size);
    at = packet_end_section (at, bits, s->nr_bits, s->size);
    p->h.nr_sections++;
  }
  p->h.body_size = at - buf - PACKET_HEADER;
  if (!(p->h.flags & (PACKET_ZLIB | PACKET_ZSTD)))
    p->h.raw_size = p->h.payload_size;
  if (p->h.payload_size > 0)
    memcpy (at, p->payload, p->h.payload_size);
  packet_seal (buf, &p->h, at);
  return at - buf + p->h.payload_size;
}

#endif /* FERRY_PACKET_TEST_H */
