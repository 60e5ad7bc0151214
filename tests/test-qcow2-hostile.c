/* nbdferry - test of the sidecar: hostile files
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A file in which every byte that matters is changed: one of ours, and one of
 * QEMU's.
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "qcow2-test.h"

#define MIB (UINT64_C (1) << 20)

/* Open what may be anything: it is refused and not touched, or it is used,
 * and closed so that it opens again in good order.
 */
static bool
try_hostile (uint64_t size, const uint8_t *patched, size_t len)
{
  enum qcow2_found found;
  struct qcow2 *q = qcow2_open (sidecar, disk, size, false, &found, &err);
  size_t nr;

  if (q == NULL) {
    size_t now;
    uint8_t *p = load_sidecar (&now);

    assert_int_equal (now, len);
    assert_memory_equal (p, patched, len);
    free (p);
    assert_non_null (strstr (err.msg, sidecar));
    return false;
  }
  qcow2_entries (q, &nr);
  close_ok (q);
  q = open_ok (size, QCOW2_CLEAN);
  qcow2_entries (q, &nr);
  close_ok (q);
  return true;
}

static void
flip_bytes (uint64_t size, uint8_t *image, size_t len, uint64_t from,
            uint64_t to, unsigned *used, unsigned *refused)
{
  static const uint8_t masks[] = { 0x01, 0x80, 0xff };
  const bool all = getenv ("CHECK_LONG") != NULL;

  for (uint64_t at = from; at < to; ++at)
    for (size_t m = 0; m < sizeof masks; ++m) {
      if (!all && m != at % 3)
        continue;
      image[at] ^= masks[m];
      store_sidecar (image, len);
      if (try_hostile (size, image, len))
        ++*used;
      else
        ++*refused;
      image[at] ^= masks[m];
    }
}

/* Our own layout: header, directory, tables. */
static void
test_hostile_ours (void **state)
{
  struct qcow2_entry e[3];
  struct qcow2 *q;
  uint8_t *image;
  size_t len;
  unsigned used = 0, refused = 0;
  uint64_t directory, table;

  unlink (sidecar);
  make_disk (64 * MIB);
  q = open_ok (64 * MIB, QCOW2_CREATED);
  e[0] = new_entry (q, "a", 16, true);
  e[1] = new_entry (q, "b", 9, false);
  e[2] = (struct qcow2_entry) { .name = (char *) "c", .shift = 12,
                                .inconsistent = true };
  write_ok (q, e, 3);
  close_ok (q);
  image = load_sidecar (&len);
  directory = peek64 (QCOW2_HEADER_LENGTH + 8 + 16);
  table = peek64 (directory);
  flip_bytes (64 * MIB, image, len, 0, 144, &used, &refused);
  flip_bytes (64 * MIB, image, len, directory, directory + 32, &used,
              &refused);
  flip_bytes (64 * MIB, image, len, directory + 64, directory + 89, &used,
              &refused);
  flip_bytes (64 * MIB, image, len, table, table + 8, &used, &refused);
  print_message ("%u used, %u refused\n", used, refused);
  assert_true (used > 20 && refused > 20);

  /* Two bitmaps in one place. */
  memcpy (image + directory + 32, image + directory, 8);
  store_sidecar (image, len);
  assert_false (try_hostile (64 * MIB, image, len));
  free (image);
}

/* A small one of QEMU's. */
static void
test_hostile_foreign (void **state)
{
  uint8_t *image;
  size_t len;
  unsigned used = 0, refused = 0;
  uint64_t at, directory, table;

  create_by_qemu ("512", MIB);
  RUN_OK ("qemu-img", "bitmap", "--add", "-g", "512", "-f", "qcow2", sidecar,
          "a");
  RUN_OK ("qemu-img", "bitmap", "--add", "-f", "qcow2", sidecar, "b");
  RUN_OK ("qemu-io", "-f", "qcow2", "-c", "write 0 4096", sidecar);
  image = load_sidecar (&len);
  image = realloc (image, (len + 4095) / 4096 * 4096);
  memset (image + len, 0, -len & 4095);
  len = (len + 4095) / 4096 * 4096;
  for (at = 0; get_be32 (image + at) != QCOW2_EXT_BITMAPS; at += 8)
    assert_true (at < 512);
  directory = get_be64 (image + at + 24);
  table = get_be64 (image + directory);
  flip_bytes (MIB, image, len, 0, 112, &used, &refused);
  flip_bytes (MIB, image, len, at, at + 32, &used, &refused);
  flip_bytes (MIB, image, len, directory, directory + 64, &used, &refused);
  flip_bytes (MIB, image, len, table, table + 8, &used, &refused);
  print_message ("%u used, %u refused\n", used, refused);
  assert_true (used > 20 && refused > 20);

  /* Entries of the table that cannot be. */
  {
    const uint64_t bad[] = { len, UINT64_C (1) << 55, 512 + 8, 512 | 2,
                             512 | UINT64_C (1) << 62, UINT64_MAX,
                             512 | QCOW2_TABLE_ALL_ONES };
    const uint64_t good = get_be64 (image + table);

    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; ++i) {
      put_be64 (image + table, bad[i]);
      store_sidecar (image, len);
      assert_false (try_hostile (MIB, image, len));
      assert_non_null (strstr (err.msg, "outside the file"));
    }
    put_be64 (image + table, good);
  }

  /* Cut anywhere. */
  for (size_t cut = 0; cut < len; cut += 256) {
    store_sidecar (image, len);
    assert_int_equal (truncate (sidecar, cut), 0);
    try_hostile (MIB, image, cut);
  }
  free (image);
}

int
main (void)
{
  static const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_hostile_ours),
    cmocka_unit_test (test_hostile_foreign),
  };

  if (!have ("qemu-img") || !have ("qemu-io")) {
    printf ("QEMU's tools are needed\n");
    return 77;
  }
  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
