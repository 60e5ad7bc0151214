/* nbdferry - packets: what travels in a migration
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "disk.h"
#include "hash.h"
#include "packet.h"

static const char magic[8] = { 'N', 'B', 'D', 'F', 'E', 'R', 'R', 'Y' };

/* The header as it lies on the wire.  Every field is naturally aligned. */
struct wire_header {
  char magic[8];
  uint16_t version;
  uint16_t type;
  uint32_t flags;
  uint8_t session[16];
  uint64_t epoch;
  uint32_t channel;
  uint32_t disk;
  uint64_t number;
  uint32_t header_size;
  uint32_t nr_extents;
  uint32_t nr_sections;
  uint32_t body_size;
  uint32_t payload_size;
  uint32_t raw_size;
  uint64_t body_hash;
  uint64_t payload_hash;
  uint8_t reserved[24];
  uint64_t header_hash; /* of all before it */
};
_Static_assert (sizeof (struct wire_header) == PACKET_HEADER, "header");

struct wire_extent {
  uint64_t offset, length;
  uint32_t type, reserved;
};
_Static_assert (sizeof (struct wire_extent) == PACKET_EXTENT, "extent");

struct wire_section {
  uint64_t granularity, first_bit, nr_bits;
  uint32_t size;
  uint16_t name_len;
  uint8_t encoding, flags;
  uint64_t reserved;
};
_Static_assert (sizeof (struct wire_section) == PACKET_SECTION, "section");

#define ENCODING_OPS 1 /* bitmap/wire.h */

static size_t
padded (size_t n)
{
  return (n + 7) & ~(size_t) 7;
}

/* ---- building ---- */

void
packet_put_extent (uint8_t *at, const struct packet_extent *e)
{
  struct wire_extent w = {
    .offset = htobe64 (e->offset),
    .length = htobe64 (e->length),
    .type = htobe32 (e->type),
  };

  memcpy (at, &w, sizeof w);
}

size_t
packet_section_overhead (size_t name_len)
{
  return PACKET_SECTION + name_len + 7;
}

uint8_t *
packet_begin_section (uint8_t *at, const struct packet_section *s)
{
  struct wire_section w = {
    .granularity = htobe64 (s->granularity),
    .first_bit = htobe64 (s->first_bit),
    .name_len = htobe16 (s->name_len),
    .encoding = ENCODING_OPS,
    .flags = s->flags,
  };

  memcpy (at, &w, sizeof w);
  memcpy (at + sizeof w, s->name, s->name_len);
  return at + sizeof w + s->name_len;
}

uint8_t *
packet_end_section (uint8_t *at, uint8_t *bits, uint64_t nr_bits, size_t size)
{
  struct wire_section w;
  size_t total = bits + size - at;

  memcpy (&w, at, sizeof w);
  w.nr_bits = htobe64 (nr_bits);
  w.size = htobe32 (size);
  memcpy (at, &w, sizeof w);
  memset (at + total, 0, padded (total) - total);
  return at + padded (total);
}

void
packet_seal (uint8_t *buf, const struct packet_header *h, const void *payload)
{
  struct wire_header w = {
    .version = htobe16 (PACKET_VERSION),
    .type = htobe16 (h->type),
    .flags = htobe32 (h->flags),
    .epoch = htobe64 (h->epoch),
    .channel = htobe32 (h->channel),
    .disk = htobe32 (h->disk),
    .number = htobe64 (h->number),
    .header_size = htobe32 (PACKET_HEADER),
    .nr_extents = htobe32 (h->nr_extents),
    .nr_sections = htobe32 (h->nr_sections),
    .body_size = htobe32 (h->body_size),
    .payload_size = htobe32 (h->payload_size),
    .raw_size = htobe32 (h->raw_size),
  };

  memcpy (w.magic, magic, sizeof magic);
  memcpy (w.session, h->session.b, sizeof w.session);
  w.body_hash = htobe64 (XXH3_64bits (buf + PACKET_HEADER, h->body_size));
  w.payload_hash = htobe64 (XXH3_64bits (payload, h->payload_size));
  w.header_hash =
    htobe64 (XXH3_64bits (&w, offsetof (struct wire_header, header_hash)));
  memcpy (buf, &w, sizeof w);
}

/* ---- parsing ---- */

static void
unpack_header (const struct wire_header *w, struct packet_header *h)
{
  h->type = be16toh (w->type);
  h->flags = be32toh (w->flags);
  memcpy (h->session.b, w->session, sizeof h->session.b);
  h->epoch = be64toh (w->epoch);
  h->channel = be32toh (w->channel);
  h->disk = be32toh (w->disk);
  h->number = be64toh (w->number);
  h->nr_extents = be32toh (w->nr_extents);
  h->nr_sections = be32toh (w->nr_sections);
  h->body_size = be32toh (w->body_size);
  h->payload_size = be32toh (w->payload_size);
  h->raw_size = be32toh (w->raw_size);
}

static bool
is_for_archives (enum packet_type type)
{
  return type == PACKET_ARCHIVE_HEAD || type == PACKET_ARCHIVE_END;
}

/* 'len' is the whole packet's, or 0 if that is not known yet. */
static int
check_header (const struct packet_header *h, size_t len, struct error *err)
{
  bool data = h->type == PACKET_DATA, blob = h->type == PACKET_BLOB;

  if ((h->type < PACKET_HELLO || h->type > PACKET_BLOB) &&
      !is_for_archives (h->type))
    return error_set (err, EBADMSG, "packet of unknown type %d", h->type);
  if (h->flags & ~PACKET_KNOWN_FLAGS)
    return error_set (err, EBADMSG, "packet with unknown flags 0x%" PRIx32,
                      h->flags & ~PACKET_KNOWN_FLAGS);
  if ((h->flags & PACKET_ZLIB) && (h->flags & PACKET_ZSTD))
    return error_set (err, EBADMSG, "packet compressed in two ways");
  if (len > 0 &&
      (uint64_t) PACKET_HEADER + h->body_size + h->payload_size != len)
    return error_set (err, EBADMSG,
                      "packet of %zu bytes speaks of %" PRIu32 " + %" PRIu32
                      " bytes behind its header",
                      len, h->body_size, h->payload_size);
  if (h->nr_extents > PACKET_MAX_EXTENTS ||
      (uint64_t) h->nr_extents * PACKET_EXTENT > h->body_size)
    return error_set (err, EBADMSG, "packet with %" PRIu32
                      " extents in %" PRIu32 " bytes",
                      h->nr_extents, h->body_size);
  if (!data && (h->nr_extents || h->nr_sections ||
                (h->payload_size && !blob)))
    return error_set (err, EBADMSG, "control packet with block data");
  if (blob && h->flags != 0)
    return error_set (err, EBADMSG, "BLOB packet with flags 0x%" PRIx32,
                      h->flags);
  if (h->raw_size > PACKET_MAX)
    return error_set (err, EBADMSG, "payload of %" PRIu32 " bytes, more than "
                      "the %d allowed", h->raw_size, PACKET_MAX);
  if (!(h->flags & (PACKET_ZLIB | PACKET_ZSTD)) &&
      h->raw_size != h->payload_size)
    return error_set (err, EBADMSG, "payload of %" PRIu32 " bytes that is "
                      "said to be %" PRIu32, h->payload_size, h->raw_size);
  return 0;
}

static int
parse_header (const uint8_t *buf, size_t len, struct packet_header *h,
              struct error *err)
{
  struct wire_header w;

  memcpy (&w, buf, sizeof w);
  if (memcmp (w.magic, magic, sizeof magic) != 0)
    return error_set (err, EBADMSG, "not a packet: wrong magic");
  /* Before anything else: another version may differ in all the rest. */
  if (be16toh (w.version) != PACKET_VERSION)
    return error_set (err, EPROTONOSUPPORT,
                      "the source speaks version %d of the protocol, this "
                      "side version %d; use the same release on both sides",
                      be16toh (w.version), PACKET_VERSION);
  if (be64toh (w.header_hash) !=
      XXH3_64bits (&w, offsetof (struct wire_header, header_hash)))
    return error_set (err, EBADMSG, "damaged packet: the header's checksum "
                      "is wrong");
  if (be32toh (w.header_size) != PACKET_HEADER)
    return error_set (err, EBADMSG, "packet with a header of %" PRIu32
                      " bytes", be32toh (w.header_size));
  unpack_header (&w, h);
  return check_header (h, len, err);
}

int
packet_parse_header (const uint8_t *buf, struct packet_header *h,
                     struct error *err)
{
  return parse_header (buf, 0, h, err);
}

int
packet_check_body (const uint8_t *buf, struct error *err)
{
  struct wire_header w;

  memcpy (&w, buf, sizeof w);
  if (be64toh (w.body_hash) !=
      XXH3_64bits (buf + PACKET_HEADER, be32toh (w.body_size)))
    return error_set (err, EBADMSG, "damaged packet: the body's checksum is "
                      "wrong");
  return 0;
}

int
packet_check_payload (const uint8_t *buf, const void *payload,
                      struct error *err)
{
  struct wire_header w;

  memcpy (&w, buf, sizeof w);
  if (be64toh (w.payload_hash) !=
      XXH3_64bits (payload, be32toh (w.payload_size)))
    return error_set (err, EBADMSG, "damaged packet: the payload's checksum "
                      "is wrong");
  return 0;
}

int
packet_parse (const uint8_t *buf, size_t len, struct packet_header *h,
              struct error *err)
{
  if (len < PACKET_HEADER || len > PACKET_MAX)
    return error_set (err, EBADMSG, "packet of %zu bytes", len);
  if (parse_header (buf, len, h, err) == -1)
    return -1;
  if (is_for_archives (h->type))
    return error_set (err, EBADMSG, "packet of an archive, on the wire");
  if (packet_check_body (buf, err) == -1)
    return -1;
  return packet_check_payload (buf, packet_payload (buf, h), err);
}

const char *
packet_json (const uint8_t *buf)
{
  return (const char *) buf + PACKET_HEADER;
}

const uint8_t *
packet_payload (const uint8_t *buf, const struct packet_header *h)
{
  return buf + PACKET_HEADER + h->body_size;
}

void
packet_get_extent (const uint8_t *buf, uint32_t i, struct packet_extent *e)
{
  struct wire_extent w;

  memcpy (&w, buf + PACKET_HEADER + (size_t) i * PACKET_EXTENT, sizeof w);
  e->offset = be64toh (w.offset);
  e->length = be64toh (w.length);
  e->type = be32toh (w.type);
}

int
packet_check_extents (const uint8_t *buf, const struct packet_header *h,
                      uint64_t disk_size, struct error *err)
{
  uint64_t data = 0;

  for (uint32_t i = 0; i < h->nr_extents; i++) {
    struct packet_extent e;

    packet_get_extent (buf, i, &e);
    if (e.length == 0 || e.offset > disk_size ||
        e.length > disk_size - e.offset || e.type > EXTENT_HOLE)
      return error_set (err, EBADMSG,
                        "extent of type %" PRIu32 " at %" PRIu64 " + %" PRIu64
                        " does not lie in a disk of %" PRIu64 " bytes",
                        e.type, e.offset, e.length, disk_size);
    if (e.type == EXTENT_DATA) {
      /* Can't overflow: each is at most the disk, and it ends at once. */
      data += e.length;
      if (data > h->raw_size)
        break;
    }
  }
  if (data != h->raw_size)
    return error_set (err, EBADMSG, "the extents do not match a payload of %"
                      PRIu32 " bytes", h->raw_size);
  return 0;
}

int
packet_next_section (const uint8_t *buf, const struct packet_header *h,
                     size_t *pos, uint32_t *seen, struct packet_section *s,
                     struct error *err)
{
  size_t begin = (size_t) h->nr_extents * PACKET_EXTENT;
  size_t left = h->body_size - begin - *pos;
  const uint8_t *at = buf + PACKET_HEADER + begin + *pos;
  struct wire_section w;
  size_t total;

  if (*seen == h->nr_sections) {
    if (left != 0)
      return error_set (err, EBADMSG, "%zu bytes behind the last bitmap "
                        "section", left);
    return 0;
  }
  if (left < sizeof w)
    return error_set (err, EBADMSG, "bitmap section %" PRIu32 " is cut off",
                      *seen);
  memcpy (&w, at, sizeof w);
  s->name_len = be16toh (w.name_len);
  s->size = be32toh (w.size);
  s->flags = w.flags;
  s->granularity = be64toh (w.granularity);
  s->first_bit = be64toh (w.first_bit);
  s->nr_bits = be64toh (w.nr_bits);
  total = sizeof w + s->name_len + s->size;
  if (padded (total) > left)
    return error_set (err, EBADMSG, "bitmap section %" PRIu32 " of %zu bytes "
                      "is cut off", *seen, total);
  if (w.encoding != ENCODING_OPS || (w.flags & ~SECTION_REPLACE))
    return error_set (err, EBADMSG, "bitmap section %" PRIu32 " in an unknown "
                      "encoding (%d, flags %d)", *seen, w.encoding, w.flags);
  if (s->name_len == 0 || s->name_len > PACKET_MAX_NAME)
    return error_set (err, EBADMSG, "bitmap section %" PRIu32 " with a name "
                      "of %zu bytes", *seen, s->name_len);
  s->name = (const char *) at + sizeof w;
  s->bits = at + sizeof w + s->name_len;
  *pos += padded (total);
  ++*seen;
  return 1;
}
