/* nbdferry - test of the sidecar: crashes
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A process that is killed -9 at any moment.  A machine that loses its power:
 * every write, truncate and fallocate of the sidecar is recorded here, and
 * after each of them the disk is played to hold what was synced before, and of
 * the rest a prefix, or all but one, or only one.
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
#include <time.h>

#include <cmocka.h>

#include "qcow2-test.h"
#include "qcow2-tap.h"

#define MIB (UINT64_C (1) << 20)

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
  struct qcow2 *q = qcow2_open (sidecar, disk, KILL_SIZE, false, &found, &err);
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
  struct qcow2 *q = qcow2_open (sidecar, disk, KILL_SIZE, false, &found, &err);
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
  q = qcow2_open (sidecar, disk, 64 * MIB, false, &found, &err);
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

static void
play_some (size_t from, size_t to, size_t except)
{
  int fd = open (sidecar, O_RDWR | O_CLOEXEC);

  for (size_t i = from; i < to; ++i)
    if (i != except)
      play (fd, &ops[i]);
  close (fd);
}

/* The pristine file, its first 'durable' operations, and some of the rest. */
static void
crash_image (const uint8_t *pristine, size_t len, size_t durable)
{
  store_sidecar (pristine, len);
  play_some (0, durable, nr_ops);
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
  forget_ops ();
  for (size_t i = 0; i + 1 < nr_phases; ++i)
    free ((char *) phases[i].names);
  free (pristine);
}

int
main (void)
{
  static const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_kill),
    cmocka_unit_test (test_power_loss),
  };

  if (!have ("qemu-img")) {
    printf ("qemu-img is needed\n");
    return 77;
  }
  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
