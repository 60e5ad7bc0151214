/* nbdferry - packets: what travels in a migration
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * docs/protocol.md has the format byte for byte.  A packet is
 *
 *   header | extent table | bitmap sections | payload
 *
 * all big-endian, or for control packets
 *
 *   header | JSON
 *
 * (a BLOB has a payload behind that).  Building and parsing happen in place, in
 * a buffer that somebody else owns; nothing is allocated.  Parsing checks every
 * size against what is there before it is used.
 */
#ifndef FERRY_PACKET_H
#define FERRY_PACKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"
#include "uuid.h"

#define PACKET_VERSION     1
#define PACKET_HEADER      128
#define PACKET_EXTENT      24
#define PACKET_SECTION     40       /* before name and bits */
#define PACKET_MAX         (32 << 20) /* bytes, header and all */
#define PACKET_MAX_EXTENTS 4096
#define PACKET_MAX_NAME    1023     /* bytes of a bitmap's name */
#define PACKET_STATUS      8192     /* of the status block, see incoming.h */

/* How the description of an export that takes packets begins; the version
 * follows.
 */
#define PACKET_DESCRIPTION "nbdferry destination, protocol "

enum packet_type {
  PACKET_HELLO = 1,   /* JSON: the session's disks */
  PACKET_LIST = 2,    /* JSON: the bitmaps that a disk has */
  PACKET_DATA = 3,    /* extents, bitmaps, block data */
  PACKET_PREPARE = 4, /* JSON */
  PACKET_COMMIT = 5,  /* JSON */
  PACKET_CANCEL = 6,  /* no body */
  PACKET_BLOB = 7,    /* JSON, and a piece of a named file */
  /* Only in an archive (backup/archive.h), never on the wire. */
  PACKET_ARCHIVE_HEAD = 32, /* JSON */
  PACKET_ARCHIVE_END = 33,  /* JSON */
};

/* Flags of a DATA packet. */
#define PACKET_DEVICE_BLOCK 0x01 /* it is about a disk's blocks */
#define PACKET_EOS          0x02 /* reserved, not sent */
#define PACKET_PROGRESS     0x04 /* nobody waits for it */
#define PACKET_ZERO_BLOCK   0x08 /* some extents are zeros or holes */
#define PACKET_HAS_BLOCK    0x10 /* it has a payload */
#define PACKET_HAS_BITMAPS  0x20 /* it has bitmap sections */
#define PACKET_ZLIB         0x100 /* the payload is compressed */
#define PACKET_ZSTD         0x200
#define PACKET_KNOWN_FLAGS  0x33f

struct packet_header {
  enum packet_type type;
  uint32_t flags;
  struct uuid session;
  uint64_t epoch;
  uint32_t channel;
  uint32_t disk;         /* index in the HELLO's list */
  uint64_t number;       /* of the packet, counted by the source */
  uint32_t nr_extents;
  uint32_t nr_sections;
  uint32_t body_size;    /* extents and sections, or the JSON; bytes */
  uint32_t payload_size; /* on the wire */
  uint32_t raw_size;     /* of the payload, uncompressed */
};

struct packet_extent {
  uint64_t offset, length; /* bytes of the disk */
  uint32_t type;           /* enum extent_type; DATA takes 'length' bytes of
                              the payload, in order */
};

#define SECTION_REPLACE 0x1 /* the range holds these bits and no others */

struct packet_section {
  const char *name;    /* not terminated */
  size_t name_len;
  unsigned flags;
  uint64_t granularity; /* bytes */
  uint64_t first_bit, nr_bits;
  const uint8_t *bits; /* bitmap/wire.h */
  size_t size;
};

/* ---- building, in a buffer of PACKET_MAX bytes ---- */

void packet_put_extent (uint8_t *at, const struct packet_extent *e);

/* Write a section's head and name; the bits are to be placed at the pointer
 * that it returns.  packet_end_section pads, and returns where the next one
 * begins.
 */
uint8_t *packet_begin_section (uint8_t *at, const struct packet_section *s);
uint8_t *packet_end_section (uint8_t *at, uint8_t *bits, uint64_t nr_bits,
                             size_t size);
/* How many bytes a section takes beside its bits, padding included. */
size_t packet_section_overhead (size_t name_len);

/* Write the header, with checksums over header, body and payload, before the
 * body and payload that lie behind it.  'payload' may lie elsewhere.  The
 * checksums are computed here, epoch and channel must be final.
 */
void packet_seal (uint8_t *buf, const struct packet_header *h,
                  const void *payload);

/* ---- parsing ---- */

/* Check a whole packet of 'len' bytes, checksums included.  EPROTONOSUPPORT
 * for another version, EBADMSG for everything else that is wrong.
 */
int packet_parse (const uint8_t *buf, size_t len, struct packet_header *h,
                  struct error *err);

/* The same in two steps, for who must know a packet's length before it is
 * there: the first PACKET_HEADER bytes; then the body and the payload (which
 * may lie elsewhere) against the header's checksums.  Archive packets are
 * accepted, too.
 */
int packet_parse_header (const uint8_t *buf, struct packet_header *h,
                         struct error *err);
int packet_check_body (const uint8_t *buf, struct error *err);
int packet_check_payload (const uint8_t *buf, const void *payload,
                          struct error *err);

/* The parts of a packet that packet_parse has accepted. */
const char *packet_json (const uint8_t *buf);
const uint8_t *packet_payload (const uint8_t *buf,
                               const struct packet_header *h);
void packet_get_extent (const uint8_t *buf, uint32_t i,
                        struct packet_extent *e);

/* Check the extent table against the disk's size and the payload. */
int packet_check_extents (const uint8_t *buf, const struct packet_header *h,
                          uint64_t disk_size, struct error *err);

/* Go through the sections: *pos begins at 0.  1: 's' is the next one, 0:
 * there are no more, -1: malformed.
 */
int packet_next_section (const uint8_t *buf, const struct packet_header *h,
                         size_t *pos, uint32_t *seen,
                         struct packet_section *s, struct error *err);

#endif /* FERRY_PACKET_H */
