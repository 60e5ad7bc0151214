/* nbdferry - what a migration's destination does not hold durably
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cleanup.h"
#include "ship-map.h"

/* ship-clearing: the magic, start and end, big-endian, and their exclusive or
 * with all bits turned.
 */
static const char magic[8] = "FERRYCLR";

bool
ship_map_name (const char *name)
{
  return strcmp (name, SHIP_MAP_NAME) == 0;
}

bool
ship_map_reserved (const char *name)
{
  return strncmp (name, "x-ferry-", 8) == 0;
}

/* ---- the range that is being cleared ---- */

static char *
clearing_path (const struct drive *d)
{
  char *path;

  return asprintf (&path, "%s/ship-clearing", d->state_dir) == -1 ? NULL
                                                                   : path;
}

static int
write_clearing (struct drive *d, uint64_t start, uint64_t end)
{
  uint8_t buf[SHIP_MAP_CLEARING_BYTES];
  const uint64_t v[3] = { htobe64 (start), htobe64 (end),
                          htobe64 (~(start ^ end)) };

  memcpy (buf, magic, 8);
  memcpy (buf + 8, v, sizeof v);
  return pwrite (d->clearing_fd, buf, sizeof buf, 0) == sizeof buf ? 0 : -1;
}

int
ship_map_parse (const uint8_t *buf, size_t len, struct range *range)
{
  uint64_t v[3];

  if (len != SHIP_MAP_CLEARING_BYTES || memcmp (buf, magic, 8) != 0)
    return -1;
  memcpy (v, buf + 8, sizeof v);
  range->start = be64toh (v[0]);
  range->end = be64toh (v[1]);
  return be64toh (v[2]) == ~(range->start ^ range->end) &&
         range->start <= range->end ? 0 : -1;
}

/* The file, with room for what will be written, so that this cannot fail
 * later for want of space.
 */
static int
open_clearing (struct drive *d, struct error *err)
{
  CLEANUP_FREE char *path = clearing_path (d);

  if (path == NULL)
    return error_set (err, ENOMEM, "%m");
  if (d->clearing_fd == -1)
    d->clearing_fd = open (path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (d->clearing_fd == -1 || write_clearing (d, 0, 0) == -1 ||
      fsync (d->clearing_fd) == -1)
    return error_set (err, errno, "write %s: %m", path);
  return 0;
}

void
ship_map_forget (struct drive *d)
{
  CLEANUP_FREE char *path = clearing_path (d);

  if (d->clearing_fd >= 0)
    close (d->clearing_fd);
  d->clearing_fd = -1;
  if (path)
    unlink (path);
}

int
ship_map_clearing (struct drive *d, uint64_t start, uint64_t end)
{
  if (!d->unheld->persistent)
    return 0;
  return d->clearing_fd >= 0 ? write_clearing (d, start, end) : -1;
}

void
ship_map_cleared (struct drive *d)
{
  /* If this fails, too much is sent again. */
  if (d->unheld->persistent)
    write_clearing (d, 0, 0);
}

int
ship_map_mend (struct drive *d)
{
  CLEANUP_FREE char *path = clearing_path (d);
  uint8_t buf[SHIP_MAP_CLEARING_BYTES + 1];
  struct range r;
  ssize_t n;

  if (path == NULL)
    return -1;
  d->clearing_fd = open (path, O_RDWR | O_CLOEXEC);
  if (d->clearing_fd == -1)
    return -1;
  n = pread (d->clearing_fd, buf, sizeof buf, 0);
  if (n < 0 || ship_map_parse (buf, n, &r) == -1)
    return -1;
  if (r.end > r.start)
    bitmap_set (d->unheld->bits, r.start, r.end - r.start);
  return 0;
}

/* ---- making and removing ---- */

/* Everything set, durable, and in the directory.  Control held. */
static int
make_persistent (struct drive *d, unsigned shift, struct error *err)
{
  struct named_bitmap *nb;

  if (d->store == NULL || d->size == 0)
    return error_set (err, EOPNOTSUPP, "there is no store");
  if (open_clearing (d, err) == -1)
    return -1;
  nb = drive_new_bitmap (d, SHIP_MAP_NAME, shift, true, true, err);
  if (nb == NULL)
    return -1;
  bitmap_set_alone (nb->bits, 0, d->size);
  d->unheld = nb;
  if (qcow2_sync (d->store, err) == 0 && drive_write_list (d, err) == 0)
    return 0;
  d->unheld = NULL;
  drive_write_list (d, NULL); /* it may be there all the same */
  drive_free_bitmap (d, nb);
  return -1;
}

/* Nobody marks it any more.  Control held. */
static void
forget_marks (struct drive *d)
{
  d->unheld->recording = false;
  if (d->unheld->bits)
    drive_stop_marking (d, d->unheld->bits);
}

static void
remove_locked (struct drive *d)
{
  struct named_bitmap *nb = d->unheld;
  struct error err;

  if (nb == NULL)
    return;
  forget_marks (d);
  d->unheld = NULL;
  if (nb->persistent && d->store && drive_write_list (d, &err) == -1) {
    drive_log ("disk '%s': the map of a migration that has ended stays in %s: "
               "%s", d->name, d->sidecar, err.msg);
    d->unheld = nb;
    return;
  }
  drive_free_bitmap (d, nb);
  ship_map_forget (d);
}

int
ship_map_make (struct drive *d, unsigned shift, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);
  struct error why;

  remove_locked (d);
  if (d->unheld) /* it could not be removed */
    return error_set (err, EIO, "disk '%s': %s cannot be written", d->name,
                      d->sidecar);
  if (make_persistent (d, shift, &why) == 0)
    return 0;
  if (drive_failure (d))
    return error_set (err, EIO, "disk '%s': %s", d->name, why.msg);
  ship_map_forget (d);
  if (d->size > 0)
    drive_log ("disk '%s': what the destination holds is kept in memory only "
               "(%s); if this server is restarted before the migration has "
               "completed, all of it is sent again", d->name, why.msg);
  d->unheld = drive_new_bitmap (d, SHIP_MAP_NAME, shift, false, true, err);
  if (d->unheld == NULL)
    return -1;
  bitmap_set (d->unheld->bits, 0, d->size);
  return 0;
}

int
ship_map_fill (struct drive *d, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);

  bitmap_set (d->unheld->bits, 0, d->size);
  /* Its regions are not armed. */
  if (d->unheld->persistent && d->store)
    return qcow2_sync (d->store, err);
  return 0;
}

void
ship_map_remove (struct drive *d)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);

  remove_locked (d);
}
