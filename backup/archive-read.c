/* nbdferry - reading archives
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A stranger's file: nothing in it is believed before it was checked, and no
 * more memory is taken than a packet may have (about 8 MiB, with what it is
 * decompressed to).  Each packet's three checksums find what was damaged and
 * where; that packets are all there, in order and of one archive is known by
 * their session and number, and by the totals and the checksum at the end.
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "archive.h"
#include "cleanup.h"
#include "compress.h"
#include "disk.h"
#include "hash.h"

#define MAX_BODY (PACKET_MAX_EXTENTS * PACKET_EXTENT)

struct archive_reader {
  int fd;
  char *name;
  bool lazy;
  bool ended;
  XXH3_state_t *hash;   /* of all that was read; NULL if lazy */
  struct archive_head head;
  struct archive_totals totals; /* so far */
  uint64_t next_number;
  uint64_t covered;     /* up to here extents have been seen */

  /* The present packet. */
  struct packet_header h;
  uint64_t at;          /* where it begins */
  uint8_t *packet;      /* header and body; PACKET_HEADER + MAX_BODY bytes */
  struct packet_extent *extents; /* PACKET_MAX_EXTENTS */
  uint8_t *wire;        /* its payload as it was read, or NULL: not yet */
  uint8_t *raw;         /* decompressed, or NULL */
};

/* "NAME: at byte 4711 (packet 12): MESSAGE" */
static int
damaged (struct archive_reader *r, struct error *err)
{
  return error_prefix (err, "%s: at byte %" PRIu64 " (packet %" PRIu64 ")",
                       r->name, r->at, r->next_number);
}

/* ---- bytes ---- */

/* Read 'len' bytes from 'offset', where a reader that is not lazy is anyway.
 * Returns how many there were, -1 with errno.
 */
static ssize_t
read_bytes (struct archive_reader *r, void *buf, size_t len, uint64_t offset)
{
  size_t done = 0;

  while (done < len) {
    ssize_t n = r->lazy ? pread (r->fd, (char *) buf + done, len - done,
                                 offset + done)
                        : read (r->fd, (char *) buf + done, len - done);

    if (n == -1 && errno == EINTR)
      continue;
    if (n == -1)
      return -1;
    if (n == 0)
      break;
    done += n;
  }
  if (r->hash)
    XXH3_128bits_update (r->hash, buf, done);
  return done;
}

static int
read_exactly (struct archive_reader *r, void *buf, size_t len,
              uint64_t offset, const char *what, struct error *err)
{
  ssize_t n = read_bytes (r, buf, len, offset);

  if (n == -1)
    return error_set (err, errno, "%m");
  if ((size_t) n < len)
    return error_set (err, EBADMSG, "cut off: it ends in the %s, at byte %"
                      PRIu64, what, offset + n);
  return 0;
}

/* ---- a packet ---- */

static int
check_place (struct archive_reader *r, struct error *err)
{
  const struct packet_header *h = &r->h;

  if (r->next_number == 0) {
    if (h->type != PACKET_ARCHIVE_HEAD)
      return error_set (err, EBADMSG, "an archive does not begin like this");
    r->head.id = h->session;
  }
  else if (h->type != PACKET_DATA && h->type != PACKET_ARCHIVE_END)
    return error_set (err, EBADMSG, "a packet of type %d inside an archive",
                      h->type);
  if (!uuid_equal (&h->session, &r->head.id))
    return error_set (err, EBADMSG, "a packet of another archive");
  if (h->number != r->next_number)
    return error_set (err, EBADMSG, "packet number %" PRIu64 " stands where "
                      "%" PRIu64 " should be", h->number, r->next_number);
  if (h->epoch != 0 || h->channel != 0 || h->disk != 0)
    return error_set (err, EBADMSG, "a packet that was made for the wire");
  return 0;
}

static int
check_sizes (const struct packet_header *h, struct error *err)
{
  if (h->type == PACKET_DATA) {
    if (h->nr_sections > 0 || h->nr_extents == 0 ||
        h->body_size != h->nr_extents * PACKET_EXTENT)
      return error_set (err, EBADMSG, "a body of %" PRIu32 " bytes for %"
                        PRIu32 " extents", h->body_size, h->nr_extents);
    if (h->raw_size > ARCHIVE_MAX_RAW || h->payload_size > h->raw_size)
      return error_set (err, EBADMSG, "a payload of %" PRIu32 " bytes for %"
                        PRIu32, h->payload_size, h->raw_size);
    return 0;
  }
  if (h->body_size >
      (h->type == PACKET_ARCHIVE_HEAD ? ARCHIVE_MAX_HEAD
                                      : ARCHIVE_END_SIZE - PACKET_HEADER))
    return error_set (err, EBADMSG, "a body of %" PRIu32 " bytes",
                      h->body_size);
  if (h->type == PACKET_ARCHIVE_END &&
      h->body_size != ARCHIVE_END_SIZE - PACKET_HEADER)
    return error_set (err, EBADMSG, "an end of %" PRIu32 " bytes",
                      h->body_size);
  return 0;
}

/* Header and body of the packet at r->at. */
static int
read_head_and_body (struct archive_reader *r, struct error *err)
{
  ssize_t n = read_bytes (r, r->packet, PACKET_HEADER, r->at);

  if (n == -1)
    return error_set (err, errno, "%m");
  if (n == 0 && r->next_number > 0)
    return error_set (err, EBADMSG, "cut off: it has no end");
  if (n < PACKET_HEADER)
    return error_set (err, EBADMSG, r->next_number == 0
                      ? "not an archive: too short"
                      : "cut off: it ends in a packet's header");
  if (packet_parse_header (r->packet, &r->h, err) == -1) {
    if (err && err->errnum == EPROTONOSUPPORT)
      error_set (err, EPROTONOSUPPORT, "packets of another version; they need "
                 "another nbdferry");
    return -1;
  }
  if (check_place (r, err) == -1 || check_sizes (&r->h, err) == -1 ||
      read_exactly (r, r->packet + PACKET_HEADER, r->h.body_size,
                    r->at + PACKET_HEADER, "packet's body", err) == -1)
    return -1;
  return packet_check_body (r->packet, err);
}

static uint64_t
payload_at (const struct archive_reader *r)
{
  return r->at + PACKET_HEADER + r->h.body_size;
}

static int
read_payload (struct archive_reader *r, struct error *err)
{
  if (r->wire)
    return 0;
  r->wire = malloc (r->h.payload_size ? r->h.payload_size : 1);
  if (r->wire == NULL)
    return error_set (err, ENOMEM, "%m");
  if (read_exactly (r, r->wire, r->h.payload_size, payload_at (r),
                    "packet's payload", err) == 0 &&
      packet_check_payload (r->packet, r->wire, err) == 0)
    return 0;
  free (take_ptr (&r->wire));
  return -1;
}

/* The extents follow one another, in this packet and from the last one. */
static int
take_extents (struct archive_reader *r, struct error *err)
{
  bool full = archive_is_full (&r->head);

  if (packet_check_extents (r->packet, &r->h, r->head.size, err) == -1)
    return -1;
  for (uint32_t i = 0; i < r->h.nr_extents; i++) {
    struct packet_extent *e = &r->extents[i];

    packet_get_extent (r->packet, i, e);
    /* packet_check_extents stops at the first excess of data. */
    if (e->length == 0 || e->length > r->head.size ||
        e->offset > r->head.size - e->length || e->type > EXTENT_HOLE)
      return error_set (err, EBADMSG, "an extent that is not in the disk");
    if (e->offset < r->covered || (full && e->offset > r->covered))
      return error_set (err, EBADMSG, "the extent at %" PRIu64 " does not "
                        "follow the one before, which ends at %" PRIu64,
                        e->offset, r->covered);
    r->covered = e->offset + e->length;
    if (e->type == EXTENT_DATA)
      r->totals.data += e->length;
    else if (e->type == EXTENT_ZERO)
      r->totals.zeros += e->length;
    else
      r->totals.holes += e->length;
  }
  r->totals.packets++;
  r->totals.extents += r->h.nr_extents;
  r->totals.stored += r->h.payload_size;
  return 0;
}

/* ---- the end ---- */

static bool
totals_equal (const struct archive_totals *a, const struct archive_totals *b,
              bool with_hash)
{
  return a->packets == b->packets && a->extents == b->extents &&
         a->data == b->data && a->zeros == b->zeros && a->holes == b->holes &&
         a->stored == b->stored && a->bytes == b->bytes &&
         (!with_hash ||
          (a->hash.high == b->hash.high && a->hash.low == b->hash.low));
}

static int
check_end (struct archive_reader *r, struct error *err)
{
  struct archive_totals said;
  uint8_t more;
  ssize_t n;

  if (archive_totals_parse (packet_json (r->packet), r->h.body_size, &said,
                            err) == -1)
    return -1;
  if (!totals_equal (&said, &r->totals, r->hash != NULL))
    return error_set (err, EBADMSG, totals_equal (&said, &r->totals, false)
                      ? "the checksum over the whole archive is wrong"
                      : "the totals at the end are not those of what was "
                        "before it");
  if (archive_is_full (&r->head) && r->covered != r->head.size)
    return error_set (err, EBADMSG, "a full backup that ends at %" PRIu64
                      " of %" PRIu64 " bytes", r->covered, r->head.size);
  n = read_bytes (r, &more, 1, r->at + ARCHIVE_END_SIZE);
  if (n == -1)
    return error_set (err, errno, "%m");
  if (n == 1)
    return error_set (err, EBADMSG, "there is something behind its end");
  r->totals.hash = said.hash;
  r->ended = true;
  return 0;
}

/* ---- going through ---- */

int
archive_next (struct archive_reader *r, const struct packet_extent **extents,
              size_t *nr, struct error *err)
{
  XXH128_hash_t before = { 0, 0 };

  if (r->ended)
    return 0;
  archive_unload (r);
  /* What END says is the checksum of what comes before END. */
  if (r->hash)
    before = XXH3_128bits_digest (r->hash);
  r->totals.bytes = r->at;
  r->totals.hash = (struct archive_hash){ before.high64, before.low64 };
  if (read_head_and_body (r, err) == -1)
    return damaged (r, err);
  if (r->h.type == PACKET_ARCHIVE_END)
    return check_end (r, err) == -1 ? damaged (r, err) : 0;
  if (take_extents (r, err) == -1 ||
      (!r->lazy && read_payload (r, err) == -1))
    return damaged (r, err);
  *extents = r->extents;
  *nr = r->h.nr_extents;
  /* What is said of this packet from here on counts from the next. */
  r->at = payload_at (r) + r->h.payload_size;
  r->next_number++;
  return 1;
}

const uint8_t *
archive_load (struct archive_reader *r, struct error *err)
{
  uint64_t after = r->at;
  const uint8_t *data = NULL;

  /* Back to the packet that was read last. */
  r->at -= r->h.payload_size + r->h.body_size + PACKET_HEADER;
  r->next_number--;
  if (read_payload (r, err) == -1)
    damaged (r, err);
  else if (!(r->h.flags & (PACKET_ZLIB | PACKET_ZSTD)))
    data = r->wire;
  else if (r->raw)
    data = r->raw;
  else if ((r->raw = malloc (r->h.raw_size ? r->h.raw_size : 1)) == NULL) {
    error_set (err, ENOMEM, "%m");
    damaged (r, err);
  }
  else if (decompress_payload (r->h.flags, r->raw, r->h.raw_size, r->wire,
                               r->h.payload_size, err) == -1)
    damaged (r, err);
  else
    data = r->raw;
  r->next_number++;
  r->at = after;
  return data;
}

void
archive_unload (struct archive_reader *r)
{
  free (take_ptr (&r->wire));
  free (take_ptr (&r->raw));
}

int
archive_verify (struct archive_reader *r, struct error *err)
{
  const struct packet_extent *extents;
  size_t nr;
  int n;

  while ((n = archive_next (r, &extents, &nr, err)) == 1)
    if (archive_load (r, err) == NULL)
      return -1;
  return n;
}

/* ---- opening ---- */

static int
read_head (struct archive_reader *r, struct error *err)
{
  struct uuid id;

  if (read_head_and_body (r, err) == -1)
    return -1;
  id = r->head.id;
  if (archive_head_parse (packet_json (r->packet), r->h.body_size, &r->head,
                          err) == -1)
    return -1;
  r->head.id = id;
  r->at = payload_at (r);
  r->next_number = 1;
  return 0;
}

struct archive_reader *
archive_open_fd (int fd, const char *name, unsigned flags, struct error *err)
{
  struct archive_reader *r = calloc (1, sizeof *r);

  if (r == NULL) {
    error_set (err, ENOMEM, "%s: %m", name);
    close (fd);
    return NULL;
  }
  r->fd = fd;
  r->lazy = flags & ARCHIVE_LAZY;
  r->name = strdup (name);
  r->packet = malloc (PACKET_HEADER + MAX_BODY);
  r->extents = malloc (PACKET_MAX_EXTENTS * sizeof r->extents[0]);
  r->hash = r->lazy ? NULL : XXH3_createState ();
  if (!r->name || !r->packet || !r->extents || (!r->lazy && !r->hash)) {
    error_set (err, ENOMEM, "%s: %m", name);
    goto fail;
  }
  if (r->hash)
    XXH3_128bits_reset (r->hash);
  if (read_head (r, err) == -1) {
    error_prefix (err, "%s", name);
    goto fail;
  }
  return r;

 fail:
  archive_close (r);
  return NULL;
}

int
archive_open_file (const char *path)
{
  return strcmp (path, "-") == 0 ? fcntl (STDIN_FILENO, F_DUPFD_CLOEXEC, 3)
                                 : open (path, O_RDONLY | O_CLOEXEC);
}

struct archive_reader *
archive_open (const char *path, unsigned flags, struct error *err)
{
  bool in = strcmp (path, "-") == 0;
  int fd = archive_open_file (path);
  struct stat st;

  if (fd == -1) {
    error_set (err, errno, "%s: %m", in ? "standard input" : path);
    return NULL;
  }
  if (fstat (fd, &st) == 0 && S_ISDIR (st.st_mode)) {
    close (fd);
    error_set (err, EISDIR, "%s: %m", path);
    return NULL;
  }
  if ((flags & ARCHIVE_LAZY) && lseek (fd, 0, SEEK_CUR) == -1) {
    close (fd);
    error_set (err, ESPIPE, "%s: a pipe can only be read once, and this needs "
               "a file", in ? "standard input" : path);
    return NULL;
  }
  posix_fadvise (fd, 0, 0, POSIX_FADV_SEQUENTIAL); /* advice */
  return archive_open_fd (fd, in ? "standard input" : path, flags, err);
}

void
archive_close (struct archive_reader *r)
{
  if (r == NULL)
    return;
  archive_unload (r);
  archive_head_free (&r->head);
  XXH3_freeState (r->hash);
  free (r->extents);
  free (r->packet);
  free (r->name);
  close (r->fd);
  free (r);
}

const struct archive_head *
archive_get_head (const struct archive_reader *r)
{
  return &r->head;
}

const char *
archive_get_name (const struct archive_reader *r)
{
  return r->name;
}

const struct archive_totals *
archive_get_totals (const struct archive_reader *r)
{
  return &r->totals;
}

int
archive_peek_totals (int fd, const char *name, struct archive_totals *t,
                     struct error *err)
{
  uint8_t buf[ARCHIVE_END_SIZE];
  struct packet_header h;
  struct stat st;

  if (fstat (fd, &st) == -1)
    return error_set (err, errno, "%s: %m", name);
  if (st.st_size < ARCHIVE_END_SIZE ||
      pread (fd, buf, sizeof buf, st.st_size - ARCHIVE_END_SIZE) !=
        ARCHIVE_END_SIZE ||
      packet_parse_header (buf, &h, NULL) == -1 ||
      h.type != PACKET_ARCHIVE_END ||
      h.body_size != ARCHIVE_END_SIZE - PACKET_HEADER ||
      packet_check_body (buf, NULL) == -1 ||
      archive_totals_parse (packet_json (buf), h.body_size, t, NULL) == -1)
    return error_set (err, EBADMSG, "%s: it has no end: it was cut off, or is "
                      "still being written", name);
  if (t->bytes != (uint64_t) st.st_size - ARCHIVE_END_SIZE)
    return error_set (err, EBADMSG, "%s: its end is that of another archive",
                      name);
  return 0;
}
