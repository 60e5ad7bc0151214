/* nbdferry - what there is to copy out of a backup, pack by pack
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "copy-walk.h"

#define STATUS_BYTES (UINT64_C (1) << 30) /* asked about at a time */

void
copy_walk_destroy (struct copy_walk *w)
{
  client_close (w->client);
  free (w->found);
}

static void
found_one (void *opaque, const struct extent *ext)
{
  struct copy_walk *w = opaque;
  uint64_t at = w->nr_found ? w->found[w->nr_found - 1].end : w->asked;

  /* What is not taken now, and all behind it, is asked for again. */
  if (ext->start != at)
    return;
  if (w->nr_found == w->max_found) {
    size_t max = w->max_found ? w->max_found * 2 : 1024;
    struct extent *more = realloc (w->found, max * sizeof more[0]);

    if (more == NULL)
      return;
    w->found = more;
    w->max_found = max;
  }
  w->found[w->nr_found++] = *ext;
}

static int
ask_failed (struct copy_walk *w, struct error *err)
{
  return error_set (err, errno, "ask for the extents at %" PRIu64 ": %m",
                    w->asked);
}

/* Send the next question; nobody waits for the answer yet. */
static int
ask (struct copy_walk *w, struct error *err)
{
  uint64_t end = w->size;

  if (end - w->asked > STATUS_BYTES)
    end = w->asked + STATUS_BYTES;
  if (client_extents_ask (w->client, &w->question, w->asked, end, found_one,
                          w) == -1)
    return ask_failed (w, err);
  w->is_asked = true;
  return 0;
}

static int
get_answer (struct copy_walk *w, struct error *err)
{
  uint64_t next;

  if (!w->is_asked && ask (w, err) == -1)
    return -1;
  w->is_asked = false;
  w->nr_found = w->at_found = 0;
  if (client_extents_answer (w->client, &w->question, &next) == -1)
    return ask_failed (w, err);
  if (w->nr_found == 0)
    return error_set (err, ENOMEM, "%m");
  w->asked = w->found[w->nr_found - 1].end;
  return w->asked < w->size ? ask (w, err) : 0;
}

int
copy_walk_take (struct copy_walk *w, struct pack *p, struct error *err)
{
  pack_clear (p);
  for (;;) {
    struct extent *e;
    uint64_t room, n;

    if (w->at_found == w->nr_found) {
      if (w->asked == w->size)
        return 0;
      if (get_answer (w, err) == -1)
        return -1;
      continue;
    }
    e = &w->found[w->at_found];
    n = e->end - e->start;
    if (e->type != EXTENT_HOLE || w->full) {
      room = pack_room (p, e->type);
      if (room == 0)
        return 0;
      n = n < room ? n : room;
      pack_add (p, e->start, n, e->type);
    }
    e->start += n;
    if (e->start == e->end)
      w->at_found++;
  }
}

uint64_t
copy_walk_untaken (const struct copy_walk *w)
{
  return w->at_found < w->nr_found ? w->found[w->at_found].start : w->asked;
}
