/* nbdferry - requests to a drive
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A request that changes data goes: gate, mark, submit, mark again, leave.
 * What is marked is fixed when the request is inside the gate, since it is
 * replaced only while the gate is shut.
 */
#include <config.h>

#include <errno.h>

#include "drive.h"

static void
mark (const struct marks *m, uint64_t offset, uint64_t len)
{
  for (size_t i = 0; i < m->nr; i++)
    bitmap_set (m->map[i], offset, len);
}

/* The mark before: through the gate, then set the bits.  Returns the gate's
 * token, or -1 with errno.
 */
static int
begin_write (struct drive *d, uint64_t offset, uint64_t len)
{
  uint64_t delay =
    atomic_load_explicit (&d->delay_ns, memory_order_relaxed);
  int token;

  if (delay > 0)
    gate_delay (&d->writes, delay);
  token = gate_enter (&d->writes);
  if (token == -1)
    return -1;
  if (d->mode == DRIVE_ACTIVE)
    mark (d->marks, offset, len);
  else if (d->mode != DRIVE_FORWARD) {
    gate_leave (&d->writes, token);
    errno = ESHUTDOWN;
    return -1;
  }
  return token;
}

/* The mark after, whether the write succeeded or not: it may have landed in
 * part.  The fence orders the data before the look at the bits: whoever
 * clears a bit and then reads the data sees either our data or has its
 * cleared bit seen, and set again, by us.
 */
static int
end_write (struct drive *d, int token, uint64_t offset, uint64_t len, int r)
{
  int saved = errno;

  if (d->mode == DRIVE_ACTIVE) {
    atomic_thread_fence (memory_order_seq_cst);
    mark (d->marks, offset, len);
  }
  gate_leave (&d->writes, token);
  errno = saved;
  return r;
}

static struct disk *
target (struct drive *d)
{
  return d->mode == DRIVE_FORWARD ? d->remote : d->disk;
}

int
drive_pwrite (struct drive *d, const void *buf, size_t count,
              uint64_t offset, unsigned flags)
{
  int token = begin_write (d, offset, count);
  struct disk *t;
  int r;

  if (token == -1)
    return -1;
  t = target (d);
  r = t->ops->pwrite (t, buf, count, offset, flags);
  return end_write (d, token, offset, count, r);
}

int
drive_zero (struct drive *d, uint64_t len, uint64_t offset, unsigned flags)
{
  int token = begin_write (d, offset, len);
  struct disk *t;
  int r;

  if (token == -1)
    return -1;
  t = target (d);
  r = t->ops->zero (t, len, offset, flags);
  return end_write (d, token, offset, len, r);
}

int
drive_trim (struct drive *d, uint64_t len, uint64_t offset, unsigned flags)
{
  int token = begin_write (d, offset, len);
  struct disk *t;
  int r;

  if (token == -1)
    return -1;
  t = target (d);
  r = t->ops->trim (t, len, offset, flags);
  return end_write (d, token, offset, len, r);
}

/* Requests that change nothing pass the other gate, which is shut only when
 * the disk is handed over.
 */
static int
begin_read (struct drive *d)
{
  int token = gate_enter (&d->reads);

  if (token >= 0 && d->mode != DRIVE_ACTIVE && d->mode != DRIVE_FORWARD) {
    gate_leave (&d->reads, token);
    errno = ESHUTDOWN;
    return -1;
  }
  return token;
}

static int
end_read (struct drive *d, int token, int r)
{
  int saved = errno;

  gate_leave (&d->reads, token);
  errno = saved;
  return r;
}

int
drive_pread (struct drive *d, void *buf, size_t count, uint64_t offset)
{
  int token = begin_read (d);
  struct disk *t;

  if (token == -1)
    return -1;
  t = target (d);
  return end_read (d, token, t->ops->pread (t, buf, count, offset));
}

int
drive_flush (struct drive *d)
{
  int token = begin_read (d);
  struct disk *t;

  if (token == -1)
    return -1;
  t = target (d);
  return end_read (d, token, t->ops->flush (t));
}

int
drive_cache (struct drive *d, uint64_t len, uint64_t offset)
{
  int token = begin_read (d);
  struct disk *t;

  if (token == -1)
    return -1;
  t = target (d);
  return end_read (d, token, t->ops->cache (t, len, offset));
}

int
drive_extent (struct drive *d, uint64_t offset, uint64_t end,
              struct extent *ext)
{
  int token = begin_read (d);
  struct disk *t;

  if (token == -1)
    return -1;
  t = target (d);
  return end_read (d, token, t->ops->extent (t, offset, end, ext));
}
