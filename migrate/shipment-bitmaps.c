/* nbdferry - a shipment: bitmaps that change without a write
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * All this happens between rounds, when no packet is in flight, so that a
 * section which replaces bits cannot meet one that sets them.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "mapping.h"
#include "shipment.h"
#include "wire.h"

uint8_t *
make_control (struct packet_header *h, enum packet_type type, json_t *body,
              struct error *err)
{
  uint8_t *packet;
  size_t len = json_dumpb (body, NULL, 0, JSON_COMPACT);

  if (len > PACKET_MAX - PACKET_HEADER) {
    error_set (err, EFBIG, "too many bitmaps for a migration");
    return NULL;
  }
  packet = malloc (PACKET_HEADER + len);
  if (packet == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  json_dumpb (body, (char *) packet + PACKET_HEADER, len, JSON_COMPACT);
  h->type = type;
  h->flags = h->nr_extents = h->nr_sections = 0;
  h->payload_size = h->raw_size = 0;
  h->body_size = len;
  return packet;
}

int
send_control (struct client *c, struct packet_header *h,
              enum packet_type type, json_t *body, struct error *err)
{
  CLEANUP_FREE uint8_t *packet = make_control (h, type, body, err);

  if (packet == NULL)
    return -1;
  return send_packet (c, packet, h, packet + PACKET_HEADER + h->body_size,
                      err);
}

/* ---- the list ---- */

/* 'alias' is its name there. */
static json_t *
describe (const struct named_bitmap *nb, const char *alias, bool persistent)
{
  json_t *o = json_pack ("{s:s, s:I, s:b, s:b}", "name", alias, "granularity",
                         (json_int_t) bitmap_granularity (nb->bits),
                         "recording", nb->recording, "persistent",
                         persistent);
  char id[UUID_TEXT];

  if (!uuid_is_zero (&nb->point.id)) {
    uuid_format (&nb->point.id, id);
    json_object_set_new (o, "point", json_string (id));
    json_object_set_new (o, "point-time", json_integer (nb->point.time));
  }
  return o;
}

int
shipment_list (struct shipment *s, struct shipment_list *l, struct error *err)
{
  struct drive *d = s->drive;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  l->nr = 0;
  l->version = d->list_version;
  l->json = json_array ();
  l->told = calloc (d->nr_bitmaps + 1, sizeof l->told[0]);
  for (size_t i = 0; l->told && i < d->nr_bitmaps; i++) {
    struct named_bitmap *nb = d->bitmaps[i];
    bool persistent = nb->persistent;
    const char *alias = mapping_bitmap (s->mapping, d->name, nb->name,
                                        &persistent);

    if (nb->bits == NULL || alias == NULL)
      continue; /* inconsistent, or it stays behind: nothing to bring */
    l->told[l->nr++] = (struct shipment_bitmap){
      .id = nb->id, .alias = s->mapping ? alias : NULL,
    };
    json_array_append_new (l->json, describe (nb, alias, persistent));
  }
  return l->json && l->told ? 0 : error_set (err, ENOMEM, "%m");
}

void
shipment_list_free (struct shipment_list *l)
{
  json_decref (l->json);
  free (l->told);
  *l = (struct shipment_list){ 0 };
}

/* A bitmap that the destination has kept is known as before.  At first all
 * begin empty there, and their bits come with the chunks: the version of now
 * is as good as sent.  Later ones must be sent whole; so must all when a
 * connection was lost, since nobody knows what of them has arrived.
 */
static void
carry_over (struct shipment *s, struct shipment_bitmap *told, size_t nr)
{
  for (size_t i = 0; i < nr; i++) {
    told[i].version = UINT64_MAX; /* none */
    for (size_t k = 0; k < s->nr_told; k++)
      if (s->told[k].id == told[i].id)
        told[i].version = s->told[k].version;
  }
}

static void
take_versions (struct shipment *s)
{
  struct drive *d = s->drive;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  for (size_t i = 0; i < s->nr_told; i++)
    for (size_t k = 0; k < d->nr_bitmaps; k++)
      if (d->bitmaps[k]->id == s->told[i].id)
        s->told[i].version = atomic_load (&d->bitmaps[k]->version);
}

void
shipment_listed (struct shipment *s, struct shipment_list *l)
{
  carry_over (s, l->told, l->nr);
  free (s->told);
  s->told = take_ptr (&l->told);
  s->nr_told = l->nr;
  s->list_version = l->version;
  if (!s->listed && !s->resumed)
    take_versions (s);
  s->listed = true;
}

static int
send_list (struct shipment *s, struct client *control,
           struct packet_header *h, struct error *err)
{
  struct shipment_list l = { 0 };
  json_auto_t *body = NULL;
  int r = shipment_list (s, &l, err);

  if (r == 0) {
    body = json_pack ("{s:O}", "bitmaps", l.json);
    h->disk = s->index;
    r = send_control (control, h, PACKET_LIST, body, err);
  }
  if (r == 0)
    shipment_listed (s, &l);
  shipment_list_free (&l);
  return r;
}

/* ---- whole bitmaps ---- */

/* One packet with a piece of a bitmap that replaces what is there.  *from is
 * moved on; 'found' says whether the bitmap still exists.
 */
static size_t
replace_piece (struct drive *d, const struct shipment_bitmap *told,
               uint64_t *from, uint8_t *packet, size_t room, bool *found)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);
  struct named_bitmap *nb = NULL;
  struct packet_section sec = { .flags = SECTION_REPLACE };
  struct bits_writer w;
  uint8_t *bits;
  uint64_t done, last;

  for (size_t i = 0; i < d->nr_bitmaps; i++)
    if (d->bitmaps[i]->id == told->id)
      nb = d->bitmaps[i];
  *found = nb != NULL;
  if (nb == NULL)
    return 0;
  sec.name = told->alias ?: nb->name;
  sec.name_len = strlen (sec.name);
  sec.granularity = bitmap_granularity (nb->bits);
  sec.first_bit = *from >> nb->shift;
  bits = packet_begin_section (packet, &sec);
  bits_writer_init (&w, bits,
                    room - packet_section_overhead (sec.name_len),
                    sec.first_bit);
  done = bits_write (&w, nb->bits, *from, d->size);
  last = done == d->size ? bitmap_bits (nb->bits) : done >> nb->shift;
  *from = done;
  return packet_end_section (packet, bits, last - sec.first_bit, w.len) -
         packet;
}

static int
replace_bitmap (struct shipment *s, const struct shipment_bitmap *told,
                struct engine *e, struct error *err)
{
  uint64_t from = 0;

  do {
    struct buffer *b = engine_get (e);
    bool found;
    size_t n;

    if (b == NULL) {
      engine_failed (e, err);
      return -1;
    }
    b->cargo = s;
    n = replace_piece (s->drive, told, &from, b->mem,
                       b->head - PACKET_HEADER, &found);
    if (!found) { /* removed; the next list says so */
      engine_return (e, b);
      return 0;
    }
    memmove (b->payload - n, b->mem, n);
    b->h.flags = PACKET_HAS_BITMAPS;
    b->h.disk = s->index;
    b->h.nr_sections = 1;
    b->h.body_size = b->section_bytes = n;
    engine_put (e, b);
  } while (from < s->drive->size);
  return 0;
}

/* The version that a bitmap has now, or what was sent if it is gone. */
static uint64_t
version_now (struct drive *d, const struct shipment_bitmap *told)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  for (size_t i = 0; i < d->nr_bitmaps; i++)
    if (d->bitmaps[i]->id == told->id)
      return atomic_load (&d->bitmaps[i]->version);
  return told->version;
}

static bool
list_changed (struct shipment *s)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&s->drive->list);

  return !s->listed || s->list_version != s->drive->list_version;
}

bool
shipment_bitmaps_pending (struct shipment *s)
{
  if (list_changed (s))
    return true;
  for (size_t i = 0; i < s->nr_told; i++)
    if (version_now (s->drive, &s->told[i]) != s->told[i].version)
      return true;
  return false;
}

int
shipment_sync_bitmaps (struct shipment *s, struct client *control,
                       struct engine *e, struct packet_header *h,
                       struct error *err)
{
  if (list_changed (s) && send_list (s, control, h, err) == -1)
    return -1;
  for (size_t i = 0; e && i < s->nr_told; i++) {
    /* Read before the bits: a change that comes between is sent again. */
    uint64_t version = version_now (s->drive, &s->told[i]);

    if (version == s->told[i].version)
      continue;
    if (replace_bitmap (s, &s->told[i], e, err) == -1)
      return -1;
    s->told[i].version = version;
  }
  return 0;
}

void
shipment_send_whole (struct shipment *s)
{
  for (size_t i = 0; i < s->nr_told; i++)
    s->told[i].version = UINT64_MAX; /* none */
}

json_t *
shipment_counts (struct shipment *s)
{
  struct drive *d = s->drive;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);
  json_t *list = json_array ();

  for (size_t i = 0; i < d->nr_bitmaps; i++) {
    const struct named_bitmap *nb = d->bitmaps[i];
    bool persistent;
    const char *alias = mapping_bitmap (s->mapping, d->name, nb->name,
                                        &persistent);

    if (nb->bits && alias)
      json_array_append_new (
        list, json_pack ("{s:s, s:I}", "name", alias, "bits",
                         (json_int_t) bitmap_count_bits (nb->bits)));
  }
  return list;
}
