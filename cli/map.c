/* nbdferry - a disk's dirty map, as text
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "map.h"
#include "output.h"
#include "size.h"

#define LABEL 6 /* columns: "1023K", and a blank */

const char *const map_level_names[MAP_LEVELS] = {
  "clean", "up to 25 %", "up to 50 %", "more", "all dirty",
};

static uint64_t
number (const json_t *json, const char *key)
{
  json_int_t n = json_integer_value (json_object_get (json, key));

  return n > 0 ? n : 0;
}

int
map_parse (struct dirty_map *m, const json_t *answer, struct error *err)
{
  *m = (struct dirty_map){
    .node = json_string_value (json_object_get (answer, "node")),
    .name = json_string_value (json_object_get (answer, "name")),
    .size = number (answer, "size"),
    .granularity = number (answer, "granularity"),
    .count = number (answer, "count"),
    .recording = json_is_true (json_object_get (answer, "recording")),
    .persistent = json_is_true (json_object_get (answer, "persistent")),
    .busy = json_is_true (json_object_get (answer, "busy")),
    .cell = number (answer, "cell-granules"),
    .cells = json_object_get (answer, "cells"),
  };
  m->nr = json_array_size (m->cells);
  if (m->granularity)
    m->granules = m->size / m->granularity + (m->size % m->granularity != 0);
  if (m->node == NULL || m->name == NULL || m->cell == 0 || m->nr == 0 ||
      m->granules / m->cell + (m->granules % m->cell != 0) != m->nr)
    return error_set (err, EPROTO, "the daemon gave no map of the bitmap");
  return 0;
}

enum map_level
map_level_of (const struct dirty_map *m, uint64_t cell)
{
  json_int_t dirty = json_integer_value (json_array_get (m->cells, cell));
  uint64_t all = cell == m->nr - 1 ? m->granules - cell * m->cell : m->cell;
  double share = (double) dirty / all;

  return dirty <= 0 ? MAP_CLEAN
         : (uint64_t) dirty >= all ? MAP_ALL
         : share > 0.5 ? MAP_MORE
         : share > 0.25 ? MAP_HALF : MAP_QUARTER;
}

double
map_share (const struct dirty_map *m)
{
  return (double) (m->count / m->granularity) / m->granules;
}

char *
map_format_share (const struct dirty_map *m, char text[MAP_SHARE_TEXT])
{
  const double percent = map_share (m) * 100;

  if (m->count == 0 || percent >= 100)
    snprintf (text, MAP_SHARE_TEXT, "%d %%", m->count ? 100 : 0);
  else if (percent < 0.01)
    snprintf (text, MAP_SHARE_TEXT, "< 0.01 %%");
  else
    snprintf (text, MAP_SHARE_TEXT, percent >= 99.95 ? "> 99.9 %%"
              : percent < 1 ? "%.2f %%" : "%.1f %%", percent);
  return text;
}

/* A multiple of 16, so that lines begin at round offsets. */
unsigned
map_text_columns (unsigned width)
{
  return width > LABEL + 2 + 16 ? (width - LABEL - 2) / 16 * 16 : 16;
}

static void
print_head (const struct dirty_map *m, FILE *out)
{
  CLEANUP_FREE char *node = text_printable (m->node);
  CLEANUP_FREE char *name = text_printable (m->name);
  char dirty[SIZE_TEXT], size[SIZE_TEXT], granule[SIZE_TEXT];
  char share[MAP_SHARE_TEXT];

  fprintf (out, "%s on %s: %s of %s dirty (%s), granularity %s%s\n\n", name,
           node, size_format (m->count, dirty), size_format (m->size, size),
           map_format_share (m, share), size_format (m->granularity, granule),
           m->busy ? ", busy" : m->recording ? "" : ", not recording");
}

static void
print_rows (const struct dirty_map *m, const char *const shades[MAP_LEVELS],
            const char *border, unsigned columns, FILE *out)
{
  char text[SIZE_TEXT];

  for (uint64_t i = 0; i < m->nr; i++) {
    if (i % columns == 0)
      fprintf (out, "%*s %s", LABEL - 1,
               i == 0 ? "0" : size_compact (i * m->cell * m->granularity,
                                            text), border);
    fputs (shades[map_level_of (m, i)], out);
    if (i % columns == columns - 1 || i == m->nr - 1)
      fprintf (out, "%s\n", border);
  }
}

void
map_print_text (const struct dirty_map *m, unsigned width, bool ascii,
                FILE *out)
{
  static const char *const ascii_shades[] = { ".", ":", "+", "%", "#" };
  static const char *const shades[] = { "·", "░", "▒", "▓", "█" };
  const char *const *use = ascii ? ascii_shades : shades;
  unsigned columns = map_text_columns (width);
  char text[SIZE_TEXT];

  print_head (m, out);
  print_rows (m, use, ascii ? "|" : "│", columns, out);
  fprintf (out, "\n%*s", LABEL - 3, "");
  for (int i = 0; i < MAP_LEVELS; i++)
    if (m->cell > 1 || i == MAP_CLEAN || i == MAP_ALL)
      fprintf (out, "   %s %s", use[i], map_level_names[i]);
  fprintf (out, "\n%*seach stands for %s\n", LABEL, "",
           size_format (m->cell * m->granularity, text));
}
