/* nbdferry - named files that travel with a migration: the source
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Each time a file is sent it gets a new version, so the destination can tell
 * its packets from those that are late.  A file that has changed just before
 * it was read may change once more within one tick of the file system's clock;
 * such a one is sent again.
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "blobs.h"
#include "cleanup.h"
#include "clock.h"

/* File systems' clocks tick at least that often. */
#define TICK (20 * NS_PER_MS)

struct blob {
  char *name, *path;
  uint64_t version;  /* of what was sent last; 0: nothing */
  struct stat sent;  /* the file then */
  bool settled;      /* it can't have changed without a change of its times */
};

struct blobs {
  struct blob *v;
  size_t nr;
  uint64_t version; /* the last one */
};

bool
blob_name_ok (const char *name)
{
  size_t len = strlen (name);

  if (len == 0 || len > BLOB_MAX_NAME || name[0] == '.')
    return false;
  for (size_t i = 0; i < len; i++)
    if (name[i] < ' ' || name[i] > '~' || name[i] == '/')
      return false;
  return true;
}

struct blobs *
blobs_new (void)
{
  struct blobs *b = calloc (1, sizeof *b);

  /* Grows from one process to the next as well. */
  if (b)
    b->version = real_ns ();
  return b;
}

void
blobs_free (struct blobs *b)
{
  if (b == NULL)
    return;
  for (size_t i = 0; i < b->nr; i++) {
    free (b->v[i].name);
    free (b->v[i].path);
  }
  free (b->v);
  free (b);
}

/* Open the file: -1, or a descriptor, and what it is. */
static int
open_blob (const char *name, const char *path, struct stat *st,
           struct error *err)
{
  /* Non-blocking: it may be a pipe. */
  int fd = open (path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);

  if (fd == -1 || fstat (fd, st) == -1)
    error_set (err, errno, "attach '%s': %s: %m", name, path);
  else if (!S_ISREG (st->st_mode))
    error_set (err, EINVAL, "attach '%s': %s is not a regular file", name,
               path);
  else if ((uint64_t) st->st_size > BLOB_MAX_SIZE)
    error_set (err, EFBIG, "attach '%s': %s has %ju bytes, more than the %"
               PRIu64 " allowed", name, path, (uintmax_t) st->st_size,
               BLOB_MAX_SIZE);
  else
    return fd;
  if (fd >= 0)
    close (fd);
  return -1;
}

int
blobs_add (struct blobs *b, const char *name, const char *path,
           struct error *err)
{
  struct blob *v, *blob;
  struct stat st;
  int fd;

  if (!blob_name_ok (name))
    return error_set (err, EINVAL, "'%s' cannot be the name of an attached "
                      "file: it must be printable ASCII, without a slash and "
                      "a leading dot", name);
  for (size_t i = 0; i < b->nr; i++)
    if (strcmp (b->v[i].name, name) == 0)
      return error_set (err, EEXIST, "two attached files are named '%s'",
                        name);
  if (b->nr == BLOBS_MAX)
    return error_set (err, E2BIG, "more than %d attached files", BLOBS_MAX);
  if (path[0] != '/')
    return error_set (err, EINVAL, "attach '%s': the path '%s' is not "
                      "absolute", name, path);
  fd = open_blob (name, path, &st, err);
  if (fd == -1)
    return -1;
  close (fd);
  v = realloc (b->v, (b->nr + 1) * sizeof *v);
  if (v == NULL)
    return error_set (err, ENOMEM, "%m");
  b->v = v;
  blob = &v[b->nr];
  *blob = (struct blob){ .name = strdup (name), .path = strdup (path) };
  b->nr++;
  return blob->name && blob->path ? 0 : error_set (err, ENOMEM, "%m");
}

void
blobs_raise (struct blobs *b, uint64_t version)
{
  if (b && b->version < version)
    b->version = version;
}

json_t *
blobs_describe (const struct blobs *b)
{
  json_t *list = json_array ();

  for (size_t i = 0; b && i < b->nr; i++)
    json_array_append_new (list, json_pack ("{s:s, s:s}", "name",
                                            b->v[i].name, "path",
                                            b->v[i].path));
  return list;
}

void
blobs_forget (struct blobs *b)
{
  for (size_t i = 0; b && i < b->nr; i++)
    b->v[i].version = 0;
}

static bool
same_file (const struct stat *a, const struct stat *b)
{
  return a->st_dev == b->st_dev && a->st_ino == b->st_ino &&
         a->st_size == b->st_size &&
         a->st_mtim.tv_sec == b->st_mtim.tv_sec &&
         a->st_mtim.tv_nsec == b->st_mtim.tv_nsec &&
         a->st_ctim.tv_sec == b->st_ctim.tv_sec &&
         a->st_ctim.tv_nsec == b->st_ctim.tv_nsec;
}

/* Must it be sent (again)? */
static bool
is_pending (const struct blob *blob, struct stat *st)
{
  if (stat (blob->path, st) == -1) {
    st->st_size = 0;
    return true; /* and that will fail */
  }
  return blob->version == 0 || !blob->settled || !same_file (st, &blob->sent);
}

uint64_t
blobs_pending (struct blobs *b)
{
  uint64_t n = 0;
  struct stat st;

  for (size_t i = 0; b && i < b->nr; i++)
    if (is_pending (&b->v[i], &st))
      n += PACKET_HEADER + st.st_size;
  return n;
}

/* A packet with what lies at 'offset'; returns the number of bytes. */
static ssize_t
put_piece (struct blobs *b, struct blob *blob, int fd, uint64_t offset,
           struct engine *e, struct error *err)
{
  struct buffer *buf = engine_get (e);
  uint64_t left = blob->sent.st_size - offset;
  json_auto_t *body = NULL;
  size_t len, done = 0;

  if (buf == NULL) {
    engine_failed (e, err);
    return -1;
  }
  len = left < buf->room ? left : buf->room;
  while (done < len) {
    ssize_t n = pread (fd, buf->payload + done, len - done, offset + done);

    if (n > 0) {
      done += n;
      continue;
    }
    engine_return (e, buf);
    if (n == 0)
      return error_set (err, EIO, "attach '%s': %s has become shorter while "
                        "it was read", blob->name, blob->path);
    return error_set (err, errno, "attach '%s': read %s: %m", blob->name,
                      blob->path);
  }
  body = json_pack ("{s:s, s:I, s:I, s:I}", "name", blob->name, "version",
                    (json_int_t) b->version, "size",
                    (json_int_t) blob->sent.st_size, "offset",
                    (json_int_t) offset);
  buf->h.type = PACKET_BLOB;
  buf->h.body_size = json_dumpb (body, NULL, 0, JSON_COMPACT);
  json_dumpb (body, (char *) buf->payload - buf->h.body_size,
              buf->h.body_size, JSON_COMPACT);
  buf->h.payload_size = buf->h.raw_size = len;
  engine_put (e, buf);
  return len;
}

static int
send_blob (struct blobs *b, struct blob *blob, struct engine *e,
           struct error *err)
{
  CLEANUP_CLOSE int fd = -1;
  uint64_t began = real_ns (), offset = 0;
  struct stat after;
  ssize_t n;

  fd = open_blob (blob->name, blob->path, &blob->sent, err);
  if (fd == -1)
    return -1;
  b->version++;
  do {
    n = put_piece (b, blob, fd, offset, e, err);
    if (n == -1)
      return -1;
    offset += n;
  } while (offset < (uint64_t) blob->sent.st_size);
  blob->version = b->version;
  blob->settled = fstat (fd, &after) == 0 && same_file (&after, &blob->sent) &&
                  after.st_mtim.tv_sec * NS_PER_S + after.st_mtim.tv_nsec +
                      TICK <
                    began;
  return 0;
}

int
blobs_send (struct blobs *b, struct engine *e, struct error *err)
{
  struct stat st;

  for (size_t i = 0; b && i < b->nr; i++)
    if (is_pending (&b->v[i], &st) && send_blob (b, &b->v[i], e, err) == -1)
      return -1;
  return 0;
}

json_t *
blobs_list (const struct blobs *b)
{
  json_t *list = json_array ();

  for (size_t i = 0; b && i < b->nr; i++)
    json_array_append_new (
      list, json_pack ("{s:s, s:I, s:I}", "name", b->v[i].name, "version",
                       (json_int_t) b->v[i].version, "size",
                       (json_int_t) b->v[i].sent.st_size));
  return list;
}

int
blob_piece_parse (json_t *body, size_t len, struct blob_piece *p,
                  struct error *err)
{
  json_int_t version, size, offset;

  if (json_unpack (body, "{s:s, s:I, s:I, s:I}", "name", &p->name, "version",
                   &version, "size", &size, "offset", &offset) == -1 ||
      version <= 0 || size < 0 || offset < 0)
    return error_set (err, EBADMSG, "malformed BLOB packet");
  if (!blob_name_ok (p->name))
    return error_set (err, EBADMSG, "a name that an attached file cannot "
                      "have");
  if ((uint64_t) size > BLOB_MAX_SIZE || offset > size ||
      len > (uint64_t) (size - offset) || (len == 0 && size > 0))
    return error_set (err, EBADMSG, "attached file '%s': %zu bytes at %jd of "
                      "%jd", p->name, len, (intmax_t) offset, (intmax_t) size);
  p->version = version;
  p->size = size;
  p->offset = offset;
  return 0;
}
