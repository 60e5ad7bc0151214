/* nbdferry - fuzz target: the description of a migration, ship-clearing, and
 * the note of a clear
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What can be read can be written, and says the same when it is read again.
 */
#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "clear-note.h"
#include "description.h"
#include "ship-map.h"

int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

static void
must (bool ok)
{
  if (!ok)
    abort ();
}

static void
same (const char *a, const char *b)
{
  must ((a == NULL) == (b == NULL) && (a == NULL || strcmp (a, b) == 0));
}

static void
check (const struct description *a, const struct description *b)
{
  must (uuid_equal (&a->session, &b->session));
  same (a->first, b->first);
  if (a->first)
    return;
  same (a->uri, b->uri);
  must (a->epoch == b->epoch && a->attempt == b->attempt &&
        a->paused == b->paused && a->nr == b->nr && a->nr > 0);
  must (a->params.channels <= MIGRATE_MAX_CHANNELS && /* 0: not chosen */
        a->params.channels == b->params.channels &&
        a->params.max_bandwidth == b->params.max_bandwidth &&
        a->params.downtime_limit == b->params.downtime_limit &&
        a->params.compression == b->params.compression &&
        a->params.overwrite == b->params.overwrite &&
        json_equal (a->params.mapping, b->params.mapping) ==
          (a->params.mapping != NULL));
  for (size_t i = 0; i < a->nr; i++) {
    same (a->disks[i].name, b->disks[i].name);
    same (a->disks[i].target, b->disks[i].target);
    same (a->disks[i].state_dir, b->disks[i].state_dir);
    must (a->disks[i].state_dir[0] == '/');
    must (uuid_equal (&a->disks[i].lineage, &b->disks[i].lineage) &&
          a->disks[i].generation == b->disks[i].generation);
  }
}

/* Whatever it says is put into a bitmap, of two blocks and a bit. */
static void
mend (const uint8_t *data, size_t size)
{
  struct clear_note_record r = { 0 };
  struct bitmap *bm = bitmap_new ((8192 + 1) << 9, 9, NULL);

  must (bm != NULL);
  memcpy (&r, data, size < sizeof r ? size : sizeof r);
  if (clear_note_valid (&r))
    must (strlen (r.name) < sizeof r.name);
  bitmap_restore_block (bm, r.block, r.words);
  bitmap_restore_block (bm, r.block % 3, r.words);
  must (bitmap_is_consistent (bm));
  bitmap_free (bm);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  struct description d, again;
  struct error err = { 0 };
  struct range r;
  char *text;

  mend (data, size);
  if (ship_map_parse (data, size, &r) == 0)
    must (r.start <= r.end);
  if (description_parse ((const char *) data, size, &d, &err) == -1) {
    must (err.errnum != 0 && err.msg[0] != '\0' && d.disks == NULL);
    return 0;
  }
  text = description_format (&d);
  must (text != NULL);
  must (description_parse (text, strlen (text), &again, &err) == 0);
  check (&d, &again);
  description_free (&again);
  description_free (&d);
  free (text);
  return 0;
}
