/* nbdferry - which bitmaps of a sidecar belong to a migration under way
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cleanup.h"
#include "fullio.h"
#include "incoming-names.h"

/* A file of names alone; more is not ours. */
#define MAX_BYTES (128 << 20)

static char *
file_path (const char *state_dir, const char *suffix)
{
  char *path;

  if (asprintf (&path, "%s/incoming.json%s", state_dir, suffix) == -1)
    return NULL;
  return path;
}

static int
sync_names (const char *path, struct error *err)
{
  return sync_directory_of (path) == 0 ? 0
    : error_set (err, errno, "sync the directory of %s: %m", path);
}

static json_t *
names_of (const struct drive_entry *entries, size_t nr)
{
  json_t *names = json_array ();

  for (size_t i = 0; i < nr; i++)
    if (entries[i].nb->persistent && entries[i].nb->incoming)
      json_array_append_new (names, json_string (entries[i].nb->name));
  return names;
}

int
incoming_names_write (const char *state_dir,
                      const struct drive_entry *entries, size_t nr,
                      struct error *err)
{
  CLEANUP_FREE char *path = file_path (state_dir, "");
  CLEANUP_FREE char *tmp = file_path (state_dir, ".new");
  CLEANUP_CLOSE int fd = -1;
  json_auto_t *names = names_of (entries, nr);

  if (path == NULL || tmp == NULL || names == NULL)
    return error_set (err, ENOMEM, "%m");
  if (json_array_size (names) == 0) {
    /* Mostly it was not there, and nothing needs to be made durable. */
    if (unlink (path) == 0)
      return sync_names (path, err);
    return errno == ENOENT ? 0 : error_set (err, errno, "remove %s: %m", path);
  }
  fd = open (tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd == -1 || json_dumpfd (names, fd, JSON_INDENT (1)) == -1 ||
      fsync (fd) == -1 || rename (tmp, path) == -1)
    return error_set (err, errno, "write %s: %m", path);
  return sync_names (path, err);
}

json_t *
incoming_names_read (const char *state_dir, struct error *err)
{
  CLEANUP_FREE char *path = file_path (state_dir, "");
  CLEANUP_CLOSE int fd = -1;
  json_error_t jerr;
  json_t *names;
  off_t size;

  if (path == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  fd = open (path, O_RDONLY | O_CLOEXEC);
  if (fd == -1 && errno == ENOENT)
    return json_array ();
  if (fd == -1 || (size = lseek (fd, 0, SEEK_END)) == -1 ||
      lseek (fd, 0, SEEK_SET) == -1) {
    error_set (err, errno, "open %s: %m", path);
    return NULL;
  }
  if (size > MAX_BYTES) {
    error_set (err, EFBIG, "%s: too large to be ours", path);
    return NULL;
  }
  names = json_loadfd (fd, 0, &jerr);
  if (!json_is_array (names)) {
    error_set (err, EINVAL, "%s: not a list of names (%s); the migration that "
               "it belongs to must begin again: remove the state directory",
               path, names ? "no array" : jerr.text);
    json_decref (names);
    return NULL;
  }
  return names;
}

void
incoming_names_forget (const char *state_dir)
{
  CLEANUP_FREE char *path = file_path (state_dir, "");

  if (path)
    unlink (path);
}

bool
incoming_names_has (const json_t *names, const char *name)
{
  size_t i;
  json_t *n;

  json_array_foreach (names, i, n)
    if (json_is_string (n) && strcmp (json_string_value (n), name) == 0)
      return true;
  return false;
}
