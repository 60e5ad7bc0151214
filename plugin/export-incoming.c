/* nbdferry - the export that is a channel of a migration
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Its content is the status block; each write at offset 0 is a packet.
 */
#include <config.h>

#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "cleanup.h"
#include "export.h"
#include "hello-name.h"
#include "house.h"

struct incoming_export {
  struct export export;
  struct drive *drive;
  struct incoming_channel *channel;
  uint64_t number;    /* of those there were */
  atomic_size_t kept; /* of 'kept' below, by this connection's threads */
};

static int64_t
incoming_size (struct export *e UNUSED)
{
  return PACKET_MAX;
}

static const char *
incoming_description (struct export *e)
{
  struct incoming_export *x = (struct incoming_export *) e;

  return nbdkit_printf_intern (PACKET_DESCRIPTION "%d: migration to disk '%s'",
                               PACKET_VERSION, x->drive->name);
}

static int
incoming_pread (struct export *e, void *buf, uint32_t count, uint64_t offset)
{
  struct incoming_export *x = (struct incoming_export *) e;
  char status[PACKET_STATUS];
  size_t n = 0;

  if (offset < sizeof status) {
    incoming_status (x->channel, status);
    n = sizeof status - offset;
    if (n > count)
      n = count;
    memcpy (buf, status + offset, n);
  }
  memset ((char *) buf + n, 0, count - n);
  return 0;
}

/* nbdkit keeps the buffer of its largest request for each thread of each
 * connection, and a channel's packets go round all of them: that may be many
 * times what is ever under way.  Once a packet was dealt with, nobody needs
 * what its pages hold; when all of them together hold more than that, those of
 * the packet are given back.  (A fault for each page is slower than a page that
 * is there.)
 */
#define KEEP (44 << 20)

/* Only sums; nothing is ordered by them. */
static atomic_size_t kept;

static void
give_back (struct incoming_export *x, const void *buf, uint32_t count)
{
  /* What this thread, which is its connection's, has in its buffer.  (The
   * retry filter opens a connection again.)
   */
  static _Thread_local size_t mine;
  static _Thread_local uint64_t number;
  size_t page = sysconf (_SC_PAGESIZE);
  uintptr_t from = ((uintptr_t) buf + page - 1) & ~(page - 1);
  uintptr_t to = ((uintptr_t) buf + count) & ~(page - 1);

  if (number != x->number) {
    number = x->number;
    mine = 0;
  }
  if (count > mine) {
    kept += count - mine;
    x->kept += count - mine;
    mine = count;
  }
  if (kept <= KEEP || from >= to)
    return;
  madvise ((void *) from, to - from, MADV_DONTNEED);
  kept -= count;
  x->kept -= count;
  mine -= count;
}

static int
incoming_pwrite (struct export *e, const void *buf, uint32_t count,
                 uint64_t offset, unsigned flags UNUSED)
{
  struct incoming_export *x = (struct incoming_export *) e;
  struct error err;

  if (offset != 0) {
    nbdkit_error ("a packet must be written at offset 0");
    errno = EINVAL;
    return -1;
  }
  if (incoming_packet (x->channel, buf, count, &err) == 0) {
    give_back (x, buf, count);
    return 0;
  }
  nbdkit_error ("incoming migration to '%s': %s", x->drive->name, err.msg);
  errno = err.errnum;
  return -1;
}

static int
incoming_export_flush (struct export *e)
{
  struct incoming_export *x = (struct incoming_export *) e;
  struct error err;

  if (incoming_flush (x->channel, &err) == 0)
    return 0;
  nbdkit_error ("%s", err.msg);
  errno = err.errnum;
  return -1;
}

static void
incoming_export_close (struct export *e)
{
  struct incoming_export *x = (struct incoming_export *) e;

  incoming_close (x->channel);
  kept -= x->kept;
  free (x);
}

static const struct export_ops incoming_export_ops = {
  .size = incoming_size,
  .description = incoming_description,
  .pread = incoming_pread,
  .pwrite = incoming_pwrite,
  .flush = incoming_export_flush,
  .close = incoming_export_close,
};

struct export *
export_open_incoming (struct drive *d, const char *hello)
{
  static atomic_uint_fast64_t numbers;
  struct incoming_export *x = calloc (1, sizeof *x);
  struct error err;

  if (x == NULL || (x->channel = incoming_open (house.incoming, d)) == NULL) {
    nbdkit_error ("calloc: %m");
    free (x);
    return NULL;
  }
  x->export.ops = &incoming_export_ops;
  x->drive = d;
  x->number = ++numbers;
  if (hello && hello_name_open (x->channel, hello, &err) == -1) {
    /* The source asks again, in a way that can be answered with a reason. */
    nbdkit_debug ("%s", err.msg);
    incoming_export_close (&x->export);
    errno = err.errnum;
    return NULL;
  }
  return &x->export;
}
