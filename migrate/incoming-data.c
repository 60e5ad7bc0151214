/* nbdferry - the destination: what a data packet does
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A packet is checked as a whole before anything of it is done.  What it does
 * can be done again: extents are written, bits are set (or, in a section that
 * replaces, a range of bits is made what it says).
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "compress.h"
#include "incoming-impl.h"
#include "wire.h"

/* The bitmap that a section speaks of.  d->list is held. */
static struct named_bitmap *
section_bitmap (struct drive *d, const struct packet_section *s,
                struct error *err)
{
  struct named_bitmap *nb = incoming_find_bitmap (d, s->name, s->name_len);

  if (nb && nb->bits) {
    if (bitmap_granularity (nb->bits) == s->granularity)
      return nb;
    error_set (err, EBADMSG, "bits of granularity %" PRIu64 " for bitmap "
               "'%s', which has %" PRIu64, s->granularity, nb->name,
               bitmap_granularity (nb->bits));
    return NULL;
  }
  error_set (err, EBADMSG, "bits for bitmap '%.*s', which was not announced",
             (int) s->name_len, s->name);
  return NULL;
}

/* Check all sections, or apply them.  d->list is held, so that no bitmap can
 * go away; it takes as long as the bits of one packet need.
 */
static int
sections (struct drive *d, const uint8_t *buf, const struct packet_header *h,
          bool apply, struct error *err)
{
  struct packet_section s;
  uint32_t seen = 0;
  size_t pos = 0;
  int r;

  while ((r = packet_next_section (buf, h, &pos, &seen, &s, err)) == 1) {
    struct named_bitmap *nb = section_bitmap (d, &s, err);

    if (nb == NULL)
      return -1;
    if (!apply) {
      if (bits_check (s.bits, s.size, s.first_bit, s.nr_bits,
                      bitmap_bits (nb->bits), err) == -1)
        return error_prefix (err, "bitmap '%s'", nb->name);
      continue;
    }
    if (s.flags & SECTION_REPLACE)
      bitmap_clear (nb->bits, s.first_bit << nb->shift,
                    s.nr_bits << nb->shift);
    /* A bitmap of that granularity has as many bits as when it was checked. */
    bits_apply_checked (nb->bits, s.bits, s.size, s.first_bit, s.nr_bits);
  }
  return r;
}

/* Where there is a hole already nothing is to be done: a sparse destination
 * stays sparse, and a hole of any size costs nothing.
 */
static int
make_zero (struct drive *d, const struct packet_extent *e)
{
  struct disk *disk = d->disk;
  uint64_t from = e->offset, end = e->offset + e->length;

  if (disk->ops->next_data &&
      disk->ops->next_data (disk, e->offset, end, &from) == -1)
    return -1;
  if (from == end)
    return 0;
  return disk->ops->zero (disk, end - from, from, DISK_MAY_TRIM);
}

static int
write_extents (struct drive *d, const uint8_t *buf,
               const struct packet_header *h, const uint8_t *payload,
               struct error *err)
{
  struct disk *disk = d->disk;

  for (uint32_t i = 0; i < h->nr_extents; i++) {
    struct packet_extent e;
    int r;

    packet_get_extent (buf, i, &e);
    if (e.type == EXTENT_DATA) {
      r = disk->ops->pwrite (disk, payload, e.length, e.offset, 0);
      payload += e.length;
    }
    else
      r = make_zero (d, &e);
    if (r == -1)
      return error_set (err, errno, "write %s at %" PRIu64 ": %m", d->path,
                        e.offset);
  }
  return 0;
}

int
incoming_takes_data (const struct drive *d, struct error *err)
{
  if (d->mode == DRIVE_INCOMING)
    return 0;
  return error_set (err, EPROTO, "disk '%s' is %s; it takes no data", d->name,
                    drive_mode_name (d->mode));
}

int
incoming_data (struct session *s, const uint8_t *buf,
               const struct packet_header *h, struct error *err)
{
  CLEANUP_FREE uint8_t *raw = NULL;
  const uint8_t *payload = packet_payload (buf, h);
  struct drive *d;
  int r;

  if (h->disk >= s->nr)
    return error_set (err, EBADMSG, "packet for disk %" PRIu32 " of %zu",
                      h->disk, s->nr);
  d = s->drives[h->disk];
  if (packet_check_extents (buf, h, d->size, err) == -1)
    return -1;
  if (h->flags & (PACKET_ZLIB | PACKET_ZSTD)) {
    raw = malloc (h->raw_size); /* at most PACKET_MAX */
    if (raw == NULL)
      return error_set (err, ENOMEM, "%m");
    if (decompress_payload (h->flags, raw, h->raw_size, payload,
                            h->payload_size, err) == -1)
      return -1;
    payload = raw;
  }
  pthread_mutex_lock (&d->list);
  r = incoming_takes_data (d, err);
  if (r == 0)
    r = sections (d, buf, h, false, err);
  pthread_mutex_unlock (&d->list);
  if (r == -1 || incoming_begin (s, err) == -1)
    return -1;
  trust_write_begins (d->trust, h->channel);
  r = write_extents (d, buf, h, payload, err);
  trust_write_ended (d->trust, h->channel);
  if (r == -1)
    return -1;
  pthread_mutex_lock (&d->list);
  r = sections (d, buf, h, true, err);
  pthread_mutex_unlock (&d->list);
  return r;
}
