/* nbdferry - where old granules are kept aside
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "cleanup.h"
#include "fullio.h"
#include "scratch.h"

struct scratch {
  /* Read-only after it was opened. */
  int fd;
  uint32_t slot_size;
  uint64_t limit;    /* bytes */
  uint32_t max;      /* slots */

  pthread_mutex_t lock; /* protects what follows; a leaf */
  uint32_t next;     /* the first slot that was never used */
  uint32_t *free;    /* those that were given back */
  size_t nr_free, room;
  uint32_t used;
};

/* A file that nobody else ever sees. */
static int
open_unnamed (const char *dir)
{
  CLEANUP_FREE char *path = NULL;
  int fd = open (dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

  if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR))
    return fd;
  if (asprintf (&path, "%s/scratch-XXXXXX", dir) == -1) {
    path = NULL;
    return -1;
  }
  fd = mkostemp (path, O_CLOEXEC);
  if (fd >= 0)
    unlink (path);
  return fd;
}

static uint64_t
half_of_free (int fd)
{
  struct statvfs st;

  if (fstatvfs (fd, &st) == -1)
    return 0;
  return (uint64_t) st.f_bavail * st.f_frsize / 2;
}

struct scratch *
scratch_open (const char *dir, uint32_t slot_size, uint64_t limit,
              struct error *err)
{
  struct scratch *s = calloc (1, sizeof *s);
  uint64_t slots;

  if (s == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  s->fd = open_unnamed (dir);
  if (s->fd == -1) {
    error_set (err, errno, "create a scratch file in %s: %m", dir);
    free (s);
    return NULL;
  }
  s->limit = limit ? limit : half_of_free (s->fd);
  s->slot_size = slot_size;
  slots = s->limit / slot_size;
  s->max = slots < UINT32_MAX - 16 ? slots : UINT32_MAX - 16;
  pthread_mutex_init (&s->lock, NULL);
  return s;
}

void
scratch_close (struct scratch *s)
{
  if (s == NULL)
    return;
  close (s->fd);
  free (s->free);
  pthread_mutex_destroy (&s->lock);
  free (s);
}

bool
scratch_take (struct scratch *s, uint32_t *slot)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&s->lock);

  if (s->used == s->max)
    return false;
  *slot = s->nr_free > 0 ? s->free[--s->nr_free] : s->next++;
  s->used++;
  return true;
}

void
scratch_give_back (struct scratch *s, uint32_t slot)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&s->lock);

  if (s->nr_free == s->room) {
    size_t room = s->room ? 2 * s->room : 64;
    uint32_t *more = reallocarray (s->free, room, sizeof more[0]);

    if (more == NULL)
      return; /* it stays in use, which is safe */
    s->free = more;
    s->room = room;
  }
  s->free[s->nr_free++] = slot;
  s->used--;
}

int
scratch_write (struct scratch *s, uint32_t slot, const void *buf, size_t len)
{
  return full_pwrite (s->fd, buf, len, (uint64_t) slot * s->slot_size);
}

int
scratch_read (struct scratch *s, uint32_t slot, uint32_t skip, void *buf,
              size_t len)
{
  ssize_t r = full_pread (s->fd, buf, len,
                          (uint64_t) slot * s->slot_size + skip);

  if (r >= 0 && (size_t) r < len) {
    errno = EIO; /* it was dropped */
    return -1;
  }
  return r == -1 ? -1 : 0;
}

void
scratch_drop (struct scratch *s)
{
  /* Its space comes back at the latest when it is closed. */
  if (ftruncate (s->fd, 0) == -1)
    return;
}

uint64_t
scratch_used (struct scratch *s)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&s->lock);

  return (uint64_t) s->used * s->slot_size;
}

uint64_t
scratch_limit (const struct scratch *s)
{
  return s->limit;
}
