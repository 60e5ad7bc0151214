/* nbdferry - a copy to another server: the bitmaps, in a file
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cleanup.h"
#include "plain-impl.h"
#include "qcow2-image.h"

int
plain_bitmaps_open (struct plain *p, struct error *err)
{
  if (p->bitmaps_to == NULL)
    return 0;
  p->bitmaps_fd = open (p->bitmaps_to, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC,
                        0600);
  if (p->bitmaps_fd == -1)
    return error_set (err, errno, "%s: cannot make it for the bitmaps: %m",
                      p->bitmaps_to);
  return 0;
}

int
plain_bitmaps_take (struct plain *p, struct error *err)
{
  struct drive *d = p->disks[0].drive;

  if (p->bitmaps_to == NULL)
    return 0;
  p->bitmaps = calloc (d->nr_bitmaps + 1, sizeof p->bitmaps[0]);
  if (p->bitmaps == NULL)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < d->nr_bitmaps; i++) {
    const struct named_bitmap *nb = d->bitmaps[i];
    struct plain_bitmap *b = &p->bitmaps[p->nr_bitmaps];

    /* What is inconsistent says nothing. */
    if (nb->bits == NULL || nb->inconsistent)
      continue;
    b->bits = bitmap_new (d->size, nb->shift, err);
    if (b->bits == NULL)
      return -1;
    p->nr_bitmaps++;
    b->name = strdup (nb->name);
    if (b->name == NULL)
      return error_set (err, ENOMEM, "%m");
    b->recording = nb->recording;
    bitmap_merge (b->bits, nb->bits);
  }
  return 0;
}

int
plain_bitmaps_write (struct plain *p, struct error *err)
{
  CLEANUP_FREE struct qcow2_image_bitmap *list =
    calloc (p->nr_bitmaps + 1, sizeof *list);

  if (p->bitmaps_to == NULL)
    return 0;
  if (list == NULL)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < p->nr_bitmaps; i++)
    list[i] = (struct qcow2_image_bitmap){ p->bitmaps[i].name,
                                           p->bitmaps[i].recording,
                                           p->bitmaps[i].bits };
  return qcow2_write_image (p->bitmaps_fd, p->bitmaps_to,
                            p->disks[0].drive->size, list, p->nr_bitmaps,
                            err);
}

void
plain_bitmaps_close (struct plain *p, bool good)
{
  if (p->bitmaps_fd != -1) {
    close (p->bitmaps_fd);
    if (!good)
      unlink (p->bitmaps_to);
  }
  p->bitmaps_fd = -1;
  for (size_t i = 0; i < p->nr_bitmaps; i++) {
    free (p->bitmaps[i].name);
    bitmap_free (p->bitmaps[i].bits);
  }
  free (p->bitmaps);
  p->bitmaps = NULL;
  p->nr_bitmaps = 0;
}
