/* nbdferry - test of a drive whose machine loses its power
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Random lives of a drive are recorded (crash-life.h).  Each is then crashed
 * before every single step, in several ways (crash-model.h), opened as after a
 * reboot, and looked at: the bitmaps are those from before or after the command
 * that was under way, and none lacks a bit of a write that may have landed
 * while it was recording.  The same for a daemon that is killed, in the same
 * boot.  The next life begins from one of those crashes.
 */
#include <config.h>

/* cmocka passes every test a state that most do not want. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include <cmocka.h>

#include "crash-model.h"
#include "crash-drive.h"
#include "crash-life.h"

/* ---- what must be ---- */

static struct must now[SLOTS];
static const struct note *under_way;
static bool instant, opening;

static void
set_blocks (blocks b, uint64_t offset, uint64_t len)
{
  for (uint64_t i = offset / BLOCK; i <= (offset + len - 1) / BLOCK; i++)
    b[i / 64] |= UINT64_C (1) << i % 64;
}

static void
or_blocks (blocks to, const blocks from)
{
  for (size_t i = 0; i < NR_BLOCKS / 64; i++)
    to[i] |= from[i];
}

static const struct must_action *
action_on (int slot)
{
  for (int i = 0; under_way && i < under_way->nr; i++)
    if (under_way->action[i].slot == slot)
      return &under_way->action[i];
  return NULL;
}

static void
begin (const struct note *n)
{
  under_way = n;
  instant = false;
  for (int i = 0; i < n->nr; i++) {
    const struct must_action *a = &n->action[i];
    struct must *m = &now[a->slot];

    if (a->type == BITMAP_ADD) {
      memset (m, 0, sizeof *m);
      strcpy (m->name, a->name);
    }
    memset (m->if_recording, 0, sizeof m->if_recording);
    memset (m->after_clear, 0, sizeof m->after_clear);
    if (a->type == BITMAP_BACKUP_BEGIN)
      memset (m->since, 0, sizeof m->since);
    if (a->type == BITMAP_MERGE)
      memcpy (m->merged, now[a->source].bits, sizeof m->merged);
  }
}

static void
finish (struct must *m, const struct must_action *a)
{
  switch (a->type) {
  case BITMAP_ADD:
    m->exists = true;
    m->recording = !a->disabled;
    break;
  case BITMAP_REMOVE: m->exists = false; break;
  case BITMAP_ENABLE:
    m->point = m->recording ? m->point : 0;
    m->recording = true;
    break;
  case BITMAP_DISABLE:
    m->point = m->recording ? 0 : m->point;
    m->recording = false;
    break;
  case BITMAP_CLEAR:
    memcpy (m->bits, m->after_clear, sizeof m->bits);
    m->point = 0;
    break;
  case BITMAP_BACKUP_FORGET:
    m->point = 0;
    break;
  case BITMAP_ABORT: /* there is none */
    break;
  case BITMAP_BACKUP_BEGIN:
    m->frozen = true;
    or_blocks (m->bits, m->if_recording);
    break;
  case BITMAP_BACKUP_END:
    or_blocks (m->bits, m->if_recording);
    or_blocks (m->since, m->if_recording);
    if (a->success) {
      memcpy (m->bits, m->since, sizeof m->bits);
      m->point = a->point;
    }
    m->frozen = false;
    break;
  case BITMAP_MERGE:
    or_blocks (m->bits, m->merged);
    or_blocks (m->bits, m->if_recording);
    break;
  }
}

static void
data_landed (const struct op *o)
{
  for (int s = 0; s < SLOTS; s++) {
    if (o->mask & 1u << s) {
      set_blocks (now[s].bits, o->offset, o->len);
      if (o->mask & INSTANT)
        set_blocks (now[s].after_clear, o->offset, o->len);
      if (now[s].frozen ||
          (action_on (s) && action_on (s)->type == BITMAP_BACKUP_BEGIN &&
           (o->mask & INSTANT)))
        set_blocks (now[s].since, o->offset, o->len);
    }
    if (now[s].exists && now[s].recording)
      set_blocks (action_on (s) ? now[s].if_recording : now[s].bits,
                  o->offset, o->len);
  }
}

static void
pass (size_t k)
{
  const struct op *o = &ops[k];
  const struct note *n = (const struct note *) o->data;

  pass_op (k);
  if (under_way && (o->mask & INSTANT))
    instant = true;
  if (o->type == OP_DATA)
    data_landed (o);
  else if (o->type == OP_NOTE && n->what == OPENING) {
    opening = true;
    for (int s = 0; s < SLOTS; s++)
      now[s].frozen = false;
  }
  else if (o->type == OP_NOTE && n->what == OPENED)
    opening = false;
  else if (o->type == OP_NOTE && n->what == BEGIN)
    begin (n);
  else if (o->type == OP_NOTE) {
    for (int i = 0; i < n->nr; i++)
      finish (&now[n->action[i].slot], &n->action[i]);
    under_way = NULL;
  }
}

/* ---- what is ---- */

/* Is the drive's list the model's, after the command under way or before? */
static bool
is_list (const struct drive *d, bool after)
{
  size_t nr = 0;

  for (int s = 0; s < SLOTS; s++) {
    const struct must_action *a = action_on (s);
    struct must m = now[s];
    const struct named_bitmap *nb;

    if (a && after)
      finish (&m, a);
    if (!m.exists)
      continue;
    nr++;
    nb = drive_find_bitmap ((struct drive *) d, m.name);
    if (nb == NULL || nb->inconsistent || nb->recording != m.recording)
      return false;
  }
  return nr == d->nr_bitmaps;
}

/* What should be there, for who reads the test's output. */
static void
explain (void)
{
  static const char *const types[] = { "add", "remove", "clear", "enable",
                                       "disable", "merge", "backup begin",
                                       "backup end" };

  for (int s = 0; s < SLOTS; s++)
    if (now[s].exists)
      print_error ("model: %s%s\n", now[s].name,
                   now[s].recording ? " recording" : "");
  for (int i = 0; under_way && i < under_way->nr; i++)
    print_error ("under way: %s %s%s\n", types[under_way->action[i].type],
                 now[under_way->action[i].slot].name,
                 instant ? ", past the instant" : "");
}

static void
check_bits (const struct named_bitmap *nb, const blocks want, size_t k,
            uint64_t seed)
{
  for (uint64_t i = 0; i < NR_BLOCKS; i++) {
    struct range run;

    if (!(want[i / 64] >> i % 64 & 1))
      continue;
    /* A write is at least 4 KiB somewhere in the block. */
    if (bitmap_next_dirty (nb->bits, i * BLOCK, (i + 1) * BLOCK, &run))
      continue;
    explain ();
    fail_msg ("crash %llu before op %zu: '%s' lacks block %llu",
              (unsigned long long) seed, k, nb->name,
              (unsigned long long) i);
  }
}

/* Is it a merge of one bitmap into another that clears the one? */
static bool
is_move (const struct note *n)
{
  return n && n->nr == 2 && n->action[1].type == BITMAP_CLEAR &&
         n->action[0].source == n->action[1].slot;
}

/* At no moment is a bit that moves in neither of the two. */
static void
check_move (struct drive *d, size_t k, uint64_t seed)
{
  const struct must *from = &now[under_way->action[1].slot];
  const struct named_bitmap *b[2] = {
    drive_find_bitmap (d, now[under_way->action[0].slot].name),
    drive_find_bitmap (d, from->name),
  };

  for (uint64_t i = 0; i < NR_BLOCKS; i++) {
    struct range run;

    if (!(from->bits[i / 64] >> i % 64 & 1) ||
        bitmap_next_dirty (b[0]->bits, i * BLOCK, (i + 1) * BLOCK, &run) ||
        bitmap_next_dirty (b[1]->bits, i * BLOCK, (i + 1) * BLOCK, &run))
      continue;
    explain ();
    fail_msg ("crash %llu before op %zu: neither '%s' nor '%s' has block "
              "%llu", (unsigned long long) seed, k, b[0]->name, b[1]->name,
              (unsigned long long) i);
  }
}

/* A bitmap has the point that it had, or gets; without, that of a command under
 * way which takes it away.  What it must have then is in 'want'.
 */
static void
check_point (const struct named_bitmap *nb, const struct must *m,
             const struct must_action *a, blocks want, size_t k,
             uint64_t seed)
{
  const unsigned point = number_of (&nb->point);

  if (a && a->type == BITMAP_BACKUP_END && a->success && point == a->point) {
    memcpy (want, m->since, sizeof m->since);
    or_blocks (want, m->if_recording);
    return;
  }
  if (point == m->point) {
    /* Then nothing is missing: a clear has not begun. */
    if (point != 0)
      memcpy (want, m->bits, sizeof m->bits);
    return;
  }
  if (point == 0 && (opening || (a && (a->type == BITMAP_REMOVE ||
                                       a->type == BITMAP_CLEAR ||
                                       a->type == BITMAP_ENABLE ||
                                       a->type == BITMAP_DISABLE))))
    return;
  explain ();
  fail_msg ("crash %llu before op %zu: '%s' has point %u instead of %u",
            (unsigned long long) seed, k, nb->name, point, m->point);
}

/* What is found becomes what must be, if it is to be gone on from. */
static void
check (struct drive *d, size_t k, uint64_t seed, struct must *next)
{
  if (is_move (under_way))
    check_move (d, k, seed);
  for (int s = 0; s < SLOTS; s++) {
    struct must *m = &now[s];
    const struct must_action *a = action_on (s);
    struct named_bitmap *nb =
      m->name[0] ? drive_find_bitmap (d, m->name) : NULL;
    static blocks want;

    if (next)
      memset (&next[s], 0, sizeof next[s]);
    if (nb == NULL)
      continue;
    memcpy (want, m->bits, sizeof want);
    if (a && a->type == BITMAP_CLEAR && instant)
      memcpy (want, m->after_clear, sizeof want);
    check_point (nb, m, a, want, k, seed);
    if (a && nb->recording && m->recording && a->type != BITMAP_CLEAR)
      or_blocks (want, m->if_recording);
    check_bits (nb, want, k, seed);
    if (next) {
      strcpy (next[s].name, m->name);
      next[s].exists = true;
      next[s].recording = nb->recording;
      next[s].point = number_of (&nb->point);
      memcpy (next[s].bits, want, sizeof want);
    }
  }
}

static struct drive *
open_crashed (size_t k, uint64_t seed)
{
  struct drive_options opt = { .name = "d", .path = disk_path,
                               .state_dir = state_dir };
  struct drive *d;

  last_writes_file (false);
  d = drive_open (&opt, &err);
  if (d == NULL)
    fail_msg ("crash %llu before op %zu: %s", (unsigned long long) seed, k,
              err.msg);
  if (!is_list (d, false) && !(under_way && is_list (d, true))) {
    explain ();
    for (size_t i = 0; i < d->nr_bitmaps; i++)
      print_error ("%s%s%s%s\n", d->bitmaps[i]->name,
                   d->bitmaps[i]->recording ? " recording" : "",
                   d->bitmaps[i]->inconsistent ? " inconsistent " : "",
                   d->bitmaps[i]->reason ? d->bitmaps[i]->reason->text : "");
    fail_msg ("crash %llu before op %zu: another list",
              (unsigned long long) seed, k);
  }
  return d;
}

static void
copy_points (const char *from, const char *to)
{
  char path[PATH_MAX + 8], *text;
  int fd;

  snprintf (path, sizeof path, "%s%s", points.path, from);
  text = file_text (path);
  snprintf (path, sizeof path, "%s%s", points.path, to);
  unlink (path);
  if (text == NULL)
    return;
  fd = open (path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  assert_true (fd >= 0);
  assert_int_equal (write (fd, text, strlen (text)), strlen (text));
  close (fd);
  free (text);
}

static void
copy_files (const char *from, const char *to)
{
  static uint8_t buf[MIB];
  char path[PATH_MAX + 8];
  ssize_t n;

  copy_points (from, to);

  for (int f = 0; f < NR_FILES; f++) {
    int in, out;

    snprintf (path, sizeof path, "%s%s", files[f].path, from);
    in = open (path, O_RDONLY | O_CLOEXEC);
    snprintf (path, sizeof path, "%s%s", files[f].path, to);
    out = open (path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    assert_true (in >= 0 && out >= 0);
    while ((n = read (in, buf, sizeof buf)) > 0)
      assert_int_equal (write (out, buf, n), n);
    close (in);
    close (out);
  }
}

static unsigned long crashes;

/* Crash the recorded life before each op; go on from one of them. */
static void
crash_everywhere (unsigned seeds)
{
  static struct image work[NR_FILES];
  static struct must next[SLOTS];
  size_t chosen = rnd (nr_ops + 1);
  unsigned life = boot;

  for (size_t k = 0; k <= nr_ops; k++) {
    /* The same twice: nothing has happened to the files. */
    if (k == 0 || (ops[k - 1].type != OP_NOTE) || k == chosen) {
      for (unsigned i = 0; i < seeds; i++) {
        uint64_t seed = i < 2 ? i : 2 + rnd (UINT64_C (1) << 40);
        struct drive *d;

        play_crash (k, seed, work);
        set_boot (life + 1);
        d = open_crashed (k, seed);
        check (d, k, seed, NULL);
        drive_free (d);
        crashes++;
      }
      /* kill -9 */
      {
        struct drive *d;

        play_crash (k, 1, work);
        set_boot (life);
        d = open_crashed (k, 1);
        check (d, k, 1, NULL);
        drive_free (d);
      }
    }
    if (k == chosen) {
      uint64_t seed = 2 + rnd (1000);
      struct drive *d;

      play_crash (k, seed, work);
      set_boot (life + 1);
      d = open_crashed (k, seed);
      check (d, k, seed, next);
      drive_free (d);
      /* Once more as it was before that look, to begin from. */
      play_crash (k, seed, work);
      copy_files ("", ".next");
    }
    if (k < nr_ops)
      pass (k);
  }
  copy_files (".next", "");
  memcpy (now, next, sizeof now);
  under_way = NULL;
  memcpy (model, next, sizeof model);
  boot = life + 1;
  set_boot (boot);
  forget_ops ();
}

static void
test_lives (void **state)
{
  const char *sanitizer = getenv ("FERRY_SANITIZE");
  /* ThreadSanitizer makes it ten times as slow. */
  const unsigned few = sanitizer && strstr (sanitizer, "thread") ? 2 : 4;
  const unsigned lives = getenv ("CHECK_LONG") ? 150 : few;
  /* On a machine that has more to do. */
  const time_t end = time (NULL) + (getenv ("CHECK_LONG") ? 600 : 30);

  if (getenv ("CRASH_SEED"))
    rnd_state += strtoull (getenv ("CRASH_SEED"), NULL, 0) * 7919;
  memset (model, 0, sizeof model);
  memset (now, 0, sizeof now);
  for (unsigned i = 0; i < lives && time (NULL) < end; i++) {
    load_files ();
    recording = true;
    live_a_life (i % 2 ? 18 : 25, i % 2);
    crash_everywhere (3);
  }
  print_message ("%lu crashes\n", crashes);
}

int
main (void)
{
  static const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_lives),
  };

  return cmocka_run_group_tests (tests, make_files, remove_files);
}
