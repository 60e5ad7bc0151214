/* nbdferry - reading the disk of a backup without asking the daemon
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"
#include "direct.h"

/* Read-only; any thread. */
struct direct {
  int fd;
  uint64_t size;
  unsigned shift;
  struct direct_head *head;
  size_t len;
};

/* Map it, and see whether it is one. */
static int
map (struct direct *d, int fd, struct error *err)
{
  struct stat st;

  if (fstat (fd, &st) == -1)
    return error_set (err, errno, "%m");
  d->len = st.st_size;
  d->head = mmap (NULL, d->len, PROT_READ, MAP_SHARED, fd, 0);
  if (d->head == MAP_FAILED) {
    d->head = NULL;
    return error_set (err, errno, "mmap: %m");
  }
  d->shift = d->len < DIRECT_BITS ? 0 : d->head->shift;
  if (d->shift >= BITMAP_MIN_SHIFT && d->shift <= BITMAP_MAX_SHIFT &&
      memcmp (d->head->magic, DIRECT_MAGIC, sizeof d->head->magic) == 0 &&
      d->head->size == d->size && d->len >= direct_map_len (d->size, d->shift))
    return 0;
  return error_set (err, EPROTO, "the daemon gave something else than the map "
                    "of a backup");
}

struct direct *
direct_open (int disk_fd, int map_fd, uint64_t size, struct error *err)
{
  CLEANUP_CLOSE int to_close = map_fd;
  struct direct *d = calloc (1, sizeof *d);

  if (d == NULL) {
    close (disk_fd);
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  d->fd = disk_fd;
  d->size = size;
  if (map (d, to_close, err) == 0)
    return d;
  direct_close (d);
  return NULL;
}

void
direct_close (struct direct *d)
{
  if (d == NULL)
    return;
  if (d->head)
    munmap (d->head, d->len);
  close (d->fd);
  free (d);
}

void
direct_expect (struct direct *d, uint64_t offset, uint64_t len)
{
  posix_fadvise (d->fd, offset, len, POSIX_FADV_WILLNEED);
}

int
direct_pread (struct direct *d, void *buf, size_t count, uint64_t offset)
{
  while (count > 0) {
    ssize_t r = pread (d->fd, buf, count, offset);

    if (r == -1 && errno == EINTR)
      continue;
    if (r == 0) /* somebody cut the file */
      errno = EIO;
    if (r <= 0)
      return -1;
    buf = (char *) buf + r;
    count -= r;
    offset += r;
  }
  return 0;
}

static bool
is_gone (const struct direct *d, uint64_t granule)
{
  const unsigned char *byte =
    (const unsigned char *) d->head + DIRECT_BITS + granule / 8;

  return __atomic_load_n (byte, __ATOMIC_RELAXED) >> granule % 8 & 1;
}

bool
direct_next_gone (struct direct *d, uint64_t from, uint64_t to,
                  struct range *run)
{
  const uint64_t end = (to - 1) >> d->shift;
  uint64_t g;

  if (from >= to)
    return false;
  /* What was read comes before what is looked at here. */
  atomic_thread_fence (memory_order_seq_cst);
  *run = (struct range){ from, to };
  if (atomic_load (&d->head->over))
    return true;
  for (g = from >> d->shift; g <= end && !is_gone (d, g); g++)
    ;
  if (g > end)
    return false;
  if (g << d->shift > from)
    run->start = g << d->shift;
  while (g <= end && is_gone (d, g))
    g++;
  if (g << d->shift < to)
    run->end = g << d->shift;
  return true;
}
