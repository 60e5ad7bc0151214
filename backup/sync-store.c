/* nbdferry - what is known of standbys, on disk
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A file of the state directory, replaced as a whole:
 *
 *   {"format": "nbdferry-sync", "version": 1, "records": {BITMAP: {...}}}
 *
 * What cannot be understood counts as nothing, since then sync refuses to
 * rely on the standby.
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cleanup.h"
#include "sync-record.h"

#define FORMAT    "nbdferry-sync"
#define MAX_BYTES (64 << 20)

static char *
file_path (const char *state_dir, const char *suffix)
{
  char *path;

  if (asprintf (&path, "%s/sync.json%s", state_dir, suffix) == -1)
    return NULL;
  return path;
}

/* All records, an object; NULL if the file cannot be read. */
static json_t *
load (const char *state_dir, struct error *err)
{
  CLEANUP_FREE char *path = file_path (state_dir, "");
  CLEANUP_CLOSE int fd = path ? open (path, O_RDONLY | O_CLOEXEC) : -1;
  json_auto_t *file = NULL;
  json_t *records;
  off_t size;

  if (fd == -1 && path && errno == ENOENT)
    return json_object ();
  if (fd == -1 || (size = lseek (fd, 0, SEEK_END)) == -1 ||
      lseek (fd, 0, SEEK_SET) == -1) {
    error_set (err, errno, "open %s: %m", path ? path : "sync.json");
    return NULL;
  }
  if (size <= MAX_BYTES)
    file = json_loadfd (fd, 0, NULL);
  records = json_object_get (file, "records");
  if (json_is_object (records) &&
      json_integer_value (json_object_get (file, "version")) == 1)
    return json_incref (records);
  return json_object ();
}

static int
store (const char *state_dir, json_t *records, struct error *err)
{
  CLEANUP_FREE char *path = file_path (state_dir, "");
  CLEANUP_FREE char *tmp = file_path (state_dir, ".new");
  CLEANUP_CLOSE int fd = -1, dir = -1;
  json_auto_t *file = json_pack ("{s:s, s:i, s:O}", "format", FORMAT,
                                 "version", 1, "records", records);

  if (path == NULL || tmp == NULL || file == NULL)
    return error_set (err, ENOMEM, "%m");
  fd = open (tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd == -1 || json_dumpfd (file, fd, JSON_INDENT (1)) == -1 ||
      fsync (fd) == -1 || rename (tmp, path) == -1)
    return error_set (err, errno, "write %s: %m", path);
  dir = open (state_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (dir == -1 || fsync (dir) == -1)
    return error_set (err, errno, "sync %s: %m", state_dir);
  return 0;
}

json_t *
sync_store_get (const char *state_dir, const char *bitmap, struct error *err)
{
  json_auto_t *records = load (state_dir, err);
  json_t *record = json_object_get (records, bitmap);

  if (records == NULL)
    return NULL;
  return record ? json_incref (record) : json_null ();
}

int
sync_store_set (const char *state_dir, const char *bitmap, json_t *record,
                bool (*exists) (void *opaque, const char *bitmap),
                void *opaque, struct error *err)
{
  json_auto_t *records = load (state_dir, err);
  const char *name;
  json_t *r;
  void *next;

  if (records == NULL)
    return -1;
  if (record)
    json_object_set (records, bitmap, record);
  else
    json_object_del (records, bitmap);
  json_object_foreach_safe (records, next, name, r)
    if (!exists (opaque, name))
      json_object_del (records, name);
  return store (state_dir, records, err);
}
