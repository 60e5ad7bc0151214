/* nbdferry - what a backup or a restore is written to
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"
#include "keep-out.h"
#include "probe.h"
#include "remote.h"
#include "target.h"

#define PATIENCE_MS 10000 /* for an NBD server that is gone */
#define LOOK        (1 << 20) /* bytes at both ends in which content shows */
#define GLANCE      (1 << 16) /* bytes at each place in between */
#define PLACES      64        /* of them, at least, if all is data */
#define MAX_EXTENTS 1024

/* ---- is anything on it? ---- */

static int
is_blank (struct disk *d, uint64_t offset, size_t len, struct error *err)
{
  CLEANUP_FREE char *buf = malloc (len);

  if (buf == NULL)
    return error_set (err, ENOMEM, "%m");
  if (d->ops->pread (d, buf, len, offset) == -1)
    return error_set (err, errno, "read: %m");
  return disk_is_zero (buf, len);
}

/* In between: where data begins, and here and there within it.  It cannot be
 * read as a whole, so this finds what is likely to be there, not all that may
 * be.
 */
static int
is_blank_between (struct disk *d, struct error *err)
{
  struct extent ext = { 0 };
  uint64_t step = d->size / PLACES > GLANCE ? d->size / PLACES : GLANCE;
  int i, blank;

  for (i = 0; i < MAX_EXTENTS && ext.end < d->size; i++) {
    uint64_t at = ext.end;

    if (d->ops->extent (d, at, d->size, &ext) == -1)
      return error_set (err, errno, "where its data is: %m");
    for (; ext.type == EXTENT_DATA && at < ext.end; at += step) {
      size_t len = ext.end - at < GLANCE ? ext.end - at : GLANCE;

      blank = is_blank (d, at, len, err);
      if (blank != 1)
        return blank;
    }
  }
  return 1;
}

/* Something that is known, or anything at all where one would look. */
static int
refuse_content (struct disk *d, const char *where, struct error *err)
{
  size_t len = d->size < LOOK ? d->size : LOOK;
  CLEANUP_FREE char *what = NULL;
  int known = disk_probe (d, &what, err), blank = -1;

  if (known == 0)
    blank = is_blank (d, 0, len, err);
  if (blank == 1)
    blank = is_blank (d, d->size - len, len, err);
  if (blank == 1)
    blank = is_blank_between (d, err);
  if (known == 1)
    return error_set (err, EEXIST, "%s holds %s; it is overwritten only if "
                      "asked to (restore --overwrite, backup --force)",
                      where, what);
  if (known == -1 || blank == -1)
    return error_prefix (err, "%s", where);
  if (blank == 0)
    return error_set (err, EEXIST, "%s is not empty; it is overwritten only "
                      "if asked to (restore --overwrite, backup --force)",
                      where);
  return 0;
}

/* ---- the kinds of targets ---- */

/* It can be written, and the system does not use it: not mounted, not swap,
 * no loop device upon it.
 */
static int
check_use (struct disk *d, const char *where, struct error *err)
{
  if (d->readonly)
    return error_set (err, EROFS, "%s cannot be written", where);
  return d->ops->claim && d->ops->claim (d, err) == -1 ? -1 : 0;
}

/* A device or a server: it is there, and large enough. */
static int
check_fixed (struct target *t, const struct target_options *opt,
             struct error *err)
{
  struct disk *d = t->disk;

  if (check_use (d, opt->where, err) == -1)
    return -1;
  if (d->size < opt->size)
    return error_set (err, ENOSPC, "%s has %" PRIu64 " bytes, which is less "
                      "than the %" PRIu64 " of the disk", opt->where, d->size,
                      opt->size);
  if (opt->in_place || opt->overwrite || d->size == 0)
    return 0;
  return refuse_content (d, opt->where, err);
}

static int
open_server (struct target *t, const struct target_options *opt,
             struct error *err)
{
  CLEANUP_FREE char *uri = remote_absolute_uri (opt->where, err);
  struct remote_options remote = {
    .connections = opt->connections,
    .patience_ms = PATIENCE_MS,
  };

  if (uri == NULL)
    return -1;
  t->disk = remote_open (uri, &remote, err);
  return t->disk ? check_fixed (t, opt, err) : -1;
}

static int
open_device (struct target *t, const struct target_options *opt,
             struct error *err)
{
  t->disk = disk_open_file (opt->where, 0, false, err);
  return t->disk ? check_fixed (t, opt, err) : -1;
}

static int
open_in_place (struct target *t, const struct target_options *opt,
               struct error *err)
{
  t->disk = disk_open_file (opt->where, 0, false, err);
  if (t->disk == NULL || check_use (t->disk, opt->where, err) == -1)
    return -1;
  if (t->disk->size != opt->size)
    return error_set (err, EINVAL, "%s has %" PRIu64 " bytes, the disk has %"
                      PRIu64 ": it is not an image of it", opt->where,
                      t->disk->size, opt->size);
  return 0;
}

/* The lock says whether somebody uses it, before it loses anything. */
static int
open_to_empty (struct target *t, const struct target_options *opt,
               struct error *err)
{
  t->disk = disk_open_file (opt->where, 0, false, err);
  t->to_empty = true;
  return t->disk ? check_use (t->disk, opt->where, err) : -1;
}

/* Keeps owner and mode of a file, and needs no room for both. */
int
target_begin (struct target *t, struct error *err)
{
  if (!t->to_empty)
    return 0;
  t->disk->ops->close (t->disk);
  t->disk = NULL;
  if (truncate (t->path, 0) == -1 || truncate (t->path, t->size) == -1)
    return error_set (err, errno, "%s: %m", t->path);
  t->fresh = true;
  t->disk = disk_open_file (t->path, 0, false, err);
  return t->disk ? 0 : -1;
}

static int
open_new (struct target *t, const struct target_options *opt,
          struct error *err)
{
  if (partial_open (&t->partial, opt->where, false, err) == -1)
    return -1;
  if (t->partial.tmp == NULL)
    return error_set (err, EINVAL, "%s is not a file", opt->where);
  if (ftruncate (t->partial.fd, opt->size) == -1)
    return error_set (err, errno, "%s: cannot make it %" PRIu64 " bytes: %m",
                      opt->where, opt->size);
  t->fresh = true;
  t->disk = disk_open_file (t->partial.tmp, 0, false, err);
  return t->disk ? 0 : -1;
}

static int
open_path (struct target *t, const struct target_options *opt,
           struct error *err)
{
  struct stat st;

  t->path = strdup (opt->where);
  if (t->path == NULL)
    return error_set (err, errno, "%m");
  if (stat (opt->where, &st) == -1) {
    if (errno != ENOENT)
      return error_set (err, errno, "%s: %m", opt->where);
    if (opt->in_place)
      return error_set (err, ENOENT, "%s does not exist, so it has nothing to "
                        "be brought up to date", opt->where);
    return open_new (t, opt, err);
  }
  if (S_ISBLK (st.st_mode))
    return open_device (t, opt, err);
  if (!S_ISREG (st.st_mode))
    return error_set (err, EINVAL, "%s is neither a file nor a block device",
                      opt->where);
  if (keep_out_of_state (opt->where, err) == -1)
    return -1;
  if (opt->in_place)
    return open_in_place (t, opt, err);
  if (opt->overwrite)
    return open_to_empty (t, opt, err);
  return error_set (err, EEXIST, "%s exists already; it is overwritten only "
                    "if asked to (restore --overwrite, backup --force)",
                    opt->where);
}

int
target_open (struct target *t, const struct target_options *opt,
             struct error *err)
{
  int r;

  *t = (struct target){ .partial = PARTIAL_NONE, .size = opt->size };
  r = remote_is_uri (opt->where) ? open_server (t, opt, err)
                                 : open_path (t, opt, err);
  if (r == -1)
    target_close (t);
  return r;
}

int
target_commit (struct target *t, struct error *err)
{
  struct disk *d = t->disk;
  int r = d->ops->settle ? d->ops->settle (d) : d->ops->flush (d);

  if (r == -1)
    return error_set (err, errno, "%s: cannot make it durable: %m",
                      t->path ? t->path : "the server");
  return t->partial.tmp ? partial_commit (&t->partial, err) : 0;
}

void
target_close (struct target *t)
{
  if (t->disk)
    t->disk->ops->close (t->disk);
  partial_drop (&t->partial);
  free (t->path);
  *t = (struct target){ .partial = PARTIAL_NONE };
}
