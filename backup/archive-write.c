/* nbdferry - writing archives
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "archive-write.h"
#include "cleanup.h"
#include "hash.h"

struct archive_writer {
  int fd;
  char *name;
  struct uuid id;
  XXH3_state_t *hash; /* of all that was written */
  struct archive_totals totals;
};

static int
write_bytes (struct archive_writer *w, const void *a, size_t a_len,
             const void *b, size_t b_len, struct error *err)
{
  struct iovec iov[2] = { { (void *) a, a_len }, { (void *) b, b_len } };
  struct iovec *v = iov;
  int nr = 2;

  XXH3_128bits_update (w->hash, a, a_len);
  XXH3_128bits_update (w->hash, b, b_len);
  w->totals.bytes += a_len + b_len;
  while (nr > 0) {
    ssize_t n;

    if (v->iov_len == 0) {
      v++;
      nr--;
      continue;
    }
    n = writev (w->fd, v, nr);
    if (n == -1 && errno == EINTR)
      continue;
    if (n == -1)
      return error_set (err, errno, "write to %s: %m", w->name);
    for (int i = 0; i < nr; i++) {
      size_t part = (size_t) n < v[i].iov_len ? (size_t) n : v[i].iov_len;

      v[i].iov_base = (char *) v[i].iov_base + part;
      v[i].iov_len -= part;
      n -= part;
    }
  }
  return 0;
}

/* 'json' must have 'size' bytes. */
static int
write_json (struct archive_writer *w, enum packet_type type, uint64_t number,
            const char *json, size_t size, struct error *err)
{
  struct packet_header h = { .type = type, .session = w->id,
                             .number = number, .body_size = size };
  CLEANUP_FREE uint8_t *buf = malloc (PACKET_HEADER + size);

  if (buf == NULL)
    return error_set (err, ENOMEM, "%m");
  memcpy (buf + PACKET_HEADER, json, size);
  packet_seal (buf, &h, buf + PACKET_HEADER + size);
  return write_bytes (w, buf, PACKET_HEADER + size, "", 0, err);
}

struct archive_writer *
archive_writer_open (int fd, const char *name,
                     const struct archive_head *head, struct error *err)
{
  CLEANUP_FREE char *json = archive_head_format (head, err);
  struct archive_writer *w = calloc (1, sizeof *w);

  if (json == NULL || w == NULL || strlen (json) > ARCHIVE_MAX_HEAD) {
    if (json)
      error_set (err, w ? EFBIG : ENOMEM, "%s: cannot write the head", name);
    free (w);
    return NULL;
  }
  w->fd = fd;
  w->id = head->id;
  w->name = strdup (name);
  w->hash = XXH3_createState ();
  if (w->name == NULL || w->hash == NULL) {
    error_set (err, ENOMEM, "%m");
    goto fail;
  }
  XXH3_128bits_reset (w->hash);
  if (write_json (w, PACKET_ARCHIVE_HEAD, 0, json, strlen (json), err) == -1)
    goto fail;
  return w;

 fail:
  archive_writer_free (w);
  return NULL;
}

void
archive_writer_free (struct archive_writer *w)
{
  if (w == NULL)
    return;
  XXH3_freeState (w->hash);
  free (w->name);
  free (w);
}

int
archive_write (struct archive_writer *w, const struct pack *p,
               struct error *err)
{
  struct archive_totals *t = &w->totals;

  for (size_t i = 0; i < p->nr; i++) {
    uint64_t n = p->extents[i].length;

    switch (p->extents[i].type) {
    case EXTENT_DATA: t->data += n; break;
    case EXTENT_ZERO: t->zeros += n; break;
    default: t->holes += n; break;
    }
  }
  t->packets++;
  t->extents += p->nr;
  t->stored += p->payload_size;
  return write_bytes (w, p->packet, p->packet_size, p->payload,
                      p->payload_size, err);
}

int
archive_writer_end (struct archive_writer *w, struct error *err)
{
  XXH128_hash_t hash = XXH3_128bits_digest (w->hash);
  struct archive_totals said = w->totals;
  CLEANUP_FREE char *text = NULL;
  char body[ARCHIVE_END_SIZE - PACKET_HEADER];

  said.hash = (struct archive_hash){ hash.high64, hash.low64 };
  text = archive_totals_format (&said, err);
  if (text == NULL)
    return -1;
  /* Of a fixed size, so that it is found from the file's end: ten numbers of
   * 20 digits and their names always fit.
   */
  memset (body, ' ', sizeof body);
  memcpy (body, text, strlen (text));
  if (write_json (w, PACKET_ARCHIVE_END, w->totals.packets + 1, body,
                  sizeof body, err) == -1)
    return -1;
  w->totals = said;
  return 0;
}

const struct archive_totals *
archive_writer_totals (const struct archive_writer *w)
{
  return &w->totals;
}

/* ---- in order ---- */

static int
write_pack (struct archive_appender *a, struct error *err)
{
  if (a->pack.nr == 0)
    return 0;
  if (pack_seal (&a->pack, a->id, a->number++, &a->compression, err) == -1 ||
      archive_write (a->writer, &a->pack, err) == -1)
    return -1;
  pack_clear (&a->pack);
  return 0;
}

int
archive_append (struct archive_appender *a, uint64_t offset, uint64_t length,
                enum extent_type type, const uint8_t *data,
                struct error *err)
{
  while (length > 0) {
    uint64_t n = pack_room (&a->pack, type);
    uint8_t *at;

    if (n == 0) {
      if (write_pack (a, err) == -1)
        return -1;
      continue;
    }
    n = n < length ? n : length;
    at = pack_add (&a->pack, offset, n, type);
    if (type == EXTENT_DATA) {
      memcpy (at, data, n);
      data += n;
    }
    offset += n;
    length -= n;
  }
  return 0;
}

int
archive_append_end (struct archive_appender *a, struct error *err)
{
  return write_pack (a, err) == -1 ? -1 : archive_writer_end (a->writer, err);
}
