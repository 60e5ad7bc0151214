/* nbdferry - a random life of a drive that is recorded, for tests
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * It is opened, written to, its bitmaps are changed by random transactions
 * (with writes in the midst of them), regions disarmed, closed.  What is done,
 * and when, is recorded as notes among the steps.  To be included once, after
 * crash-drive.h.
 */
#ifndef FERRY_CRASH_LIFE_H
#define FERRY_CRASH_LIFE_H

#include "hook-test.h"

#define BLOCK     65536 /* what the model knows of: two granules and more */
#define NR_BLOCKS (DISK_SIZE / BLOCK)
#define SLOTS     5

typedef uint64_t blocks[NR_BLOCKS / 64];

/* A bitmap as it must be at least.  'recording' and 'exists' as of the last
 * command that has returned.
 */
struct must {
  char name[16];
  bool exists, recording;
  blocks bits;
  /* While a command is under way: */
  blocks if_recording; /* also those, if it is found recording */
  blocks after_clear;  /* all, once the instant of a clear has passed */
  blocks merged;       /* what it gets at the end */
  /* Backups. */
  bool frozen;
  blocks since;        /* written since the backup began */
  unsigned point;      /* of the last one that was completed, or 0 */
};

/* What is recorded as OP_NOTE. */
struct note {
  enum { BEGIN, END, OPENING, OPENED } what;
  struct must_action { enum bitmap_action_type type; int slot, source;
                       bool disabled, success; unsigned point;
                       char name[16]; } action[2];
  int nr;
  size_t since; /* END: what the marks were */
};

static bool inject; /* writes into the steps of a command */
static int depth;
static struct marks *marks_at_begin;
static struct must model[SLOTS]; /* of the life; names and flags alone */
static unsigned serial;

#define INSTANT 0x100 /* in an op's mask: the marks are new ones */

static unsigned
mask_of_step (int file)
{
  unsigned mask = 0;

  if (live == NULL)
    return 0;
  if (live->marks != marks_at_begin)
    mask |= INSTANT;
  if (file != DISK)
    return mask;

  for (size_t i = 0; i < live->nr_bitmaps; i++)
    for (size_t k = 0; k < live->marks->nr; k++)
      if (live->marks->map[k] == live->bitmaps[i]->bits)
        for (int s = 0; s < SLOTS; s++)
          if (strcmp (model[s].name, live->bitmaps[i]->name) == 0)
            mask |= 1u << s;
  return mask;
}

static void
write_somewhere (void)
{
  static const char buf[MIB];
  uint64_t offset = rnd (DISK_SIZE / 4096) * 4096;
  uint64_t len = rnd (4) ? 4096 : rnd (256) * 4096 + 4096;
  int r;

  /* Mostly in few regions, so that some are armed already. */
  if (rnd (3))
    offset %= 192 * MIB;
  if (len > DISK_SIZE - offset)
    len = DISK_SIZE - offset;
  r = rnd (4) ? drive_pwrite (live, buf, len, offset, 0)
              : rnd (2) ? drive_zero (live, len, offset, DISK_MAY_TRIM)
                        : drive_trim (live, len, offset, 0);
  if (r == -1)
    fail_msg ("write: %s", strerror (errno));
}

/* Before a step is recorded.  Not in a step of the activity log, which is the
 * writer's.
 */
static void
step_of (int file)
{
  if (!inject || depth > 0 || file == ACTIVITY || file == DISK || rnd (3) ||
      atomic_load (&live->writes.shut))
    return;
  depth++;
  write_somewhere ();
  depth--;
}

/* None that is busy. */
static int
slot_that (bool exists)
{
  int first = rnd (SLOTS);

  for (int i = 0; i < SLOTS; i++) {
    const struct must *m = &model[(first + i) % SLOTS];

    if (m->exists == exists && !m->frozen)
      return (first + i) % SLOTS;
  }
  return -1;
}

/* Backups, whose hooks do nothing. */
static const struct hook_ops no_ops = { nothing_to_prepare, go_on,
                                        nothing_begun, nothing_ended };
static struct write_hook hooks[SLOTS];

/* One that runs is ended before others begin, mostly. */
static bool
choose_backup (struct must_action *a)
{
  int first = rnd (SLOTS), begin = rnd (8) == 0;

  for (int s = 0; s < SLOTS; s++)
    if (model[s].frozen)
      first = s;
  for (int i = 0; i < SLOTS; i++) {
    const struct must *m = &model[(first + i) % SLOTS];

    if (!m->exists || !m->recording || (begin && m->frozen))
      continue;
    a->slot = (first + i) % SLOTS;
    a->source = -1;
    a->type = m->frozen ? BITMAP_BACKUP_END : BITMAP_BACKUP_BEGIN;
    a->success = m->frozen && rnd (4);
    a->point = ++serial;
    return true;
  }
  return false;
}

static bool
choose (struct must_action *a, enum bitmap_action_type type)
{
  a->type = type;
  a->slot = slot_that (type != BITMAP_ADD);
  a->source = -1;
  if (a->slot == -1)
    return false;
  if (type == BITMAP_ADD) {
    a->disabled = rnd (4) == 0;
    snprintf (a->name, sizeof a->name, "b%u", ++serial);
  }
  if (type == BITMAP_MERGE) {
    a->source = slot_that (true);
    return a->source != -1 && a->source != a->slot;
  }
  return true;
}

static struct point
point_of (unsigned n)
{
  struct point p = { .time = n };

  memcpy (p.id.b, &n, sizeof n);
  return p;
}

static unsigned
number_of (const struct point *p)
{
  unsigned n;

  memcpy (&n, p->id.b, sizeof n);
  return n;
}

static void
add_note (const struct note *n)
{
  scan ();
  add_op (OP_NOTE, OTHER, 0, sizeof *n, n);
}

enum change { ANY, AN_ADD, A_BACKUP };

static void
change_bitmaps (enum change what)
{
  static const enum bitmap_action_type pairs[][2] = {
    { BITMAP_DISABLE, BITMAP_ADD }, { BITMAP_REMOVE, BITMAP_ADD },
    { BITMAP_CLEAR, BITMAP_DISABLE }, { BITMAP_ENABLE, BITMAP_MERGE },
    { BITMAP_MERGE, BITMAP_CLEAR }, /* bits move: see is_move */
  };
  struct note n = { .what = BEGIN, .nr = 1 };
  struct bitmap_action a[2] = { 0 };
  bool frozen = false;
  struct bitmap_ref source[2];

  for (int s = 0; s < SLOTS; s++)
    frozen |= model[s].frozen;
  if (what == AN_ADD) {
    if (slot_that (true) != -1 || !choose (&n.action[0], BITMAP_ADD))
      return;
    n.action[0].disabled = false;
  }
  else if (what == ANY && rnd (frozen ? 6 : 3) == 0) {
    const enum bitmap_action_type *p = pairs[rnd (5)];

    n.nr = 2;
    if (!choose (&n.action[0], p[0]) || !choose (&n.action[1], p[1]))
      return;
    if (p[0] == BITMAP_MERGE)
      n.action[1].slot = n.action[0].source;
    if (n.action[0].slot == n.action[1].slot ||
        n.action[0].slot == n.action[1].source)
      return;
  }
  else if (what == A_BACKUP) {
    if (!choose_backup (&n.action[0]))
      return;
  }
  else if (!choose (&n.action[0], rnd (BITMAP_MERGE + 1)))
    return;
  for (int i = 0; i < n.nr; i++) {
    struct must_action *m = &n.action[i];

    a[i].type = m->type;
    a[i].persistent = true;
    a[i].disabled = m->disabled;
    hooks[m->slot].ops = &no_ops;
    a[i].hook = &hooks[m->slot];
    a[i].full = true;
    a[i].success = m->success;
    a[i].point = point_of (m->point);
    a[i].granularity = rnd (2) ? 16384 : 65536;
    if (m->type == BITMAP_ADD)
      strcpy (model[m->slot].name, m->name);
    a[i].target = (struct bitmap_ref){ live, model[m->slot].name };
    if (m->source >= 0) {
      source[i] = (struct bitmap_ref){ live, model[m->source].name };
      a[i].sources = &source[i];
      a[i].nr_sources = 1;
    }
  }
  marks_at_begin = live->marks;
  add_note (&n);
  inject = true;
  if (bitmap_transaction (a, n.nr, &err) == -1)
    fail_msg ("%s", err.msg);
  inject = false;
  n.what = END;
  add_note (&n);
  for (int i = 0; i < n.nr; i++) {
    struct must *m = &model[n.action[i].slot];

    switch (n.action[i].type) {
    case BITMAP_ADD:
      m->exists = true;
      m->recording = !n.action[i].disabled;
      break;
    case BITMAP_REMOVE: m->exists = false; m->name[0] = '\0'; break;
    case BITMAP_ENABLE: m->recording = true; break;
    case BITMAP_DISABLE: m->recording = false; break;
    case BITMAP_BACKUP_BEGIN: m->frozen = true; break;
    case BITMAP_BACKUP_END: m->frozen = false; break;
    default: break;
    }
  }
}

static void
open_noted (void)
{
  struct note n = { .what = OPENING };

  add_op (OP_NOTE, OTHER, 0, sizeof n, &n);
  for (int s = 0; s < SLOTS; s++)
    model[s].frozen = false;
  open_live ();
  n.what = OPENED;
  add_note (&n);
}

static void
look (void)
{
  /* Writes in its steps are those of others beside the keeper. */
  marks_at_begin = live->marks;
  inject = true;
  if (keeper_look (live) == -1)
    fail_msg ("the keeper");
  inject = false;
}

/* The page of the last writes is of this boot, or says so: as the life left
 * it.
 */
static uint8_t last_writes[65536];
static ssize_t last_writes_len;

static void
last_writes_file (bool save)
{
  char path[PATH_MAX];
  int fd;

  snprintf (path, sizeof path, "%s/lastwrite", state_dir);
  fd = open (path, O_RDWR | O_CLOEXEC);
  assert_true (fd >= 0);
  if (save)
    last_writes_len = read (fd, last_writes, sizeof last_writes);
  else
    assert_int_equal (write (fd, last_writes, last_writes_len),
                      last_writes_len);
  close (fd);
}

static void
live_a_life (unsigned steps, bool backups)
{
  open_noted ();
  if (backups)
    change_bitmaps (AN_ADD);
  for (unsigned i = 0; i < steps; i++) {
    /* One begins, and mostly ends. */
    if (backups && i % (steps / 3) == steps / 6)
      change_bitmaps (A_BACKUP);
    switch (rnd (10)) {
    case 0 ... 4: write_somewhere (); break;
    case 5 ... 6: look (); break;
    case 7 ... 8: change_bitmaps (ANY); break;
    default:
      if (rnd (3) == 0) {
        close_live ();
        open_noted ();
      }
    }
  }
  scan ();
  recording = false;
  drive_free (live);
  live = NULL;
  last_writes_file (true);
}

#endif /* FERRY_CRASH_LIFE_H */
