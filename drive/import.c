/* nbdferry - the bitmaps of any qcow2, brought into a drive
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"
#include "import.h"
#include "lock.h"
#include "ship-map.h"
#include "transaction.h"

/* What the bits of all may take in memory.  A table of a few bytes can stand
 * for half a gigabyte of ones, so the file's size says nothing.
 */
#define MAX_BYTES (UINT64_C (2) << 30)

struct reading {
  struct import *im;
  const struct import_options *opt;
  struct imported *now; /* whose bits come in; NULL: not wanted */
  size_t room;          /* in im->list */
  uint64_t bytes;       /* of bits so far */
};

static int
check_wanted (const struct import_options *opt,
              const struct qcow2_entry *entry, uint64_t size,
              struct error *err)
{
  if (size != opt->size)
    return error_set (err, EINVAL, "%s: is an image of a disk of %" PRIu64
                      " bytes, but this disk has %" PRIu64 " bytes; if it is "
                      "the same disk, make them equal first, with "
                      "\"qemu-img resize\" or truncate(1)",
                      opt->path, size, opt->size);
  if (entry->inconsistent)
    return error_set (err, EINVAL, "%s: bitmap '%s' is inconsistent and "
                      "cannot be used%s", opt->path, entry->name,
                      opt->name ? "" : "; nothing was imported; name the "
                      "ones that you want, one at a time");
  if (entry->in_use)
    return error_set (err, EBUSY, "%s: bitmap '%s' was in use when its daemon "
                      "ended; repair it with \"nbdferry recover\"",
                      opt->path, entry->name);
  return 0;
}

static int
found (void *opaque, const struct qcow2_entry *entry, uint64_t size,
       struct error *err)
{
  struct reading *r = opaque;
  struct import *im = r->im;
  const char *name = entry->name;

  r->now = NULL;
  if (r->opt->name ? strcmp (r->opt->name, name) != 0 : ship_map_name (name))
    return 0;
  if (check_wanted (r->opt, entry, size, err) == -1)
    return -1;
  if (im->nr == r->room) {
    size_t room = r->room ? r->room * 2 : 16;
    struct imported *p = reallocarray (im->list, room, sizeof *p);

    if (p == NULL)
      return error_set (err, ENOMEM, "%m");
    im->list = p;
    r->room = room;
  }
  if (r->opt->new_name)
    name = r->opt->new_name;
  r->now = &im->list[im->nr];
  *r->now = (struct imported){ .name = strdup (name), .shift = entry->shift,
                               .recording = entry->autoflag };
  if (r->now->name == NULL)
    return error_set (err, ENOMEM, "%m");
  im->nr++;
  r->now->bits = bitmap_new (size, entry->shift, err);
  return r->now->bits ? 0 : -1;
}

/* Mark the runs of ones in 'w', whose first bit is 'bit'. */
static void
set_word (struct bitmap *bm, uint64_t bit, uint64_t w)
{
  const unsigned shift = bitmap_shift (bm);

  while (w) {
    unsigned first = __builtin_ctzll (w);
    uint64_t gap = ~(w >> first);
    unsigned len = gap ? (unsigned) __builtin_ctzll (gap) : 64;

    if (len > 64 - first)
      len = 64 - first;
    /* What lies beyond the end of the disk is cut off. */
    bitmap_set (bm, (bit + first) << shift, (uint64_t) len << shift);
    if (first + len == 64)
      break;
    w &= UINT64_MAX << (first + len);
  }
}

static int
words (void *opaque, uint64_t first_bit, const uint64_t *word, size_t nr,
       struct error *err)
{
  struct reading *r = opaque;

  if (r->opt->stop && stop_wait (r->opt->stop, 0))
    return error_set (err, ECANCELED, "given up: the client has gone, or the daemon "
                      "is ending");
  if (r->now == NULL)
    return 0;
  r->bytes += nr * sizeof word[0];
  if (r->bytes > MAX_BYTES)
    return error_set (err, EFBIG, "%s: its bitmaps are too large to be "
                      "imported at once; name the ones that you want, one at "
                      "a time", r->opt->path);
  for (size_t i = 0; i < nr; i++)
    set_word (r->now->bits, first_bit + i * 64, word[i]);
  return 0;
}

static int
open_image (const char *path, struct error *err)
{
  /* O_NONBLOCK: not to hang at a FIFO before it is seen to be one. */
  int fd = open (path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  struct stat st;

  if (fd == -1)
    return error_set (err, errno, "%s: open: %m", path);
  if (fstat (fd, &st) == -1)
    error_set (err, errno, "%s: %m", path);
  else if (!S_ISREG (st.st_mode) && !S_ISBLK (st.st_mode))
    error_set (err, EINVAL, "%s: is neither a regular file nor a block device",
               path);
  /* As a writer, so that there is no other. */
  else if (lock_file (fd, path, true, err) == 0)
    return fd;
  close (fd);
  return -1;
}

int
import_read (struct import *im, const struct import_options *opt,
             struct error *err)
{
  static const struct qcow2_reader reader = { found, words };
  struct reading r = { .im = im, .opt = opt };
  CLEANUP_CLOSE int fd = open_image (opt->path, err);

  if (fd == -1 ||
      qcow2_read_bitmaps (fd, opt->path, &reader, &r, err) == -1)
    return -1;
  if (im->nr > 0)
    return 0;
  return opt->name
    ? error_set (err, ENOENT, "%s: has no bitmap '%s'", opt->path, opt->name)
    : error_set (err, ENOENT, "%s: has no bitmaps", opt->path);
}

int
import_add (const struct import *im, struct drive *d, struct error *err)
{
  CLEANUP_FREE struct bitmap_action *actions =
    calloc (im->nr + 1, sizeof *actions);

  if (actions == NULL)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < im->nr; i++)
    actions[i] = (struct bitmap_action){
      .type = BITMAP_ADD,
      .target = { .drive = d, .name = im->list[i].name },
      .granularity = UINT64_C (1) << im->list[i].shift,
      .persistent = true,
      .disabled = !im->list[i].recording,
      .bits = im->list[i].bits,
    };
  return bitmap_transaction (actions, im->nr, err);
}

void
import_free (struct import *im)
{
  for (size_t i = 0; i < im->nr; i++) {
    free (im->list[i].name);
    bitmap_free (im->list[i].bits);
  }
  free (im->list);
  *im = (struct import){ 0 };
}
