/* nbdferry - a chain of archives as one of two disks that are compared
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "archive-merge.h"
#include "archive.h"
#include "cleanup.h"
#include "fullio.h"
#include "packet.h"
#include "side-archive.h"

#define MAGIC "NBDFERRY" /* of a packet */

struct archive_side {
  size_t nr;
  char **paths;
  struct archive_reader **readers;
  struct archive_merge *merge;
  uint64_t size;
  struct merge_piece piece; /* the last one that was read */
  bool over;                /* there are no more */
  struct error err;         /* if errnum is set: reading has failed */
};

static bool
is_archive (const char *path)
{
  CLEANUP_CLOSE int fd = open (path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  char magic[sizeof MAGIC - 1];

  return fd >= 0 && pread (fd, magic, sizeof magic, 0) == sizeof magic &&
         memcmp (magic, MAGIC, sizeof magic) == 0;
}

bool
archive_side_is (const char *where)
{
  CLEANUP_FREE char *first = NULL;

  if (access (where, F_OK) == 0 || strchr (where, ',') == NULL)
    return is_archive (where);
  first = strndup (where, strcspn (where, ","));
  return first && is_archive (first);
}

/* ---- opening ---- */

static int
split (struct archive_side *s, const char *where, struct error *err)
{
  const bool one = access (where, F_OK) == 0;
  size_t most = 1;

  for (const char *p = where; *p; p++)
    most += *p == ',';
  s->paths = calloc (most, sizeof s->paths[0]);
  s->readers = calloc (most, sizeof s->readers[0]);
  if (s->paths == NULL || s->readers == NULL)
    return error_set (err, ENOMEM, "%m");
  for (;;) {
    size_t len = one ? strlen (where) : strcspn (where, ",");

    s->paths[s->nr] = strndup (where, len);
    if (s->paths[s->nr] == NULL)
      return error_set (err, ENOMEM, "%m");
    s->nr++;
    if (where[len] == '\0')
      return 0;
    where += len + 1;
  }
}

static int
open_all (struct archive_side *s, struct error *err)
{
  CLEANUP_FREE const struct archive_head **heads =
    calloc (s->nr, sizeof heads[0]);

  if (heads == NULL)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < s->nr; i++) {
    s->readers[i] = archive_open (s->paths[i], s->nr > 1 ? ARCHIVE_LAZY : 0,
                                  err);
    if (s->readers[i] == NULL)
      return -1;
    heads[i] = archive_get_head (s->readers[i]);
  }
  if (!archive_is_full (heads[0]))
    return error_set (err, EINVAL, "%s: is an incremental backup; name the "
                      "full one and those between before it, with commas",
                      s->paths[0]);
  if (archive_chain_check (heads, (const char *const *) s->paths, s->nr,
                           err) == -1)
    return -1;
  s->size = heads[s->nr - 1]->size;
  s->merge = archive_merge_open (s->readers, s->nr, err);
  return s->merge ? 0 : -1;
}

struct archive_side *
archive_side_open (const char *where, struct error *err)
{
  struct archive_side *s = calloc (1, sizeof *s);

  if (s == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  if (split (s, where, err) == 0 && open_all (s, err) == 0)
    return s;
  archive_side_close (s);
  return NULL;
}

void
archive_side_close (struct archive_side *s)
{
  archive_merge_free (s->merge);
  for (size_t i = 0; i < s->nr; i++) {
    archive_close (s->readers[i]);
    free (s->paths[i]);
  }
  free (s->readers);
  free (s->paths);
  free (s);
}

/* ---- reading ---- */

/* Have 'piece' reach beyond 'at', or be the end.  -1 with errno. */
static int
advance (struct archive_side *s, uint64_t at)
{
  while (!s->over && s->piece.offset + s->piece.length <= at) {
    int r = archive_merge_next (s->merge, &s->piece, &s->err);

    if (r == -1) {
      errno = s->err.errnum;
      return -1;
    }
    s->over = r == 0;
  }
  return 0;
}

static int
source_extent (void *opaque, uint64_t offset, uint64_t end,
               struct extent *ext)
{
  struct archive_side *s = opaque;
  uint64_t stop;

  if (advance (s, offset) == -1)
    return -1;
  *ext = (struct extent){ offset, end, EXTENT_HOLE };
  if (s->over) /* what no archive speaks of */
    return 0;
  if (s->piece.offset > offset)
    stop = s->piece.offset;
  else {
    stop = s->piece.offset + s->piece.length;
    ext->type = s->piece.type;
  }
  if (stop < end)
    ext->end = stop;
  return 0;
}

/* Only within what source_extent has called data. */
static int
source_pread (void *opaque, void *buf, size_t count, uint64_t offset)
{
  struct archive_side *s = opaque;

  memcpy (buf, s->piece.data + (offset - s->piece.offset), count);
  return 0;
}

void
archive_side_source (struct archive_side *s, struct hash_source *source)
{
  *source = (struct hash_source){ .size = s->size, .opaque = s,
                                  .pread = source_pread,
                                  .extent = source_extent };
}

int
archive_side_finish (struct archive_side *s, struct error *err)
{
  if (s->err.errnum == 0)
    advance (s, UINT64_MAX);
  if (s->err.errnum == 0)
    return 0;
  if (err)
    *err = s->err;
  return -1;
}
