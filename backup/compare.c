/* nbdferry - where two disks differ
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Some threads, each with its own connections, take one piece after the other
 * until there is none left or one of them has failed.  The first error wins.
 */
#include <config.h>

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "compare.h"
#include "crew.h"

/* A piece: enough to make requests rare, little enough that threads share
 * the work and progress moves.
 */
#define PIECE_MAX  (UINT64_C (64) << 20)
#define PIECES     64

struct comparison {
  /* Read-only while threads run. */
  const struct side *a, *b;
  struct bitmap *differs;
  const struct compare_options *opt;
  uint64_t total;     /* bytes that both have */
  uint64_t nr, piece; /* blocks: all, and of a piece */

  struct crew crew;
  atomic_uint_fast64_t next; /* the first block that nobody has taken */
  atomic_uint_fast64_t done; /* blocks */
};

static int
compare_piece (struct comparison *c, struct side_reader r[2], uint8_t *ha,
               uint8_t *hb, uint64_t first, uint64_t nr, struct error *err)
{
  const uint64_t block = c->a->block;

  if (side_read_hashes (&r[0], first, nr, ha, err) == -1 ||
      side_read_hashes (&r[1], first, nr, hb, err) == -1)
    return -1;
  if (memcmp (ha, hb, nr * HASH_SIZE) == 0)
    return 0;
  for (uint64_t i = 0; i < nr; i++)
    if (memcmp (ha + i * HASH_SIZE, hb + i * HASH_SIZE, HASH_SIZE) != 0)
      bitmap_set (c->differs, (first + i) * block, 1);
  return 0;
}

static int
work_with (struct comparison *c, struct side_reader r[2], struct error *err)
{
  CLEANUP_FREE uint8_t *hashes = malloc (2 * c->piece * HASH_SIZE);

  if (hashes == NULL)
    return error_set (err, ENOMEM, "%m");
  if (side_reader_open (&r[0], c->a, err) == -1 ||
      side_reader_open (&r[1], c->b, err) == -1)
    return -1;
  while (!atomic_load (&c->crew.over)) {
    uint64_t first = atomic_fetch_add (&c->next, c->piece);
    uint64_t nr = c->nr > first ? c->nr - first : 0;

    if (nr == 0)
      break;
    if (nr > c->piece)
      nr = c->piece;
    if (c->opt->stop && stop_wait (c->opt->stop, 0))
      return error_set (err, ECANCELED, "given up");
    if (compare_piece (c, r, hashes, hashes + c->piece * HASH_SIZE, first, nr,
                       err) == -1)
      return -1;
    atomic_fetch_add (&c->done, nr);
  }
  return 0;
}

static int
work (void *opaque, struct error *err)
{
  struct side_reader r[2] = { 0 };
  int ret = work_with (opaque, r, err);

  side_reader_close (&r[0]);
  side_reader_close (&r[1]);
  return ret;
}

static void
tick (void *opaque)
{
  struct comparison *c = opaque;
  uint64_t done = atomic_load (&c->done) * c->a->block;

  if (c->opt->progress)
    c->opt->progress (c->opt->opaque, done < c->total ? done : c->total,
                      c->total);
}

/* An archive is read in order, so by one thread. */
int
compare_sides (struct side *a, struct side *b, struct bitmap *differs,
               const struct compare_options *opt, struct error *err)
{
  struct comparison c = { .a = a, .b = b, .differs = differs, .opt = opt };

  c.crew = (struct crew){ .threads = a->archive || b->archive ? 1
                                                              : opt->threads,
                          .work = work, .tick = tick,
                          .opaque = &c };
  c.total = a->size < b->size ? a->size : b->size;
  side_clip (a, c.total);
  side_clip (b, c.total);
  c.nr = hash_blocks (c.total, a->block);
  c.piece = c.nr / PIECES + 1;
  if (c.piece > PIECE_MAX / a->block)
    c.piece = PIECE_MAX / a->block;
  if (c.piece > SIDE_AT_ONCE)
    c.piece = SIDE_AT_ONCE;
  return crew_run (&c.crew, err);
}
