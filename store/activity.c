/* nbdferry - the activity log: where bits may not be durable yet
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What is known of a region, besides whether it was touched:
 *
 *              want  durable  leaving  armed   in the file
 *   quiet       -      -        -       -      no (or still, after a disarm)
 *   arming      x      -        -       -      being written
 *   armed       x      x        -       x      durably
 *   leaving     x      x        x       -      durably
 *
 * 'want' is what a record is made of when it is written.  'armed' is what
 * requests look at without the lock; the rest is under it.
 *
 *   quiet   -> arming    activity_arm; the record is marked to be written
 *   arming  -> armed     a record made since was written and synced
 *   armed   -> leaving   activity_begin_disarm, if not touched
 *   leaving -> armed     activity_arm or _cancel_disarm: no I/O, since the
 *                        file still has it
 *   leaving -> quiet     activity_end_disarm: the record is written without
 *
 * There is one writer of the file at a time ('writing'), so that what is
 * written later was also made later.  It makes the records under the lock and
 * writes them without it.  Who arms while somebody writes waits, and then one
 * of those who wait writes for all: that is the group commit.
 *
 * A record is one sector, with a checksum.  One that is damaged arms all its
 * regions.  A sync that failed may have lost what was written before it: the
 * records are written anew by whoever comes next, and until a sync succeeds
 * nothing counts as armed that was not before.
 */
#include <config.h>

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "activity-format.h"
#include "activity.h"
#include "cleanup.h"
#include "clock.h"
#include "fullio.h"

struct activity {
  struct activity_hot hot; /* first: activity_is_armed relies on it */

  /* Read-only after activity_open. */
  char *path;
  uint64_t size;      /* of the disk, bytes */
  uint64_t nr;        /* regions */
  uint64_t nr_words;
  size_t nr_records;

  /* Before activity_start: what was found.  NULL: everything is armed. */
  uint64_t *was;
  struct activity_geometry was_geometry;
  unsigned was_flags;

  pthread_mutex_t lock;    /* protects what follows */
  pthread_cond_t written;  /* 'writing' became false */
  pthread_cond_t wake;     /* something is armed, or 'ended' */
  int fd;                  /* -1 before activity_start */
  uint64_t *want, *durable, *leaving;
  bool *dirty;             /* records that must be written */
  unsigned flags;
  bool header_dirty;
  bool header_unsynced;    /* written, but not synced since */
  bool writing;
  bool finished;           /* nothing is armed any more */
  bool ended;              /* nobody waits any more */
  uint64_t sequence;
  uint64_t failures;       /* of the writer, and why the last one */
  int failed_errno;
  uint64_t syncs;
};

/* ---- opening and closing ---- */

struct activity *
activity_open (const char *path, uint64_t size, struct error *err)
{
  struct activity *a = calloc (1, sizeof *a);
  pthread_condattr_t attr;

  if (a == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  a->fd = -1;
  a->size = size;
  a->hot.shift = ACTIVITY_MIN_SHIFT;
  while (bitmap_bits_for (size, a->hot.shift) > ACTIVITY_MAX_REGIONS)
    a->hot.shift++;
  a->nr = bitmap_bits_for (size, a->hot.shift);
  /* One at least: a request of no bytes looks at the first. */
  a->nr_words = a->nr / 64 + 1;
  a->nr_records = activity_nr_records (a->nr);
  pthread_mutex_init (&a->lock, NULL);
  pthread_condattr_init (&attr);
  pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
  pthread_cond_init (&a->wake, &attr);
  pthread_cond_init (&a->written, NULL);
  pthread_condattr_destroy (&attr);
  a->path = strdup (path);
  a->hot.word = calloc (a->nr_words, sizeof a->hot.word[0]);
  a->want = calloc (a->nr_words, sizeof a->want[0]);
  a->durable = calloc (a->nr_words, sizeof a->durable[0]);
  a->leaving = calloc (a->nr_words, sizeof a->leaving[0]);
  a->dirty = calloc (a->nr_records + 1, sizeof a->dirty[0]);
  if (!a->path || !a->hot.word || !a->want || !a->durable || !a->leaving ||
      !a->dirty) {
    error_set (err, ENOMEM, "%m");
    goto fail;
  }
  if (activity_read (path, &a->was_geometry, &a->was_flags, &a->was,
                     err) == -1)
    goto fail;
  if (a->was == NULL) {
    if (!(a->was_flags & ACTIVITY_UNLOGGED))
      a->was_flags |= ACTIVITY_UNREADABLE;
    a->was_flags |= ACTIVITY_EVERY;
  }
  return a;

 fail:
  activity_close (a);
  return NULL;
}

void
activity_close (struct activity *a)
{
  if (a == NULL)
    return;
  if (a->fd != -1)
    close (a->fd);
  pthread_mutex_destroy (&a->lock);
  pthread_cond_destroy (&a->written);
  pthread_cond_destroy (&a->wake);
  free (a->path);
  free (a->hot.word);
  free (a->want);
  free (a->durable);
  free (a->leaving);
  free (a->dirty);
  free (a->was);
  free (a);
}

bool
activity_was_armed (const struct activity *a, uint64_t from,
                    struct range *run)
{
  const unsigned shift = a->was_geometry.shift;
  uint64_t i, nr = a->was_geometry.nr;

  if (from >= a->size)
    return false;
  if (a->was == NULL || (a->was_flags & ACTIVITY_UNLOGGED)) {
    *run = (struct range){ from, a->size };
    return true;
  }
  for (i = from >> shift; i < nr; i++)
    if (a->was[i / 64] >> i % 64 & 1)
      break;
  if (i >= nr || i << shift >= a->size)
    return false;
  run->start = i << shift > from ? i << shift : from;
  while (i < nr && (a->was[i / 64] >> i % 64 & 1))
    i++;
  /* The disk may have another size by now. */
  run->end = i << shift < a->size ? i << shift : a->size;
  return true;
}

unsigned
activity_was_flags (const struct activity *a)
{
  return a->was_flags;
}

/* ---- the writer ---- */

/* A record's words of 'bits', cut at the end. */
static size_t
record_words (const struct activity *a, size_t record)
{
  uint64_t left = a->nr_words - record * ACTIVITY_RECORD_WORDS;

  return left < ACTIVITY_RECORD_WORDS ? left : ACTIVITY_RECORD_WORDS;
}

/* All that must be written, made from what is wanted now: sectors and their
 * numbers (0: the header).  Lock held.
 */
static size_t
make_sectors (struct activity *a, uint8_t *buf, size_t *numbers)
{
  size_t n = 0;

  a->sequence++;
  if (a->header_dirty) {
    const struct activity_geometry g = { a->size, a->hot.shift, a->nr };

    activity_make_header (buf, &g, a->flags, a->sequence);
    numbers[n++] = 0;
    a->header_dirty = false;
  }
  for (size_t i = 0; i < a->nr_records; i++)
    if (a->dirty[i]) {
      activity_make_record (buf + n * ACTIVITY_SECTOR, i, a->sequence,
                            a->want + i * ACTIVITY_RECORD_WORDS,
                            record_words (a, i));
      numbers[n++] = i + 1;
      a->dirty[i] = false;
    }
  return n;
}

/* Neighbours in one write. */
static int
write_sectors (int fd, const uint8_t *buf, const size_t *numbers, size_t n)
{
  size_t k;

  for (size_t i = 0; i < n; i = k) {
    k = i + 1;
    while (k < n && numbers[k] == numbers[k - 1] + 1)
      k++;
    if (full_pwrite (fd, buf + i * ACTIVITY_SECTOR,
                         (k - i) * ACTIVITY_SECTOR,
                         (off_t) numbers[i] * ACTIVITY_SECTOR) == -1)
      return -1;
  }
  return 0;
}

/* These sectors are durable: what they say, and is still wanted, is armed. */
static void
now_durable (struct activity *a, const uint8_t *buf, const size_t *numbers,
             size_t n)
{
  for (size_t i = 0; i < n; i++) {
    size_t record = numbers[i] - 1, first;

    if (numbers[i] == 0)
      continue;
    first = record * ACTIVITY_RECORD_WORDS;
    for (size_t w = 0; w < record_words (a, record); w++) {
      uint64_t bits =
        activity_record_word (buf + i * ACTIVITY_SECTOR, w);
      uint64_t fresh = bits & a->want[first + w] & ~a->durable[first + w];

      if (fresh == 0)
        continue;
      a->durable[first + w] |= fresh;
      atomic_fetch_or_explicit (&a->hot.word[first + w].touched, fresh,
                                memory_order_relaxed);
      atomic_fetch_or (&a->hot.word[first + w].armed, fresh);
      pthread_cond_signal (&a->wake);
    }
  }
}

/* These sectors are written, but not durable; or not even written. */
static void
write_again (struct activity *a, const size_t *numbers, size_t n, bool failed)
{
  for (size_t i = 0; i < n; i++) {
    const size_t first = (numbers[i] - 1) * ACTIVITY_RECORD_WORDS;

    if (numbers[i] == 0) {
      a->header_unsynced = true;
      continue;
    }
    /* Somebody waits for it to become durable. */
    for (size_t w = 0; w < record_words (a, numbers[i] - 1); w++)
      if (a->want[first + w] & ~a->durable[first + w])
        a->dirty[numbers[i] - 1] = true;
    if (failed)
      a->dirty[numbers[i] - 1] = true;
  }
  if (failed && a->header_unsynced)
    a->header_dirty = true;
}

/* Write all that must be, and sync it.  Lock held, let go meanwhile; nobody
 * else writes.  On error it must still be written.
 */
static int
write_all (struct activity *a, bool sync)
{
  CLEANUP_FREE uint8_t *buf = NULL;
  CLEANUP_FREE size_t *numbers = NULL;
  size_t n;
  int r = -1, e = ENOMEM;

  a->writing = true;
  buf = malloc ((a->nr_records + 1) * ACTIVITY_SECTOR);
  numbers = malloc ((a->nr_records + 1) * sizeof numbers[0]);
  if (buf && numbers) {
    n = make_sectors (a, buf, numbers);
    pthread_mutex_unlock (&a->lock);
    r = write_sectors (a->fd, buf, numbers, n);
    if (r == 0 && sync)
      r = fdatasync (a->fd);
    e = errno;
    pthread_mutex_lock (&a->lock);
    if (r == 0 && sync) {
      a->syncs++;
      a->header_unsynced = false;
      now_durable (a, buf, numbers, n);
    }
    else
      write_again (a, numbers, n, r == -1);
  }
  if (r == -1 && sync) {
    a->failures++;
    a->failed_errno = e;
  }
  a->writing = false;
  pthread_cond_broadcast (&a->written);
  errno = e;
  return r;
}

static void
wait_for_writer (struct activity *a)
{
  while (a->writing)
    pthread_cond_wait (&a->written, &a->lock);
}

int
activity_start (struct activity *a, unsigned flags, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&a->lock);
  const struct activity_geometry g = { a->size, a->hot.shift, a->nr };
  bool fits = a->was && a->was_geometry.size == g.size &&
              a->was_geometry.shift == g.shift;

  a->flags = flags;
  for (uint64_t i = 0; i < a->nr_words; i++)
    atomic_store (&a->hot.word[i].armed,
                  flags & ACTIVITY_UNLOGGED ? UINT64_MAX : 0);
  a->fd = fits ? open (a->path, O_RDWR | O_CLOEXEC | O_NOFOLLOW)
               : activity_create (a->path, &g, flags, err);
  if (a->fd == -1)
    return fits ? error_set (err, errno, "%s: open: %m", a->path) : -1;
  free (a->was);
  a->was = NULL;
  if (!fits)
    return 0;
  /* In any order: nothing is armed, whichever of it is there. */
  memset (a->dirty, true, a->nr_records);
  a->header_dirty = true;
  if (write_all (a, true) == -1)
    return error_set (err, errno, "%s: write: %m", a->path);
  return 0;
}

/* ---- arming ---- */

bool
activity_are_armed (struct activity *a, uint64_t first, uint64_t last)
{
  for (uint64_t i = first / 64; i <= last / 64; i++) {
    struct activity_word *w = &a->hot.word[i];
    uint64_t mask = UINT64_MAX;

    if (i == first / 64)
      mask &= UINT64_MAX << first % 64;
    if (i == last / 64)
      mask &= UINT64_MAX >> (63 - last % 64);
    if (~atomic_load (&w->armed) & mask)
      return false;
    if (~atomic_load_explicit (&w->touched, memory_order_relaxed) & mask)
      atomic_fetch_or_explicit (&w->touched, mask, memory_order_relaxed);
  }
  return true;
}

/* Want all of the range; is any of it not durable yet?  Lock held. */
static bool
want_range (struct activity *a, uint64_t first, uint64_t last)
{
  bool missing = false;

  for (uint64_t r = first; r <= last; r++) {
    const uint64_t i = r / 64, bit = UINT64_C (1) << r % 64;

    if (a->leaving[i] & bit) {
      /* The file has it still: it stays, before it could be taken out. */
      a->leaving[i] &= ~bit;
      atomic_fetch_or (&a->hot.word[i].armed, bit);
    }
    if (!(a->want[i] & bit)) {
      a->want[i] |= bit;
      a->dirty[i / ACTIVITY_RECORD_WORDS] = true;
    }
    if (!(a->durable[i] & bit))
      missing = true;
  }
  return missing;
}

int
activity_arm (struct activity *a, uint64_t offset, uint64_t len)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&a->lock);
  uint64_t first = offset >> a->hot.shift;
  uint64_t last = (offset + (len ? len - 1 : 0)) >> a->hot.shift;
  uint64_t failures = a->failures;

  if (last >= a->nr)
    last = a->nr ? a->nr - 1 : 0;
  for (;;) {
    if (a->finished) {
      errno = ESHUTDOWN;
      return -1;
    }
    if (!want_range (a, first, last))
      break;
    if (!a->writing) {
      if (write_all (a, true) == -1)
        return -1;
      continue;
    }
    wait_for_writer (a);
    if (a->failures != failures) {
      errno = a->failed_errno;
      return -1;
    }
  }
  /* Not quiet, from now on: the next look must not take it out again. */
  activity_are_armed (a, first, last);
  return 0;
}

/* ---- disarming ---- */

uint64_t
activity_begin_disarm (struct activity *a)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&a->lock);
  uint64_t n = 0;

  if (a->flags & ACTIVITY_UNLOGGED)
    return 0;
  for (uint64_t i = 0; i < a->nr_words; i++) {
    struct activity_word *w = &a->hot.word[i];
    uint64_t touched, quiet;

    if (atomic_load (&w->armed) == 0)
      continue;
    touched = atomic_exchange_explicit (&w->touched, 0, memory_order_relaxed);
    quiet = atomic_load (&w->armed) & ~touched;
    if (quiet == 0)
      continue;
    atomic_fetch_and (&w->armed, ~quiet);
    a->leaving[i] |= quiet;
    n += __builtin_popcountll (quiet);
  }
  return n;
}

int
activity_end_disarm (struct activity *a, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&a->lock);

  wait_for_writer (a);
  for (uint64_t i = 0; i < a->nr_words; i++)
    if (a->leaving[i]) {
      a->want[i] &= ~a->leaving[i];
      a->durable[i] &= ~a->leaving[i];
      a->leaving[i] = 0;
      a->dirty[i / ACTIVITY_RECORD_WORDS] = true;
    }
  if (write_all (a, false) == -1)
    return error_set (err, errno, "%s: write: %m", a->path);
  return 0;
}

void
activity_cancel_disarm (struct activity *a)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&a->lock);

  for (uint64_t i = 0; i < a->nr_words; i++)
    if (a->leaving[i]) {
      atomic_fetch_or (&a->hot.word[i].armed, a->leaving[i]);
      a->leaving[i] = 0;
    }
}

/* ---- the rest ---- */

int
activity_flag (struct activity *a, unsigned set, unsigned drop, bool durable,
               struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&a->lock);
  unsigned flags;

  wait_for_writer (a);
  flags = (a->flags & ~drop) | set; /* others may have changed them */
  if (flags == a->flags && !a->header_dirty &&
      !(durable && a->header_unsynced))
    return 0;
  a->flags = flags;
  a->header_dirty = true;
  if (write_all (a, durable) == -1)
    return error_set (err, errno, "%s: write: %m", a->path);
  return 0;
}

int
activity_finish (struct activity *a, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&a->lock);

  if (a->fd == -1)
    return 0;
  wait_for_writer (a);
  a->finished = true;
  for (uint64_t i = 0; i < a->nr_words; i++) {
    if (!(a->flags & ACTIVITY_UNLOGGED))
      atomic_store (&a->hot.word[i].armed, 0);
    a->want[i] = a->durable[i] = a->leaving[i] = 0;
  }
  memset (a->dirty, true, a->nr_records);
  if (write_all (a, true) == -1)
    return error_set (err, errno, "%s: write: %m", a->path);
  return 0;
}

static uint64_t
count_armed (const struct activity *a)
{
  uint64_t n = 0;

  for (uint64_t i = 0; i < a->nr_words; i++)
    n += __builtin_popcountll (a->durable[i]);
  return n;
}

bool
activity_wait (struct activity *a, uint64_t ns)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&a->lock);
  struct timespec ts;
  int r = 0;

  while (!a->ended && count_armed (a) == 0)
    pthread_cond_wait (&a->wake, &a->lock);
  clock_in (&ts, ns);
  while (!a->ended && r == 0)
    r = pthread_cond_timedwait (&a->wake, &a->lock, &ts);
  return !a->ended;
}

void
activity_wake_up (struct activity *a)
{
  pthread_mutex_lock (&a->lock);
  a->ended = true;
  pthread_cond_broadcast (&a->wake);
  pthread_mutex_unlock (&a->lock);
}

uint64_t
activity_nr_armed (struct activity *a)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&a->lock);

  return count_armed (a);
}

uint64_t
activity_nr_syncs (struct activity *a)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&a->lock);

  return a->syncs;
}
