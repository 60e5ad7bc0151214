/* nbdferry - tests of archives: format, damage, chains, merging
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include "archive-test.h"
#include "packet-test.h"

static uint64_t random_state = 88172645463325252;

static uint64_t
random_below (uint64_t n)
{
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state % n;
}

static void
fill_random (uint8_t *p, size_t n)
{
  for (size_t i = 0; i < n; i++)
    p[i] = random_below (256);
}

/* ---- a small one, of each kind of extent ---- */

#define SMALL_SIZE 65536

/* 512 bytes of data at 4096, compressible; zeros at 8192; data at 16384. */
static int
small_archive (enum migrate_compression how, unsigned parent)
{
  struct archive_head head = test_head (SMALL_SIZE, 2, parent);
  struct test_archive t;
  uint8_t data[512];

  memset (data, 'x', sizeof data);
  test_begin (&t, &head, how);
  if (parent == 0)
    test_must (archive_append (&t.appender, 0, 4096, EXTENT_HOLE, NULL,
                               NULL));
  test_must (archive_append (&t.appender, 4096, 512, EXTENT_DATA, data,
                             NULL));
  if (parent == 0)
    test_must (archive_append (&t.appender, 4608, 8192 - 4608, EXTENT_HOLE,
                               NULL, NULL));
  test_must (archive_append (&t.appender, 8192, 8192, EXTENT_ZERO, NULL,
                             NULL));
  fill_random (data, sizeof data);
  test_must (archive_append (&t.appender, 16384, 512, EXTENT_DATA, data,
                             NULL));
  if (parent == 0)
    test_must (archive_append (&t.appender, 16896, SMALL_SIZE - 16896,
                               EXTENT_HOLE, NULL, NULL));
  return test_end (&t);
}

static uint8_t *
contents (int fd, size_t *len)
{
  uint8_t *p;

  *len = lseek (fd, 0, SEEK_END);
  p = malloc (*len + 1);
  assert_non_null (p);
  assert_int_equal (pread (fd, p, *len, 0), *len);
  return p;
}

/* Open and verify those bytes: 0 or -1. */
static int
verify_bytes (int fd, const uint8_t *p, size_t len, struct error *err)
{
  struct archive_reader *r;
  int n;

  assert_int_equal (ftruncate (fd, len), 0);
  assert_int_equal (pwrite (fd, p, len, 0), len);
  r = test_open (fd, "FILE", 0, err);
  if (r == NULL)
    return -1;
  n = archive_verify (r, err);
  archive_close (r);
  return n;
}

static void
test_head_is_kept (void **state)
{
  int fd = small_archive (MIGRATE_COMPRESSION_NONE, 1);
  struct error err = { 0 };
  struct archive_reader *r = test_open (fd, "FILE", 0, &err);
  const struct archive_head *h;
  const struct archive_totals *t;
  struct archive_totals peeked;
  struct uuid u;

  assert_non_null (r);
  h = archive_get_head (r);
  assert_string_equal (h->disk, "vda");
  assert_string_equal (h->bitmap, "daily");
  assert_string_equal (h->tool, "a test");
  assert_int_equal (h->size, SMALL_SIZE);
  assert_int_equal (h->generation, 3);
  assert_int_equal (h->granularity, 65536);
  assert_int_equal (h->time, 1700000002);
  u = test_uuid (7);
  assert_true (uuid_equal (&h->lineage, &u));
  u = test_uuid (2);
  assert_true (uuid_equal (&h->point, &u));
  u = test_uuid (1);
  assert_true (uuid_equal (&h->parent, &u));
  assert_false (archive_is_full (h));
  assert_int_equal (archive_verify (r, &err), 0);
  t = archive_get_totals (r);
  assert_int_equal (t->packets, 1);
  assert_int_equal (t->extents, 3);
  assert_int_equal (t->data, 1024);
  assert_int_equal (t->zeros, 8192);
  assert_int_equal (t->holes, 0);
  assert_int_equal (archive_peek_totals (fd, "FILE", &peeked, &err), 0);
  assert_memory_equal (&peeked, t, sizeof peeked);
  archive_close (r);
  close (fd);
}

/* Any bit, wherever it is, of archives of each kind. */
static void
test_flipped_bits (void **state)
{
  static const enum migrate_compression hows[] = {
    MIGRATE_COMPRESSION_NONE, MIGRATE_COMPRESSION_ZLIB,
    MIGRATE_COMPRESSION_ZSTD,
  };

  for (unsigned k = 0; k < 6; k++) {
    int fd = small_archive (hows[k % 3], k / 3);
    struct error err = { 0 };
    size_t len;
    uint8_t *p = contents (fd, &len);

    assert_int_equal (verify_bytes (fd, p, len, &err), 0);
    for (size_t i = 0; i < len; i++) {
      unsigned bit = (i + k) % 8;

      p[i] ^= 1 << bit;
      err = (struct error){ 0 };
      if (verify_bytes (fd, p, len, &err) == 0)
        fail_msg ("bit %u of byte %zu is not missed", bit, i);
      assert_true (err.errnum != 0 && strncmp (err.msg, "FILE", 4) == 0);
      p[i] ^= 1 << bit;
    }
    free (p);
    close (fd);
  }
}

static void
test_cut_off (void **state)
{
  int fd = small_archive (MIGRATE_COMPRESSION_ZSTD, 0);
  struct archive_totals t;
  struct error err;
  size_t len;
  uint8_t *p = contents (fd, &len);

  for (size_t n = 0; n < len; n++) {
    assert_int_equal (verify_bytes (fd, p, n, &err), -1);
    assert_int_equal (archive_peek_totals (fd, "FILE", &t, &err), -1);
  }
  /* And with something behind the end. */
  p[len] = 0;
  assert_int_equal (verify_bytes (fd, p, len + 1, &err), -1);
  assert_non_null (strstr (err.msg, "behind its end"));
  free (p);
  close (fd);
}

/* A pipe brings bytes in small pieces, and cannot be read twice. */
struct feeder {
  int fd;
  const uint8_t *p;
  size_t len;
};

static void *
feed (void *opaque)
{
  struct feeder *f = opaque;

  while (f->len > 0) {
    size_t n = f->len < 7 ? f->len : 7;

    if (write (f->fd, f->p, n) != (ssize_t) n)
      break;
    f->p += n;
    f->len -= n;
  }
  close (f->fd);
  return NULL;
}

static void
test_pipe (void **state)
{
  int fd = small_archive (MIGRATE_COMPRESSION_NONE, 1), p[2];
  struct archive_reader *r;
  struct feeder f = { 0 };
  struct error err = { 0 };
  uint8_t *bytes;
  pthread_t thread;

  bytes = contents (fd, &f.len);
  f.p = bytes;
  assert_int_equal (pipe2 (p, O_CLOEXEC), 0);
  f.fd = p[1];
  assert_int_equal (pthread_create (&thread, NULL, feed, &f), 0);
  r = archive_open_fd (p[0], "pipe", 0, &err);
  assert_non_null (r);
  assert_int_equal (archive_verify (r, &err), 0);
  archive_close (r);
  pthread_join (thread, NULL);
  free (bytes);
  close (fd);
}

/* ---- what a forger might write ---- */

/* Extents of one data packet, then END; the checksums are right. */
static int
verify_extents (const struct packet_extent *e, size_t nr, uint64_t size,
                unsigned parent, uint32_t raw, struct error *err)
{
  struct archive_head head = test_head (size, 2, parent);
  struct test_archive t;
  struct archive_reader *r;
  int fd, n;

  test_begin (&t, &head, MIGRATE_COMPRESSION_NONE);
  memcpy (t.appender.pack.extents, e, nr * sizeof *e);
  t.appender.pack.nr = nr;
  t.appender.pack.raw_size = raw;
  memset (t.appender.pack.raw, 1, raw);
  fd = test_end (&t);
  r = test_open (fd, "FILE", 0, err);
  assert_non_null (r);
  n = archive_verify (r, err);
  archive_close (r);
  close (fd);
  return n;
}

static void
test_bad_extents (void **state)
{
  const struct packet_extent good[] = { { 0, 512, EXTENT_DATA },
                                        { 512, 512, EXTENT_ZERO } };
  const struct packet_extent order[] = { { 512, 512, EXTENT_ZERO },
                                         { 0, 512, EXTENT_DATA } };
  const struct packet_extent overlap[] = { { 0, 512, EXTENT_DATA },
                                           { 256, 512, EXTENT_ZERO } };
  const struct packet_extent beyond[] = { { 0, 512, EXTENT_DATA },
                                          { 512, 1024, EXTENT_ZERO } };
  const struct packet_extent wraps[] = { { 0, 512, EXTENT_DATA },
                                         { 512, UINT64_MAX - 100,
                                           EXTENT_ZERO } };
  const struct packet_extent gap[] = { { 0, 512, EXTENT_DATA },
                                       { 1024, 512, EXTENT_ZERO } };
  struct error err = { 0 };

  assert_int_equal (verify_extents (good, 2, 1024, 0, 512, &err), 0);
  assert_int_equal (verify_extents (order, 2, 1024, 1, 512, &err), -1);
  assert_non_null (strstr (err.msg, "does not follow"));
  assert_int_equal (verify_extents (overlap, 2, 1024, 1, 512, &err), -1);
  assert_non_null (strstr (err.msg, "does not follow"));
  assert_int_equal (verify_extents (beyond, 2, 1024, 1, 512, &err), -1);
  assert_int_equal (verify_extents (wraps, 2, 1024, 1, 512, &err), -1);
  assert_int_equal (verify_extents (good, 2, 1024, 1, 1024, &err), -1);
  /* A gap means "as before" in an incremental, and is a fault in a full one. */
  assert_int_equal (verify_extents (gap, 2, 1536, 1, 512, &err), 0);
  assert_int_equal (verify_extents (gap, 2, 1536, 0, 512, &err), -1);
  assert_int_equal (verify_extents (good, 2, 2048, 0, 512, &err), -1);
  assert_non_null (strstr (err.msg, "ends at 1024 of 2048"));
}

/* Change a field of the DATA packet's header, with the checksums right. */
static void
test_bad_fields (void **state)
{
  static const struct {
    unsigned at, bytes;
    uint64_t value;
    const char *message;
  } bad[] = {
    { AT_TYPE, 2, PACKET_CANCEL, "" },
    { AT_TYPE, 2, PACKET_ARCHIVE_HEAD, "" },
    { AT_SESSION + 3, 1, 99, "another archive" },
    { AT_EPOCH, 8, 1, "made for the wire" },
    { AT_CHANNEL, 4, 1, "made for the wire" },
    { AT_DISK, 4, 1, "made for the wire" },
    { AT_NUMBER, 8, 2, "number 2 stands where 1" },
    { AT_NR_SECTIONS, 4, 1, "a body of" },
    { AT_BODY_SIZE, 4, 24, "" },
    { AT_BODY_SIZE, 4, UINT32_MAX, "a body of" },
    { AT_RAW_SIZE, 4, ARCHIVE_MAX_RAW + 1, "" },
    { AT_PAYLOAD_SIZE, 4, UINT32_MAX, "" },
  };
  int fd = small_archive (MIGRATE_COMPRESSION_NONE, 1);
  uint8_t *p, *copy;
  size_t len, head;
  struct error err;

  p = contents (fd, &len);
  copy = malloc (len);
  head = PACKET_HEADER + get_be (p + AT_BODY_SIZE, 4);
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    memcpy (copy, p, len);
    put_be (copy + head + bad[i].at, bad[i].bytes, bad[i].value);
    put_be (copy + head + AT_HEADER_HASH, 8,
            XXH3_64bits (copy + head, AT_HEADER_HASH));
    assert_int_equal (verify_bytes (fd, copy, len, &err), -1);
    if (strstr (err.msg, bad[i].message) == NULL)
      fail_msg ("field %u: %s", bad[i].at, err.msg);
  }
  free (copy);
  free (p);
  close (fd);
}

static void
refused_head (const char *json, const char *message)
{
  struct archive_head h;
  struct error err = { 0 };

  if (archive_head_parse (json, strlen (json), &h, &err) == 0)
    fail_msg ("accepted: %s", json);
  if (strstr (err.msg, message) == NULL)
    fail_msg ("%s: %s", json, err.msg);
}

static void
test_bad_heads (void **state)
{
#define U "\"40000000-0000-0000-0000-000000000001\""
#define GOOD \
  "\"format\":\"nbdferry-archive\",\"version\":1,\"disk\":\"a\",\"size\":512," \
  "\"lineage\":" U ",\"generation\":0,\"point\":" U ",\"time\":1"
  struct archive_head h;
  struct error err;

  assert_int_equal (archive_head_parse ("{" GOOD "}", strlen ("{" GOOD "}"),
                                        &h, &err), 0);
  archive_head_free (&h);
  refused_head ("", "format");
  refused_head ("[]", "format");
  refused_head ("{\"format\":\"zip\"}", "format");
  refused_head ("{\"format\":\"nbdferry-archive\",\"version\":2}",
                "of version 2");
  refused_head ("{" GOOD ",\"parent\":5}", "parent");
  refused_head ("{" GOOD ",\"parent\":\"x\"}", "parent");
  refused_head ("{" GOOD ",\"bitmap\":\"\"}", "bitmap");
  refused_head ("{" GOOD ",\"bitmap\":\"b\"}", "granularity");
  refused_head ("{" GOOD ",\"bitmap\":\"b\",\"granularity\":1000}",
                "granularity");
  refused_head ("{" GOOD ",\"tool\":7}", "tool");
  refused_head ("{" GOOD ",\"time\":1}", "format"); /* twice */
  refused_head ("{\"format\":\"nbdferry-archive\",\"version\":1,"
                "\"disk\":\"a\",\"size\":-512}", "size");
  refused_head ("{\"format\":\"nbdferry-archive\",\"version\":1,"
                "\"disk\":\"a\",\"size\":513}", "size");
  refused_head ("{\"format\":\"nbdferry-archive\",\"version\":1,"
                "\"disk\":\"a\\u0000b\",\"size\":512}", "");
}

/* ---- chains ---- */

static int
chain (const unsigned (*links)[2], size_t nr, struct error *err)
{
  static const char *const names[] = { "A", "B", "C", "D" };
  struct archive_head heads[4];
  const struct archive_head *p[4];

  for (size_t i = 0; i < nr; i++) {
    heads[i] = test_head (512, links[i][0], links[i][1]);
    p[i] = &heads[i];
  }
  return archive_chain_check (p, names, nr, err);
}

static void
test_chain (void **state)
{
  const unsigned good[][2] = { { 1, 0 }, { 2, 1 }, { 3, 2 } };
  const unsigned late[][2] = { { 2, 1 }, { 3, 2 } };
  const unsigned gap[][2] = { { 1, 0 }, { 3, 2 } };
  const unsigned order[][2] = { { 1, 0 }, { 3, 2 }, { 2, 1 } };
  const unsigned dead[][2] = { { 1, 0 }, { 2, 1 }, { 3, 1 } };
  const unsigned again[][2] = { { 1, 0 }, { 2, 1 }, { 2, 1 } };
  const unsigned full[][2] = { { 1, 0 }, { 2, 0 } };
  struct archive_head a = test_head (512, 1, 0), b = test_head (512, 2, 1);
  const struct archive_head *two[] = { &a, &b };
  const char *const names[] = { "A", "B" };
  struct error err = { 0 };

  assert_int_equal (chain (good, 3, &err), 0);
  assert_int_equal (chain (late, 2, &err), 0);
  assert_int_equal (chain (gap, 2, &err), -1);
  assert_non_null (strstr (err.msg, "a gap: B"));
  assert_int_equal (chain (order, 3, &err), -1);
  assert_non_null (strstr (err.msg, "wrong order: B builds upon C"));
  assert_int_equal (chain (dead, 3, &err), -1);
  assert_non_null (strstr (err.msg, "leave out B, which it replaces"));
  assert_int_equal (chain (again, 3, &err), -1);
  assert_non_null (strstr (err.msg, "same point"));
  assert_int_equal (chain (full, 2, &err), -1);
  assert_non_null (strstr (err.msg, "B is a full backup"));
  b.lineage = test_uuid (8);
  assert_int_equal (archive_chain_check (two, names, 2, &err), -1);
  assert_non_null (strstr (err.msg, "another disk"));
  b.lineage = a.lineage;
  b.generation = a.generation + 1; /* it has migrated */
  assert_int_equal (archive_chain_check (two, names, 2, &err), 0);
  b.generation = a.generation - 1;
  assert_int_equal (archive_chain_check (two, names, 2, &err), -1);
  assert_non_null (strstr (err.msg, "generation"));
}

/* ---- merging, against a plain array ---- */

#define MAX_SIZE (3 << 20)

/* Write something at random into 'disk', and the archive that says so. */
static int
random_archive (uint8_t *disk, uint64_t size, unsigned point,
                unsigned parent)
{
  static const enum migrate_compression hows[] = {
    MIGRATE_COMPRESSION_NONE, MIGRATE_COMPRESSION_ZLIB,
    MIGRATE_COMPRESSION_ZSTD,
  };
  struct archive_head head = test_head (size, point, parent);
  struct test_archive t;
  uint64_t at = 0, n;

  test_begin (&t, &head, hows[random_below (3)]);
  while (at < size) {
    enum extent_type type = random_below (3);

    n = 512 * (1 + random_below (random_below (4) ? 64 : 3000));
    n = n < size - at ? n : size - at;
    if (parent > 0 && random_below (2)) {
      at += n;
      continue;
    }
    if (type == EXTENT_DATA && random_below (2))
      fill_random (disk + at, n);
    else
      memset (disk + at, type == EXTENT_DATA ? (int) point : 0, n);
    test_must (archive_append (&t.appender, at, n, type, disk + at, NULL));
    at += n;
  }
  return test_end (&t);
}

static void
check_merged (struct archive_reader **r, size_t nr, const uint8_t *disk,
              uint64_t size)
{
  struct error err = { 0 };
  struct archive_merge *m = archive_merge_open (r, nr, &err);
  struct merge_piece p;
  uint64_t at = 0;
  int n;

  assert_non_null (m);
  while ((n = archive_merge_next (m, &p, &err)) == 1) {
    assert_int_equal (p.offset, at);
    assert_true (p.length > 0 && p.length <= size - at);
    if (p.type == EXTENT_DATA)
      assert_memory_equal (p.data, disk + at, p.length);
    else
      for (uint64_t i = 0; i < p.length; i++)
        assert_int_equal (disk[at + i], 0);
    at += p.length;
  }
  if (n == -1)
    fail_msg ("%s", err.msg);
  assert_int_equal (at, size);
  assert_int_equal (archive_merge_next (m, &p, &err), 0);
  archive_merge_free (m);
}

static void
test_merge (void **state)
{
  uint8_t *disk = calloc (1, MAX_SIZE);

  for (unsigned round = 0; round < 40; round++) {
    struct archive_reader *r[24];
    size_t nr = 1 + random_below (round % 4 == 0 ? 24 : 5);
    uint64_t size = 0;
    struct error err = { 0 };
    int fds[24];

    memset (disk, 0, MAX_SIZE);
    for (size_t i = 0; i < nr; i++) {
      uint64_t old = size;

      /* The disk may be resized between two points. */
      if (i == 0 || random_below (4) == 0)
        size = 512 * (1 + random_below (MAX_SIZE / 512));
      if (size < old)
        memset (disk + size, 0, old - size);
      fds[i] = random_archive (disk, size, i + 1, i);
    }
    for (size_t i = 0; i < nr; i++) {
      r[i] = test_open (fds[i], "A", ARCHIVE_LAZY, &err);
      assert_non_null (r[i]);
    }
    check_merged (r, nr, disk, size);
    for (size_t i = 0; i < nr; i++) {
      archive_close (r[i]);
      close (fds[i]);
    }
  }
  free (disk);
}

/* ---- packs ---- */

static void
test_zeros_are_found (void **state)
{
  struct archive_head head = test_head (1 << 20, 1, 0);
  struct test_archive t;
  struct archive_reader *r;
  struct error err = { 0 };
  struct pack *p = &t.appender.pack;
  uint8_t *at;
  int fd;

  test_begin (&t, &head, MIGRATE_COMPRESSION_NONE);
  at = pack_add (p, 0, 1 << 20, EXTENT_DATA);
  memset (at, 0, 1 << 20);
  at[100000] = 1;
  at[700000] = 2;
  assert_int_equal (pack_find_zeros (p, &err), 0);
  assert_int_equal (p->nr, 5);
  assert_int_equal (p->raw_size, 2 * 32768);
  assert_int_equal (p->raw[100000 - 3 * 32768], 1);
  assert_int_equal (p->raw[32768 + 700000 - 21 * 32768], 2);
  fd = test_end (&t);
  r = test_open (fd, "A", 0, &err);
  assert_int_equal (archive_verify (r, &err), 0);
  assert_int_equal (archive_get_totals (r)->data, 2 * 32768);
  archive_close (r);
  close (fd);
}

/* As many extents as a pack takes, each cut in as many as there can be. */
static void
test_zeros_in_many_extents (void **state)
{
  struct archive_head head = test_head (UINT64_C (1) << 30, 1, 9);
  struct test_archive t;
  struct archive_reader *r;
  struct error err = { 0 };
  struct pack *p = &t.appender.pack;
  size_t nr = 0;
  int fd;

  test_begin (&t, &head, MIGRATE_COMPRESSION_ZSTD);
  while (pack_room (p, EXTENT_DATA) >= 520) {
    /* Half before a multiple of the unit, and half behind it. */
    uint8_t *at = pack_add (p, (nr + 1) * 65536 - 260, 520, EXTENT_DATA);

    memset (at, 0, 260);
    memset (at + 260, 1, 260);
    nr++;
  }
  assert_int_equal (nr, PACK_EXTENTS);
  assert_int_equal (pack_find_zeros (p, &err), 0);
  assert_int_equal (p->nr, 2 * PACK_EXTENTS);
  fd = test_end (&t);
  r = test_open (fd, "A", 0, &err);
  assert_int_equal (archive_verify (r, &err), 0);
  archive_close (r);
  close (fd);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_head_is_kept),
    cmocka_unit_test (test_flipped_bits),
    cmocka_unit_test (test_cut_off),
    cmocka_unit_test (test_pipe),
    cmocka_unit_test (test_bad_extents),
    cmocka_unit_test (test_bad_fields),
    cmocka_unit_test (test_bad_heads),
    cmocka_unit_test (test_chain),
    cmocka_unit_test (test_merge),
    cmocka_unit_test (test_zeros_are_found),
    cmocka_unit_test (test_zeros_in_many_extents),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
