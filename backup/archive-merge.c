/* nbdferry - a chain of archives as one
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>

#include "archive-merge.h"
#include "cleanup.h"
#include "disk.h"

/* So many packets' data is kept at a time. */
#define LOADED_MAX 16

struct source {
  struct archive_reader *reader;
  uint64_t limit;      /* what lies from here on is of no interest: the disk
                          was smaller at some later point */
  const struct packet_extent *extents; /* of the present packet */
  size_t nr, i;        /* its extents; which one it is at */
  uint64_t data_start; /* where its data lies in the packet's */
  bool ended;
  bool loaded;
  uint64_t last_use;
};

struct archive_merge {
  struct source *sources;
  size_t nr;
  uint64_t size, pos;  /* of the disk; all before pos was given out */
  bool full;
  unsigned nr_loaded;
  uint64_t clock;
};

struct archive_merge *
archive_merge_open (struct archive_reader **readers, size_t nr,
                    struct error *err)
{
  struct archive_merge *m = calloc (1, sizeof *m);
  uint64_t limit = UINT64_MAX;

  if (m)
    m->sources = calloc (nr, sizeof m->sources[0]);
  if (m == NULL || m->sources == NULL) {
    error_set (err, ENOMEM, "%m");
    free (m);
    return NULL;
  }
  m->nr = nr;
  for (size_t i = nr; i-- > 0;) {
    const struct archive_head *h = archive_get_head (readers[i]);

    limit = h->size < limit ? h->size : limit;
    m->sources[i] = (struct source){ .reader = readers[i], .limit = limit };
  }
  m->size = archive_get_head (readers[nr - 1])->size;
  m->full = archive_is_full (archive_get_head (readers[0]));
  return m;
}

void
archive_merge_free (struct archive_merge *m)
{
  if (m == NULL)
    return;
  for (size_t i = 0; i < m->nr; i++)
    archive_unload (m->sources[i].reader);
  free (m->sources);
  free (m);
}

static void
unload (struct archive_merge *m, struct source *s)
{
  if (!s->loaded)
    return;
  archive_unload (s->reader);
  s->loaded = false;
  m->nr_loaded--;
}

static const struct packet_extent *
current (const struct source *s)
{
  return &s->extents[s->i];
}

static uint64_t
extent_end (const struct packet_extent *e)
{
  return e->offset + e->length;
}

/* Have 's' stand at the first extent that reaches beyond m->pos. */
static int
catch_up (struct archive_merge *m, struct source *s, struct error *err)
{
  int r;

  while (!s->ended) {
    if (s->i < s->nr && extent_end (current (s)) > m->pos)
      break;
    if (s->i < s->nr) {
      if (current (s)->type == EXTENT_DATA)
        s->data_start += current (s)->length;
      s->i++;
      continue;
    }
    unload (m, s);
    r = archive_next (s->reader, &s->extents, &s->nr, err);
    if (r == -1)
      return -1;
    s->ended = r == 0;
    s->i = 0;
    s->data_start = 0;
  }
  return 0;
}

/* Where 's' begins to speak, or goes on to: SIZE_MAX if it is silent. */
static uint64_t
begins (const struct archive_merge *m, const struct source *s)
{
  uint64_t at;

  if (s->ended)
    return UINT64_MAX;
  at = current (s)->offset > m->pos ? current (s)->offset : m->pos;
  return at < s->limit ? at : UINT64_MAX;
}

/* The data of that packet; the one unused for longest makes room. */
static const uint8_t *
load (struct archive_merge *m, struct source *s, struct error *err)
{
  const uint8_t *data;

  if (!s->loaded && m->nr_loaded >= LOADED_MAX) {
    struct source *oldest = NULL;

    for (size_t i = 0; i < m->nr; i++)
      if (m->sources[i].loaded &&
          (!oldest || m->sources[i].last_use < oldest->last_use))
        oldest = &m->sources[i];
    if (oldest)
      unload (m, oldest);
  }
  data = archive_load (s->reader, err);
  if (data == NULL)
    return NULL;
  if (!s->loaded)
    m->nr_loaded++;
  s->loaded = true;
  s->last_use = ++m->clock;
  return data;
}

/* Give out [m->pos, end) of the source's present extent. */
static int
give (struct archive_merge *m, struct source *s, uint64_t end,
      struct merge_piece *piece, struct error *err)
{
  const struct packet_extent *e = current (s);

  *piece = (struct merge_piece){ m->pos, end - m->pos, e->type, NULL };
  if (e->type == EXTENT_DATA) {
    const uint8_t *data = load (m, s, err);

    if (data == NULL)
      return -1;
    piece->data = data + s->data_start + (m->pos - e->offset);
  }
  m->pos = end;
  return 1;
}

int
archive_merge_next (struct archive_merge *m, struct merge_piece *piece,
                    struct error *err)
{
  struct source *winner = NULL;
  uint64_t next = UINT64_MAX, end;

  for (size_t i = 0; i < m->nr; i++)
    if (catch_up (m, &m->sources[i], err) == -1)
      return -1;
  /* From the last one down: 'next' is where one that counts more begins. */
  for (size_t i = m->nr; i-- > 0;) {
    uint64_t at = begins (m, &m->sources[i]);

    if (at == m->pos && at < m->size) {
      winner = &m->sources[i];
      break;
    }
    next = at < next ? at : next;
  }
  if (winner) {
    end = extent_end (current (winner));
    end = end < winner->limit ? end : winner->limit;
    return give (m, winner, end < next ? end : next, piece, err);
  }
  /* Nobody says anything here. */
  if (next > m->size)
    next = m->size;
  if (m->pos < next && m->full) {
    *piece = (struct merge_piece){ m->pos, next - m->pos, EXTENT_HOLE, NULL };
    m->pos = next;
    return 1;
  }
  if (m->pos < next) {
    m->pos = next;
    return archive_merge_next (m, piece, err);
  }
  /* The end of the disk; what is left of the archives lies beyond. */
  m->pos = UINT64_MAX;
  for (size_t i = 0; i < m->nr; i++)
    if (catch_up (m, &m->sources[i], err) == -1)
      return -1;
  return 0;
}
