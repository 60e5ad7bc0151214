/* nbdferry - test of the journal
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

/* cmocka passes every test a state that most do not want. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>
#include <xxhash.h>

#include "journal.h"

#define SLOT 16384

static char dir[PATH_MAX - 64], path[PATH_MAX];
static struct error err;

/* Stands before libc's: the next one fails. */
static bool fail_fsync;

int
fsync (int fd)
{
  if (fail_fsync) {
    fail_fsync = false;
    errno = EIO;
    return -1;
  }
  return fdatasync (fd);
}

static int
make_dir (void **state)
{
  const char *tmp = getenv ("TMPDIR");

  snprintf (dir, sizeof dir, "%s/ferry-journal.XXXXXX",
            tmp ? tmp : "/var/tmp");
  if (mkdtemp (dir) == NULL)
    return -1;
  snprintf (path, sizeof path, "%s/journal", dir);
  return 0;
}

static int
remove_dir (void **state)
{
  unlink (path);
  return rmdir (dir);
}

static struct journal *
open_ok (bool want_created)
{
  bool created;
  struct journal *j = journal_open (path, &created, &err);

  if (j == NULL)
    print_error ("%s\n", err.msg);
  assert_non_null (j);
  assert_int_equal (created, want_created);
  return j;
}

static void
write_ok (struct journal *j, const struct journal_record *rec)
{
  if (journal_write (j, rec, &err) == -1)
    fail_msg ("%s", err.msg);
}

static void
refuse (const char *words)
{
  bool created;
  struct journal_record rec;

  assert_null (journal_open (path, &created, &err));
  assert_non_null (strstr (err.msg, words));
  assert_int_equal (journal_read (path, &rec, &err), -1);
  assert_non_null (strstr (err.msg, words));
}

/* The whole file, in a static buffer. */
static uint8_t *
load (void)
{
  static uint8_t buf[2 * SLOT];
  int fd = open (path, O_RDONLY | O_CLOEXEC);

  assert_int_equal (read (fd, buf, sizeof buf), sizeof buf);
  assert_int_equal (lseek (fd, 0, SEEK_END), sizeof buf);
  close (fd);
  return buf;
}

static void
store (const void *buf, size_t len, uint64_t offset)
{
  int fd = open (path, O_RDWR | O_CLOEXEC);

  assert_int_equal (pwrite (fd, buf, len, offset), len);
  close (fd);
}

static void
test_create (void **state)
{
  const struct journal_record *rec;
  struct uuid lineage;
  struct journal *j;
  struct stat st;
  char boot[37];

  unlink (path);
  j = open_ok (true);
  rec = journal_get (j);
  lineage = rec->lineage;
  assert_false (uuid_is_zero (&lineage));
  assert_true (uuid_is_zero (&rec->session));
  assert_int_equal (rec->generation, 0);
  assert_int_equal (rec->state, JOURNAL_ACTIVE);
  assert_false (rec->clean);
  assert_null (rec->coordinator);
  assert_null (rec->peer);
  journal_boot_id (boot);
  assert_string_equal (rec->boot_id, boot);
  assert_string_equal (journal_path (j), path);
  journal_close (j);
  assert_int_equal (stat (path, &st), 0);
  assert_int_equal (st.st_mode & 0777, 0600);
  assert_int_equal (st.st_size, 2 * SLOT);

  j = open_ok (false);
  assert_true (uuid_equal (&journal_get (j)->lineage, &lineage));
  journal_close (j);

  /* Nothing in it yet. */
  assert_int_equal (truncate (path, 0), 0);
  j = open_ok (true);
  assert_false (uuid_equal (&journal_get (j)->lineage, &lineage));
  journal_close (j);
}

static void
test_write (void **state)
{
  struct journal_record rec, read;
  struct journal *j;

  unlink (path);
  j = open_ok (true);
  rec = *journal_get (j);
  for (uint64_t i = 1; i < 12; ++i) {
    rec.generation = i;
    rec.state = i % 5;
    rec.clean = i & 1;
    rec.attempt = i * 7;
    uuid_new (&rec.session);
    rec.peer = i % 3 ? (char *) "nbd://höst/vda?a=\"b\"" : NULL;
    rec.coordinator = i % 2 ? (char *) "/a b/journal" : NULL;
    write_ok (j, &rec);
    /* The record may be made of the journal's own strings. */
    rec = *journal_get (j);
    write_ok (j, &rec);
    if (i % 4 == 0) {
      journal_close (j);
      j = open_ok (false);
    }
    assert_int_equal (journal_read (path, &read, &err), 0);
    assert_int_equal (read.generation, i);
    assert_int_equal (read.state, i % 5);
    assert_int_equal (read.clean, i & 1);
    assert_int_equal (read.attempt, i * 7);
    assert_true (uuid_equal (&read.session, &journal_get (j)->session));
    assert_true (uuid_equal (&read.lineage, &journal_get (j)->lineage));
    if (i % 3)
      assert_string_equal (read.peer, "nbd://höst/vda?a=\"b\"");
    else
      assert_null (read.peer);
    if (i % 2)
      assert_string_equal (read.coordinator, "/a b/journal");
    else
      assert_null (read.coordinator);
    journal_record_free (&read);
    rec = *journal_get (j);
  }
  journal_close (j);
}

/* Two records: generation 1 in one slot, 2 in the other. */
static void
make_two (void)
{
  struct journal_record rec;
  struct journal *j;

  unlink (path);
  j = open_ok (true);
  rec = *journal_get (j);
  rec.generation = 1;
  write_ok (j, &rec);
  /* Opened again, so that it is seen to go on in the right slot. */
  journal_close (j);
  j = open_ok (false);
  rec = *journal_get (j);
  rec.generation = 2;
  write_ok (j, &rec);
  journal_close (j);
}

/* Whatever is torn or flipped in the newer one, the older one counts, and
 * never something else.
 */
static void
test_torn (void **state)
{
  uint8_t good[2 * SLOT], bad[SLOT];
  struct journal_record rec;
  uint64_t s0, s1;
  unsigned newer;
  size_t len;

  make_two ();
  memcpy (good, load (), sizeof good);
  memcpy (&s0, good + 16, 8);
  memcpy (&s1, good + SLOT + 16, 8);
  newer = be64toh (s1) > be64toh (s0);
  len = 32 + strlen ((char *) good + newer * SLOT + 32);

  for (size_t cut = 0; cut <= len; cut += cut < 40 ? 1 : 13) {
    /* The new slot only got 'cut' bytes far; before, it had another. */
    memcpy (bad, good + !newer * SLOT, SLOT);
    bad[23] ^= 0x40; /* of another sequence and checksum */
    bad[31] ^= 0x40;
    memcpy (bad, good + newer * SLOT, cut);
    store (bad, SLOT, newer * SLOT);
    if (journal_read (path, &rec, &err) == -1)
      fail_msg ("cut at %zu: %s", cut, err.msg);
    assert_int_equal (rec.generation,
                      memcmp (bad, good + newer * SLOT, len) == 0 ? 2 : 1);
    journal_record_free (&rec);
  }
  for (size_t at = 0; at < len; ++at) {
    memcpy (bad, good + newer * SLOT, SLOT);
    bad[at] ^= 1 << at % 8;
    store (bad, SLOT, newer * SLOT);
    assert_int_equal (journal_read (path, &rec, &err), 0);
    assert_int_equal (rec.generation, 1);
    journal_record_free (&rec);
  }
  /* Both: refused, and left as it was. */
  store (bad, SLOT, !newer * SLOT);
  memcpy (good, load (), sizeof good);
  refuse ("damaged");
  assert_memory_equal (load (), good, sizeof good);
  memset (bad, 0, SLOT);
  store (bad, SLOT, 0);
  store (bad, SLOT, SLOT);
  refuse ("damaged");
  assert_int_equal (truncate (path, 100), 0);
  refuse ("damaged");
}

/* Put a payload, with a right checksum, into slot 0. */
static void
forge (uint32_t version, uint64_t sequence, const char *payload)
{
  uint8_t buf[SLOT] = "FERRYJNL";
  uint32_t v = htobe32 (version), len = htobe32 (strlen (payload));
  uint64_t s = htobe64 (sequence), sum;
  XXH3_state_t *x = XXH3_createState ();

  memcpy (buf + 8, &v, 4);
  memcpy (buf + 12, &len, 4);
  memcpy (buf + 16, &s, 8);
  memcpy (buf + 32, payload, strlen (payload));
  XXH3_64bits_reset (x);
  XXH3_64bits_update (x, buf, 24);
  XXH3_64bits_update (x, buf + 32, strlen (payload));
  sum = htobe64 (XXH3_64bits_digest (x));
  XXH3_freeState (x);
  memcpy (buf + 24, &sum, 8);
  store (buf, SLOT, 0);
  memset (buf, 0, SLOT);
  store (buf, SLOT, SLOT);
}

#define U1 "12345678-1234-4123-8123-123456789abc"
#define RECORD(generation, state, more)                                   \
  "{\"lineage\":\"" U1 "\",\"generation\":" generation ",\"state\":\""    \
  state "\",\"clean\":true,\"boot-id\":\"\",\"session\":\"" U1            \
  "\",\"attempt\":1" more "}"

static void
test_other_versions (void **state)
{
  struct journal_record rec;

  make_two ();
  forge (1, 9, RECORD ("5", "gone", ",\"peer\":\"nbd://x\",\"new\":[1]"));
  assert_int_equal (journal_read (path, &rec, &err), 0);
  assert_int_equal (rec.generation, 5);
  assert_int_equal (rec.state, JOURNAL_GONE);
  assert_true (rec.clean);
  assert_string_equal (rec.peer, "nbd://x");
  journal_record_free (&rec);

  forge (2, 9, RECORD ("5", "gone", ""));
  refuse ("later version");
  forge (1, 9, RECORD ("-5", "gone", ""));
  refuse ("damaged");
  forge (1, 9, RECORD ("5", "elsewhere", ""));
  refuse ("damaged");
  forge (1, 9, RECORD ("5", "gone", ",\"peer\":3"));
  refuse ("damaged");
  forge (1, 9, "{}");
  refuse ("damaged");
  forge (1, 9, "nonsense");
  refuse ("damaged");
  forge (1, 9, "");
  refuse ("damaged");
}

#define FILE_TIMES "{\"size\":1,\"inode\":-1,\"mtime\":-5}"

static void
test_trust (void **state)
{
  static const char *const bad[] = {
    ",\"trust\":null", ",\"trust\":{}", ",\"trust\":[1]",
    ",\"trust\":{\"disk\":" FILE_TIMES "}",
    ",\"trust\":{\"disk\":" FILE_TIMES ",\"sidecar\":{\"size\":\"1\"}}",
    ",\"reasons\":null", ",\"reasons\":{}", ",\"reasons\":[1]",
    ",\"reasons\":[{\"time\":1}]", ",\"reasons\":[{\"text\":\"\"}]",
    ",\"reasons\":[{\"time\":\"1\",\"text\":\"\"}]",
    ",\"reasons\":[{\"time\":1,\"text\":\"\",\"bitmaps\":1}]",
    ",\"reasons\":[{\"time\":1,\"text\":\"\",\"bitmaps\":[1]}]",
  };
  struct journal_record rec, read;
  struct journal *j;

  make_two ();
  forge (1, 9, RECORD ("5", "active", ",\"trust\":{\"disk\":" FILE_TIMES
                       ",\"sidecar\":" FILE_TIMES ",\"new\":1},"
                       "\"reasons\":[{\"time\":7,\"text\":\"why\","
                       "\"bitmaps\":[\"b\"]},{\"time\":0,\"text\":\"\"}]"));
  j = open_ok (false);
  rec = *journal_get (j);
  assert_true (rec.trust.known);
  assert_int_equal (rec.trust.disk_inode, UINT64_MAX);
  assert_int_equal (rec.trust.sidecar_mtime, -5);
  assert_int_equal (json_array_size (rec.reasons), 2);
  rec.trust = (struct journal_trust){
    .known = true, .disk_size = INT64_MAX, .disk_inode = UINT64_MAX - 1,
    .disk_mtime = INT64_C (1800000000123456789), .sidecar_size = 2,
    .sidecar_inode = 3, .sidecar_mtime = INT64_MIN,
  };
  write_ok (j, &rec);
  rec.reasons = journal_get (j)->reasons;
  write_ok (j, &rec);
  journal_close (j);
  assert_int_equal (journal_read (path, &read, &err), 0);
  assert_memory_equal (&read.trust, &rec.trust, sizeof rec.trust);
  assert_string_equal (json_string_value (json_object_get (
    json_array_get (read.reasons, 0), "text")), "why");
  journal_record_free (&read);

  forge (1, 9, RECORD ("5", "active", ""));
  assert_int_equal (journal_read (path, &read, &err), 0);
  assert_false (read.trust.known);
  assert_null (read.reasons);
  journal_record_free (&read);
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; ++i) {
    const char *whole = RECORD ("5", "active", "");
    char text[1000];

    snprintf (text, sizeof text, "%.*s%s}", (int) strlen (whole) - 1, whole,
              bad[i]);
    forge (1, 9, text);
    refuse ("damaged");
  }
}

/* A later version's record in the newer slot: the older one must not count,
 * however well we can read it.
 */
static void
test_newer_version_wins (void **state)
{
  uint8_t old[SLOT], *all;

  make_two ();
  forge (1, 7, RECORD ("5", "active", ""));
  memcpy (old, load (), SLOT);
  forge (2, 8, RECORD ("6", "gone", ""));
  store (old, SLOT, SLOT);
  refuse ("later version");
  /* The other way round the version we know is the later word. */
  forge (2, 6, RECORD ("6", "gone", ""));
  store (old, SLOT, SLOT);
  journal_close (open_ok (false));
  /* A number that has no successor is no number. */
  forge (1, UINT64_MAX, RECORD ("5", "gone", ""));
  refuse ("damaged");
  /* Two of the same number cannot be. */
  forge (1, 7, RECORD ("5", "gone", ""));
  store (old, SLOT, SLOT);
  all = load ();
  assert_int_equal (all[0], 'F');
  refuse ("damaged");
}

/* An error leaves the record that stood, in memory and on disk. */
static void
test_failed_write (void **state)
{
  struct journal_record rec;
  struct rlimit old, limit;
  struct journal *j;
  char *big;

  make_two ();
  j = open_ok (false);
  rec = *journal_get (j);
  big = calloc (1, SLOT + 1);
  memset (big, 'x', SLOT);
  rec.peer = big;
  assert_int_equal (journal_write (j, &rec, &err), -1);
  assert_int_equal (err.errnum, E2BIG);
  strcpy (big, "nbd://\xff");
  assert_int_equal (journal_write (j, &rec, &err), -1);
  assert_non_null (strstr (err.msg, "UTF-8"));
  rec.peer = NULL;
  rec.generation = 77;
  signal (SIGXFSZ, SIG_IGN);
  getrlimit (RLIMIT_FSIZE, &old);
  limit = old;
  limit.rlim_cur = 100;
  setrlimit (RLIMIT_FSIZE, &limit);
  assert_int_equal (journal_write (j, &rec, &err), -1);
  setrlimit (RLIMIT_FSIZE, &old);
  /* It is in the file, but not for certain: it must not stay there. */
  fail_fsync = true;
  assert_int_equal (journal_write (j, &rec, &err), -1);
  assert_int_equal (err.errnum, EIO);
  assert_int_equal (journal_get (j)->generation, 2);
  assert_null (journal_get (j)->peer);
  journal_close (j);
  j = open_ok (false);
  assert_int_equal (journal_get (j)->generation, 2);
  rec = *journal_get (j);
  rec.generation = 3;
  write_ok (j, &rec);
  journal_close (j);
  free (big);
}

/* kill -9 at any moment: what was acknowledged is there, or the next. */
static void
test_kill (void **state)
{
  const int rounds = getenv ("CHECK_LONG") ? 1000 : 40;
  uint64_t *acked = mmap (NULL, 4096, PROT_READ | PROT_WRITE,
                          MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  struct journal_record rec;

  unlink (path);
  for (int i = 0; i < rounds; ++i) {
    struct timespec ts = { 0, (rand () % 8000) * 1000 };
    pid_t pid = fork ();

    if (pid == 0) {
      bool created;
      struct journal *j = journal_open (path, &created, &err);

      for (;;) {
        if (j == NULL)
          _exit (1);
        rec = *journal_get (j);
        rec.generation++;
        if (journal_write (j, &rec, &err) == -1)
          _exit (1);
        *acked = rec.generation;
      }
    }
    nanosleep (&ts, NULL);
    kill (pid, SIGKILL);
    waitpid (pid, NULL, 0);
    if (access (path, F_OK) == -1)
      continue; /* killed before it was made */
    assert_int_equal (journal_read (path, &rec, &err), 0);
    assert_true (rec.generation == *acked || rec.generation == *acked + 1);
    *acked = rec.generation;
    journal_record_free (&rec);
  }
  munmap (acked, 4096);
  {
    char new_path[PATH_MAX + 8];

    snprintf (new_path, sizeof new_path, "%s.new", path);
    unlink (new_path);
  }
}

static void
test_absent (void **state)
{
  struct journal_record rec;

  unlink (path);
  assert_int_equal (journal_read (path, &rec, &err), -1);
  assert_int_equal (err.errnum, ENOENT);
  assert_int_equal (access (path, F_OK), -1);
  assert_string_equal (journal_state_name (JOURNAL_DOUBT), "in-doubt");
}

int
main (void)
{
  static const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_create),
    cmocka_unit_test (test_write),
    cmocka_unit_test (test_torn),
    cmocka_unit_test (test_other_versions),
    cmocka_unit_test (test_trust),
    cmocka_unit_test (test_newer_version_wins),
    cmocka_unit_test (test_failed_write),
    cmocka_unit_test (test_kill),
    cmocka_unit_test (test_absent),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
