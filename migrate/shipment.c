/* nbdferry - a shipment: choosing chunks
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "shipment-impl.h"

/* Chunks are as small as a page, so that little is sent again for a small
 * write, and as large as it takes for the ship map to stay small.
 */
#define MIN_SHIFT 12
#define MAX_CHUNKS (UINT64_C (1) << 26)

static unsigned
chunk_shift (uint64_t size)
{
  unsigned shift = MIN_SHIFT;

  while (bitmap_bits_for (size, shift) > MAX_CHUNKS)
    shift++;
  return shift;
}

int
shipment_init (struct shipment *s, struct drive *d, uint32_t index,
               const char *uri, const char *name, struct error *err)
{
  unsigned shift = chunk_shift (d->size);

  memset (s, 0, sizeof *s);
  pthread_mutex_init (&s->lock, NULL);
  s->drive = d;
  s->index = index;
  s->granule = UINT64_C (1) << shift;
  pthread_mutex_lock (&d->control);
  s->lineage = journal_get (d->journal)->lineage;
  s->generation = journal_get (d->journal)->generation;
  pthread_mutex_unlock (&d->control);
  s->name = strdup (name);
  s->peer = client_uri_with_export (uri, name, err);
  if (s->name == NULL)
    return error_set (err, ENOMEM, "%m");
  if (s->peer == NULL)
    return -1;
  if (s->granule > ENGINE_PAYLOAD_MAX)
    return error_set (err, EFBIG, "disk '%s' is too large to be migrated",
                      d->name);
  s->ship = bitmap_new (d->size, shift, err);
  s->in_flight = bitmap_new (d->size, shift, err);
  s->acked = bitmap_new (d->size, shift, err);
  s->flushing = bitmap_new (d->size, shift, err);
  return s->ship && s->in_flight && s->acked && s->flushing ? 0 : -1;
}

void
shipment_destroy (struct shipment *s)
{
  bitmap_free (s->ship);
  bitmap_free (s->in_flight);
  bitmap_free (s->acked);
  bitmap_free (s->flushing);
  pthread_mutex_destroy (&s->lock);
  json_decref (s->mapping);
  free (s->told);
  free (s->name);
  free (s->peer);
}

void
shipment_mark_all (struct shipment *s)
{
  bitmap_set_alone (s->ship, 0, s->drive->size);
}

void
shipment_rewind (struct shipment *s)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&s->lock);

  s->cursor = 0;
}

uint64_t
shipment_dirty (const struct shipment *s)
{
  uint64_t n = bitmap_count (s->ship);

  return n < s->drive->size ? n : s->drive->size;
}

uint64_t
shipment_in_flight (const struct shipment *s)
{
  return bitmap_count (s->in_flight);
}

void
shipment_acked (struct shipment *s, const struct buffer *b)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&s->lock);

  for (size_t i = 0; i < b->covers.nr; i++) {
    const struct range *r = &b->covers.v[i];

    bitmap_set_alone (s->acked, r->start, r->end - r->start);
    bitmap_clear_alone (s->in_flight, r->start, r->end - r->start);
  }
}

/* ---- choosing ---- */

uint64_t
shipment_chunk (const struct shipment *s, uint64_t offset)
{
  return offset & ~(s->granule - 1);
}

/* How far a run that begins here may go: as much data as fits, or a hole as
 * long as it is.  Only a guess; the truth is found after the chunks were
 * cleared.  What was data once may be read as data for ever, holes or not, so
 * that is remembered: to ask is expensive (see disk/file.c).  A short run is
 * not worth asking for.
 */
static int
guess_end (struct shipment *s, struct range *run, size_t room,
           struct error *err)
{
  struct disk *disk = s->drive->disk;
  struct extent ext;

  if (run->end - run->start > SHORT_RUN &&
      (run->start < s->data.start || run->start >= s->data.end)) {
    if (disk->ops->extent (disk, run->start, s->drive->size, &ext) == -1)
      return error_set (err, errno, "%s: what is allocated at %" PRIu64
                        " cannot be found out: %m", s->drive->path,
                        run->start);
    if (ext.type == EXTENT_DATA)
      s->data = (struct range){ ext.start, ext.end };
    else if (shipment_chunk (s, ext.end) > run->start) {
      if (ext.end < run->end)
        run->end = shipment_chunk (s, ext.end);
      return 0;
    }
  }
  if (run->end - run->start > room)
    run->end = run->start + shipment_chunk (s, room);
  return 0;
}

int
shipment_take (struct shipment *s, uint64_t *cursor, uint64_t limit,
               size_t room, uint64_t longest, struct range *run,
               struct range *data, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&s->lock);

  while (bitmap_next_dirty (s->ship, *cursor, limit, run)) {
    struct range busy;

    /* What is in flight is not sent again before it is acknowledged: it
     * stays dirty, for the next round.
     */
    if (bitmap_next_dirty (s->in_flight, run->start, run->end, &busy)) {
      if (busy.start == run->start) {
        *cursor = busy.end;
        continue;
      }
      run->end = busy.start;
    }
    if (run->end - run->start > longest)
      run->end = run->start + longest;
    if (guess_end (s, run, room, err) == -1)
      return -1;
    bitmap_clear (s->ship, run->start, run->end - run->start);
    bitmap_set_alone (s->in_flight, run->start, run->end - run->start);
    *cursor = run->end;
    *data = s->data;
    return 1;
  }
  *cursor = limit;
  return 0;
}

void
shipment_put_back (struct shipment *s, uint64_t start, uint64_t end)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&s->lock);

  bitmap_set (s->ship, start, end - start);
  bitmap_clear_alone (s->in_flight, start, end - start);
}
