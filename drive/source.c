/* nbdferry - where a drive's data is
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"
#include "remote.h"
#include "source.h"

#define STAND_IN "not-the-disk.raw"
#define CONNECTIONS 16

char *
source_data_file (const char *path, const char *state_dir)
{
  char *r;

  if (!remote_is_uri (path))
    return strdup (path);
  return asprintf (&r, "%s/" STAND_IN, state_dir) == -1 ? NULL : r;
}

struct disk *
source_open (const struct drive *d, const struct drive_options *opt,
             struct error *err)
{
  const unsigned s = opt->nbd_timeout ? opt->nbd_timeout : DRIVE_NBD_TIMEOUT;
  struct remote_options remote = { .connections = CONNECTIONS,
                                   .patience_ms = s * 1000 };
  struct disk *disk;

  if (!remote_is_uri (d->path))
    return disk_open_file (d->path, opt->create, opt->readonly, err);
  if (opt->state_dir == NULL) {
    error_set (err, EINVAL, "disk '%s' is held by another NBD server, and so "
               "has no place of its own for its bitmaps; say where with "
               "state=DIR after it", d->name);
    return NULL;
  }
  disk = remote_open (d->path, &remote, err);
  if (disk && opt->readonly)
    disk->readonly = true;
  return disk;
}

/* The note, in a file that no program takes for a disk with anything on it. */
static int
write_note (int fd, const struct drive *d)
{
  char sector[512];

  memset (sector, ' ', sizeof sector);
  snprintf (sector, sizeof sector,
            "This file is not the disk, and holds none of its data.\n"
            "It stands for the disk in bitmaps.qcow2, which says what has\n"
            "changed on it.  The disk itself is at\n%.300s\n", d->path);
  return pwrite (fd, sector, sizeof sector, 0) == sizeof sector ? 0 : -1;
}

int
source_prepare (const struct drive *d, struct error *err)
{
  CLEANUP_CLOSE int fd = -1;
  struct stat st;

  if (!remote_is_uri (d->path))
    return 0;
  fd = open (d->data_file, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd == -1 || fstat (fd, &st) == -1)
    return error_set (err, errno, "%s: open: %m", d->data_file);
  if (!S_ISREG (st.st_mode))
    return error_set (err, EINVAL, "%s: is not a regular file", d->data_file);
  /* What stands in it beside the note is of no use to anybody.  It may be
   * shorter than the disk, where the file system has no files that large.
   */
  if (ftruncate (fd, 0) == -1 || write_note (fd, d) == -1 ||
      (ftruncate (fd, d->size) == -1 && errno != EFBIG))
    return error_set (err, errno, "%s: cannot make it: %m", d->data_file);
  return 0;
}
