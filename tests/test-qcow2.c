/* nbdferry - test of the sidecar, with QEMU as the judge
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

/* cmocka passes every test a state that most do not want. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>
#include <time.h>

#include <cmocka.h>

#include "qcow2-test.h"

#define MIB (UINT64_C (1) << 20)
#define GIB (UINT64_C (1) << 30)
#define TIB (UINT64_C (1) << 40)

static void
set_random (uint64_t *words, uint64_t bits, unsigned n)
{
  set_bit (words, 0);
  set_bit (words, bits - 1);
  while (n-- > 0) {
    uint64_t from = rnd (bits), len = 1 + rnd (rnd (4) ? 3 : 300);

    for (; len > 0 && from < bits; --len)
      set_bit (words, from++);
  }
}

/* Every granularity: QEMU and we see the same bits, before and after. */
static void
roundtrip (uint64_t size, unsigned first, unsigned last)
{
  struct qcow2_entry e[23];
  const struct qcow2_entry *found;
  uint64_t *copy[23];
  char names[23][16];
  size_t nr = 0, n;
  struct qcow2 *q;
  json_t *list;

  unlink (sidecar);
  make_disk (size);
  q = open_ok (size, QCOW2_CREATED);
  for (unsigned shift = first; shift <= last; ++shift, ++nr) {
    size_t len = qcow2_nr_words (size, shift) * 8;

    snprintf (names[nr], sizeof names[nr], "g%u", shift);
    e[nr] = new_entry (q, names[nr], shift, shift % 2);
    for (size_t i = 0; i < len / 8; i += 1 + i / 1024)
      assert_int_equal (qcow2_words (e[nr].bits)[i], 0);
    set_random (qcow2_words (e[nr].bits), qcow2_nr_bits (size, shift), 40);
    copy[nr] = malloc (len);
    memcpy (copy[nr], qcow2_words (e[nr].bits), len);
  }
  write_ok (q, e, nr);
  close_ok (q);

  check_clean ();
  list = list_by_qemu ();
  assert_int_equal (json_array_size (list), nr);
  for (size_t i = 0; i < nr; ++i) {
    assert_true (is_listed (list, i, e[i].name, e[i].shift, e[i].autoflag,
                            false));
    compare_with_qemu (e[i].name, e[i].shift, size, copy[i]);
  }
  json_decref (list);

  q = open_ok (size, QCOW2_CLEAN);
  found = qcow2_entries (q, &n);
  assert_int_equal (n, nr);
  for (size_t i = 0; i < nr; ++i) {
    assert_string_equal (found[i].name, e[i].name);
    assert_int_equal (found[i].shift, e[i].shift);
    assert_int_equal (found[i].autoflag, e[i].autoflag);
    assert_false (found[i].in_use || found[i].inconsistent);
    assert_memory_equal (qcow2_words (found[i].bits), copy[i],
                         qcow2_nr_words (size, e[i].shift) * 8);
    free (copy[i]);
  }
  close_ok (q);
  check_clean ();
}

static void
test_granularities (void **state)
{
  roundtrip (512, 9, 31);
  roundtrip (5 * MIB + 1536, 9, 31);
}

static void
test_granularities_large (void **state)
{
  roundtrip (5 * GIB + 512, 9, 16);
  roundtrip (3 * TIB - 512, 16, 18);
}

/* A disk without bytes has bitmaps without bits.  (QEMU does not open an
 * image of no size with a bitmap, not even one that it made.)
 */
static void
test_empty_disk (void **state)
{
  struct qcow2_entry e;
  struct qcow2 *q;

  unlink (sidecar);
  make_disk (0);
  q = open_ok (0, QCOW2_CREATED);
  e = new_entry (q, "a", 16, true);
  assert_non_null (qcow2_words (e.bits));
  write_ok (q, &e, 1);
  close_ok (q);
  q = open_ok (0, QCOW2_CLEAN);
  write_ok (q, NULL, 0);
  close_ok (q);
  check_clean ();
}

static void
test_names (void **state)
{
  static char longest[1024];
  const char *const names[] = {
    "a b", "it's", "\"quoted\" \\ $HOME `x`", "naïve ☃ 𝄞", "-x", "a/b:c,d=e",
    longest,
  };
  const size_t nr = sizeof names / sizeof names[0];
  struct qcow2_entry e[nr], bad;
  struct qcow2 *q;
  json_t *list;

  memset (longest, 'n', 1023);
  unlink (sidecar);
  make_disk (MIB);
  q = open_ok (MIB, QCOW2_CREATED);
  for (size_t i = 0; i < nr; ++i) {
    e[i] = new_entry (q, names[i], 16, true);
    set_bit (qcow2_words (e[i].bits), i);
  }
  write_ok (q, e, nr);
  bad = e[0];
  bad.name = (char[1025]) { 0 };
  assert_int_equal (qcow2_write_directory (q, &bad, 1, &err), -1);
  assert_string_equal (err.msg, "Bitmap name cannot be empty");
  memset (bad.name, 'x', 1024);
  assert_int_equal (qcow2_write_directory (q, &bad, 1, &err), -1);
  assert_string_equal (err.msg,
                       "Name length exceeds maximum (1023 characters)");
  close_ok (q);

  check_clean ();
  list = list_by_qemu ();
  for (size_t i = 0; i < nr; ++i) {
    uint64_t want = UINT64_C (1) << i;

    assert_true (is_listed (list, i, names[i], 16, true, false));
    compare_with_qemu (names[i], 16, MIB, &want);
  }
  json_decref (list);
  close_ok (open_ok (MIB, QCOW2_CLEAN));
}

/* 2^32 bits, and not one more, in QEMU's words. */
static void
test_limits (void **state)
{
  struct qcow2_bits *b;
  struct qcow2 *q;
  struct stat st, st2;

  unlink (sidecar);
  q = open_ok (2 * TIB + 512, QCOW2_CREATED);
  assert_int_equal (stat (sidecar, &st), 0);
  assert_null (qcow2_alloc (q, 9, &err));
  assert_string_equal (err.msg, "Too much space will be occupied by the "
                       "bitmap. Use larger granularity");
  assert_null (qcow2_alloc (q, 8, &err));
  assert_string_equal (err.msg, "Granularity must be power of 2 and at least "
                       "512");
  assert_null (qcow2_alloc (q, 32, &err));
  assert_int_equal (stat (sidecar, &st2), 0);
  assert_int_equal (st.st_blocks, st2.st_blocks);
  close_ok (q);

  unlink (sidecar);
  q = open_ok (2 * TIB, QCOW2_CREATED);
  b = qcow2_alloc (q, 9, &err);
  assert_non_null (b);
  /* Allocated for real. */
  assert_int_equal (stat (sidecar, &st), 0);
  assert_true ((uint64_t) st.st_blocks * 512 >= 512 * MIB);
  qcow2_free (q, b);
  assert_int_equal (stat (sidecar, &st), 0);
  assert_true ((uint64_t) st.st_blocks * 512 < 64 * MIB);
  close_ok (q);
  unlink (sidecar);

  assert_null (qcow2_open (sidecar, disk, 1000, false,
                           &(enum qcow2_found) { 0 }, &err));
  assert_null (qcow2_open (sidecar, disk, INT64_MAX - 511, false,
                           &(enum qcow2_found) { 0 }, &err));
  assert_int_equal (access (sidecar, F_OK), -1);
}

/* No room: an error, and everything is as it was. */
static void
test_no_space (void **state)
{
  struct rlimit old, limit;
  struct qcow2_entry e;
  struct qcow2 *q;
  struct stat st;

  unlink (sidecar);
  make_disk (GIB);
  q = create_with (GIB, &e, "a", 16, true);
  assert_int_equal (stat (sidecar, &st), 0);
  signal (SIGXFSZ, SIG_IGN);
  getrlimit (RLIMIT_FSIZE, &old);
  limit = old;
  limit.rlim_cur = st.st_size;
  assert_int_equal (setrlimit (RLIMIT_FSIZE, &limit), 0);
  assert_null (qcow2_alloc (q, 12, &err));
  assert_int_equal (err.errnum, EFBIG);
  setrlimit (RLIMIT_FSIZE, &old);
  /* What exists can be closed, and it can be tried again. */
  qcow2_free (q, qcow2_alloc (q, 12, &err));
  close_ok (q);
  check_clean ();
}

/* Adding and removing for ever does not make the file grow, and reused
 * clusters come back zeroed.
 */
static void
test_no_growth (void **state)
{
  struct qcow2_entry e[6] = { { .name = NULL } }, list[6];
  static char names[6][8] = { "a", "b", "c", "d", "e", "f" };
  const unsigned shift[6] = { 9, 9, 10, 12, 16, 9 };
  struct qcow2 *q;
  struct stat st, st2;
  const uint64_t size = 16 * GIB; /* 2 clusters of bits with 512 bytes */

  unlink (sidecar);
  make_disk (size);
  q = open_ok (size, QCOW2_CREATED);
  for (int round = 0; round < 200; ++round) {
    size_t i = rnd (6), nr = 0;
    struct qcow2_bits *gone = e[i].bits;

    if (gone)
      e[i].bits = NULL;
    else {
      uint64_t last = qcow2_nr_bits (size, shift[i]) - 1;

      e[i] = new_entry (q, names[i], shift[i], true);
      assert_int_equal (qcow2_words (e[i].bits)[0], 0);
      assert_int_equal (qcow2_words (e[i].bits)[last / 64], 0);
      set_bit (qcow2_words (e[i].bits), 0);
      set_bit (qcow2_words (e[i].bits), last);
    }
    for (i = 0; i < 6; ++i)
      if (e[i].bits)
        list[nr++] = e[i];
    write_ok (q, list, nr);
    qcow2_free (q, gone);
    if (round == 100)
      assert_int_equal (stat (sidecar, &st), 0);
  }
  assert_int_equal (stat (sidecar, &st2), 0);
  assert_true (st2.st_size < st.st_size + 8 * 2 * (off_t) MIB);
  /* All six at once, twice over, in any order. */
  assert_true (st2.st_size < 80 * (off_t) MIB);
  close_ok (q);
  check_clean ();
}

/* A crash: exact bits, then, with bit 63 cleared, inconsistent ones. */
static void
test_unclean (void **state)
{
  struct qcow2_entry e[2];
  const struct qcow2_entry *f;
  struct qcow2 *q;
  size_t nr;
  json_t *list;

  unlink (sidecar);
  make_disk (GIB);
  q = open_ok (GIB, QCOW2_CREATED);
  e[0] = new_entry (q, "a", 16, true);
  e[1] = new_entry (q, "b", 16, false);
  write_ok (q, e, 2);
  set_bit (qcow2_words (e[0].bits), 77);
  qcow2_abandon (q);
  list = list_by_qemu ();
  assert_true (is_listed (list, 0, "a", 16, true, true));
  json_decref (list);

  q = open_ok (GIB, QCOW2_UNCLEAN);
  f = qcow2_entries (q, &nr);
  assert_int_equal (nr, 2);
  assert_true (f[0].in_use && !f[0].inconsistent);
  assert_true (test_bit (qcow2_words (f[0].bits), 77));
  qcow2_abandon (q);

  /* Ours no more: somebody wrote behind our back. */
  patch64 (AUTOCLEAR, peek64 (AUTOCLEAR) & ~QCOW2_AUTOCLEAR_OURS);
  q = open_ok (GIB, QCOW2_FOREIGN);
  f = qcow2_entries (q, &nr);
  assert_int_equal (nr, 2);
  assert_true (f[0].inconsistent && f[0].bits == NULL);
  assert_true (f[1].inconsistent && f[0].autoflag && !f[1].autoflag);
  close_ok (q);
  check_clean ();

  /* It stays so, and is no crash; beside it, others are kept. */
  q = open_ok (GIB, QCOW2_CLEAN);
  f = qcow2_entries (q, &nr);
  assert_int_equal (nr, 2);
  assert_true (f[0].inconsistent && f[1].inconsistent);
  e[0] = f[0];
  e[0].name = strdup (f[0].name);
  e[1] = new_entry (q, "c", 16, true);
  set_bit (qcow2_words (e[1].bits), 3);
  write_ok (q, e, 2);
  qcow2_abandon (q);
  free (e[0].name);
  q = open_ok (GIB, QCOW2_UNCLEAN);
  f = qcow2_entries (q, &nr);
  assert_int_equal (nr, 2);
  assert_true (f[0].inconsistent && !f[1].inconsistent);
  assert_true (test_bit (qcow2_words (f[1].bits), 3));
  close_ok (q);
  check_clean ();
  list = list_by_qemu ();
  assert_true (is_listed (list, 0, "a", 16, true, true));
  assert_true (is_listed (list, 1, "c", 16, true, false));
  json_decref (list);

  /* QEMU can remove what is inconsistent, and we go on. */
  RUN_OK ("qemu-img", "bitmap", "--remove", "-f", "qcow2", sidecar, "a");
  q = open_ok (GIB, QCOW2_FOREIGN);
  f = qcow2_entries (q, &nr);
  assert_int_equal (nr, 1);
  assert_true (test_bit (qcow2_words (f[0].bits), 3));
  close_ok (q);
  check_clean ();
}

/* A bitmap that becomes inconsistent while it has bits. */
static void
test_become_inconsistent (void **state)
{
  struct qcow2_entry e;
  const struct qcow2_entry *f;
  struct qcow2 *q;
  size_t nr;

  unlink (sidecar);
  make_disk (GIB);
  q = create_with (GIB, &e, "a", 9, true);
  memset (qcow2_words (e.bits), 0xff, 4096);
  e.inconsistent = true;
  write_ok (q, &e, 1);
  close_ok (q);
  check_clean ();
  q = open_ok (GIB, QCOW2_CLEAN);
  f = qcow2_entries (q, &nr);
  assert_true (nr == 1 && f[0].inconsistent && f[0].bits == NULL);
  close_ok (q);
}

/* Garbage beyond the last granule of a bitmap that does not record, grown. */
static void
test_garbage_then_growth (void **state)
{
  const struct qcow2_entry *f;
  struct qcow2_entry e;
  struct qcow2 *q;
  size_t nr;

  unlink (sidecar);
  make_disk (512 * 5);
  q = create_with (512 * 5, &e, "off", 9, false);
  qcow2_words (e.bits)[0] = UINT64_MAX;
  close_ok (q);
  q = open_ok (512 * 90, QCOW2_CLEAN);
  f = qcow2_entries (q, &nr);
  assert_int_equal (qcow2_words (f[0].bits)[0], 0x1f);
  assert_int_equal (qcow2_words (f[0].bits)[1], 0);
  qcow2_words (f[0].bits)[1] = UINT64_MAX;
  close_ok (q);
  q = open_ok (512 * 90, QCOW2_CLEAN);
  f = qcow2_entries (q, &nr);
  assert_int_equal (qcow2_words (f[0].bits)[1], (1 << 26) - 1);
  close_ok (q);
}

/* Growth while unclean is still unclean; a moved disk likewise keeps all. */
static void
test_resize_unclean (void **state)
{
  const struct qcow2_entry *f;
  struct qcow2_entry e[2];
  char other[PATH_MAX + 8];
  enum qcow2_found found;
  struct qcow2 *q;
  size_t nr;
  int status;
  char *out;

  unlink (sidecar);
  make_disk (GIB);
  q = open_ok (GIB, QCOW2_CREATED);
  e[0] = new_entry (q, "a", 20, true);
  e[1] = new_entry (q, "b", 20, false);
  write_ok (q, e, 2);
  set_bit (qcow2_words (e[0].bits), 9);
  qcow2_abandon (q);
  q = open_ok (GIB + 512, QCOW2_UNCLEAN);
  f = qcow2_entries (q, &nr);
  assert_true (test_bit (qcow2_words (f[0].bits), 9));
  assert_true (test_bit (qcow2_words (f[0].bits), 1024));
  assert_false (test_bit (qcow2_words (f[0].bits), 1023));
  assert_false (test_bit (qcow2_words (f[1].bits), 1024));
  close_ok (q);

  snprintf (other, sizeof other, "%s.moved", disk);
  make_disk (GIB + 512);
  assert_int_equal (rename (disk, other), 0);
  q = qcow2_open (sidecar, other, GIB + 512, false, &found, &err);
  assert_non_null (q);
  assert_int_equal (found, QCOW2_CLEAN);
  close_ok (q);
  out = run (&status, "qemu-img", "info", sidecar, NULL);
  assert_non_null (strstr (out, other));
  free (out);
  unlink (other);

  /* Grown beyond 2^32 bits: the disk opens, the bitmap is given up. */
  unlink (sidecar);
  q = open_ok (2 * TIB, QCOW2_CREATED);
  e[0] = new_entry (q, "a", 9, true);
  e[1] = new_entry (q, "b", 16, true);
  write_ok (q, e, 2);
  close_ok (q);
  q = open_ok (2 * TIB + 512, QCOW2_CLEAN);
  f = qcow2_entries (q, &nr);
  assert_true (f[0].inconsistent && f[0].bits == NULL);
  assert_false (f[1].inconsistent);
  close_ok (q);
  make_disk (2 * TIB + 512);
  check_clean ();
  q = open_ok (2 * TIB + 512, QCOW2_CLEAN);
  f = qcow2_entries (q, &nr);
  assert_true (nr == 2 && f[0].inconsistent && !f[1].inconsistent);
  close_ok (q);
}

/* Two cannot have it, nor we and QEMU. */
static void
test_in_use (void **state)
{
  enum qcow2_found found;
  struct qcow2 *q;
  int status;
  char *out;

  unlink (sidecar);
  make_disk (MIB);
  q = open_ok (MIB, QCOW2_CREATED);
  assert_null (qcow2_open (sidecar, disk, MIB, false, &found, &err));
  assert_int_equal (err.errnum, EAGAIN);
  out = run (&status, "qemu-io", "-f", "qcow2", "-c", "write 0 512", sidecar,
             NULL);
  assert_int_not_equal (status, 0);
  assert_non_null (strstr (out, "Failed to get \"write\" lock"));
  free (out);
  out = run (&status, "qemu-img", "info", "-f", "qcow2", sidecar, NULL);
  assert_int_not_equal (status, 0);
  assert_non_null (strstr (out, "Failed to get shared \"write\" lock"));
  free (out);
  RUN_OK ("qemu-img", "info", "-U", "-f", "qcow2", sidecar);
  close_ok (q);

  /* The lock is on the new file after a rebuild, too. */
  q = open_ok (2 * MIB, QCOW2_CLEAN);
  assert_null (qcow2_open (sidecar, disk, 2 * MIB, false, &found, &err));
  assert_int_equal (err.errnum, EAGAIN);
  close_ok (q);
}

/* A terabyte costs little, on disk and in time. */
static void
test_terabyte (void **state)
{
  struct timespec a, b;
  struct qcow2_entry e;
  struct qcow2 *q;
  struct stat st;
  double ms;

  unlink (sidecar);
  make_disk (TIB);
  q = create_with (TIB, &e, "a", 16, true);
  close_ok (q);
  assert_int_equal (stat (sidecar, &st), 0);
  assert_true (st.st_blocks * 512 < 16 * (off_t) MIB);
  clock_gettime (CLOCK_MONOTONIC, &a);
  q = open_ok (TIB, QCOW2_CLEAN);
  clock_gettime (CLOCK_MONOTONIC, &b);
  close_ok (q);
  ms = (b.tv_sec - a.tv_sec) * 1e3 + (b.tv_nsec - a.tv_nsec) / 1e6;
  print_message ("a sidecar of 1 TiB opened in %.2f ms\n", ms);
  /* For what it depends on, see the figures above; this is for a disaster. */
  assert_true (ms < 1000);
}

int
main (void)
{
  static const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_granularities),
    cmocka_unit_test (test_granularities_large),
    cmocka_unit_test (test_empty_disk),
    cmocka_unit_test (test_names),
    cmocka_unit_test (test_limits),
    cmocka_unit_test (test_no_space),
    cmocka_unit_test (test_no_growth),
    cmocka_unit_test (test_unclean),
    cmocka_unit_test (test_become_inconsistent),
    cmocka_unit_test (test_garbage_then_growth),
    cmocka_unit_test (test_resize_unclean),
    cmocka_unit_test (test_in_use),
    cmocka_unit_test (test_terabyte),
  };

  if (!have ("qemu-img") || !have ("qemu-io") || !have ("qemu-nbd")
      || !have ("nbdinfo")) {
    printf ("QEMU's tools and nbdinfo are needed\n");
    return 77;
  }
  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
