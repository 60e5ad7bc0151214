/* nbdferry - test of the destination: DATA, and errors of the disk
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "compress.h"
#include "incoming-test.h"

static void
test_bits (void **state)
{
  struct source_bitmap *b = source_add (&src, 0, "b", 12, true, true);
  struct bitmap *coarse = bitmap_new (DISK_SIZE, 16, &err);
  struct bitmap *more = bitmap_new (DISK_SIZE + 4096, 12, &err);
  struct bitmap *got;

  hello_ok (&src, ch);
  got = bits_of (drives[0], "b");
  bitmap_set (b->bits, 0x3000, 1);
  bitmap_set (coarse, 0, 1);
  bitmap_set (more, DISK_SIZE + 1, 1);
  OK (send_bits (&src, ch, 0, "b", b->bits, 0, &err));
  REFUSED (send_bits (&src, ch, 0, "b", coarse, 0, &err), EBADMSG,
           "granularity 65536 for bitmap 'b', which has 4096");
  REFUSED (send_bits (&src, ch, 0, "b", more, 0, &err), EBADMSG,
           "bitmap 'b': ");
  REFUSED (send_bits (&src, ch, 0, "B", b->bits, 0, &err), EBADMSG,
           "'B', which was not announced");
  REFUSED (send_bits (&src, ch, 1, "b", b->bits, 0, &err), EBADMSG,
           "disk 1 of 1");
  assert_true (same_bits (got, b->bits));

  /* Bits are added to what is there, or replace it. */
  bitmap_clear_all (b->bits);
  bitmap_set (b->bits, 0x8000, 0x2000);
  OK (send_bits (&src, ch, 0, "b", b->bits, 0, &err));
  assert_int_equal (bitmap_count_bits (got), 3);
  OK (send_bits (&src, ch, 0, "b", b->bits, SECTION_REPLACE, &err));
  assert_true (same_bits (got, b->bits));
  bitmap_clear_all (b->bits);
  OK (send_bits (&src, ch, 0, "b", b->bits, SECTION_REPLACE, &err));
  assert_int_equal (bitmap_count_bits (got), 0);
  bitmap_free (coarse);
  bitmap_free (more);
}

/* A section that replaces a part leaves the rest alone. */
static void
test_replace_part (void **state)
{
  struct source_bitmap *b = source_add (&src, 0, "b", 12, true, true);
  static const uint8_t set_2[] = { 1 << 2, 2 << 2 | 1 }; /* skip 1, set 2 */
  struct parcel p = {
    .h = { .type = PACKET_DATA, .flags = PACKET_HAS_BITMAPS },
    .sections = { { .name = "b", .granularity = 4096, .first_bit = 10,
                    .nr_bits = 100, .flags = SECTION_REPLACE, .bits = set_2,
                    .size = 2 } },
  };
  struct bitmap *got;

  hello_ok (&src, ch);
  bitmap_set (b->bits, 0, DISK_SIZE);
  OK (send_bits (&src, ch, 0, "b", b->bits, 0, &err));
  OK (send_parcel (&src, ch, &p, &err));
  got = bits_of (drives[0], "b");
  assert_int_equal (bitmap_count_bits (got), bitmap_bits (got) - 98);
  assert_true (bitmap_test (got, 9 * 4096));
  assert_false (bitmap_test (got, 10 * 4096));
  assert_true (bitmap_test (got, 11 * 4096));
  assert_true (bitmap_test (got, 12 * 4096));
  assert_false (bitmap_test (got, 13 * 4096));
  assert_false (bitmap_test (got, 109 * 4096));
  assert_true (bitmap_test (got, 110 * 4096));
  assert_true (bitmap_is_consistent (got));
}

/* A packet with something wrong at its end does nothing of its beginning. */
static void
test_whole_packet (void **state)
{
  static const uint8_t set_1[] = { 1 << 2 | 1 }, cut[] = { 0x80 };
  struct parcel p = {
    .h = { .type = PACKET_DATA, .payload_size = 512 },
    .extents = { { 0, 512, EXTENT_DATA } },
    .sections = { { .name = "a", .granularity = 4096, .nr_bits = 1,
                    .bits = set_1, .size = 1 },
                  { .name = "b", .granularity = 4096, .nr_bits = 1,
                    .bits = cut, .size = 1 } },
    .payload = src.disks[0].data,
  };

  source_add (&src, 0, "a", 12, true, true);
  source_add (&src, 0, "b", 12, true, true);
  hello_ok (&src, ch);
  REFUSED (send_parcel (&src, ch, &p, &err), EBADMSG, "bitmap 'b': ");
  assert_int_equal (tap_calls (TAP_WRITE), 0);
  assert_int_equal (bitmap_count_bits (bits_of (drives[0], "a")), 0);
  p.sections[1].bits = set_1;
  p.extents[1] = (struct packet_extent){ DISK_SIZE, 512, EXTENT_HOLE };
  p.h.nr_extents = 0;
  REFUSED (send_parcel (&src, ch, &p, &err), EBADMSG, "does not lie");
  assert_int_equal (tap_calls (TAP_WRITE), 0);
}

/* Zeros over data become zeros, zeros over zeros cost nothing. */
static void
test_zeros (void **state)
{
  struct parcel p = { .h = { .type = PACKET_DATA },
                      .extents = { { 0, DISK_SIZE, EXTENT_ZERO } } };
  uint8_t data[1024];

  OK (send_hello (&src, ch, &err));
  OK (send_parcel (&src, ch, &p, &err));
  assert_int_equal (tap_calls (TAP_ZERO), 0);
  memset (data, 1, sizeof data);
  OK (send_data (&src, ch, 0, DISK_SIZE - 1024, data, 1024, &err));
  p.extents[0].type = EXTENT_HOLE;
  OK (send_parcel (&src, ch, &p, &err));
  assert_true (tap_calls (TAP_ZERO) > 0);
  assert_int_equal (
    tap.real->pread (drives[0]->disk, data, 1024, DISK_SIZE - 1024), 0);
  assert_true (disk_is_zero (data, sizeof data));
}

#define RAW (256 << 10)

static void
compressed (enum migrate_compression how, uint32_t flag)
{
  static uint8_t raw[RAW], packed[RAW], got[RAW];
  struct compressor c = { 0 };
  struct parcel p = {
    .h = { .type = PACKET_DATA, .flags = flag, .raw_size = RAW },
    .extents = { { 512, RAW, EXTENT_DATA } },
    .payload = packed,
  };
  size_t size;

  for (size_t i = 0; i < RAW; i++)
    raw[i] = i >> 4;
  size = compress_payload (&c, how, packed, RAW, raw, RAW);
  assert_true (size > 0 && size < RAW / 2);
  p.h.payload_size = size;
  OK (send_parcel (&src, ch, &p, &err));
  assert_int_equal (tap.real->pread (drives[0]->disk, got, RAW, 512), 0);
  assert_memory_equal (got, raw, RAW);
  tap_reset (NULL);

  /* A bomb: more comes out than is said.  And less. */
  p.h.nr_extents = 0;
  p.h.raw_size = p.extents[0].length = RAW - 512;
  REFUSED (send_parcel (&src, ch, &p, &err), EBADMSG, "decompress");
  p.h.raw_size = p.extents[0].length = RAW + 512;
  REFUSED (send_parcel (&src, ch, &p, &err), EBADMSG, "decompress");
  p.h.raw_size = p.extents[0].length = 512;
  REFUSED (send_parcel (&src, ch, &p, &err), EBADMSG, "decompress");
  p.h.raw_size = PACKET_MAX + 1;
  REFUSED (send_parcel (&src, ch, &p, &err), EBADMSG, "more than");
  p.h.raw_size = RAW; /* but not what the extents say */
  REFUSED (send_parcel (&src, ch, &p, &err), EBADMSG, "do not match");
  /* Cut off, damaged, garbage, nothing at all. */
  p.extents[0].length = RAW;
  p.h.payload_size = size - 1;
  REFUSED (send_parcel (&src, ch, &p, &err), EBADMSG, "decompress");
  p.h.payload_size = size;
  memset (packed + size / 2, 0xff, size / 4);
  REFUSED (send_parcel (&src, ch, &p, &err), EBADMSG, "decompress");
  p.payload = raw;
  REFUSED (send_parcel (&src, ch, &p, &err), EBADMSG, "decompress");
  p.h.payload_size = 0;
  REFUSED (send_parcel (&src, ch, &p, &err), EBADMSG, "decompress");
  assert_int_equal (tap_calls (TAP_WRITE), 0);
  compressor_free (&c);
}

static void
test_compression (void **state)
{
  OK (send_hello (&src, ch, &err));
  compressed (MIGRATE_COMPRESSION_ZLIB, PACKET_ZLIB);
  compressed (MIGRATE_COMPRESSION_ZSTD, PACKET_ZSTD);
}

static void
test_disk_errors (void **state)
{
  struct incoming_channel *other = channel ();
  json_t *status;

  OK (send_hello (&src, ch, &err));
  OK (send_hello (&src, other, &err));
  tap_fail (TAP_WRITE, ENOSPC);
  REFUSED (send_data (&src, ch, 0, 512, "x", 1, &err), ENOSPC,
           "vda.raw at 512: No space left on device");
  status = status_of (ch);
  assert_int_equal (json_integer_value (json_object_get (status, "errno")),
                    ENOSPC);
  assert_string_equal (json_string_value (json_object_get (status, "error")),
                       err.msg);
  json_decref (status);
  status = status_of (other); /* it was not its error */
  assert_null (json_object_get (status, "error"));
  json_decref (status);

  tap_fail (TAP_WRITE, 0);
  OK (send_data (&src, ch, 0, 512, "x", 1, &err));
  OK (incoming_flush (ch, &err));
  assert_int_equal (tap_calls (TAP_FLUSH), 1);
  tap_fail (TAP_FLUSH, EIO);
  REFUSED (incoming_flush (ch, &err), EIO, "vda.raw");
  REFUSED (send_prepare (&src, ch, 1, &err), EIO, "flush");
  assert_int_equal (drives[0]->mode, DRIVE_INCOMING);
  assert_int_equal (journal_get (drives[0]->journal)->state,
                    JOURNAL_INCOMING);
  tap_fail (TAP_FLUSH, 0);
  incoming_close (other);
}

/* The kernel tells only one: here a session that was displaced. */
static void
test_flush_of_another (void **state)
{
  struct incoming_channel *other = channel ();
  struct source next = src;

  OK (send_hello (&src, ch, &err));
  OK (send_data (&src, ch, 0, 512, "x", 1, &err));
  uuid_new (&next.session);
  OK (send_hello (&next, other, &err));
  OK (send_data (&next, other, 0, 512, "y", 1, &err));
  tap_fail (TAP_FLUSH, EIO);
  REFUSED (incoming_flush (ch, &err), EIO, "vda.raw");
  tap_fail (TAP_FLUSH, 0);
  REFUSED (incoming_flush (other, &err), EIO, "must be sent again");
  REFUSED (send_prepare (&next, other, 1, &err), EIO, "must be sent again");
  OK (send_hello (&next, other, &err)); /* which raises nothing */
  REFUSED (incoming_flush (other, &err), EIO, "must be sent again");
  next.epoch++;
  OK (send_hello (&next, other, &err));
  OK (incoming_flush (other, &err));
  incoming_close (other);
}

int
main (void)
{
#define TEST(f) cmocka_unit_test_setup_teardown (f, begin, end)
  static const struct CMUnitTest tests[] = {
    TEST (test_bits),
    TEST (test_replace_part),
    TEST (test_whole_packet),
    TEST (test_zeros),
    TEST (test_compression),
    TEST (test_disk_errors),
    TEST (test_flush_of_another),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
