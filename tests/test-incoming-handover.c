/* nbdferry - test of the destination: PREPARE, COMMIT, and what a crash leaves
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "incoming-test.h"

static int
begin_two (void **state)
{
  fresh (2);
  ch = channel ();
  return 0;
}

/* The daemon ends, in good order or not, and another one starts. */
static void
restart (bool clean, bool incoming)
{
  size_t nr = nr_drives;

  incoming_close (ch);
  stop (clean);
  start (nr, 0, incoming);
  ch = channel ();
}

static const struct journal_record *
journal (size_t i)
{
  return journal_get (drives[i]->journal);
}

/* Bitmaps of all sorts. */
static void
add_bitmaps (size_t disk)
{
  static const struct {
    const char *name;
    unsigned shift;
    bool persistent, recording;
  } sorts[] = {
    { "fine", 9, true, true },       { "täglich um 8", 16, true, true },
    { "coarse", 31, true, false },   { "off", 12, true, false },
    { "transient", 12, false, true }, { "empty", 16, true, true },
  };

  for (size_t i = 0; i < sizeof sorts / sizeof sorts[0]; i++) {
    struct source_bitmap *b =
      source_add (&src, disk, sorts[i].name, sorts[i].shift,
                  sorts[i].persistent, sorts[i].recording);

    for (uint64_t at = 0; i != 5 && at < DISK_SIZE; at += 4567 << i)
      bitmap_set (b->bits, at, 513);
    if (i != 5)
      bitmap_set (b->bits, DISK_SIZE - 1, 1);
  }
}

/* ---- the way it should go ---- */

static void
test_happy (void **state)
{
  add_bitmaps (0);
  ship_ok (&src, ch);
  assert_int_equal (drive_may_serve (drives[0], &err), -1);
  OK (send_prepare (&src, ch, 1, &err));
  assert_int_equal (drives[0]->mode, DRIVE_PREPARED);
  assert_int_equal (drive_may_serve (drives[0], &err), -1);
  assert_int_equal (journal (0)->state, JOURNAL_PREPARED);
  OK (send_commit (&src, ch, 1, 0, 1, &err));
  check_arrived (&src, 0, drives[0]);

  /* They record from here on. */
  assert_int_equal (drive_pwrite (drives[0], src.disks[0].data, 512, 512, 0),
                    0);
  assert_true (bitmap_test (bits_of (drives[0], "fine"), 512));
  assert_false (bitmap_test (bits_of (drives[0], "empty"), 1 << 16));
  assert_true (bitmap_test (bits_of (drives[0], "empty"), 512));
  assert_int_equal (
    bitmap_count_bits (bits_of (drives[0], "off")),
    bitmap_count_bits (src.disks[0].bitmaps[3].bits));
}

/* All that is durable is there after a crash; the transient one is not. */
static void
test_happy_after_restart (void **state)
{
  for (int clean = 0; clean < 2; clean++) {
    add_bitmaps (0);
    src.disks[0].bitmaps[4].persistent = true;
    ship_ok (&src, ch);
    OK (send_prepare (&src, ch, 1, &err));
    OK (send_commit (&src, ch, 1, 0, 1, &err));
    restart (clean, clean);
    check_arrived (&src, 0, drives[0]);
    if (clean)
      break;
    end (NULL);
    begin (NULL);
  }
}

/* ---- COMMIT ---- */

static void
test_commit_again (void **state)
{
  struct source other = src;

  add_bitmaps (0);
  ship_ok (&src, ch);
  REFUSED (send_commit (&src, ch, 1, 0, 1, &err), EPROTO, "not prepared");
  REFUSED (send_commit (&src, ch, 0, 0, 1, &err), EPROTO,
           "is incoming; it cannot be committed");
  OK (send_prepare (&src, ch, 3, &err));
  uuid_new (&other.session);
  REFUSED (send_commit (&src, ch, 2, 0, 1, &err), EPROTO, "not prepared by");
  REFUSED (send_commit (&src, ch, 4, 0, 1, &err), EPROTO, "not prepared by");
  REFUSED (send_commit (&other, ch, 3, 0, 1, &err), EPROTO,
           "not prepared by");
  assert_int_equal (drives[0]->mode, DRIVE_PREPARED);
  for (int i = 0; i < 3; i++) {
    OK (send_commit (&src, ch, 3, 0, 1, &err));
    check_arrived (&src, 0, drives[0]);
  }
  REFUSED (send_commit (&src, ch, 2, 0, 1, &err), EPROTO, "not prepared by");
  /* What comes late has no effect. */
  OK (send_cancel (&src, ch, &err));
  assert_int_equal (drives[0]->mode, DRIVE_ACTIVE);
  src.disks[0].bitmaps[4].persistent = true; /* lost at a restart */
}

static void
test_commit_after_restart (void **state)
{
  for (int clean = 0; clean < 2; clean++) {
    source_add (&src, 0, "b", 9, true, true);
    bitmap_set (src.disks[0].bitmaps[0].bits, 4096, 4096);
    ship_ok (&src, ch);
    OK (send_prepare (&src, ch, 1, &err));
    /* Prepared, without the source and without incoming=on. */
    for (int incoming = 0; incoming < 2; incoming++) {
      restart (clean, incoming);
      assert_int_equal (drives[0]->mode, DRIVE_PREPARED);
      REFUSED (drive_may_serve (drives[0], &err), EPERM, "waits for");
      assert_true (find_ok (drives[0], "b")->incoming);
      REFUSED (send_commit (&src, ch, 2, 0, 1, &err), EPROTO, "");
    }
    OK (send_commit (&src, ch, 1, 0, 1, &err)); /* without a handshake */
    check_arrived (&src, 0, drives[0]);
    restart (clean, true);
    check_arrived (&src, 0, drives[0]);
    OK (send_commit (&src, ch, 1, 0, 1, &err));
    check_arrived (&src, 0, drives[0]);
    if (clean)
      break;
    end (NULL);
    begin (NULL);
  }
}

static void
test_malformed_commit (void **state)
{
  static const char *const bodies[] = {
    "", "{}", "{\"attempt\":1}", "{\"attempt\":1,\"disks\":[]}",
    "{\"disks\":[\"vda\"]}", "{\"attempt\":\"1\",\"disks\":[\"vda\"]}",
  };

  ship_ok (&src, ch);
  OK (send_prepare (&src, ch, 1, &err));
  for (size_t i = 0; i < sizeof bodies / sizeof bodies[0]; i++) {
    struct parcel p = { .h = { .type = PACKET_COMMIT }, .json = bodies[i] };

    REFUSED (send_parcel (&src, ch, &p, &err), EBADMSG, "");
  }
  REFUSED (send_json (&src, ch, PACKET_COMMIT, 0,
                      json_pack ("{s:i, s:[i]}", "attempt", 1, "disks", 7),
                      &err), ENOENT, "no disk ''");
  src.disks[0].name = "vdz";
  REFUSED (send_commit (&src, ch, 1, 0, 1, &err), ENOENT, "no disk 'vdz'");
  assert_int_equal (drives[0]->mode, DRIVE_PREPARED);
}

/* ---- a disk that has moved on ---- */

/* The drive hands over in its turn, to somebody else. */
static void
move_on (struct drive *d, bool acknowledged)
{
  struct journal_record rec = *journal_get (d->journal);

  rec.state = JOURNAL_GONE;
  uuid_new (&rec.session);
  rec.attempt = 3;
  rec.peer = (char *) "nbd://elsewhere/vda";
  rec.acknowledged = acknowledged;
  pthread_mutex_lock (&d->control);
  OK (drive_record (d, &rec, &err));
  drives_close (&d, 1, true);
  drive_set_mode (d, DRIVE_LEAVING, NULL);
  drives_open (&d, 1, true);
  pthread_mutex_unlock (&d->control);
}

/* COMMIT is idempotent for ever. */
static void
test_moved_on (void **state)
{
  source_add (&src, 0, "b", 9, true, true);
  ship_ok (&src, ch);
  OK (send_prepare (&src, ch, 1, &err));
  OK (send_commit (&src, ch, 1, 0, 1, &err));
  move_on (drives[0], false);
  OK (send_commit (&src, ch, 1, 0, 1, &err));
  assert_int_equal (drives[0]->mode, DRIVE_LEAVING);
  assert_int_equal (journal (0)->state, JOURNAL_GONE);

  /* It may not come back before the other side is known to have it. */
  restart (false, true);
  assert_int_equal (drives[0]->mode, DRIVE_GONE);
  REFUSED (drive_may_serve (drives[0], &err), EPERM, "nbd://elsewhere/vda");
  OK (send_commit (&src, ch, 1, 0, 1, &err));
  drive_record_acknowledged (drives[0]);
  restart (true, false);
  assert_int_equal (drives[0]->mode, DRIVE_GONE);

  /* Then it may, with incoming=on, and begins with nothing. */
  restart (true, true);
  assert_int_equal (drives[0]->mode, DRIVE_INCOMING);
  assert_int_equal (drives[0]->nr_bitmaps, 0);
  uuid_new (&src.session);
  hello_ok (&src, ch);
  assert_int_equal (journal (0)->state, JOURNAL_GONE);
  OK (send_prepare (&src, ch, 1, &err)); /* less than 3, but not of these */
  assert_int_equal (journal (0)->state, JOURNAL_PREPARED);
}

/* ---- PREPARE ---- */

static void
not_prepared (void)
{
  assert_int_equal (drives[0]->mode, DRIVE_INCOMING);
  assert_int_equal (journal (0)->state, JOURNAL_INCOMING);
}

static void
test_counts (void **state)
{
  struct source_bitmap *b = source_add (&src, 0, "b", 12, true, true);

  bitmap_set (b->bits, 0, 3 * 4096);
  ship_ok (&src, ch);
  bitmap_set (b->bits, 8 * 4096, 1);
  REFUSED (send_prepare (&src, ch, 1, &err), EBADMSG,
           "disk 'vda': bitmap 'b' arrived with 3 bits instead of 4");
  not_prepared ();
  bitmap_clear (b->bits, 0, 2 * 4096);
  REFUSED (send_prepare (&src, ch, 1, &err), EBADMSG, "3 bits instead of 2");
  b->name = "c";
  REFUSED (send_prepare (&src, ch, 1, &err), EBADMSG,
           "bitmap 'c' did not arrive");
  src.disks[0].nr = 0;
  REFUSED (send_prepare (&src, ch, 1, &err), EBADMSG,
           "1 bitmaps arrived instead of 0");
  not_prepared ();
  src.disks[0].nr = 1;
  b->name = "b";
  bitmap_set (b->bits, 0, 2 * 4096); /* the third one is there, too */
  bitmap_clear (b->bits, 8 * 4096, 1);
  OK (send_prepare (&src, ch, 1, &err));
  assert_int_equal (drives[0]->mode, DRIVE_PREPARED);
}

static void
test_malformed_prepare (void **state)
{
  static const char *const bodies[] = {
    "", "{}", "{\"attempt\":1,\"disks\":[]}", "{\"attempt\":1,\"disks\":[1]}",
    "{\"attempt\":1,\"disks\":[{\"lineage\":\"x\",\"generation\":1}]}",
    "{\"attempt\":1,\"disks\":[{\"generation\":1}]}",
    "{\"attempt\":1,\"disks\":[{},{}]}",
  };

  ship_ok (&src, ch);
  for (size_t i = 0; i < sizeof bodies / sizeof bodies[0]; i++) {
    struct parcel p = { .h = { .type = PACKET_PREPARE }, .json = bodies[i] };

    REFUSED (send_parcel (&src, ch, &p, &err), EBADMSG, "");
    not_prepared ();
  }
}

/* COMMIT matches only the last PREPARE, and that is the one that was sent
 * last, not the one that took longest on its way.
 */
static void
test_attempts (void **state)
{
  ship_ok (&src, ch);
  OK (send_prepare (&src, ch, 2, &err));
  OK (send_prepare (&src, ch, 2, &err));
  OK (send_prepare (&src, ch, 3, &err));
  REFUSED (send_prepare (&src, ch, 2, &err), ESTALE, "after attempt 3");
  REFUSED (send_commit (&src, ch, 2, 0, 1, &err), EPROTO, "");
  OK (send_commit (&src, ch, 3, 0, 1, &err));
}

/* Who may begin again on a drive that is prepared. */
static void
test_prepared_drive (void **state)
{
  struct source again = src;

  source_add (&src, 0, "b", 16, true, true);
  ship_ok (&src, ch);
  OK (send_prepare (&src, ch, 1, &err));
  for (int twice = 0; twice < 2; twice++) {
    again = src;
    uuid_new (&again.session);
    uuid_new (&again.disks[0].lineage);
    REFUSED (send_hello (&again, ch, &err), EBUSY, "waits for another");
    again.disks[0].lineage = src.disks[0].lineage;
    again.disks[0].generation++;
    REFUSED (send_hello (&again, ch, &err), EBUSY, "waits for another");
    assert_int_equal (drives[0]->mode, DRIVE_PREPARED);
    restart (false, true);
  }
  /* The very disk that has not let go. */
  again.disks[0].generation = src.disks[0].generation;
  OK (send_hello (&again, ch, &err));
  not_prepared ();
  assert_null (drive_find_bitmap (drives[0], "b"));
  REFUSED (send_commit (&src, ch, 1, 0, 1, &err), EPROTO, "not prepared by");
  ship_ok (&again, ch);
  OK (send_prepare (&again, ch, 1, &err));
  OK (send_commit (&again, ch, 1, 0, 1, &err));
  check_arrived (&again, 0, drives[0]);
}

/* Bitmaps that the drive had before know nothing of what came in. */
static void
test_own_bitmaps (void **state)
{
  restart (true, false);
  assert_int_equal (drives[0]->mode, DRIVE_ACTIVE); /* nothing ever came */
  add_bitmap (drives[0], "own", 4096, true, false);
  add_bitmap (drives[0], "off", 4096, true, true);
  bitmap_set (bits_of (drives[0], "off"), 0, 1);
  restart (true, true);
  ship_ok (&src, ch);
  OK (send_prepare (&src, ch, 1, &err));
  for (int i = 0; i < 2; i++) {
    struct bitmap *own = bits_of (drives[0], "own");

    assert_int_equal (bitmap_count_bits (own), bitmap_bits (own));
    assert_int_equal (bitmap_count_bits (bits_of (drives[0], "off")), 1);
    restart (false, true);
  }
  OK (send_commit (&src, ch, 1, 0, 1, &err));
  check_arrived (&src, 0, drives[0]);
}

/* ---- giving up ---- */

static void
test_cancel (void **state)
{
  source_add (&src, 0, "b", 16, true, true);
  for (int prepared = 0; prepared < 2; prepared++) {
    ship_ok (&src, ch);
    if (prepared)
      OK (send_prepare (&src, ch, 1, &err));
    OK (send_cancel (&src, ch, &err));
    not_prepared ();
    assert_null (drive_find_bitmap (drives[0], "b"));
    REFUSED (send_commit (&src, ch, 1, 0, 1, &err), EPROTO, "");
    REFUSED (drive_may_serve (drives[0], &err), EPERM, "has not completed");
  }
}

/* What has begun to come in is served by nobody, whatever incoming= says. */
static void
test_unfinished (void **state)
{
  source_add (&src, 0, "b", 16, true, true);
  ship_ok (&src, ch);
  restart (false, false);
  not_prepared ();
  REFUSED (drive_may_serve (drives[0], &err), EPERM, "has not completed");
  assert_int_equal (drives[0]->nr_bitmaps, 0);
  restart (true, false);
  not_prepared ();
}

/* ---- several disks ---- */

static void
ship_two (void)
{
  add_bitmaps (0);
  source_add (&src, 1, "b", 16, true, true);
  bitmap_set (src.disks[1].bitmaps[0].bits, 0, 1);
  src.disks[0].bitmaps[4].persistent = true;
  ship_ok (&src, ch);
  OK (send_prepare (&src, ch, 1, &err));
  assert_null (journal (0)->coordinator);
  assert_string_equal (journal (1)->coordinator,
                       journal_path (drives[0]->journal));
}

static void
test_two (void **state)
{
  ship_two ();
  OK (send_commit (&src, ch, 1, 0, 2, &err));
  check_arrived (&src, 0, drives[0]);
  check_arrived (&src, 1, drives[1]);
  OK (send_commit (&src, ch, 1, 0, 2, &err));
}

/* A crash before the coordinator was committed: both wait. */
static void
test_crash_before (void **state)
{
  ship_two ();
  restart (false, true);
  for (size_t i = 0; i < 2; i++) {
    assert_int_equal (drives[i]->mode, DRIVE_PREPARED);
    assert_int_equal (drive_may_serve (drives[i], &err), -1);
  }
  OK (send_commit (&src, ch, 1, 0, 2, &err));
  check_arrived (&src, 0, drives[0]);
  check_arrived (&src, 1, drives[1]);
}

/* A crash between the two: the coordinator's record decides for both. */
static void
test_crash_between (void **state)
{
  ship_two ();
  OK (send_commit (&src, ch, 1, 0, 1, &err));
  assert_int_equal (drives[1]->mode, DRIVE_PREPARED);
  restart (false, false);
  check_arrived (&src, 0, drives[0]);
  check_arrived (&src, 1, drives[1]);
  /* The source does not know, and repeats it. */
  OK (send_commit (&src, ch, 1, 0, 2, &err));
  restart (true, true);
  check_arrived (&src, 0, drives[0]);
  check_arrived (&src, 1, drives[1]);
}

/* The coordinator was committed, and has even moved on, before the other disk
 * is opened again.
 */
static void
test_coordinator_moved_on (void **state)
{
  ship_two ();
  OK (send_commit (&src, ch, 1, 0, 1, &err));
  move_on (drives[0], false);
  restart (false, true);
  assert_int_equal (drives[0]->mode, DRIVE_GONE);
  check_arrived (&src, 1, drives[1]);
}

/* The source may also commit one by one, in any order. */
static void
test_one_by_one (void **state)
{
  ship_two ();
  OK (send_commit (&src, ch, 1, 1, 2, &err));
  check_arrived (&src, 1, drives[1]);
  restart (false, true);
  check_arrived (&src, 1, drives[1]);
  assert_int_equal (drives[0]->mode, DRIVE_PREPARED);
  OK (send_commit (&src, ch, 1, 0, 1, &err));
  check_arrived (&src, 0, drives[0]);
}

/* Not served before the coordinator's journal has been read. */
static void
test_coordinator_lost (void **state)
{
  char path[PATH_MAX + 600], away[PATH_MAX + 600];

  ship_two ();
  snprintf (path, sizeof path, "%s", drive_file ("vda", "journal"));
  snprintf (away, sizeof away, "%s.away", path);
  incoming_close (ch);
  stop (false);
  assert_int_equal (rename (path, away), 0);
  assert_null (try_open ("vdb", 0, true));
  assert_non_null (strstr (err.msg, "must be read first"));
  assert_int_equal (rename (away, path), 0);
  start (2, 0, true);
  ch = channel ();
  assert_int_equal (drives[1]->mode, DRIVE_PREPARED);
}

/* One of two does not hold what it should: the other may be prepared, but the
 * source is told, and nothing is committed.
 */
static void
test_two_refused (void **state)
{
  source_add (&src, 1, "b", 16, true, true);
  ship_ok (&src, ch);
  bitmap_set (src.disks[1].bitmaps[0].bits, 0, 1);
  REFUSED (send_prepare (&src, ch, 1, &err), EBADMSG, "disk 'vdb'");
  assert_int_equal (drives[1]->mode, DRIVE_INCOMING);
  OK (send_cancel (&src, ch, &err));
  assert_int_equal (drives[0]->mode, DRIVE_INCOMING);
  assert_int_equal (drives[1]->mode, DRIVE_INCOMING);
}

/* A session that goes on after its connection was lost. */
static int
send_resume (const struct source *s, struct error *e)
{
  const struct source_disk *d = &s->disks[0];
  char lineage[UUID_TEXT];

  uuid_format (&d->lineage, lineage);
  return send_json (s, ch, PACKET_HELLO, 0,
                    json_pack ("{s:[{s:s, s:I, s:s, s:I}], s:b}", "disks",
                               "name", d->name, "size",
                               (json_int_t) d->size, "lineage", lineage,
                               "generation", (json_int_t) d->generation,
                               "resume", 1), e);
}

/* One that took the drive from another, and has brought nothing yet, goes on
 * after a restart, and not the other.
 */
static void
test_taken_and_restarted (void **state)
{
  struct source other;

  (void) state;
  ship_ok (&src, ch);
  source_init (&other, 1, DISK_SIZE);
  /* Not while the first is there: it is another disk. */
  REFUSED (send_hello (&other, ch, &err), EBUSY, "another disk is just coming");
  ship_ok (&src, ch);
  incoming_close (ch);
  ch = channel ();
  OK (send_hello (&other, ch, &err));
  restart (false, true);
  REFUSED (send_resume (&src, &err), EBUSY, "belongs to another migration");
  OK (send_resume (&other, &err));
  ship_ok (&other, ch);
  OK (send_prepare (&other, ch, 1, &err));
  source_free (&other);
}

/* The source's disk has grown while the connection was lost. */
static void
test_grown (void **state)
{
  (void) state;
  ship_ok (&src, ch);
  src.epoch++;
  src.disks[0].size += 512;
  REFUSED (send_resume (&src, &err), EINVAL, "begin anew");
  src.disks[0].size -= 512;
  OK (send_resume (&src, &err));
}

/* The name of the map of what the destination does not hold. */
static void
test_reserved_name (void **state)
{
  (void) state;
  source_add (&src, 0, "x-ferry-ship", 16, true, true);
  OK (send_hello (&src, ch, &err));
  REFUSED (send_list (&src, ch, 0, &err), EINVAL, "reserved");
}

int
main (void)
{
#define TEST(f)     cmocka_unit_test_setup_teardown (f, begin, end)
#define TEST_TWO(f) cmocka_unit_test_setup_teardown (f, begin_two, end)
  static const struct CMUnitTest tests[] = {
    TEST (test_happy),
    TEST (test_happy_after_restart),
    TEST (test_commit_again),
    TEST (test_commit_after_restart),
    TEST (test_malformed_commit),
    TEST (test_moved_on),
    TEST (test_counts),
    TEST (test_malformed_prepare),
    TEST (test_attempts),
    TEST (test_prepared_drive),
    TEST (test_own_bitmaps),
    TEST (test_cancel),
    TEST (test_unfinished),
    TEST (test_taken_and_restarted),
    TEST (test_grown),
    TEST (test_reserved_name),
    TEST_TWO (test_two),
    TEST_TWO (test_crash_before),
    TEST_TWO (test_crash_between),
    TEST_TWO (test_coordinator_moved_on),
    TEST_TWO (test_one_by_one),
    TEST_TWO (test_coordinator_lost),
    TEST_TWO (test_two_refused),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
