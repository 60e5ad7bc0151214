/* nbdferry - what the tests of the destination share
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A source as the destination sees it: disks with data and bitmaps in memory,
 * and what it sends of them.  To be included once in a test's .c after
 * cmocka.h.
 */
#ifndef FERRY_INCOMING_TEST_H
#define FERRY_INCOMING_TEST_H

#include <jansson.h>

#include "drive-test.h"
#include "incoming-impl.h"
#include "packet-test.h"
#include "wire.h"

struct source_bitmap {
  const char *name;
  struct bitmap *bits;
  bool recording, persistent;
};

struct source_disk {
  const char *name;
  uint64_t size, generation;
  struct uuid lineage;
  uint8_t *data;
  struct source_bitmap bitmaps[8];
  size_t nr;
};

struct source {
  struct uuid session;
  uint64_t epoch;
  struct source_disk disks[2];
  size_t nr;
};

/* The destination: its drives, and what serves them. */
static struct drive *drives[2];
static size_t nr_drives;
static struct incoming *in;

/* ---- the destination ---- */

static inline void
serve (void)
{
  in = incoming_new (drives, nr_drives, &err);
  assert_non_null (in);
}

/* Open "vda", and "vdb" if there are two, and serve them. */
static inline void
start (size_t nr, uint64_t size, bool incoming)
{
  static const char *const names[] = { "vda", "vdb" };

  for (nr_drives = 0; nr_drives < nr; nr_drives++)
    drives[nr_drives] = open_ok (names[nr_drives], size, incoming);
  serve ();
}

/* End; channels must have been closed. */
static inline void
stop (bool clean)
{
  incoming_stop (in);
  incoming_free (in);
  in = NULL;
  while (nr_drives > 0) {
    nr_drives--;
    if (clean)
      close_ok (drives[nr_drives]);
    else
      crash (drives[nr_drives]);
  }
}

static inline struct incoming_channel *
channel (void)
{
  struct incoming_channel *ch = incoming_open (in, drives[0]);

  assert_non_null (ch);
  return ch;
}

/* The status block, to be decref'd. */
static inline json_t *
status_of (struct incoming_channel *ch)
{
  char status[PACKET_STATUS];
  json_t *o;

  memset (status, 0xee, sizeof status);
  incoming_status (ch, status);
  assert_int_equal (status[PACKET_STATUS - 1], 0);
  o = json_loads (status, 0, NULL);
  assert_true (json_is_object (o));
  return o;
}

/* ---- the source ---- */

static inline void
source_init (struct source *s, size_t nr, uint64_t size)
{
  static const char *const names[] = { "vda", "vdb" };

  memset (s, 0, sizeof *s);
  uuid_new (&s->session);
  s->epoch = 1;
  s->nr = nr;
  for (size_t i = 0; i < nr; i++) {
    struct source_disk *d = &s->disks[i];

    d->name = names[i];
    d->size = size;
    d->generation = 5 + i;
    uuid_new (&d->lineage);
    d->data = calloc (1, size);
    assert_non_null (d->data);
    /* Some data: a few bytes in most, but not in all, 64 KiB. */
    for (uint64_t k = 0; k < size; k += 7001)
      if (k >> 16 & 3)
        d->data[k] = 1 + k % 251 + i;
    d->data[size - 1] = 0x99;
  }
}

static inline void
source_free (struct source *s)
{
  for (size_t i = 0; i < s->nr; i++) {
    free (s->disks[i].data);
    for (size_t k = 0; k < s->disks[i].nr; k++)
      bitmap_free (s->disks[i].bitmaps[k].bits);
  }
}

static inline struct source_bitmap *
source_add (struct source *s, size_t disk, const char *name, unsigned shift,
            bool persistent, bool recording)
{
  struct source_disk *d = &s->disks[disk];
  struct source_bitmap *b = &d->bitmaps[d->nr++];

  *b = (struct source_bitmap){ name, bitmap_new (d->size, shift, &err),
                               recording, persistent };
  assert_non_null (b->bits);
  return b;
}

/* Returns 0 or -1 with 'e'.  Asserts nothing, so that any thread may. */
static inline int
send_parcel (const struct source *s, struct incoming_channel *ch,
             struct parcel *p, struct error *e)
{
  size_t room = (1 << 20) + p->h.payload_size + (p->json ? strlen (p->json)
                                                         : 0);
  uint8_t *buf = malloc (room), *exact;
  size_t len;
  int r;

  if (buf == NULL)
    abort ();
  p->h.session = s->session;
  p->h.epoch = s->epoch;
  len = parcel_build (buf, p);
  exact = realloc (buf, len);
  r = incoming_packet (ch, exact, len, e);
  free (exact);
  return r;
}

/* 'body' is given up. */
static inline int
send_json (const struct source *s, struct incoming_channel *ch,
           enum packet_type type, uint32_t disk, json_t *body,
           struct error *e)
{
  char *json = json_dumps (body, JSON_COMPACT);
  struct parcel p = { .h = { .type = type, .disk = disk },
                      .json = json ? json : "" };
  int r = send_parcel (s, ch, &p, e);

  free (json);
  json_decref (body);
  return r;
}

static inline json_t *
list_json (const struct source_disk *d)
{
  json_t *list = json_array ();

  for (size_t i = 0; i < d->nr; i++) {
    const struct source_bitmap *b = &d->bitmaps[i];

    json_array_append_new (
      list, json_pack ("{s:s, s:I, s:b, s:b}", "name", b->name,
                       "granularity",
                       (json_int_t) bitmap_granularity (b->bits),
                       "recording", b->recording, "persistent",
                       b->persistent));
  }
  return list;
}

static inline json_t *
hello_json (const struct source *s, bool lists)
{
  json_t *disks = json_array ();

  for (size_t i = 0; i < s->nr; i++) {
    const struct source_disk *d = &s->disks[i];
    char lineage[UUID_TEXT];

    uuid_format (&d->lineage, lineage);
    json_array_append_new (
      disks, json_pack ("{s:s, s:I, s:s, s:I}", "name", d->name, "size",
                        (json_int_t) d->size, "lineage", lineage,
                        "generation", (json_int_t) d->generation));
    if (lists)
      json_object_set_new (json_array_get (disks, i), "bitmaps",
                           list_json (d));
  }
  return json_pack ("{s:o}", "disks", disks);
}

static inline int
send_hello (const struct source *s, struct incoming_channel *ch,
            struct error *e)
{
  return send_json (s, ch, PACKET_HELLO, 0, hello_json (s, false), e);
}

/* With what LIST says of all disks. */
static inline int
send_hello_lists (const struct source *s, struct incoming_channel *ch,
                  struct error *e)
{
  return send_json (s, ch, PACKET_HELLO, 0, hello_json (s, true), e);
}

static inline int
send_list (const struct source *s, struct incoming_channel *ch, uint32_t disk,
           struct error *e)
{
  return send_json (s, ch, PACKET_LIST, disk,
                    json_pack ("{s:o}", "bitmaps",
                               list_json (&s->disks[disk])), e);
}

static inline json_t *
prepare_json (const struct source *s, uint64_t attempt)
{
  json_t *disks = json_array ();

  for (size_t i = 0; i < s->nr; i++) {
    const struct source_disk *d = &s->disks[i];
    json_t *list = json_array ();
    char lineage[UUID_TEXT];

    uuid_format (&d->lineage, lineage);
    for (size_t k = 0; k < d->nr; k++)
      json_array_append_new (
        list, json_pack ("{s:s, s:I}", "name", d->bitmaps[k].name, "bits",
                         (json_int_t) bitmap_count_bits (
                           d->bitmaps[k].bits)));
    json_array_append_new (
      disks, json_pack ("{s:s, s:s, s:I, s:o}", "name", d->name, "lineage",
                        lineage, "generation", (json_int_t) d->generation,
                        "bitmaps", list));
  }
  return json_pack ("{s:I, s:o}", "attempt", (json_int_t) attempt, "disks",
                    disks);
}

static inline int
send_prepare (const struct source *s, struct incoming_channel *ch,
              uint64_t attempt, struct error *e)
{
  return send_json (s, ch, PACKET_PREPARE, 0, prepare_json (s, attempt), e);
}

/* For the disks [from, to). */
static inline int
send_commit (const struct source *s, struct incoming_channel *ch,
             uint64_t attempt, size_t from, size_t to, struct error *e)
{
  json_t *names = json_array ();

  for (size_t i = from; i < to; i++)
    json_array_append_new (names, json_string (s->disks[i].name));
  return send_json (s, ch, PACKET_COMMIT, 0,
                    json_pack ("{s:I, s:o}", "attempt", (json_int_t) attempt,
                               "disks", names), e);
}

static inline int
send_cancel (const struct source *s, struct incoming_channel *ch,
             struct error *e)
{
  return send_json (s, ch, PACKET_CANCEL, 0, NULL, e);
}

/* Some bytes, and nothing else. */
static inline int
send_data (const struct source *s, struct incoming_channel *ch, uint32_t disk,
           uint64_t offset, const void *data, size_t len, struct error *e)
{
  struct parcel p = { .h = { .type = PACKET_DATA,
                             .disk = disk,
                             .flags = PACKET_HAS_BLOCK,
                             .payload_size = len },
                      .extents = { { offset, len, EXTENT_DATA } },
                      .payload = data };

  return send_parcel (s, ch, &p, e);
}

/* A whole bitmap, in place of what is there. */
static inline int
send_bits (const struct source *s, struct incoming_channel *ch, uint32_t disk,
           const char *name, const struct bitmap *bits, unsigned flags,
           struct error *e)
{
  static uint8_t buf[64 << 10];
  struct bits_writer w;
  struct parcel p = {
    .h = { .type = PACKET_DATA, .disk = disk, .flags = PACKET_HAS_BITMAPS },
    .sections = { { .name = name, .flags = flags,
                    .granularity = bitmap_granularity (bits),
                    .nr_bits = bitmap_bits (bits), .bits = buf } },
  };

  bits_writer_init (&w, buf, sizeof buf, 0);
  if (bits_write (&w, bits, 0, bitmap_size (bits)) != bitmap_size (bits))
    abort ();
  p.sections[0].size = w.len;
  return send_parcel (s, ch, &p, e);
}

/* 64 KiB of a disk, with the bits of its bitmaps there, as a source would. */
static inline int
send_chunk (const struct source *s, struct incoming_channel *ch,
            uint32_t disk, uint64_t at, struct error *e)
{
  static uint8_t bits[8][16 << 10];
  const struct source_disk *d = &s->disks[disk];
  uint64_t end = at + 65536 < d->size ? at + 65536 : d->size;
  struct parcel p = { .h = { .type = PACKET_DATA, .disk = disk },
                      .extents = { { at, end - at, EXTENT_HOLE } } };
  size_t n = 0;

  if (!disk_is_zero (d->data + at, end - at)) {
    p.extents[0].type = EXTENT_DATA;
    p.h.payload_size = end - at;
    p.payload = d->data + at;
  }
  for (size_t i = 0; i < d->nr; i++) {
    const struct source_bitmap *b = &d->bitmaps[i];
    struct bits_writer w;

    bits_writer_init (&w, bits[n], sizeof bits[n],
                      at >> bitmap_shift (b->bits));
    if (bits_write (&w, b->bits, at, end) != end)
      abort ();
    if (w.len > 0) {
      p.sections[n] = (struct packet_section){
        .name = b->name,
        .granularity = bitmap_granularity (b->bits),
        .first_bit = w.first,
        .nr_bits = w.next - w.first,
        .bits = bits[n],
        .size = w.len,
      };
      n++;
    }
  }
  return send_parcel (s, ch, &p, e);
}

#define OK(call)                                                        \
  do {                                                                  \
    if ((call) == -1)                                                   \
      fail_msg ("%s: %s", #call, err.msg);                              \
  } while (0)

/* It is refused, with that error and those words. */
#define REFUSED(call, number, words)                                    \
  do {                                                                  \
    if ((call) != -1)                                                   \
      fail_msg ("%s: was not refused", #call);                          \
    if (err.errnum != (number) || strstr (err.msg, words) == NULL)      \
      fail_msg ("%s: errno %d: %s", #call, err.errnum, err.msg);        \
  } while (0)

/* HELLO, and the lists of bitmaps. */
static inline void
hello_ok (const struct source *s, struct incoming_channel *ch)
{
  OK (send_hello (s, ch, &err));
  for (uint32_t i = 0; i < s->nr; i++)
    OK (send_list (s, ch, i, &err));
}

/* Everything, up to PREPARE. */
static inline void
ship_ok (const struct source *s, struct incoming_channel *ch)
{
  hello_ok (s, ch);
  for (uint32_t i = 0; i < s->nr; i++)
    for (uint64_t at = 0; at < s->disks[i].size; at += 65536)
      OK (send_chunk (s, ch, i, at, &err));
}

/* The drive holds what the source has, and it is an active one. */
static inline void
check_arrived (const struct source *s, size_t disk, struct drive *d)
{
  const struct source_disk *sd = &s->disks[disk];
  uint8_t *data = malloc (d->size);

  assert_non_null (data);
  assert_int_equal (d->mode, DRIVE_ACTIVE);
  assert_int_equal (drive_may_serve (d, &err), 0);
  assert_int_equal (drive_pread (d, data, d->size, 0), 0);
  assert_memory_equal (data, sd->data, sd->size);
  free (data);
  for (size_t i = 0; i < sd->nr; i++) {
    struct named_bitmap *nb = find_ok (d, sd->bitmaps[i].name);

    if (!same_bits (nb->bits, sd->bitmaps[i].bits))
      fail_msg ("the bits of '%s' differ", nb->name);
    assert_int_equal (nb->recording, sd->bitmaps[i].recording);
    assert_int_equal (nb->persistent, sd->bitmaps[i].persistent);
    assert_int_equal (nb->shift, bitmap_shift (sd->bitmaps[i].bits));
    assert_false (nb->incoming);
  }
  assert_int_equal (journal_get (d->journal)->state, JOURNAL_ACTIVE);
  assert_int_equal (journal_get (d->journal)->generation,
                    sd->generation + 1);
  assert_true (uuid_equal (&journal_get (d->journal)->lineage,
                           &sd->lineage));
}

/* ---- a source and a destination for each test ---- */

static struct source src;
static struct incoming_channel *ch;

/* New disks: their state is that of none before. */
static inline void
fresh (size_t nr)
{
  static const char *const names[] = { "vda", "vdb" };

  tap_reset (NULL);
  for (size_t i = 0; i < 2; i++) {
    remove (drive_file (names[i], NULL));
    nftw (drive_file (names[i], ""), remove_one, 16, FTW_DEPTH | FTW_PHYS);
  }
  start (nr, DISK_SIZE, true);
  source_init (&src, nr, DISK_SIZE);
}

static inline int
begin (void **state)
{
  fresh (1);
  ch = channel ();
  return 0;
}

static inline int
end (void **state)
{
  incoming_close (ch);
  stop (true);
  source_free (&src);
  return 0;
}

#endif /* FERRY_INCOMING_TEST_H */
