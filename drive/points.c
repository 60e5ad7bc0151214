/* nbdferry - the points of bitmaps, on disk
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cleanup.h"
#include "fullio.h"
#include "points.h"

/* Names and little else; more is not ours. */
#define MAX_BYTES (128 << 20)

static char *
file_path (const char *state_dir, const char *suffix)
{
  char *path;

  if (asprintf (&path, "%s/points.json%s", state_dir, suffix) == -1)
    return NULL;
  return path;
}

static int
sync_points (const char *path, struct error *err)
{
  return sync_directory_of (path) == 0 ? 0
    : error_set (err, errno, "sync the directory of %s: %m", path);
}

/* ---- writing ---- */

static json_t *
to_json (const struct drive_entry *entries, size_t nr)
{
  json_t *all = json_object ();

  for (size_t i = 0; i < nr; i++) {
    const struct point *p = &entries[i].point;
    char id[UUID_TEXT];

    if (!entries[i].nb->persistent || point_is_none (p))
      continue;
    uuid_format (&p->id, id);
    json_object_set_new (all, entries[i].nb->name,
                         json_pack ("{s:s, s:I}", "point", id, "time",
                                    (json_int_t) p->time));
  }
  return all;
}

static int
write_file (const char *state_dir, const json_t *points, struct error *err)
{
  CLEANUP_FREE char *path = file_path (state_dir, "");
  CLEANUP_FREE char *tmp = file_path (state_dir, ".new");
  CLEANUP_CLOSE int fd = -1;

  if (path == NULL || tmp == NULL)
    return error_set (err, ENOMEM, "%m");
  if (json_object_size (points) == 0) {
    if (unlink (path) == -1 && errno != ENOENT)
      return error_set (err, errno, "remove %s: %m", path);
    return sync_points (path, err);
  }
  fd = open (tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd == -1 ||
      json_dumpfd (points, fd, JSON_INDENT (1) | JSON_SORT_KEYS) == -1 ||
      fsync (fd) == -1 || rename (tmp, path) == -1)
    return error_set (err, errno, "write %s: %m", path);
  return sync_points (path, err);
}

int
points_write (struct drive *d, const struct drive_entry *entries, size_t nr,
              struct error *err)
{
  json_t *points;

  if (d->store == NULL)
    return 0; /* no persistent bitmap can be among them */
  points = to_json (entries, nr);
  if (points == NULL)
    return error_set (err, ENOMEM, "%m");
  if (d->points && json_equal (d->points, points)) {
    json_decref (points);
    return 0;
  }
  /* If it fails nobody knows what the file says. */
  json_decref (d->points);
  d->points = NULL;
  if (write_file (d->state_dir, points, err) == -1) {
    json_decref (points);
    return -1;
  }
  d->points = points;
  return 0;
}

int
points_write_list (struct drive *d, struct error *err)
{
  CLEANUP_FREE struct drive_entry *entries =
    calloc (d->nr_bitmaps ? d->nr_bitmaps : 1, sizeof (struct drive_entry));

  if (entries == NULL)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < d->nr_bitmaps; i++)
    entries[i] = (struct drive_entry){ .nb = d->bitmaps[i],
                                       .point = d->bitmaps[i]->point };
  return points_write (d, entries, d->nr_bitmaps, err);
}

/* ---- reading ---- */

static bool
get_point (const json_t *o, struct point *p)
{
  const char *id = json_string_value (json_object_get (o, "point"));
  json_t *time = json_object_get (o, "time");

  if (id == NULL || !uuid_parse (id, &p->id) || !json_is_integer (time))
    return false;
  p->time = json_integer_value (time);
  return true;
}

json_t *
points_parse (const char *text, size_t len)
{
  json_t *points = json_loadb (text, len, JSON_REJECT_DUPLICATES, NULL), *o;
  struct point p;
  const char *name;
  bool ok = json_is_object (points);

  json_object_foreach (points, name, o)
    ok = ok && get_point (o, &p);
  if (ok)
    return points;
  json_decref (points);
  return NULL;
}

/* NULL if there is none that can be understood. */
static json_t *
read_file (const char *state_dir)
{
  CLEANUP_FREE char *path = file_path (state_dir, ""), *text = NULL;
  CLEANUP_CLOSE int fd = path ? open (path, O_RDONLY | O_CLOEXEC) : -1;
  off_t size = fd == -1 ? -1 : lseek (fd, 0, SEEK_END);

  if (size < 0 || size > MAX_BYTES || (text = malloc (size + 1)) == NULL ||
      full_pread (fd, text, size, 0) != size)
    return NULL;
  return points_parse (text, size);
}

int
points_load (struct drive *d, bool forget, struct error *err)
{
  json_auto_t *points = NULL;

  if (forget)
    return points_write_list (d, err);
  points = read_file (d->state_dir);
  for (size_t i = 0; i < d->nr_bitmaps; i++) {
    struct named_bitmap *nb = d->bitmaps[i];

    if (!nb->inconsistent && nb->recording)
      get_point (json_object_get (points, nb->name), &nb->point);
  }
  return 0;
}
