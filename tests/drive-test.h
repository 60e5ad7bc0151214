/* nbdferry - what the tests of drives share
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A folder of the test's own, real drives on files in it, a tap on what a
 * drive does to its disk, and threads that can be asked whether they are done.
 * To be included once in a test's .c after cmocka.h.
 *
 * Nothing here sleeps.  What must happen is waited for, at most LONG; what
 * must not happen is given a MOMENT to happen all the same.
 */
#ifndef FERRY_DRIVE_TEST_H
#define FERRY_DRIVE_TEST_H

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "clock.h"
#include "drive.h"
#include "transaction.h"

#define LONG   (20 * NS_PER_S)
#define MOMENT (100 * NS_PER_MS)

/* A disk that is a multiple of nothing but a sector. */
#define DISK_SIZE ((UINT64_C (3) << 20) + 5 * 512)

static char dir[PATH_MAX - 64];
static struct error err;

/* ---- the folder ---- */

static inline int
make_dir (void **state)
{
  const char *tmp = getenv ("TMPDIR");

  (void) state;
  snprintf (dir, sizeof dir, "%s/ferry-drive.XXXXXX", tmp ? tmp : "/var/tmp");
  return mkdtemp (dir) ? 0 : -1;
}

static inline int
remove_one (const char *path, const struct stat *st, int type, struct FTW *f)
{
  (void) st;
  (void) type;
  (void) f;
  return remove (path);
}

static inline int
remove_dir (void **state)
{
  (void) state;
  return nftw (dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

/* ---- the tap: what the disks of all drives are asked to do ---- */

enum tap_op { TAP_WRITE, TAP_ZERO, TAP_TRIM, TAP_FLUSH };

static struct {
  const struct disk_ops *real; /* read-only once a drive is open */

  pthread_mutex_t lock; /* protects what follows */
  pthread_cond_t changed;
  unsigned calls[4]; /* by enum tap_op */
  unsigned extents;  /* that were asked for */
  int fail[4];       /* errno for each call, or 0 */
  bool hold;         /* the next write, zero or trim at 'hold_at' waits */
  uint64_t hold_at;
  bool held, let_on; /* it waits; it may go on */
  unsigned landed;   /* writes that were carried out */
  /* Called before a write, zero or trim is carried out, without the lock. */
  void (*before) (void *opaque, uint64_t offset, uint64_t len);
  void *opaque;
} tap = { .lock = PTHREAD_MUTEX_INITIALIZER };

/* Until 'flag' is set.  tap.lock is held; false if that takes too long. */
static inline bool
tap_await (const bool *flag, uint64_t ns)
{
  struct timespec ts;
  int r = 0;

  clock_in (&ts, ns);
  while (!*flag && r == 0)
    r = pthread_cond_timedwait (&tap.changed, &tap.lock, &ts);
  return *flag;
}

static inline int
tap_enter (enum tap_op op, uint64_t offset, uint64_t len)
{
  void (*before) (void *, uint64_t, uint64_t);
  void *opaque;
  int fail;

  pthread_mutex_lock (&tap.lock);
  tap.calls[op]++;
  fail = tap.fail[op];
  before = tap.before;
  opaque = tap.opaque;
  if (tap.hold && op != TAP_FLUSH && offset == tap.hold_at) {
    tap.hold = false;
    tap.held = true;
    pthread_cond_broadcast (&tap.changed);
    tap_await (&tap.let_on, LONG);
    tap.held = false;
  }
  pthread_mutex_unlock (&tap.lock);
  if (before && op != TAP_FLUSH)
    before (opaque, offset, len);
  if (fail) {
    errno = fail;
    return -1;
  }
  return 0;
}

static inline int
tap_leave (int r)
{
  pthread_mutex_lock (&tap.lock);
  tap.landed++;
  pthread_mutex_unlock (&tap.lock);
  return r;
}

static inline int
tap_pread (struct disk *d, void *buf, size_t count, uint64_t offset)
{
  return tap.real->pread (d, buf, count, offset);
}

static inline int
tap_pwrite (struct disk *d, const void *buf, size_t count, uint64_t offset,
            unsigned flags)
{
  if (tap_enter (TAP_WRITE, offset, count) == -1)
    return -1;
  return tap_leave (tap.real->pwrite (d, buf, count, offset, flags));
}

static inline int
tap_zero (struct disk *d, uint64_t len, uint64_t offset, unsigned flags)
{
  if (tap_enter (TAP_ZERO, offset, len) == -1)
    return -1;
  return tap_leave (tap.real->zero (d, len, offset, flags));
}

static inline int
tap_trim (struct disk *d, uint64_t len, uint64_t offset, unsigned flags)
{
  if (tap_enter (TAP_TRIM, offset, len) == -1)
    return -1;
  return tap_leave (tap.real->trim (d, len, offset, flags));
}

static inline int
tap_flush (struct disk *d)
{
  if (tap_enter (TAP_FLUSH, 0, 0) == -1)
    return -1;
  return tap.real->flush (d);
}

static inline int
tap_cache (struct disk *d, uint64_t len, uint64_t offset)
{
  return tap.real->cache (d, len, offset);
}

static inline int
tap_extent (struct disk *d, uint64_t offset, uint64_t end, struct extent *ext)
{
  pthread_mutex_lock (&tap.lock);
  tap.extents++;
  pthread_mutex_unlock (&tap.lock);
  return tap.real->extent (d, offset, end, ext);
}

static inline int
tap_next_data (struct disk *d, uint64_t offset, uint64_t end, uint64_t *data)
{
  return tap.real->next_data (d, offset, end, data);
}

static inline void
tap_close (struct disk *d)
{
  tap.real->close (d);
}

static int
tap_reader (struct disk *d)
{
  return tap.real->reader (d);
}

static const struct disk_ops tap_ops = {
  .reader = tap_reader,
  .pread = tap_pread,
  .pwrite = tap_pwrite,
  .zero = tap_zero,
  .trim = tap_trim,
  .flush = tap_flush,
  .cache = tap_cache,
  .extent = tap_extent,
  .next_data = tap_next_data,
  .close = tap_close,
};

/* Before each test: nothing counted, nothing in the way. */
static inline int
tap_reset (void **state)
{
  static bool once;
  pthread_condattr_t attr;

  (void) state;
  if (!once) {
    pthread_condattr_init (&attr);
    pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
    pthread_cond_init (&tap.changed, &attr);
    pthread_condattr_destroy (&attr);
    once = true;
  }
  pthread_mutex_lock (&tap.lock);
  memset (tap.calls, 0, sizeof tap.calls);
  memset (tap.fail, 0, sizeof tap.fail);
  tap.hold = tap.held = tap.let_on = false;
  tap.landed = 0;
  tap.before = NULL;
  pthread_mutex_unlock (&tap.lock);
  return 0;
}

static inline void
tap_fail (enum tap_op op, int errnum)
{
  pthread_mutex_lock (&tap.lock);
  tap.fail[op] = errnum;
  pthread_mutex_unlock (&tap.lock);
}

static inline unsigned
tap_calls (enum tap_op op)
{
  unsigned n;

  pthread_mutex_lock (&tap.lock);
  n = tap.calls[op];
  pthread_mutex_unlock (&tap.lock);
  return n;
}

static inline unsigned
tap_landed (void)
{
  unsigned n;

  pthread_mutex_lock (&tap.lock);
  n = tap.landed;
  pthread_mutex_unlock (&tap.lock);
  return n;
}

/* Hold the next write, zero or trim at that offset. */
static inline void
tap_hold (uint64_t offset)
{
  pthread_mutex_lock (&tap.lock);
  tap.hold = true;
  tap.hold_at = offset;
  tap.let_on = false;
  pthread_mutex_unlock (&tap.lock);
}

static inline void
tap_wait_held (void)
{
  bool held;

  pthread_mutex_lock (&tap.lock);
  held = tap_await (&tap.held, LONG);
  pthread_mutex_unlock (&tap.lock);
  assert_true (held);
}

static inline void
tap_release (void)
{
  pthread_mutex_lock (&tap.lock);
  tap.let_on = true;
  pthread_cond_broadcast (&tap.changed);
  pthread_mutex_unlock (&tap.lock);
}

/* ---- threads ---- */

struct job {
  int (*run) (struct job *job); /* asserts nothing: that is for the main
                                   thread; it says in r and err how it went */
  void *arg;
  struct error err;
  int r;
  unsigned landed; /* what had landed when it was done */
  bool done;       /* protected by tap.lock */
  pthread_t thread;
};

static inline void *
job_thread (void *arg)
{
  struct job *job = arg;

  job->r = job->run (job);
  pthread_mutex_lock (&tap.lock);
  job->landed = tap.landed;
  job->done = true;
  pthread_cond_broadcast (&tap.changed);
  pthread_mutex_unlock (&tap.lock);
  return NULL;
}

static inline void
job_start (struct job *job, int (*run) (struct job *job), void *arg)
{
  memset (job, 0, sizeof *job);
  job->run = run;
  job->arg = arg;
  assert_int_equal (pthread_create (&job->thread, NULL, job_thread, job), 0);
}

static inline bool
job_done_within (struct job *job, uint64_t ns)
{
  bool done;

  pthread_mutex_lock (&tap.lock);
  done = tap_await (&job->done, ns);
  pthread_mutex_unlock (&tap.lock);
  return done;
}

/* What it returned. */
static inline int
job_join (struct job *job)
{
  assert_true (job_done_within (job, LONG));
  assert_int_equal (pthread_join (job->thread, NULL), 0);
  return job->r;
}

/* Look again and again, until it is so.  For states that nobody announces. */
#define WAIT_UNTIL(what)                                                \
  do {                                                                  \
    uint64_t end_ = now_ns () + LONG;                                   \
                                                                        \
    while (!(what)) {                                                   \
      assert_true (now_ns () < end_);                                   \
      sched_yield ();                                                   \
    }                                                                   \
  } while (0)

/* ---- drives ---- */

/* The path of a file of that drive's state directory, or of its disk (NULL);
 * overwritten by the next call.
 */
static inline const char *
drive_file (const char *name, const char *file)
{
  static char path[PATH_MAX + 512];

  if (file)
    snprintf (path, sizeof path, "%s/%s.raw.ferry/%s", dir, name, file);
  else
    snprintf (path, sizeof path, "%s/%s.raw", dir, name);
  return path;
}

static inline struct drive *
try_open (const char *name, uint64_t size, bool incoming)
{
  struct drive_options opt = { .name = name,
                               .path = drive_file (name, NULL),
                               .create = size,
                               .incoming = incoming };
  struct drive *d = drive_open (&opt, &err);

  if (d) {
    tap.real = d->disk->ops;
    d->disk->ops = &tap_ops;
  }
  return d;
}

static inline struct drive *
open_ok (const char *name, uint64_t size, bool incoming)
{
  struct drive *d = try_open (name, size, incoming);

  if (d == NULL)
    fail_msg ("%s", err.msg);
  return d;
}

/* In good order. */
static inline void
close_ok (struct drive *d)
{
  if (drive_shutdown (d, &err) == -1)
    fail_msg ("%s", err.msg);
  drive_free (d);
}

/* As kill -9 would. */
static inline void
crash (struct drive *d)
{
  drive_free (d);
}

static inline int
transact (struct drive *d, enum bitmap_action_type type, const char *name)
{
  struct bitmap_action a = { .type = type, .target = { d, name } };

  return bitmap_transaction (&a, 1, &err);
}

static inline void
add_bitmap (struct drive *d, const char *name, uint64_t granularity,
            bool persistent, bool disabled)
{
  struct bitmap_action a = { .type = BITMAP_ADD,
                             .target = { d, name },
                             .granularity = granularity,
                             .persistent = persistent,
                             .disabled = disabled };

  if (bitmap_transaction (&a, 1, &err) == -1)
    fail_msg ("%s", err.msg);
}

static inline struct named_bitmap *
find_ok (struct drive *d, const char *name)
{
  struct named_bitmap *nb = drive_find_bitmap (d, name);

  if (nb == NULL)
    fail_msg ("no bitmap '%s'", name);
  return nb;
}

static inline struct bitmap *
bits_of (struct drive *d, const char *name)
{
  struct named_bitmap *nb = find_ok (d, name);

  assert_non_null (nb->bits);
  return nb->bits;
}

static inline bool
same_bits (const struct bitmap *a, const struct bitmap *b)
{
  struct range ra = { 0, 0 }, rb = { 0, 0 };
  bool more = true;

  while (more) {
    more = bitmap_next_dirty (a, ra.end, UINT64_MAX, &ra);
    if (more != bitmap_next_dirty (b, rb.end, UINT64_MAX, &rb) ||
        (more && (ra.start != rb.start || ra.end != rb.end)))
      return false;
  }
  return true;
}

#endif /* FERRY_DRIVE_TEST_H */
