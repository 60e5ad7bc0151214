/* nbdferry - test of the sidecar: crashes, and hostile files
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Ways to come to harm.  A process that is killed -9 at any moment.
 * A machine that loses its power: every write, truncate and fallocate of
 * the sidecar is recorded here, and after each of them the disk is played
 * to hold what was synced before, and of the rest a prefix, or all but one,
 * or only one.  Faults of the file system.  And a file in which every byte
 * that matters is changed.
 */
#include <config.h>

/* cmocka passes every test a state that most do not want. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>

#include <cmocka.h>

#include "qcow2-test.h"

#define MIB     (UINT64_C (1) << 20)
#define CLUSTER (2 * MIB)

/* ---- kill -9 ---- */

#define KILL_SIZE  (1024 * MIB)
#define KILL_SHIFT 20 /* 1024 bits */
#define NR_MODELS  65536
#define MAX_LISTED 5

/* What the child says it has done, in shared memory. */
struct model {
  /* Serial numbers of the bitmaps; 'next' is what is being written. */
  unsigned list[MAX_LISTED], nr;
  unsigned next[MAX_LISTED], nr_next;
  unsigned serials;
  uint64_t bits[NR_MODELS][16];
  unsigned setting_serial, setting_bit; /* may or may not have happened */
};

static void
name_of (char name[16], unsigned serial)
{
  snprintf (name, 16, "b%u", serial);
}

/* Take over what is there, then change it for ever. */
static void
child (struct model *m)
{
  struct qcow2_entry e[MAX_LISTED];
  char names[MAX_LISTED][16];
  enum qcow2_found found;
  const struct qcow2_entry *f;
  struct qcow2_bits *gone;
  struct qcow2 *q = qcow2_open (sidecar, disk, KILL_SIZE, &found, &err);
  size_t nr;

  if (q == NULL)
    _exit (1);
  f = qcow2_entries (q, &nr);
  for (size_t i = 0; i < nr; ++i) {
    e[i] = f[i];
    e[i].name = strcpy (names[i], f[i].name);
  }
  for (;;) {
    unsigned what = rnd (10);

    if (what < 8 && nr > 0) {
      unsigned i = rnd (nr), bit = rnd (1024);

      m->setting_bit = bit;
      __atomic_store_n (&m->setting_serial, m->list[i], __ATOMIC_SEQ_CST);
      set_bit (qcow2_words (e[i].bits), bit);
      __atomic_thread_fence (__ATOMIC_SEQ_CST);
      set_bit (m->bits[m->list[i]], bit);
      __atomic_store_n (&m->setting_serial, 0, __ATOMIC_SEQ_CST);
      continue;
    }
    gone = NULL;
    memcpy (m->next, m->list, sizeof m->list);
    m->nr_next = nr;
    if (nr < MAX_LISTED && (nr == 0 || rnd (2))) {
      if (m->serials + 1 == NR_MODELS)
        _exit (0);
      m->next[m->nr_next++] = ++m->serials;
      name_of (names[nr], m->serials);
      e[nr] = (struct qcow2_entry) { .name = names[nr], .autoflag = true,
                                     .shift = KILL_SHIFT };
      e[nr].bits = qcow2_alloc (q, KILL_SHIFT, &err);
      if (e[nr].bits == NULL)
        _exit (1);
    }
    else {
      gone = e[nr - 1].bits;
      m->nr_next--;
    }
    nr = m->nr_next;
    if (qcow2_write_directory (q, e, nr, &err) == -1)
      _exit (1);
    memcpy (m->list, m->next, sizeof m->list);
    m->nr = nr;
    qcow2_free (q, gone);
    if (rnd (40) == 0) {
      if (qcow2_close (q, &err) == -1)
        _exit (1);
      _exit (0);
    }
  }
}

static bool
is_list (const struct qcow2_entry *e, size_t nr, const unsigned *list,
         unsigned n)
{
  char name[16];

  if (nr != n)
    return false;
  for (size_t i = 0; i < nr; ++i) {
    name_of (name, list[i]);
    if (strcmp (e[i].name, name) != 0)
      return false;
  }
  return true;
}

static void
compare_with_model (struct model *m)
{
  enum qcow2_found found;
  struct qcow2 *q = qcow2_open (sidecar, disk, KILL_SIZE, &found, &err);
  const struct qcow2_entry *e;
  size_t nr;

  if (q == NULL)
    fail_msg ("%s", err.msg);
  e = qcow2_entries (q, &nr);
  if (is_list (e, nr, m->next, m->nr_next)) {
    memcpy (m->list, m->next, sizeof m->list);
    m->nr = m->nr_next;
  }
  else if (!is_list (e, nr, m->list, m->nr))
    fail_msg ("%zu bitmaps, neither what was nor what should be", nr);
  for (size_t i = 0; i < nr; ++i) {
    uint64_t *want = m->bits[m->list[i]], *have = qcow2_words (e[i].bits);

    assert_false (e[i].inconsistent);
    if (m->list[i] == m->setting_serial
        && test_bit (have, m->setting_bit))
      set_bit (want, m->setting_bit);
    assert_memory_equal (have, want, 128);
  }
  m->setting_serial = 0;
  memcpy (m->next, m->list, sizeof m->list);
  m->nr_next = m->nr;
  close_ok (q);
}

static void
test_kill (void **state)
{
  const int rounds = getenv ("CHECK_LONG") ? 3000 : 60;
  struct model *m = mmap (NULL, sizeof *m, PROT_READ | PROT_WRITE,
                          MAP_SHARED | MAP_ANONYMOUS, -1, 0);

  assert_true (m != MAP_FAILED);
  unlink (sidecar);
  make_disk (KILL_SIZE);
  for (int i = 0; i < rounds; ++i) {
    struct timespec ts = { 0, rnd (30) * rnd (1000000) };
    pid_t pid = fork ();
    int status;

    if (pid == 0) {
      random_state += i * 7919;
      child (m);
    }
    nanosleep (&ts, NULL);
    kill (pid, SIGKILL);
    waitpid (pid, &status, 0);
    assert_true (!WIFEXITED (status) || WEXITSTATUS (status) == 0);
    compare_with_model (m);
    if (i % 8 == 0)
      check_clean ();
  }
  check_clean ();
  munmap (m, sizeof *m);
}

/* ---- loss of power ---- */

struct op {
  enum { OP_WRITE, OP_TRUNCATE, OP_PUNCH } what;
  uint64_t offset, len; /* of a truncate: the new size in 'len' */
  uint8_t *data;
  unsigned syncs; /* before it */
};

static struct op ops[1000];
static size_t nr_ops;
static unsigned syncs;
static bool recording;

/* Faults. */
static bool no_fallocate;        /* a file system without */
static unsigned fail_syncs;      /* so many of the next fail */
static const char *rename_first; /* to the sidecar, before it is locked */

static void
record (int what, uint64_t offset, uint64_t len, const void *data)
{
  struct op *o = &ops[nr_ops];

  if (!recording)
    return;
  if (nr_ops++ == sizeof ops / sizeof ops[0])
    abort ();
  *o = (struct op) { what, offset, len, NULL, syncs };
  if (data) {
    o->data = malloc (len);
    memcpy (o->data, data, len);
  }
}

/* These stand before libc's for all that is linked into this test. */
ssize_t
pwrite (int fd, const void *buf, size_t len, off_t offset)
{
  record (OP_WRITE, offset, len, buf);
  return syscall (SYS_pwrite64, fd, buf, len, offset);
}

int
ftruncate (int fd, off_t len)
{
  record (OP_TRUNCATE, 0, len, NULL);
  return syscall (SYS_ftruncate, fd, len);
}

int
fallocate (int fd, int mode, off_t offset, off_t len)
{
  if (no_fallocate) {
    errno = EOPNOTSUPP;
    return -1;
  }
  if (mode & FALLOC_FL_PUNCH_HOLE)
    record (OP_PUNCH, offset, len, NULL);
  return syscall (SYS_fallocate, fd, mode, offset, len);
}

int
fsync (int fd)
{
  if (recording)
    syncs++;
  if (fail_syncs > 0) {
    fail_syncs--;
    errno = EIO;
    return -1;
  }
  return syscall (SYS_fsync, fd);
}

int
fstat (int fd, struct stat *st)
{
  if (rename_first) {
    assert_int_equal (rename (rename_first, sidecar), 0);
    rename_first = NULL;
  }
  return fstatat (fd, "", st, AT_EMPTY_PATH);
}

static void
play (int fd, const struct op *o)
{
  switch (o->what) {
  case OP_WRITE:
    assert_int_equal (syscall (SYS_pwrite64, fd, o->data, o->len, o->offset),
                      o->len);
    break;
  case OP_TRUNCATE:
    assert_int_equal (syscall (SYS_ftruncate, fd, o->len), 0);
    break;
  case OP_PUNCH:
    assert_int_equal (fallocate (fd, FALLOC_FL_PUNCH_HOLE
                                 | FALLOC_FL_KEEP_SIZE, o->offset, o->len),
                      0);
    break;
  }
}

/* What the directory was between the syncs, and the bits of each bitmap. */
struct phase {
  unsigned syncs;
  const char *names;
};

static char listed[256];

static const char *
list_names (const struct qcow2_entry *e, size_t nr)
{
  listed[0] = '\0';
  for (size_t i = 0; i < nr; ++i) {
    strcat (listed, e[i].name);
    strcat (listed, e[i].inconsistent ? "!" : "");
    strcat (listed, ",");
  }
  return listed;
}

/* Open what a crash has left: it must hold one of the two lists. */
static void
open_after_crash (const char *before, const char *after, unsigned *checks)
{
  enum qcow2_found found;
  const struct qcow2_entry *e;
  struct qcow2 *q;
  size_t nr;
  int status;
  char *out;

  /* QEMU may find leaks (3), and nothing worse.  It is slow: now and then. */
  if ((*checks)++ % 16 == 0) {
    out = run (&status, "qemu-img", "check", "-f", "qcow2", sidecar, NULL);
    if (status != 0 && status != 3)
      fail_msg ("%s", out);
    free (out);
  }
  q = qcow2_open (sidecar, disk, 64 * MIB, &found, &err);
  if (q == NULL)
    fail_msg ("%s", err.msg);
  assert_true (found == QCOW2_CLEAN || found == QCOW2_UNCLEAN);
  e = qcow2_entries (q, &nr);
  list_names (e, nr);
  if (strcmp (listed, before) != 0 && strcmp (listed, after) != 0)
    fail_msg ("has \"%s\", not \"%s\" or \"%s\"", listed, before, after);
  for (size_t i = 0; i < nr; ++i)
    if (e[i].bits)
      assert_int_equal (qcow2_words (e[i].bits)[0], 0);
  close_ok (q);
  if (*checks % 16 == 0)
    check_clean ();
}

/* Names of the list after so many steps, and syncs when it was durable. */
static struct phase phases[64];
static size_t nr_phases;

static void
step (struct qcow2 *q, const struct qcow2_entry *e, size_t nr)
{
  write_ok (q, e, nr);
  phases[nr_phases].names = strdup (list_names (e, nr));
  phases[nr_phases++].syncs = syncs;
}

static void
record_a_life (void)
{
  struct qcow2_entry e[4];
  struct qcow2 *q;

  q = open_ok (64 * MIB, QCOW2_CLEAN);
  e[0] = new_entry (q, "a", 16, true);
  step (q, e, 1);
  e[1] = new_entry (q, "b", 9, false);
  e[2] = new_entry (q, "c", 12, true);
  step (q, e, 3);
  step (q, e, 0);
  qcow2_free (q, e[0].bits);
  qcow2_free (q, e[2].bits);
  e[0] = new_entry (q, "d", 10, true); /* where "a" was */
  step (q, e, 2);
  e[1].inconsistent = true;
  step (q, e, 2);
  qcow2_free (q, e[1].bits);
  e[1].bits = NULL;
  step (q, e + 1, 1);
  step (q, e, 2);
  close_ok (q);
  phases[nr_phases].names = phases[nr_phases - 1].names;
  phases[nr_phases++].syncs = UINT_MAX;
}

static void
lists_at (unsigned s, const char **before, const char **after)
{
  *before = *after = "";
  for (size_t i = 0; i < nr_phases; ++i) {
    *after = phases[i].names;
    if (s < phases[i].syncs)
      return;
    *before = *after;
  }
}

/* The pristine file, its first 'durable' operations, and some of the rest. */
static void
crash_image (const uint8_t *pristine, size_t len, size_t durable)
{
  int fd = open (sidecar, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

  assert_true (fd >= 0);
  assert_int_equal (ftruncate (fd, len), 0);
  for (uint64_t at = 0; at < len; at += 4096) {
    static const uint8_t zeros[4096];

    if (memcmp (pristine + at, zeros, 4096) != 0)
      assert_int_equal (pwrite (fd, pristine + at, 4096, at), 4096);
  }
  for (size_t i = 0; i < durable; ++i)
    play (fd, &ops[i]);
  close (fd);
}

static uint8_t *
load_sidecar (size_t *len)
{
  int fd = open (sidecar, O_RDONLY | O_CLOEXEC);
  struct stat st;
  uint8_t *p;

  assert_int_equal (fstat (fd, &st), 0);
  *len = st.st_size;
  p = malloc (*len);
  assert_int_equal (pread (fd, p, *len, 0), *len);
  close (fd);
  return p;
}

static void
play_some (size_t from, size_t to, size_t except)
{
  int fd = open (sidecar, O_RDWR | O_CLOEXEC);

  for (size_t i = from; i < to; ++i)
    if (i != except)
      play (fd, &ops[i]);
  close (fd);
}

static void
test_power_loss (void **state)
{
  uint8_t *pristine;
  size_t len, first = 0;
  unsigned checks = 0;

  unlink (sidecar);
  make_disk (64 * MIB);
  close_ok (open_ok (64 * MIB, QCOW2_CREATED));
  pristine = load_sidecar (&len);
  recording = true;
  record_a_life ();
  recording = false;
  assert_true (nr_ops > 40);

  for (size_t n = 1; n <= nr_ops; ++n) {
    const char *before, *after;

    /* ops[first..n-1] may or may not have reached the disk. */
    while (ops[first].syncs < ops[n - 1].syncs)
      first++;
    lists_at (ops[n - 1].syncs, &before, &after);
    crash_image (pristine, len, n);
    open_after_crash (before, after, &checks);
    for (size_t i = first; i + 1 < n; ++i) {
      /* All but one... */
      crash_image (pristine, len, first);
      play_some (first, n, i);
      open_after_crash (before, after, &checks);
    }
    if (n - first > 1) {
      /* ...and only the last. */
      crash_image (pristine, len, first);
      play_some (n - 1, n, nr_ops);
      open_after_crash (before, after, &checks);
    }
  }
  print_message ("%zu operations, %u crashes\n", nr_ops, checks);
  for (size_t i = 0; i < nr_ops; ++i)
    free (ops[i].data);
  for (size_t i = 0; i + 1 < nr_phases; ++i)
    free ((char *) phases[i].names);
  free (pristine);
}

/* ---- faults ---- */

/* Before open returns, all bitmaps are durably in use. */
static void
test_in_use_at_open (void **state)
{
  const struct qcow2_entry *f;
  struct qcow2_entry e;
  struct qcow2 *q;
  uint64_t directory;
  uint32_t flags;
  size_t nr;

  unlink (sidecar);
  make_disk (MIB);
  q = open_ok (MIB, QCOW2_CREATED);
  e = new_entry (q, "a", 16, true);
  write_ok (q, &e, 1);
  close_ok (q);
  directory = peek64 (QCOW2_HEADER_LENGTH + 8 + 16);
  peek (directory + 12, &flags, 4);
  assert_int_equal (be32toh (flags), QCOW2_BITMAP_AUTO);
  nr_ops = syncs = 0;
  recording = true;
  q = open_ok (MIB, QCOW2_CLEAN);
  recording = false;
  peek (directory + 12, &flags, 4);
  assert_int_equal (be32toh (flags), QCOW2_BITMAP_AUTO | QCOW2_BITMAP_IN_USE);
  assert_true (nr_ops > 0 && ops[nr_ops - 1].syncs < syncs);
  for (size_t i = 0; i < nr_ops; ++i)
    free (ops[i].data);
  nr_ops = 0;
  qcow2_abandon (q);
  q = open_ok (MIB, QCOW2_UNCLEAN);
  f = qcow2_entries (q, &nr);
  assert_true (f[0].in_use);
  close_ok (q);
}

/* After an fsync that failed, nothing is said to be in good order. */
static void
test_failed_sync (void **state)
{
  enum qcow2_found found;
  struct qcow2_entry e;
  struct qcow2 *q;

  for (int how = 0; how < 3; ++how) {
    unlink (sidecar);
    q = open_ok (MIB, QCOW2_CREATED);
    e = new_entry (q, "a", 16, true);
    write_ok (q, &e, 1);
    fail_syncs = 1;
    if (how == 0)
      assert_int_equal (qcow2_sync (q, &err), -1);
    if (how == 1)
      assert_int_equal (qcow2_write_directory (q, &e, 1, &err), -1);
    assert_int_equal (qcow2_close (q, &err), -1); /* how == 2: here */
    assert_int_equal (fail_syncs, 0);
    fail_syncs = how == 2;
    q = open_ok (MIB, how == 2 ? QCOW2_LOST : QCOW2_UNCLEAN);
    close_ok (q);
    check_clean ();
  }
  fail_syncs = 2;
  assert_null (qcow2_open (sidecar, disk, MIB, &found, &err));
  close_ok (open_ok (MIB, QCOW2_CLEAN));
}

/* Without fallocate, zeros are written; also over old bits. */
static void
test_no_fallocate (void **state)
{
  struct qcow2_bits *b;
  struct qcow2 *q;

  unlink (sidecar);
  q = open_ok (64 * MIB, QCOW2_CREATED);
  no_fallocate = true;
  for (int i = 0; i < 2; ++i) {
    b = qcow2_alloc (q, 9, &err);
    assert_non_null (b);
    for (int w = 0; w < 2048; ++w)
      assert_int_equal (qcow2_words (b)[w], 0);
    memset (qcow2_words (b), 0xff, 16384);
    qcow2_free (q, b);
  }
  no_fallocate = false;
  /* Nor is it old bits if they could not be punched out when freed. */
  b = qcow2_alloc (q, 9, &err);
  assert_int_equal (qcow2_words (b)[2047], 0);
  qcow2_free (q, b);
  close_ok (q);
}

/* Another process puts a new sidecar in place between our open and lock. */
static void
test_renamed_meanwhile (void **state)
{
  char other[PATH_MAX + 8];
  struct qcow2_entry e;
  struct qcow2 *q;
  size_t nr;

  snprintf (other, sizeof other, "%s.other", sidecar);
  unlink (sidecar);
  q = open_ok (MIB, QCOW2_CREATED);
  e = new_entry (q, "theirs", 16, true);
  write_ok (q, &e, 1);
  close_ok (q);
  assert_int_equal (rename (sidecar, other), 0);
  close_ok (open_ok (MIB, QCOW2_CREATED));
  rename_first = other;
  q = open_ok (MIB, QCOW2_CLEAN);
  assert_string_equal (qcow2_entries (q, &nr)[0].name, "theirs");
  close_ok (q);
}

/* ---- hostile files ---- */

/* Open what may be anything: it is refused and not touched, or it is used,
 * and closed so that it opens again in good order.
 */
static bool
try_hostile (uint64_t size, const uint8_t *patched, size_t len)
{
  enum qcow2_found found;
  struct qcow2 *q = qcow2_open (sidecar, disk, size, &found, &err);
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
      crash_image (image, len, 0);
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
  crash_image (image, len, 0);
  assert_false (try_hostile (64 * MIB, image, len));
  free (image);
}

/* A small one of QEMU's. */
static void
test_hostile_foreign (void **state)
{
  char options[PATH_MAX + 128];
  uint8_t *image;
  size_t len;
  unsigned used = 0, refused = 0;
  uint64_t at, directory, table;

  unlink (sidecar);
  make_disk (MIB);
  snprintf (options, sizeof options,
            "data_file=%s,data_file_raw=on,cluster_size=512", disk);
  RUN_OK ("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, sidecar,
          "1M");
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
      crash_image (image, len, 0);
      assert_false (try_hostile (MIB, image, len));
      assert_non_null (strstr (err.msg, "outside the file"));
    }
    put_be64 (image + table, good);
  }

  /* Cut anywhere. */
  for (size_t cut = 0; cut < len; cut += 256) {
    crash_image (image, len, 0);
    assert_int_equal (truncate (sidecar, cut), 0);
    try_hostile (MIB, image, cut);
  }
  free (image);
}

int
main (void)
{
  static const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_kill),
    cmocka_unit_test (test_power_loss),
    cmocka_unit_test (test_in_use_at_open),
    cmocka_unit_test (test_failed_sync),
    cmocka_unit_test (test_no_fallocate),
    cmocka_unit_test (test_renamed_meanwhile),
    cmocka_unit_test (test_hostile_ours),
    cmocka_unit_test (test_hostile_foreign),
  };

  if (!have ("qemu-img") || !have ("qemu-io")) {
    printf ("QEMU's tools are needed\n");
    return 77;
  }
  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
