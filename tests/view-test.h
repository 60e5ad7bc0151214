/* nbdferry - what the tests of views share
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * To be included once, after drive-test.h.  Writes to a scratch file, which
 * has no name, go through here: they can be counted, held, and made to fail.
 */
#ifndef FERRY_VIEW_TEST_H
#define FERRY_VIEW_TEST_H

#include <sys/syscall.h>

#include "direct.h"
#include "views.h"

static struct {
  pthread_mutex_t lock; /* tap.changed goes with it: see scratch_hold */
  unsigned writes;
  int fail;             /* errno, or 0 */
} scratch_tap = { .lock = PTHREAD_MUTEX_INITIALIZER };

static bool scratch_hold, scratch_held, scratch_let_on; /* tap.lock */

static inline bool
is_scratch (int fd)
{
  char link[40], path[PATH_MAX];
  ssize_t n;

  snprintf (link, sizeof link, "/proc/self/fd/%d", fd);
  n = readlink (link, path, sizeof path);
  return n > 10 && memcmp (path + n - 10, " (deleted)", 10) == 0;
}

/* Stands before libc's. */
ssize_t
pwrite (int fd, const void *buf, size_t len, off_t offset)
{
  int fail = 0;

  if (is_scratch (fd)) {
    pthread_mutex_lock (&scratch_tap.lock);
    scratch_tap.writes++;
    fail = scratch_tap.fail;
    pthread_mutex_unlock (&scratch_tap.lock);
    pthread_mutex_lock (&tap.lock);
    if (scratch_hold) {
      scratch_hold = false;
      scratch_held = true;
      pthread_cond_broadcast (&tap.changed);
      tap_await (&scratch_let_on, LONG);
    }
    pthread_mutex_unlock (&tap.lock);
  }
  if (fail) {
    errno = fail;
    return -1;
  }
  return syscall (SYS_pwrite64, fd, buf, len, offset);
}

static inline struct direct *
get_direct (struct view *v)
{
  struct direct *direct;
  int fds[2];

  assert_int_equal (view_direct (v, fds, &err), 0);
  direct = direct_open (fds[0], fds[1], DISK_SIZE, &err);
  assert_non_null (direct);
  return direct;
}

static inline struct uuid
id_of (unsigned n)
{
  struct uuid id = { .b = { 1, [14] = n >> 8, [15] = n } };

  return id;
}

/* Begin a view of 'd'; NULL, and err. */
static inline struct view *
try_begin (struct view_options opt)
{
  struct bitmap_action a;
  struct view *v = views_begin (&opt, &a, &err);
  int r;

  if (v == NULL)
    return NULL;
  view_ref (v);
  r = bitmap_transaction (&a, 1, &err);
  views_settle (v);
  if (r == 0)
    return v;
  view_unref (v);
  return NULL;
}

#define BEGIN(drive_, n, ...)                                           \
  begin_ok ((struct view_options){ .drive = drive_, .id = id_of (n),    \
                                   __VA_ARGS__ })

static inline struct view *
begin_ok (struct view_options opt)
{
  struct view *v = try_begin (opt);

  if (v == NULL)
    fail_msg ("%s", err.msg);
  return v;
}

/* End it, and let go of it. */
static inline int
try_end (struct view *v, bool success)
{
  const struct view_options *opt = view_options (v);
  struct bitmap_action a;
  struct view *ended;
  int r;

  ended = views_end (opt->drive, &opt->id, success, &a, &err);
  if (ended == NULL)
    return -1;
  r = bitmap_transaction (&a, 1, &err);
  views_settle (ended);
  if (r == 0)
    view_unref (v);
  return r;
}

static inline void
end_ok (struct view *v, bool success)
{
  if (try_end (v, success) == -1)
    fail_msg ("%s", err.msg);
}

#endif /* FERRY_VIEW_TEST_H */
