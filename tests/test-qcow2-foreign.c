/* nbdferry - test of the sidecar: what QEMU has made, and what is none
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "qcow2-test.h"

#define MIB (UINT64_C (1) << 20)
#define GIB (UINT64_C (1) << 30)

/* No bitmaps: QEMU is content, and adds one of its own. */
static void
test_none (void **state)
{
  const struct qcow2_entry *f;
  struct qcow2_entry e;
  struct qcow2 *q;
  json_t *list;
  size_t nr;

  unlink (sidecar);
  make_disk (10 * MIB + 512);
  q = create_with (10 * MIB + 512, &e, "gone", 16, true);
  write_ok (q, NULL, 0);
  qcow2_free (q, e.bits);
  close_ok (q);
  check_clean ();
  assert_null (list_by_qemu ());
  RUN_OK ("qemu-img", "bitmap", "--add", "-g", "4096", "-f", "qcow2",
          sidecar, "theirs");
  RUN_OK ("qemu-io", "-f", "qcow2", "-c", "write -P 7 8192 4096", sidecar);
  check_clean ();
  q = open_ok (10 * MIB + 512, QCOW2_FOREIGN);
  f = qcow2_entries (q, &nr);
  assert_int_equal (nr, 1);
  assert_string_equal (f[0].name, "theirs");
  assert_true (f[0].autoflag);
  assert_int_equal (qcow2_words (f[0].bits)[0], 4);
  close_ok (q);
  check_clean ();
  list = list_by_qemu ();
  assert_true (is_listed (list, 0, "theirs", 12, true, false));
  json_decref (list);
}

/* QEMU's zeroing through the sidecar must not hide what is written later. */
static void
test_zeroed_by_qemu (void **state)
{
  struct qcow2 *q;
  char data[512];
  int fd;

  unlink (sidecar);
  make_disk (64 * MIB);
  close_ok (open_ok (64 * MIB, QCOW2_CREATED));
  RUN_OK ("qemu-io", "-f", "qcow2", "-c", "write -z -u 0 8M", "-c",
          "discard 8M 8M", sidecar);
  q = open_ok (64 * MIB, QCOW2_FOREIGN);
  close_ok (q);
  fd = open (disk, O_RDWR | O_CLOEXEC);
  memset (data, 0x5a, sizeof data);
  assert_int_equal (pwrite (fd, data, 512, 0), 512);
  assert_int_equal (pwrite (fd, data, 512, 8 * MIB), 512);
  close (fd);
  RUN_OK ("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x5a 0 512", "-c",
          "read -P 0x5a 8M 512", sidecar);
}

/* A table changed by somebody who leaves bit 63 alone: QEMU would read another
 * disk than ours, or write over bits.  The bitmaps, also of a crash, are as
 * good as they were.
 */
static void
test_tables_changed (void **state)
{
  /* docs/sidecar.md: the refcount table, the L1 table, cluster 4 in the L2. */
  const uint64_t where[] = { 2 * MIB, 6 * MIB, 8 * MIB + 4 * 8 };
  struct qcow2_entry e;
  struct qcow2 *q;
  size_t nr;

  for (int crash = 0; crash < 2; ++crash) {
    for (size_t i = 0; i < sizeof where / sizeof where[0]; ++i) {
      unlink (sidecar);
      make_disk (64 * MIB);
      RUN_OK ("qemu-io", "-f", "raw", "-c", "write -P 0x5a 8M 512", disk);
      q = create_with (64 * MIB, &e, "a", 9, true);
      set_bit (qcow2_words (e.bits), 77);
      if (crash)
        qcow2_abandon (q);
      else
        close_ok (q);
      patch64 (where[i], 1); /* an L2 entry: zeros */
      q = open_ok (64 * MIB, crash ? QCOW2_UNCLEAN : QCOW2_CLEAN);
      assert_true (test_bit (qcow2_words (qcow2_entries (q, &nr)[0].bits), 77));
      assert_int_equal (nr, 1);
      close_ok (q);
      check_clean ();
      RUN_OK ("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x5a 8M 512",
              sidecar);
    }
  }
}

/* What QEMU makes, with any clusters, is read exactly. */
static void
foreign (const char *cluster_size, uint64_t size)
{
  char write[64];
  const unsigned shifts[] = { 9, 12, 16, 20 };
  const uint64_t offsets[] = { 0, 65536 * 3 + 512, size / 2, size - 512 };
  const uint64_t lens[] = { 512, 70000 / 512 * 512, 512 * 9, 512 };
  const struct qcow2_entry *f;
  struct qcow2 *q;
  size_t nr;

  create_by_qemu (cluster_size, size);
  for (size_t i = 0; i < 4; ++i) {
    char name[16], g[16];

    snprintf (name, sizeof name, "s%u", shifts[i]);
    snprintf (g, sizeof g, "%u", 1u << shifts[i]);
    RUN_OK ("qemu-img", "bitmap", "--add", "-g", g, "-f", "qcow2", sidecar,
            name);
  }
  RUN_OK ("qemu-img", "bitmap", "--add", "--disable", "-f", "qcow2", sidecar,
          "off");
  for (size_t i = 0; i < 4; ++i) {
    snprintf (write, sizeof write, "write %llu %llu",
              (unsigned long long) offsets[i], (unsigned long long) lens[i]);
    RUN_OK ("qemu-io", "-f", "qcow2", "-c", write, sidecar);
  }

  q = open_ok (size, QCOW2_FOREIGN);
  f = qcow2_entries (q, &nr);
  assert_int_equal (nr, 5);
  for (size_t i = 0; i < 4; ++i) {
    uint64_t words = qcow2_nr_words (size, shifts[i]);
    uint64_t *want = calloc (words, 8);

    for (size_t w = 0; w < 4; ++w)
      for (uint64_t b = offsets[w] >> shifts[i];
           b <= (offsets[w] + lens[w] - 1) >> shifts[i]; ++b)
        set_bit (want, b);
    assert_int_equal (f[i].shift, shifts[i]);
    assert_true (f[i].autoflag && !f[i].inconsistent && !f[i].in_use);
    assert_memory_equal (qcow2_words (f[i].bits), want, words * 8);
    free (want);
  }
  assert_string_equal (f[4].name, "off");
  assert_false (f[4].autoflag);
  close_ok (q);
  check_clean ();
  close_ok (open_ok (size, QCOW2_CLEAN));
}

static void
test_foreign (void **state)
{
  foreign ("512", 6 * MIB + 1024);
  foreign ("4k", 24 * MIB);
  foreign ("64k", 700 * MIB + 512);
  foreign ("2M", 20 * GIB);
}

/* Tables with all-ones and absent entries, clusters in any order, garbage
 * beyond the last granule.
 */
static void
test_odd_tables (void **state)
{
  const uint64_t size = 10 * MIB + 512 * 5; /* 20485 bits: 6 clusters */
  const struct qcow2_entry *f;
  uint64_t at, table, words[64];
  struct qcow2 *q;
  size_t nr;

  create_by_qemu ("512", size);
  RUN_OK ("qemu-img", "bitmap", "--add", "-g", "512", "-f", "qcow2", sidecar,
          "a");
  RUN_OK ("qemu-io", "-f", "qcow2", "-c", "write 0 10488320", sidecar);
  RUN_OK ("qemu-img", "bitmap", "--add", "--disable", "-g", "512", "-f",
          "qcow2", sidecar, "b");

  /* The extension is somewhere behind the header. */
  for (at = 0; peek64 (at) >> 32 != QCOW2_EXT_BITMAPS; at += 8)
    assert_true (at < 4096);
  table = peek64 (peek64 (at + 24));
  /* All bits are set, and so are the entries; give it clusters instead. */
  at = 1 << 20;
  for (int i = 0; i < 64; ++i)
    words[i] = UINT64_C (0x0101010101010101) * i;
  patch (at, words, 512);
  patch (at + 4096, words, 512);
  memset (words, 0xff, sizeof words);
  patch (at + 2048, words, 512); /* the last, full of garbage */
  patch64 (table, at + 4096);
  patch64 (table + 8, at);
  patch64 (table + 16, 0);
  patch64 (table + 24, QCOW2_TABLE_ALL_ONES);
  patch64 (table + 32, at + 4096);
  patch64 (table + 40, at + 2048);

  /* The same, grown: garbage must not become bits of the new end. */
  q = open_ok (size + 512 * 4096, QCOW2_FOREIGN);
  f = qcow2_entries (q, &nr);
  assert_int_equal (nr, 2);
  for (int i = 0; i < 64; ++i) {
    const uint64_t w = UINT64_C (0x0101010101010101) * i;
    const uint64_t *have = qcow2_words (f[0].bits);

    assert_int_equal (have[i], w);
    assert_int_equal (have[64 + i], w);
    assert_int_equal (have[128 + i], 0);
    assert_int_equal (have[192 + i], UINT64_MAX);
    assert_int_equal (have[256 + i], w);
    assert_int_equal (qcow2_words (f[1].bits)[i], 0);
  }
  for (uint64_t b = 20480; b < 20485 + 4096; ++b) {
    assert_true (test_bit (qcow2_words (f[0].bits), b));
    assert_false (test_bit (qcow2_words (f[1].bits), b));
  }
  close_ok (q);

  /* Shrunk: the tail is cut. */
  q = open_ok (512 * 70, QCOW2_CLEAN);
  f = qcow2_entries (q, &nr);
  assert_int_equal (qcow2_words (f[0].bits)[1],
                    UINT64_C (0x0101010101010101) & 0x3f);
  close_ok (q);
  make_disk (512 * 70);
  check_clean ();
}

/* What is not a sidecar is refused in clear words, and left alone. */
static void
refuse (const char *words)
{
  enum qcow2_found found;
  struct stat before, after;

  assert_int_equal (stat (sidecar, &before), 0);
  assert_null (qcow2_open (sidecar, disk, MIB, false, &found, &err));
  if (strstr (err.msg, words) == NULL)
    fail_msg ("\"%s\" is not in: %s", words, err.msg);
  assert_non_null (strstr (err.msg, sidecar));
  assert_int_equal (stat (sidecar, &after), 0);
  assert_memory_equal (&before.st_mtim, &after.st_mtim, sizeof before.st_mtim);
  assert_int_equal (before.st_ino, after.st_ino);
}

static void
test_refused (void **state)
{
  char path[PATH_MAX + 8];
  uint64_t incompat;

  make_disk (MIB);
  unlink (sidecar);
  RUN_OK ("qemu-img", "create", "-q", "-f", "qcow2", sidecar, "1M");
  refuse ("holds a disk of its own");
  RUN_OK ("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10",
          sidecar, "1M");
  refuse ("version 2");
  RUN_OK ("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw",
          sidecar, "1M");
  refuse ("backing file");
  RUN_OK ("qemu-img", "create", "-q", "-f", "raw", sidecar, "1M");
  refuse ("not a qcow2");
  assert_int_equal (truncate (sidecar, 50), 0);
  refuse ("too short");
  assert_int_equal (truncate (sidecar, 0), 0);
  refuse ("too short");
  unlink (sidecar);
  assert_int_equal (mkfifo (sidecar, 0600), 0);
  refuse ("not a regular file");
  unlink (sidecar);

  close_ok (open_ok (MIB, QCOW2_CREATED));
  incompat = peek64 (72);
  patch64 (72, incompat | QCOW2_INCOMPAT_CORRUPT);
  refuse ("marked corrupt");
  patch64 (72, incompat | 1 << 9);
  refuse ("not known here");
  patch64 (72, incompat);
  patch64 (AUTOCLEAR, peek64 (AUTOCLEAR) & ~QCOW2_AUTOCLEAR_DATA_FILE_RAW);
  refuse ("not raw");

  snprintf (path, sizeof path, "%s.new", sidecar);
  assert_int_equal (access (path, F_OK), -1);
}

int
main (void)
{
  static const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_none),
    cmocka_unit_test (test_zeroed_by_qemu),
    cmocka_unit_test (test_tables_changed),
    cmocka_unit_test (test_foreign),
    cmocka_unit_test (test_odd_tables),
    cmocka_unit_test (test_refused),
  };

  if (!have ("qemu-img") || !have ("qemu-io")) {
    printf ("QEMU's tools are needed\n");
    return 77;
  }
  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
