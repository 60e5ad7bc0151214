/* nbdferry - test of the trust rule's judgement
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What test-trust.py cannot play: clocks that jump, writes that hang, file
 * systems without fine times.
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "trust.h"

#define MS INT64_C (1000000)
#define S  (1000 * MS)
#define T  (1800000000 * S + 123 * MS) /* when the disk was closed or opened */

#define BOOT  "11111111-1111-4111-8111-111111111111"
#define OTHER "22222222-2222-4222-8222-222222222222"

static struct journal_record was;

/* A disk that was closed in good order, or else opened, at T. */
static struct trust_case
the_case (enum qcow2_found found)
{
  memset (&was, 0, sizeof was);
  was.clean = found == QCOW2_CLEAN || found == QCOW2_FOREIGN;
  strcpy (was.boot_id, BOOT);
  was.trust = (struct journal_trust){
    .known = true, .disk_size = 1 << 20, .disk_inode = 7, .disk_mtime = T,
    .sidecar_size = 1 << 21, .sidecar_inode = 8, .sidecar_mtime = T + MS,
  };
  setenv ("FERRY_TEST_BOOT_ID", BOOT, 1);
  unsetenv ("FERRY_TEST_BOOT_TIME");
  return (struct trust_case){
    .disk_path = "/disk", .state_dir = "/state", .was = &was,
    .disk_has_times = true,
    .disk = { .size = 1 << 20, .inode = 7, .mtime = T, .local = true },
    .sidecar_exists = true,
    .sidecar = { .size = 1 << 21, .inode = 8, .mtime = T + MS,
                 .local = true },
    .left = { .valid = true, .first = T, .last = T },
    .found = found,
  };
}

static void
expect (const struct trust_case *c, enum trust_verdict verdict,
        const char *words)
{
  char why[TRUST_WHY_MAX];

  assert_int_equal (trust_judge (c, why), verdict);
  if (words)
    assert_non_null (strstr (why, words));
  else
    assert_string_equal (why, "");
}

static void
test_clean (void **state)
{
  struct trust_case c = the_case (QCOW2_CLEAN);

  expect (&c, TRUST_KEPT, NULL);
  /* One nanosecond is enough, in both directions. */
  c.disk.mtime = T + 1;
  expect (&c, TRUST_BROKEN, "/disk was modified at 2027-01-15 08:00:00 UTC "
          "while no daemon had it open");
  c.disk.mtime = T - 1;
  expect (&c, TRUST_BROKEN, "put back to an older state");
  c = the_case (QCOW2_CLEAN);
  c.disk.inode++;
  expect (&c, TRUST_BROKEN, "replaced by another file");
  /* The times of other machines are as good as any for this. */
  c = the_case (QCOW2_CLEAN);
  c.disk.local = c.sidecar.local = false;
  expect (&c, TRUST_KEPT, NULL);
  c.disk.mtime++;
  expect (&c, TRUST_BROKEN, "modified");
  /* The journal of a clean close, and a sidecar that was just opened. */
  c = the_case (QCOW2_UNCLEAN);
  was.clean = true;
  c.left.valid = false;
  c.sidecar.mtime += 5 * S;
  expect (&c, TRUST_KEPT, NULL);
  c.disk.mtime++;
  expect (&c, TRUST_BROKEN, "while no daemon had it open");
  /* One that was just made of QEMU's. */
  c.sidecar.inode++;
  expect (&c, TRUST_KEPT, NULL);
  c.disk.mtime = c.sidecar.mtime + S;
  expect (&c, TRUST_BROKEN, "modified");
}

static void
test_sidecar (void **state)
{
  struct trust_case c = the_case (QCOW2_CLEAN);

  /* Copies: later, or in whole seconds. */
  c.sidecar.inode++;
  c.sidecar.mtime += 1000 * S;
  expect (&c, TRUST_KEPT, NULL);
  c.sidecar.mtime = (T + MS) / S * S;
  expect (&c, TRUST_KEPT, NULL);
  c.sidecar.mtime = T - 10 * S;
  expect (&c, TRUST_BROKEN, "bitmaps.qcow2 is of");
  /* The same file with other content, whether or not it is known when it was
   * made; or a copy that has got the number of what it was made of.
   */
  c = the_case (QCOW2_CLEAN);
  c.sidecar.mtime++;
  expect (&c, TRUST_BROKEN, "bitmaps.qcow2 is of");
  c.sidecar_born = was.trust.sidecar_mtime;
  expect (&c, TRUST_BROKEN, "bitmaps.qcow2 is of");
  c.sidecar_born++;
  expect (&c, TRUST_KEPT, NULL);
}

static void
test_foreign (void **state)
{
  struct trust_case c = the_case (QCOW2_FOREIGN);

  c.disk.mtime = T + 50 * S;
  c.sidecar.mtime = T + 51 * S;
  expect (&c, TRUST_KEPT, NULL);
  c.disk.mtime = T + 51 * S + 20 * MS;
  expect (&c, TRUST_KEPT, NULL);
  c.disk.mtime++;
  expect (&c, TRUST_BROKEN, "after another program (QEMU) had closed");
  c.sidecar.local = false; /* another clock */
  expect (&c, TRUST_UNVERIFIABLE, NULL);
  c.disk.mtime = T + 50 * S;
  expect (&c, TRUST_KEPT, NULL);
  /* A file system of whole seconds. */
  c = the_case (QCOW2_FOREIGN);
  c.sidecar.mtime = T / S * S;
  c.disk.mtime = T + 500 * MS;
  expect (&c, TRUST_KEPT, NULL);
  c.disk.mtime = T + 5 * S;
  expect (&c, TRUST_BROKEN, "modified");
  /* Without a journal, and killed between the sidecar and the journal. */
  c = the_case (QCOW2_FOREIGN);
  memset (&was, 0, sizeof was);
  c.no_journal = true;
  expect (&c, TRUST_KEPT, NULL);
  c = the_case (QCOW2_CLEAN);
  was.clean = false;
  expect (&c, TRUST_KEPT, NULL);
  c.disk.mtime = T + 2 * S;
  expect (&c, TRUST_BROKEN, "after nbdferry had closed");
}

static void
test_crash (void **state)
{
  struct trust_case c = the_case (QCOW2_UNCLEAN);

  expect (&c, TRUST_KEPT, NULL);
  /* Written for an hour. */
  c.left.last = T + 3600 * S;
  expect (&c, TRUST_KEPT, NULL); /* as it was: the last one failed */
  c.disk.mtime = T + 3600 * S + 20 * MS;
  expect (&c, TRUST_KEPT, NULL);
  c.disk.mtime++;
  expect (&c, TRUST_BROKEN, "after a daemon had died whose last write");
  c.left.in_flight = true;
  expect (&c, TRUST_KEPT, NULL);
  c.disk.mtime = T + 3631 * S;
  expect (&c, TRUST_BROKEN, "after a daemon had died whose last write");
  /* An older state of it. */
  c.disk.mtime = T - 21 * MS;
  expect (&c, TRUST_BROKEN, "put back to an older state");
  /* Not if the clock was set back, and then it was written to. */
  c.disk.mtime = T - 3600 * S;
  c.left.first = c.left.last = T - 3600 * S;
  expect (&c, TRUST_KEPT, NULL);
  /* Times of another machine say nothing then. */
  c = the_case (QCOW2_LOST);
  c.disk.mtime = T + S;
  expect (&c, TRUST_BROKEN, "died");
  c.disk.local = false;
  expect (&c, TRUST_UNVERIFIABLE, NULL);
  c = the_case (QCOW2_UNCLEAN);
  c.left.valid = false;
  expect (&c, TRUST_BROKEN, "/state/lastwrite is missing");
  c = the_case (QCOW2_UNCLEAN);
  c.no_journal = true;
  expect (&c, TRUST_BROKEN, "journal is missing");
}

static void
test_other_boot (void **state)
{
  struct trust_case c = the_case (QCOW2_UNCLEAN);
  int64_t now = trust_now ();
  char text[32];

  setenv ("FERRY_TEST_BOOT_ID", OTHER, 1);
  snprintf (text, sizeof text, "%jd", (intmax_t) (now / S - 60));
  setenv ("FERRY_TEST_BOOT_TIME", text, 1);
  c.left.valid = false;
  c.disk.mtime = now - 3600 * S;
  expect (&c, TRUST_KEPT, NULL);
  c.disk.mtime = now - 30 * S;
  expect (&c, TRUST_BROKEN, "after the machine had been started again");
  /* A clock that is wrong says nothing. */
  c.disk.mtime = now + 3600 * S;
  expect (&c, TRUST_KEPT, NULL);
  /* What was closed in good order needs no boot. */
  c = the_case (QCOW2_CLEAN);
  setenv ("FERRY_TEST_BOOT_ID", OTHER, 1);
  expect (&c, TRUST_KEPT, NULL);
}

static void
test_size (void **state)
{
  const enum qcow2_found found[] = { QCOW2_CLEAN, QCOW2_UNCLEAN,
                                     QCOW2_FOREIGN };

  for (size_t i = 0; i < 3; i++) {
    struct trust_case c = the_case (found[i]);

    c.disk.mtime += 100 * S;
    c.disk.size += 512;
    expect (&c, TRUST_RESIZED, "extended from 1048576 to 1049088 bytes");
    c.disk.size -= 1024;
    expect (&c, TRUST_RESIZED, "cut from 1048576 to 1048064 bytes");
    c.disk.inode++;
    expect (&c, TRUST_BROKEN, "replaced");
  }
}

static void
test_no_times (void **state)
{
  struct trust_case c = the_case (QCOW2_UNCLEAN);

  c.disk_has_times = false;
  expect (&c, TRUST_UNVERIFIABLE, NULL);
  c.found = QCOW2_CREATED;
  expect (&c, TRUST_UNVERIFIABLE, NULL);
}

static void
test_long_path (void **state)
{
  struct trust_case c = the_case (QCOW2_CLEAN);
  char path[4096], why[TRUST_WHY_MAX];

  memset (path, 'x', sizeof path);
  memcpy (path, "/", 1);
  strcpy (path + sizeof path - 6, "/disk");
  c.disk_path = path;
  c.disk.mtime++;
  assert_int_equal (trust_judge (&c, why), TRUST_BROKEN);
  assert_non_null (strstr (why, "xx/disk was modified"));
  assert_non_null (strstr (why, "had it open"));
}

/* ---- the page ---- */

static char *page_path;

static struct trust *
open_page (const char *boot_id, struct trust_left *left)
{
  struct error err;
  struct trust *t = trust_open (page_path, boot_id, left, &err);

  assert_non_null (t);
  return t;
}

static void
test_page (void **state)
{
  struct trust_left left;
  struct trust *t;
  int64_t before;

  unlink (page_path);
  t = open_page (BOOT, &left);
  assert_false (left.valid);
  trust_start (t, BOOT, T);
  trust_close (t);

  t = open_page (OTHER, &left);
  assert_false (left.valid);
  trust_close (t);
  t = open_page ("", &left);
  assert_false (left.valid);
  trust_close (t);

  t = open_page (BOOT, &left);
  assert_true (left.valid && left.last == T && !left.in_flight);
  trust_start (t, BOOT, 1);
  before = trust_now ();
  trust_write_begins (t, 5);
  trust_close (t); /* as a kill leaves it */
  t = open_page (BOOT, &left);
  assert_true (left.valid && left.in_flight && left.last >= before);

  trust_start (t, BOOT, 1);
  trust_write_begins (t, 5);
  trust_write_begins (t, 5 + TRUST_SLOTS);
  trust_write_ended (t, 5);
  trust_close (t);
  t = open_page (BOOT, &left);
  assert_true (left.in_flight);
  usleep (30000);
  before = trust_now ();
  trust_write_ended (t, 5 + TRUST_SLOTS);
  trust_close (t);
  t = open_page (BOOT, &left);
  assert_true (left.valid && !left.in_flight && left.last >= before);
  trust_close (t);

  /* Cut, as by a full disk. */
  assert_int_equal (truncate (page_path, 100), 0);
  t = open_page (BOOT, &left);
  trust_start (t, BOOT, T);
  trust_close (t);
  t = open_page (BOOT, &left);
  assert_true (left.valid && left.last == T && !left.in_flight);
  trust_close (t);
  trust_write_begins (NULL, 0);
  trust_write_ended (NULL, 0);
  trust_close (NULL);
}

static void
test_page_refused (void **state)
{
  struct trust_left left;
  struct error err;

  unlink (page_path);
  assert_int_equal (mkdir (page_path, 0700), 0);
  assert_null (trust_open (page_path, BOOT, &left, &err));
  rmdir (page_path);
  assert_int_equal (symlink ("/etc/passwd", page_path), 0);
  assert_null (trust_open (page_path, BOOT, &left, &err));
  unlink (page_path);
  assert_int_equal (mkfifo (page_path, 0600), 0);
  assert_null (trust_open (page_path, BOOT, &left, &err));
  unlink (page_path);
}

/* A write after the record gets another time. */
static void
test_record (void **state)
{
  struct journal_trust r;
  struct error err;
  struct disk *d;
  char byte = 0;

  unlink (page_path);
  d = disk_open_file (page_path, 1 << 20, false, &err);
  assert_non_null (d);
  for (int i = 0; i < 20; i++) {
    byte++;
    assert_int_equal (d->ops->pwrite (d, &byte, 1, 0, 0), 0);
    assert_int_equal (d->ops->settle (d), 0);
    assert_int_equal (trust_record (d, page_path, true, &r, &err), 0);
    assert_true (r.known && r.disk_size == 1 << 20);
    assert_int_equal (r.disk_mtime, r.sidecar_mtime);
    assert_true (trust_now () > r.disk_mtime);
  }
  d->ops->close (d);
  assert_int_equal (unlink (page_path), 0);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_clean),
    cmocka_unit_test (test_sidecar),
    cmocka_unit_test (test_foreign),
    cmocka_unit_test (test_crash),
    cmocka_unit_test (test_other_boot),
    cmocka_unit_test (test_size),
    cmocka_unit_test (test_no_times),
    cmocka_unit_test (test_long_path),
    cmocka_unit_test (test_page),
    cmocka_unit_test (test_page_refused),
    cmocka_unit_test (test_record),
  };
  const char *dir = getenv ("TMPDIR");

  if (asprintf (&page_path, "%s/page", dir ? dir : "/tmp") == -1)
    return 1;
  return cmocka_run_group_tests (tests, NULL, NULL);
}
