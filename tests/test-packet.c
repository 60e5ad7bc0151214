/* nbdferry - test of packets: built and parsed, damaged and refused
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "disk.h"
#include "packet-test.h"

#define DISK_SIZE (1 << 20)

static uint8_t packet[256 << 10];
static uint8_t payload[3 * 512];
static struct error err;

/* Memory of just that size, so that sanitizers see what is read beyond. */
static uint8_t *
exactly (const uint8_t *p, size_t len)
{
  uint8_t *q = malloc (len ? len : 1);

  assert_non_null (q);
  memcpy (q, p, len);
  return q;
}

/* ---- there and back ---- */

static const struct uuid session = { { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
                                       13, 14, 15, 16 } };

/* With all that a packet can have. */
static struct parcel
full_parcel (void)
{
  static const uint8_t one_bit[] = { 1 << 2 | 1 };
  static const uint8_t odd[] = { 5 << 2, 3 << 2 | 1, 0 };
  static char long_name[1024];

  memset (long_name, 'n', 1023);
  for (size_t i = 0; i < sizeof payload; i++)
    payload[i] = i * 7 + 1;
  return (struct parcel){
    .h = { .type = PACKET_DATA,
           .flags = PACKET_DEVICE_BLOCK | PACKET_PROGRESS | PACKET_EOS |
                    PACKET_ZERO_BLOCK | PACKET_HAS_BLOCK |
                    PACKET_HAS_BITMAPS,
           .session = session,
           .epoch = UINT64_C (0x0102030405060708),
           .channel = 0x11121314,
           .disk = 0x21222324,
           .number = UINT64_C (0x3132333435363738),
           .payload_size = sizeof payload },
    .extents = { { 0, 512, EXTENT_DATA },
                 { 4096, 65536, EXTENT_HOLE },
                 { DISK_SIZE - 1024, 1024, EXTENT_DATA },
                 { 512, 512, EXTENT_ZERO } },
    .sections = { { .name = "a", .granularity = 512, .nr_bits = 1,
                    .bits = one_bit, .size = 1 },
                  { .name = "täglich", .flags = SECTION_REPLACE,
                    .granularity = UINT64_C (1) << 31,
                    .first_bit = UINT64_C (1) << 40, .nr_bits = 8,
                    .bits = odd, .size = 2 },
                  { .name = long_name, .granularity = 65536, .first_bit = 3,
                    .nr_bits = 0, .bits = odd, .size = 0 },
                  { .name = "12345678", .granularity = 4096, .nr_bits = 1,
                    .bits = one_bit, .size = 1 } },
    .payload = payload,
  };
}

static void
compare_header (const struct packet_header *a, const struct packet_header *b)
{
  assert_int_equal (a->type, b->type);
  assert_int_equal (a->flags, b->flags);
  assert_true (uuid_equal (&a->session, &b->session));
  assert_int_equal (a->epoch, b->epoch);
  assert_int_equal (a->channel, b->channel);
  assert_int_equal (a->disk, b->disk);
  assert_int_equal (a->number, b->number);
  assert_int_equal (a->nr_extents, b->nr_extents);
  assert_int_equal (a->nr_sections, b->nr_sections);
  assert_int_equal (a->body_size, b->body_size);
  assert_int_equal (a->payload_size, b->payload_size);
  assert_int_equal (a->raw_size, b->raw_size);
}

static void
parse_ok (const uint8_t *p, size_t len, struct packet_header *h)
{
  if (packet_parse (p, len, h, &err) == -1)
    fail_msg ("%s", err.msg);
}

static void
test_data (void **state)
{
  struct parcel p = full_parcel ();
  size_t len = parcel_build (packet, &p), pos = 0;
  uint8_t *exact = exactly (packet, len);
  struct packet_section s;
  struct packet_header h;
  uint32_t seen = 0;

  parse_ok (exact, len, &h);
  compare_header (&h, &p.h);
  assert_int_equal (h.nr_extents, 4);
  assert_int_equal (h.nr_sections, 4);
  for (uint32_t i = 0; i < 4; i++) {
    struct packet_extent e;

    packet_get_extent (exact, i, &e);
    assert_int_equal (e.offset, p.extents[i].offset);
    assert_int_equal (e.length, p.extents[i].length);
    assert_int_equal (e.type, p.extents[i].type);
  }
  assert_int_equal (packet_check_extents (exact, &h, DISK_SIZE, &err), 0);
  for (uint32_t i = 0; i < 4; i++) {
    const struct packet_section *w = &p.sections[i];

    assert_int_equal (
      packet_next_section (exact, &h, &pos, &seen, &s, &err), 1);
    assert_int_equal (seen, i + 1);
    assert_int_equal (s.name_len, w->name_len);
    assert_memory_equal (s.name, w->name, w->name_len);
    assert_int_equal (s.flags, w->flags);
    assert_int_equal (s.granularity, w->granularity);
    assert_int_equal (s.first_bit, w->first_bit);
    assert_int_equal (s.nr_bits, w->nr_bits);
    assert_int_equal (s.size, w->size);
    assert_memory_equal (s.bits, w->bits, w->size);
    assert_true (pos % 8 == 0);
  }
  assert_int_equal (packet_next_section (exact, &h, &pos, &seen, &s, &err),
                    0);
  assert_memory_equal (packet_payload (exact, &h), payload, sizeof payload);
  free (exact);
}

/* The bytes are those of docs/protocol.md. */
static void
test_bytes (void **state)
{
  struct parcel p = full_parcel ();
  size_t len = parcel_build (packet, &p);
  const uint8_t *section = packet + PACKET_HEADER + 4 * PACKET_EXTENT;

  assert_memory_equal (packet, "NBDFERRY", 8);
  assert_int_equal (get_be (packet + AT_VERSION, 2), 1);
  assert_int_equal (get_be (packet + AT_TYPE, 2), 3);
  assert_int_equal (get_be (packet + AT_FLAGS, 4), 0x3f);
  assert_memory_equal (packet + AT_SESSION, session.b, 16);
  assert_int_equal (get_be (packet + AT_EPOCH, 8), p.h.epoch);
  assert_int_equal (get_be (packet + AT_CHANNEL, 4), p.h.channel);
  assert_int_equal (get_be (packet + AT_DISK, 4), p.h.disk);
  assert_int_equal (get_be (packet + AT_NUMBER, 8), p.h.number);
  assert_int_equal (get_be (packet + AT_HEADER_SIZE, 4), 128);
  assert_int_equal (get_be (packet + AT_NR_EXTENTS, 4), 4);
  assert_int_equal (get_be (packet + AT_NR_SECTIONS, 4), 4);
  assert_int_equal (get_be (packet + AT_BODY_SIZE, 4),
                    len - 128 - sizeof payload);
  assert_int_equal (get_be (packet + AT_PAYLOAD_SIZE, 4), sizeof payload);
  assert_int_equal (get_be (packet + AT_RAW_SIZE, 4), sizeof payload);
  for (int i = AT_RESERVED; i < AT_HEADER_HASH; i++)
    assert_int_equal (packet[i], 0);
  /* repair knows the same checksums. */
  {
    uint8_t *copy = exactly (packet, len);

    memset (copy + AT_BODY_HASH, 0, 16);
    memset (copy + AT_HEADER_HASH, 0, 8);
    repair (copy, len);
    assert_memory_equal (copy, packet, len);
    free (copy);
  }
  assert_int_equal (get_be (packet + 128 + 24, 8), 4096);
  assert_int_equal (get_be (packet + 128 + 32, 8), 65536);
  assert_int_equal (get_be (packet + 128 + 40, 4), 2);
  /* "a": 40 + 1 + 1 bytes, padded to 48 with zeros */
  assert_int_equal (get_be (section, 8), 512);
  assert_int_equal (get_be (section + 8, 8), 0);
  assert_int_equal (get_be (section + 16, 8), 1);
  assert_int_equal (get_be (section + 24, 4), 1);
  assert_int_equal (get_be (section + 28, 2), 1);
  assert_int_equal (section[30], 1);
  assert_int_equal (section[31], 0);
  assert_int_equal (get_be (section + 32, 8), 0);
  assert_memory_equal (section + 40, "a\x05\0\0\0\0\0\0", 8);
  assert_int_equal (section[48 + 31], SECTION_REPLACE);
}

static void
test_control (void **state)
{
  static const char json[] = "{\"attempt\":7}";

  for (int type = PACKET_HELLO; type <= PACKET_CANCEL; type++) {
    struct parcel p = { .h = { .type = type, .session = session },
                        .json = json };
    struct packet_header h;
    size_t len;

    if (type == PACKET_DATA)
      continue;
    len = parcel_build (packet, &p);
    parse_ok (packet, len, &h);
    compare_header (&h, &p.h);
    assert_int_equal (h.body_size, strlen (json));
    assert_memory_equal (packet_json (packet), json, strlen (json));
    /* And without a body. */
    p.json = "";
    len = parcel_build (packet, &p);
    assert_int_equal (len, PACKET_HEADER);
    parse_ok (packet, len, &h);
  }
}

static void
test_overhead (void **state)
{
  for (size_t n = 1; n < 40; n++) {
    struct packet_section s = { .name = "0123456789012345678901234567890123"
                                        "456789", .name_len = n };
    size_t most = 0;

    for (size_t size = 0; size < 16; size++) {
      uint8_t *bits = packet_begin_section (packet, &s);
      uint8_t *end = packet_end_section (packet, bits, 1, size);
      size_t beside = end - packet - size;

      assert_true (bits == packet + PACKET_SECTION + n);
      most = beside > most ? beside : most;
    }
    assert_int_equal (most, packet_section_overhead (n));
  }
}

/* ---- one thing wrong at a time ---- */

/* Parse, extents, sections: where it ends, and how. */
enum stage { HEADER, EXTENTS, SECTIONS, FINE };

static enum stage
judge (const uint8_t *p, size_t len, uint64_t disk_size)
{
  uint8_t *exact = exactly (p, len);
  enum stage end = HEADER;
  struct packet_header h;
  uint32_t seen = 0;
  size_t pos = 0;
  int r;

  memset (&err, 0, sizeof err);
  if (packet_parse (exact, len, &h, &err) == 0) {
    end = EXTENTS;
    if (packet_check_extents (exact, &h, disk_size, &err) == 0) {
      struct packet_section s;

      end = SECTIONS;
      while ((r = packet_next_section (exact, &h, &pos, &seen, &s, &err)) ==
             1)
        ;
      if (r == 0)
        end = FINE;
    }
  }
  if (end != FINE) {
    assert_int_not_equal (err.errnum, 0);
    assert_int_not_equal (err.msg[0], 0);
  }
  free (exact);
  return end;
}

#define EXTENT_AT(i)  (PACKET_HEADER + (i) * PACKET_EXTENT)
#define SECTION_0     EXTENT_AT (4)      /* "a" */
#define SECTION_1     (SECTION_0 + 48)   /* "täglich": 40 + 8 + 2 -> 56 */
#define SECTION_2     (SECTION_1 + 56)
#define SECTION_3     (SECTION_2 + 1064) /* 40 + 8 + 1 -> 56, the last */
#define BODY          (SECTION_3 + 56 - PACKET_HEADER)
#define PAYLOAD       sizeof payload

static const struct mutation {
  unsigned at, bytes;
  uint64_t value;
  enum stage end;
  const char *words;
} mutations[] = {
  { AT_MAGIC, 1, 'n', HEADER, "magic" },
  { AT_MAGIC + 7, 1, 0, HEADER, "magic" },
  { AT_TYPE, 2, 0, HEADER, "unknown type 0" },
  { AT_TYPE, 2, 8, HEADER, "unknown type 8" },
  { AT_TYPE, 2, PACKET_BLOB, HEADER, "control packet with block data" },
  { AT_TYPE, 2, 0xffff, HEADER, "unknown type 65535" },
  { AT_TYPE, 2, PACKET_HELLO, HEADER, "control packet with block data" },
  { AT_TYPE, 2, PACKET_COMMIT, HEADER, "control packet with block data" },
  { AT_FLAGS, 4, 0x40, HEADER, "unknown flags 0x40" },
  { AT_FLAGS, 4, 0x80, HEADER, "unknown flags 0x80" },
  { AT_FLAGS, 4, 0x400, HEADER, "unknown flags 0x400" },
  { AT_FLAGS, 4, 0x80000000, HEADER, "unknown flags 0x80000000" },
  { AT_FLAGS, 4, 0x300, HEADER, "two" },
  { AT_HEADER_SIZE, 4, 0, HEADER, "header of 0 bytes" },
  { AT_HEADER_SIZE, 4, 127, HEADER, "header of 127 bytes" },
  { AT_HEADER_SIZE, 4, 136, HEADER, "header of 136 bytes" },
  { AT_NR_EXTENTS, 4, 3, SECTIONS, "unknown encoding" },
  { AT_NR_EXTENTS, 4, 2, EXTENTS, "do not match a payload" },
  { AT_NR_EXTENTS, 4, 0, EXTENTS, "do not match a payload" },
  { AT_NR_EXTENTS, 4, 5, EXTENTS, "does not lie in a disk" },
  { AT_NR_EXTENTS, 4, PACKET_MAX_EXTENTS + 1, HEADER, "4097 extents" },
  { AT_NR_EXTENTS, 4, 0x0aaaaaab, HEADER, "extents in" }, /* * 24 wraps */
  { AT_NR_EXTENTS, 4, UINT32_MAX, HEADER, "extents in" },
  { AT_NR_SECTIONS, 4, 5, SECTIONS, "cut off" },
  { AT_NR_SECTIONS, 4, UINT32_MAX, SECTIONS, "cut off" },
  { AT_NR_SECTIONS, 4, 3, SECTIONS, "56 bytes behind the last" },
  { AT_NR_SECTIONS, 4, 0, SECTIONS, "behind the last" },
  { AT_BODY_SIZE, 4, 0, HEADER, "speaks of 0 + 1536 bytes" },
  { AT_BODY_SIZE, 4, BODY - 1, HEADER, "speaks of" },
  { AT_BODY_SIZE, 4, BODY + 1, HEADER, "speaks of" },
  { AT_BODY_SIZE, 4, UINT32_MAX, HEADER, "speaks of" },
  { AT_PAYLOAD_SIZE, 4, 0, HEADER, "speaks of" },
  { AT_PAYLOAD_SIZE, 4, PAYLOAD - 1, HEADER, "speaks of" },
  { AT_PAYLOAD_SIZE, 4, UINT32_MAX, HEADER, "speaks of" },
  { AT_RAW_SIZE, 4, 0, HEADER, "1536 bytes that is said to be 0" },
  { AT_RAW_SIZE, 4, PAYLOAD + 512, HEADER, "said to be 2048" },
  { AT_RAW_SIZE, 4, PACKET_MAX + 1, HEADER, "more than" },
  { AT_RAW_SIZE, 4, UINT32_MAX, HEADER, "more than" },

  { EXTENT_AT (0), 8, 1, FINE, "" }, /* any offset will do */
  { EXTENT_AT (0), 8, DISK_SIZE, EXTENTS, "does not lie" },
  { EXTENT_AT (0), 8, DISK_SIZE - 511, EXTENTS, "does not lie" },
  { EXTENT_AT (0), 8, DISK_SIZE - 512, FINE, "" },
  { EXTENT_AT (0), 8, UINT64_MAX - 511, EXTENTS, "does not lie" }, /* wraps */
  { EXTENT_AT (0), 8, UINT64_MAX, EXTENTS, "does not lie" },
  { EXTENT_AT (0) + 8, 8, 0, EXTENTS, "does not lie" },
  { EXTENT_AT (0) + 8, 8, 511, EXTENTS, "do not match" },
  { EXTENT_AT (0) + 8, 8, 513, EXTENTS, "do not match" },
  { EXTENT_AT (0) + 8, 8, UINT64_MAX, EXTENTS, "does not lie" },
  { EXTENT_AT (0) + 8, 8, (UINT64_C (1) << 32) + 512, EXTENTS, "not lie" },
  { EXTENT_AT (0) + 16, 4, EXTENT_ZERO, EXTENTS, "do not match" },
  { EXTENT_AT (0) + 16, 4, 3, EXTENTS, "type 3" },
  { EXTENT_AT (0) + 16, 4, UINT32_MAX, EXTENTS, "type 4294967295" },
  { EXTENT_AT (1) + 8, 8, 0, EXTENTS, "does not lie" },
  { EXTENT_AT (1) + 8, 8, DISK_SIZE, EXTENTS, "does not lie" },
  { EXTENT_AT (1) + 8, 8, DISK_SIZE - 4096, FINE, "" },
  { EXTENT_AT (1) + 8, 8, UINT64_MAX - 4095, EXTENTS, "does not lie" },
  { EXTENT_AT (1) + 16, 4, EXTENT_DATA, EXTENTS, "do not match" },
  { EXTENT_AT (3) + 16, 4, EXTENT_HOLE, FINE, "" },

  { SECTION_0 + 24, 4, 2, FINE, "" }, /* still within its padding */
  { SECTION_0 + 24, 4, UINT32_MAX, SECTIONS, "cut off" },
  { SECTION_0 + 24, 4, UINT32_MAX - 40, SECTIONS, "cut off" },
  { SECTION_0 + 28, 2, 65535, SECTIONS, "cut off" },
  { SECTION_0 + 30, 1, 0, SECTIONS, "unknown encoding" },
  { SECTION_0 + 30, 1, 2, SECTIONS, "unknown encoding" },
  { SECTION_0 + 31, 1, SECTION_REPLACE, FINE, "" },
  { SECTION_0 + 31, 1, 2, SECTIONS, "unknown encoding" },
  { SECTION_0 + 31, 1, 0x80, SECTIONS, "unknown encoding" },
  { SECTION_1 + 24, 4, 2000, SECTIONS, "cut off" },
  { SECTION_1 + 28, 2, 0, SECTIONS, "name of 0 bytes" },
  { SECTION_2 + 28, 2, 1024, SECTIONS, "name of 1024 bytes" },
  { SECTION_3 + 24, 4, 8, FINE, "" },
  { SECTION_3 + 24, 4, 9, SECTIONS, "cut off" },

  /* What is written as 0, and not looked at. */
  { AT_RESERVED, 8, UINT64_MAX, FINE, "" },
  { AT_RESERVED + 16, 8, UINT64_MAX, FINE, "" },
  { EXTENT_AT (2) + 20, 4, UINT32_MAX, FINE, "" },
  { SECTION_0 + 32, 8, UINT64_MAX, FINE, "" },
};

static void
test_mutations (void **state)
{
  static const char *const stages[] = { "the header", "the extents",
                                        "the sections", "nothing" };

  for (size_t i = 0; i < sizeof mutations / sizeof mutations[0]; i++) {
    const struct mutation *m = &mutations[i];
    struct parcel p = full_parcel ();
    size_t len = parcel_build (packet, &p);
    enum stage end;

    assert_int_equal (p.h.body_size, BODY);
    assert_int_equal (judge (packet, len, DISK_SIZE), FINE);
    put_be (packet + m->at, m->bytes, m->value);
    repair (packet, len);
    end = judge (packet, len, DISK_SIZE);
    if (end != m->end || strstr (err.msg, m->words) == NULL ||
        (end != FINE && err.errnum != EBADMSG))
      fail_msg ("%u bytes at %u = %llu: refused in %s: %s", m->bytes, m->at,
                (unsigned long long) m->value, stages[end], err.msg);
  }
}

/* Sizes whose sum is right only modulo 2^32. */
static void
test_overflow (void **state)
{
  struct parcel p = full_parcel ();
  size_t len = parcel_build (packet, &p);
  uint32_t rest = len - PACKET_HEADER;

  put_be (packet + AT_BODY_SIZE, 4, rest + 0x80000000);
  put_be (packet + AT_PAYLOAD_SIZE, 4, 0x80000000);
  put_be (packet + AT_RAW_SIZE, 4, 0x80000000);
  repair (packet, len);
  assert_int_equal (judge (packet, len, DISK_SIZE), HEADER);
  assert_non_null (strstr (err.msg, "speaks of"));
  put_be (packet + AT_BODY_SIZE, 4, UINT32_MAX);
  put_be (packet + AT_PAYLOAD_SIZE, 4, rest + 1);
  repair (packet, len);
  assert_int_equal (judge (packet, len, DISK_SIZE), HEADER);
  assert_non_null (strstr (err.msg, "speaks of"));
}

/* The disk may be as large as can be, and as small. */
static void
test_disk_sizes (void **state)
{
  struct parcel p = full_parcel ();
  size_t len = parcel_build (packet, &p);

  assert_int_equal (judge (packet, len, DISK_SIZE - 1), EXTENTS);
  assert_int_equal (judge (packet, len, 0), EXTENTS);
  assert_int_equal (judge (packet, len, INT64_MAX), FINE);
  p.extents[1] =
    (struct packet_extent){ 512, INT64_MAX - 512, EXTENT_HOLE };
  len = parcel_build (packet, &p);
  assert_int_equal (judge (packet, len, INT64_MAX), FINE);
  assert_int_equal (judge (packet, len, INT64_MAX - 1), EXTENTS);
  /* Data in many extents cannot add up past 2^64. */
  for (size_t i = 0; i < 4; i++)
    p.extents[i] =
      (struct packet_extent){ 0, INT64_MAX - 511, EXTENT_DATA };
  len = parcel_build (packet, &p);
  assert_int_equal (judge (packet, len, INT64_MAX), EXTENTS);
  p.h.payload_size = 0;
  for (size_t i = 0; i < 4; i++)
    p.extents[i].length = UINT64_C (1) << 62;
  len = parcel_build (packet, &p);
  assert_int_equal (judge (packet, len, INT64_MAX), EXTENTS);
}

static void
test_many_extents (void **state)
{
  struct packet_extent hole = { 0, 512, EXTENT_HOLE };
  struct packet_header h = { .type = PACKET_DATA };

  for (uint32_t i = 0; i <= PACKET_MAX_EXTENTS; i++)
    packet_put_extent (packet + PACKET_HEADER + i * PACKET_EXTENT, &hole);
  for (uint32_t n = PACKET_MAX_EXTENTS; n <= PACKET_MAX_EXTENTS + 1; n++) {
    h.nr_extents = n;
    h.body_size = n * PACKET_EXTENT;
    packet_seal (packet, &h, packet);
    assert_int_equal (
      judge (packet, PACKET_HEADER + h.body_size, DISK_SIZE),
      n > PACKET_MAX_EXTENTS ? HEADER : FINE);
  }
}

/* Compressed: what is on the wire and what it is are two sizes. */
static void
test_compressed_sizes (void **state)
{
  static const uint32_t flags[] = { PACKET_ZLIB, PACKET_ZSTD };

  for (size_t i = 0; i < 2; i++) {
    struct parcel p = full_parcel ();
    size_t len;

    p.h.flags |= flags[i];
    p.h.payload_size = 100;
    p.h.raw_size = sizeof payload;
    len = parcel_build (packet, &p);
    assert_int_equal (judge (packet, len, DISK_SIZE), FINE);
    p.h.raw_size++;
    len = parcel_build (packet, &p);
    assert_int_equal (judge (packet, len, DISK_SIZE), EXTENTS);
    p.h.raw_size = PACKET_MAX + 1;
    len = parcel_build (packet, &p);
    assert_int_equal (judge (packet, len, DISK_SIZE), HEADER);
  }
}

/* ---- damage ---- */

static void
test_truncated (void **state)
{
  struct parcel p = full_parcel ();
  size_t len = parcel_build (packet, &p);

  for (size_t n = 0; n < len; n++) {
    assert_int_equal (judge (packet, n, DISK_SIZE), HEADER);
    assert_int_equal (err.errnum, EBADMSG);
  }
  packet[len] = 0;
  assert_int_equal (judge (packet, len + 1, DISK_SIZE), HEADER);
  /* Its checksums do not help a packet that is too short. */
  for (size_t n = PACKET_HEADER; n < len; n++) {
    len = parcel_build (packet, &p);
    repair (packet, n);
    assert_int_equal (judge (packet, n, DISK_SIZE), HEADER);
  }
}

static void
test_too_long (void **state)
{
  uint8_t *p = calloc (1, PACKET_MAX + 1);
  struct packet_header h = { .type = PACKET_LIST,
                             .body_size = PACKET_MAX - PACKET_HEADER };

  assert_non_null (p);
  packet_seal (p, &h, p + PACKET_MAX);
  parse_ok (p, PACKET_MAX, &h);
  h.body_size++;
  packet_seal (p, &h, p + PACKET_MAX);
  assert_int_equal (packet_parse (p, PACKET_MAX + 1, &h, &err), -1);
  assert_int_equal (err.errnum, EBADMSG);
  free (p);
}

/* Any bit anywhere. */
static void
test_flipped (void **state)
{
  struct parcel p = full_parcel ();
  size_t len = parcel_build (packet, &p);

  for (size_t i = 0; i < len; i++)
    for (int bit = 0; bit < 8; bit++) {
      const char *words = i < AT_HEADER_HASH + 8 ? "header's checksum"
                          : i < PACKET_HEADER + p.h.body_size
                            ? "body's checksum"
                            : "payload's checksum";
      int errnum = EBADMSG;

      if (i < AT_VERSION)
        words = "magic";
      else if (i < AT_TYPE) {
        words = "version";
        errnum = EPROTONOSUPPORT;
      }
      packet[i] ^= 1 << bit;
      assert_int_equal (judge (packet, len, DISK_SIZE), HEADER);
      assert_int_equal (err.errnum, errnum);
      if (strstr (err.msg, words) == NULL)
        fail_msg ("byte %zu: %s", i, err.msg);
      packet[i] ^= 1 << bit;
    }
  assert_int_equal (judge (packet, len, DISK_SIZE), FINE);
}

/* Whatever else a packet of another version has, its version is what counts,
 * and the message names both.
 */
static void
test_version (void **state)
{
  static const unsigned versions[] = { 0, 2, 0x100, 0xffff };

  for (size_t i = 0; i < sizeof versions / sizeof versions[0]; i++) {
    struct parcel p = full_parcel ();
    size_t len = parcel_build (packet, &p);
    char theirs[32];

    put_be (packet + AT_VERSION, 2, versions[i]);
    memset (packet + AT_TYPE, 0xee, len - AT_TYPE);
    assert_int_equal (judge (packet, len, DISK_SIZE), HEADER);
    assert_int_equal (err.errnum, EPROTONOSUPPORT);
    snprintf (theirs, sizeof theirs, "version %u of", versions[i]);
    assert_non_null (strstr (err.msg, theirs));
    assert_non_null (strstr (err.msg, "this side version 1"));
  }
}

int
main (void)
{
  static const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_data),
    cmocka_unit_test (test_bytes),
    cmocka_unit_test (test_control),
    cmocka_unit_test (test_overhead),
    cmocka_unit_test (test_mutations),
    cmocka_unit_test (test_overflow),
    cmocka_unit_test (test_disk_sizes),
    cmocka_unit_test (test_many_extents),
    cmocka_unit_test (test_compressed_sizes),
    cmocka_unit_test (test_truncated),
    cmocka_unit_test (test_too_long),
    cmocka_unit_test (test_flipped),
    cmocka_unit_test (test_version),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
