/* nbdferry - a view: for who reads the disk without us
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * 'settled' has the bits that the map of direct.h needs: a granule is in it
 * before it is written to.  So its leaves are the map.
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cleanup.h"
#include "view-impl.h"

/* Memory that has a descriptor, of which others cannot change a thing. */
static int
make_map (struct view *v, struct error *err)
{
  const uint64_t len = direct_map_len (v->size, v->shift);
  struct direct_head *head;

  v->map_fd = memfd_create ("nbdferry-backup", MFD_CLOEXEC |
                                                 MFD_ALLOW_SEALING);
  if (v->map_fd == -1 || ftruncate (v->map_fd, len) == -1)
    return error_set (err, errno, "memory for a backup: %m");
  head = mmap (NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, v->map_fd, 0);
  if (head == MAP_FAILED)
    return error_set (err, errno, "memory for a backup: %m");
  v->map = head;
  v->map_len = len;
  memcpy (head->magic, DIRECT_MAGIC, sizeof head->magic);
  head->size = v->size;
  head->shift = v->shift;
  atomic_init (&head->over, 0);
  if (fcntl (v->map_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW |
                                       F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) ==
      -1)
    return error_set (err, errno, "seal the memory of a backup: %m");
  return 0;
}

static void
drop_map (struct view *v)
{
  if (v->map)
    munmap (v->map, v->map_len);
  if (v->map_fd >= 0)
    close (v->map_fd);
  v->map = NULL;
  v->map_fd = -1;
}

int
view_make_settled (struct view *v, struct error *err)
{
  struct error ignored;

  /* A kernel that cannot do it: then nobody gets it. */
  if (make_map (v, &ignored) == -1)
    drop_map (v);
  if (v->map == NULL)
    v->settled = bitmap_new (v->size, v->shift, err);
  else
    v->settled = bitmap_new_over_zeros (
      (uint64_t *) ((char *) v->map + DIRECT_BITS), v->size, v->shift, err);
  return v->settled ? 0 : -1;
}

void
view_free_settled (struct view *v)
{
  bitmap_free (v->settled);
  drop_map (v);
}

void
view_set_over (struct view *v)
{
  /* In this order: a write that finds the second one sets no bit any more. */
  if (v->map)
    atomic_store (&v->map->over, 1);
  atomic_store (&v->over, true);
}

int
view_direct (struct view *v, int fds[2], struct error *err)
{
  struct disk *disk = v->opt.drive->disk;

  if (v->map == NULL || disk->ops->reader == NULL)
    return error_set (err, ENOTSUP, "disk '%s' can be read through its "
                      "daemon alone", v->opt.drive->name);
  if (atomic_load (&v->over))
    return error_set (err, EIO, "the backup has failed, or ended");
  fds[0] = disk->ops->reader (disk);
  if (fds[0] == -1)
    return error_set (err, errno, "open %s again: %m", v->opt.drive->path);
  fds[1] = fcntl (v->map_fd, F_DUPFD_CLOEXEC, 3);
  if (fds[1] >= 0)
    return 0;
  error_set (err, errno, "%m");
  close (fds[0]);
  return -1;
}
