/* nbdferry - one of two disks that are compared
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"
#include "remote.h"
#include "side-archive.h"
#include "side.h"

/* Hashing a few large blocks on a slow disk takes its time. */
#define CONNECT_MS 30000
#define REQUEST_MS 120000
/* How long a server that was lost is waited for. */
#define PATIENCE_MS 30000

/* ---- files ---- */

/* What would be compared as the bytes of a format, which nobody means. */
static int
check_file (const char *path, struct error *err)
{
  CLEANUP_CLOSE int fd = open (path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  struct stat st;
  char magic[4];

  if (fd == -1 || fstat (fd, &st) == -1)
    return error_set (err, errno, "%s: %m", path);
  if (!S_ISREG (st.st_mode) && !S_ISBLK (st.st_mode))
    return error_set (err, EINVAL, "%s: is neither a regular file nor a block "
                      "device", path);
  if (pread (fd, magic, sizeof magic, 0) == sizeof magic &&
      memcmp (magic, "QFI\xfb", sizeof magic) == 0)
    return error_set (err, EINVAL, "%s: is a qcow2 image; have \"qemu-nbd -r\" "
                      "serve it, and give the URI of that", path);
  return 0;
}

static struct disk *
open_file (const char *path, struct error *err)
{
  return check_file (path, err) == -1 ? NULL
                                      : disk_open_file (path, 0, true, err);
}

/* ---- NBD ---- */

static struct client *
connect_to (const struct side *s, const char *export, struct error *err)
{
  struct client *c = client_connect (s->where, export, s->stop, CONNECT_MS,
                                     err);

  if (c)
    client_set_timeout (c, REQUEST_MS);
  return c;
}

/* Ask for the hashes.  A server that ignores the export's name gives us the
 * disk itself, whose size is another: no disk is 16 bytes for each block of
 * at least 4096 long.
 */
static int
probe_hashes (struct side *s, struct error *err)
{
  CLEANUP_FREE char *export = client_uri_export (s->where, err);
  CLEANUP_FREE char *name = NULL;
  struct client *c;

  if (export == NULL)
    return -1;
  if (asprintf (&name, "%s@hash/%" PRIu64, export, s->block) == -1) {
    name = NULL;
    return error_set (err, ENOMEM, "%m");
  }
  c = connect_to (s, name, NULL);
  if (c == NULL)
    return 0;
  if (client_size (c) == hash_blocks (s->size, s->block) * HASH_SIZE) {
    s->by_hash = true;
    s->hash_export = take_ptr (&name);
  }
  client_close (c);
  return 0;
}

/* ---- both ---- */

static int
disk_read (void *opaque, void *buf, size_t count, uint64_t offset)
{
  struct disk *d = opaque;

  return d->ops->pread (d, buf, count, offset);
}

static int
disk_map (void *opaque, uint64_t offset, uint64_t end, struct extent *ext)
{
  struct disk *d = opaque;

  return d->ops->extent (d, offset, end, ext);
}

int
side_of_disk (struct side *s, const char *where, struct disk *d,
              uint64_t block, const struct stop *stop, struct error *err)
{
  struct hash_source source = { .size = d->size, .opaque = d,
                                .pread = disk_read,
                                .extent = d->can_extents ? disk_map : NULL };

  *s = (struct side){ .where = where, .disk = d, .block = block,
                      .stop = stop, .size = d->size,
                      .is_uri = remote_is_uri (where) };
  hasher_init (&s->hasher, &source, block);
  return s->is_uri && s->size > 0 ? probe_hashes (s, err) : 0;
}

static int
open_archive (struct side *s, const char *where, uint64_t block,
              struct error *err)
{
  struct hash_source source;
  struct archive_side *a = archive_side_open (where, err);

  if (a == NULL)
    return -1;
  archive_side_source (a, &source);
  *s = (struct side){ .where = where, .archive = a, .block = block,
                      .size = source.size };
  hasher_init (&s->hasher, &source, block);
  return 0;
}

int
side_open (struct side *s, const char *where, uint64_t block,
           unsigned connections, const struct stop *stop, struct error *err)
{
  struct remote_options opt = { .connections = connections,
                                .patience_ms = PATIENCE_MS, .stop = stop };
  struct disk *d;

  *s = (struct side){ 0 };
  if (!remote_is_uri (where) && archive_side_is (where))
    return open_archive (s, where, block, err);
  d = remote_is_uri (where) ? remote_open (where, &opt, err)
                            : open_file (where, err);
  if (d == NULL)
    return -1;
  if (side_of_disk (s, where, d, block, stop, err) == -1) {
    d->ops->close (d);
    return -1;
  }
  s->owned = true;
  return 0;
}

void
side_clip (struct side *s, uint64_t size)
{
  struct hash_source source = s->hasher.source;

  source.size = size;
  hasher_init (&s->hasher, &source, s->block);
}

int
side_finish (struct side *s, struct error *err)
{
  return s->archive ? archive_side_finish (s->archive, err) : 0;
}

void
side_close (struct side *s)
{
  if (s->archive)
    archive_side_close (s->archive);
  if (s->owned)
    s->disk->ops->close (s->disk);
  free (s->hash_export);
  *s = (struct side){ 0 };
}

int
side_reader_open (struct side_reader *r, const struct side *s,
                  struct error *err)
{
  *r = (struct side_reader){ .side = s };
  if (!s->by_hash)
    return 0;
  r->client = connect_to (s, s->hash_export, err);
  return r->client ? 0 : -1;
}

void
side_reader_close (struct side_reader *r)
{
  client_close (r->client);
  r->client = NULL;
}

int
side_read_hashes (struct side_reader *r, uint64_t first, uint64_t nr,
                  uint8_t *out, struct error *err)
{
  const struct side *s = r->side;
  const struct hasher *h = &s->hasher;
  uint64_t known = s->by_hash ? nr : 0; /* of them, by the server */

  if (known > 0 && h->source.size < s->size &&
      h->source.size % s->block != 0 && first + nr == h->nr)
    known--;
  if ((known == 0 || client_pread (r->client, out, known * HASH_SIZE,
                                   first * HASH_SIZE) == 0) &&
      (known == nr || hasher_read (h, first + known, nr - known,
                                   out + known * HASH_SIZE) == 0))
    return 0;
  return error_set (err, errno, "%s: reading at %" PRIu64 ": %m", s->where,
                    first * s->block);
}
