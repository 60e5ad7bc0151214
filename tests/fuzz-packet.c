/* nbdferry - fuzz target: packets
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The input is a packet, as a destination would get it.  Checksums would keep
 * a fuzzer out, so it is also tried with the checksums put right, and then
 * with sizes that add up.  What is accepted is gone through like a destination
 * does, and must come out the same when it is sealed again.
 */
#include <config.h>

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "compress.h"
#include "blobs.h"
#include "packet-test.h"
#include "wire.h"

#define DISK_SIZE (UINT64_C (1) << 24)
#define MAX_RAW   (64 << 10) /* what is decompressed here */

int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

static void
must (bool ok)
{
  if (!ok)
    abort ();
}

/* An error says what it is. */
static void
must_explain (const struct error *err)
{
  must (err->errnum != 0 && err->msg[0] != 0);
}

static void
sections (const uint8_t *p, const struct packet_header *h)
{
  struct packet_section s;
  struct error err = { 0 };
  uint32_t seen = 0;
  size_t pos = 0;
  int r;

  while ((r = packet_next_section (p, h, &pos, &seen, &s, &err)) == 1) {
    must (s.name_len >= 1 && s.name_len <= PACKET_MAX_NAME);
    must ((const uint8_t *) s.name > p && s.name + s.name_len <=
          (const char *) s.bits);
    must (s.bits + s.size <= packet_payload (p, h));
    if (bits_check (s.bits, s.size, s.first_bit, s.nr_bits, DISK_SIZE >> 9,
                    &err) == -1)
      must_explain (&err);
  }
  if (r == -1)
    must_explain (&err);
  else
    must (seen == h->nr_sections);
}

static void
extents (const uint8_t *p, const struct packet_header *h)
{
  struct error err = { 0 };
  struct packet_extent e;
  uint64_t bytes = 0;

  if (packet_check_extents (p, h, DISK_SIZE, &err) == -1) {
    must_explain (&err);
    return;
  }
  for (uint32_t i = 0; i < h->nr_extents; i++) {
    packet_get_extent (p, i, &e);
    must (e.length > 0 && e.offset < DISK_SIZE &&
          e.length <= DISK_SIZE - e.offset);
    if (e.type == 0)
      bytes += e.length;
  }
  must (bytes == h->raw_size);
}

static void
payload (const uint8_t *p, const struct packet_header *h)
{
  static uint8_t raw[MAX_RAW];
  struct error err = { 0 };

  if ((h->flags & (PACKET_ZLIB | PACKET_ZSTD)) && h->raw_size <= MAX_RAW &&
      decompress_payload (h->flags, raw, h->raw_size, packet_payload (p, h),
                          h->payload_size, &err) == -1)
    must_explain (&err);
}

static void
blob (const uint8_t *p, const struct packet_header *h)
{
  json_t *body = json_loadb (packet_json (p), h->body_size, 0, NULL);
  struct error err = { 0 };
  struct blob_piece piece;

  if (body && blob_piece_parse (body, h->payload_size, &piece, &err) == 0)
    must (blob_name_ok (piece.name) && piece.size <= BLOB_MAX_SIZE &&
          piece.offset <= piece.size &&
          h->payload_size <= piece.size - piece.offset);
  else if (body)
    must_explain (&err);
  json_decref (body);
}

static void
receive (const uint8_t *data, size_t size)
{
  struct packet_header h, again;
  struct error err = { 0 };
  uint8_t *copy;

  if (packet_parse (data, size, &h, &err) == -1) {
    must_explain (&err);
    return;
  }
  must (PACKET_HEADER + (uint64_t) h.body_size + h.payload_size == size);
  extents (data, &h);
  sections (data, &h);
  payload (data, &h);
  if (h.type == PACKET_BLOB)
    blob (data, &h);

  copy = malloc (size);
  must (copy != NULL);
  memcpy (copy, data, size);
  packet_seal (copy, &h, packet_payload (copy, &h));
  must (packet_parse (copy, size, &again, NULL) == 0);
  must (h.type == again.type && h.flags == again.flags &&
        h.epoch == again.epoch && h.number == again.number &&
        h.nr_extents == again.nr_extents &&
        h.nr_sections == again.nr_sections && h.raw_size == again.raw_size);
  free (copy);
}

/* Sizes that add up, with as much of a body as there was to be. */
static void
add_up (uint8_t *p, size_t size)
{
  size_t rest = size - PACKET_HEADER;
  size_t body = get_be (p + AT_BODY_SIZE, 4);

  body = body < rest ? body : rest;
  put_be (p + AT_BODY_SIZE, 4, body);
  put_be (p + AT_PAYLOAD_SIZE, 4, rest - body);
  if (!(get_be (p + AT_FLAGS, 4) & (PACKET_ZLIB | PACKET_ZSTD)))
    put_be (p + AT_RAW_SIZE, 4, rest - body);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  uint8_t *p;

  receive (data, size);
  if (size < PACKET_HEADER)
    return 0;
  p = malloc (size);
  must (p != NULL);
  memcpy (p, data, size);
  repair (p, size);
  receive (p, size);
  add_up (p, size);
  repair (p, size);
  receive (p, size);
  free (p);
  return 0;
}
