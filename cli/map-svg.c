/* nbdferry - a disk's dirty map, as an SVG image
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * One path for each level, which draws a square for each cell of that level.
 */
#include <config.h>

#include <inttypes.h>
#include <stdlib.h>
#include <time.h>

#include "cleanup.h"
#include "map.h"
#include "output.h"
#include "size.h"

#define COLUMNS 64
#define PITCH   13 /* pixels from one cell to the next */
#define SQUARE  11
#define LEFT    84
#define TOP     118
#define RIGHT   28
#define WIDTH   (LEFT + COLUMNS * PITCH + RIGHT)

static const char *const colours[MAP_LEVELS] = {
  "#e6eaf0", "#f9d9a8", "#f2a65a", "#dd6b33", "#a52a1a",
};

/* Text as XML wants it. */
static void
put_text (const char *text, FILE *out)
{
  CLEANUP_FREE char *safe = text_printable (text);

  for (const char *p = safe; *p; p++)
    switch (*p) {
    case '&': fputs ("&amp;", out); break;
    case '<': fputs ("&lt;", out); break;
    case '>': fputs ("&gt;", out); break;
    case '"': fputs ("&quot;", out); break;
    default: putc (*p, out);
    }
}

static unsigned
rows_of (const struct dirty_map *m)
{
  return (m->nr + COLUMNS - 1) / COLUMNS;
}

static void
put_title (const struct dirty_map *m, FILE *out)
{
  fputs ("Dirty map of ", out);
  put_text (m->node, out);
  fputs (", bitmap ", out);
  put_text (m->name, out);
}

static void
put_head (const struct dirty_map *m, FILE *out)
{
  char a[SIZE_TEXT], b[SIZE_TEXT], c[SIZE_TEXT], share[MAP_SHARE_TEXT];
  const char *state = m->busy ? "busy" : m->recording ? "recording"
                                                      : "not recording";
  char when[32] = "";
  time_t now = time (NULL);
  struct tm tm;

  if (gmtime_r (&now, &tm))
    strftime (when, sizeof when, "%Y-%m-%d %H:%M UTC", &tm);
  fprintf (out, "<text class=\"h\" x=\"%d\" y=\"40\">", LEFT);
  put_title (m, out);
  map_format_share (m, share);
  fprintf (out, "</text>\n<text x=\"%d\" y=\"64\">%s of %s dirty (%s%s)  "
           "\xc2\xb7  granularity %s  \xc2\xb7  %s%s  \xc2\xb7  %s</text>\n", LEFT,
           size_format (m->count, a), size_format (m->size, b),
           share[0] == '<' ? "&lt;" : share[0] == '>' ? "&gt;" : "",
           share + (share[0] == '<' || share[0] == '>'),
           size_format (m->granularity, c), state,
           m->persistent ? ", persistent" : "", when);
}

/* The share as a bar over the width of the cells. */
static void
put_bar (const struct dirty_map *m, FILE *out)
{
  const double width = COLUMNS * PITCH - (PITCH - SQUARE);
  double dirty = map_share (m) * width;

  if (dirty > 0 && dirty < 1)
    dirty = 1;
  fprintf (out, "<rect x=\"%d\" y=\"80\" width=\"%.0f\" height=\"6\" rx=\"3\" "
           "fill=\"%s\"/>\n", LEFT, width, colours[MAP_CLEAN]);
  if (dirty > 0)
    fprintf (out, "<rect x=\"%d\" y=\"80\" width=\"%.1f\" height=\"6\" "
             "rx=\"%.1f\" fill=\"%s\"/>\n", LEFT, dirty,
             dirty < 6 ? dirty / 2 : 3, colours[MAP_ALL]);
}

static void
put_cells (const struct dirty_map *m, enum map_level level, FILE *out)
{
  bool any = false;

  for (uint64_t i = 0; i < m->nr; i++) {
    if (map_level_of (m, i) != level)
      continue;
    if (!any)
      fprintf (out, "<path fill=\"%s\" d=\"", colours[level]);
    any = true;
    fprintf (out, "M%u %uh%dv%dh-%dz", (unsigned) (LEFT + i % COLUMNS * PITCH),
             (unsigned) (TOP + i / COLUMNS * PITCH), SQUARE, SQUARE, SQUARE);
  }
  if (any)
    fputs ("\"/>\n", out);
}

/* Where lines begin: each of them, or every so many. */
static void
put_offsets (const struct dirty_map *m, FILE *out)
{
  const unsigned step = rows_of (m) > 16 ? 4 : rows_of (m) > 8 ? 2 : 1;
  char text[SIZE_TEXT];

  for (unsigned row = 0; row < rows_of (m); row += step) {
    uint64_t at = (uint64_t) row * COLUMNS * m->cell * m->granularity;

    fprintf (out, "<text class=\"s\" text-anchor=\"end\" x=\"%d\" y=\"%u\">%s"
             "</text>\n", LEFT - 10, TOP + row * PITCH + 10,
             row ? size_format (at, text) : "0");
  }
}

static void
put_legend (const struct dirty_map *m, unsigned y, FILE *out)
{
  char cell[SIZE_TEXT], line[SIZE_TEXT];
  unsigned x = LEFT;

  for (int i = 0; i < MAP_LEVELS; i++) {
    if (m->cell == 1 && i != MAP_CLEAN && i != MAP_ALL)
      continue;
    fprintf (out, "<path fill=\"%s\" d=\"M%u %uh%dv%dh-%dz\"/>\n"
             "<text class=\"s\" x=\"%u\" y=\"%u\">%s</text>\n", colours[i], x,
             y - 10, SQUARE, SQUARE, SQUARE, x + 17, y, map_level_names[i]);
    x += 100;
  }
  fprintf (out, "<text class=\"s\" text-anchor=\"end\" x=\"%d\" y=\"%u\">"
           "a square is %s, a line %s</text>\n",
           LEFT + COLUMNS * PITCH - (PITCH - SQUARE), y,
           size_format (m->cell * m->granularity, cell),
           size_format (COLUMNS * m->cell * m->granularity, line));
}

void
map_print_svg (const struct dirty_map *m, FILE *out)
{
  const unsigned legend = TOP + rows_of (m) * PITCH + 32;
  const unsigned height = legend + 28;

  fprintf (out, "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"
           "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" "
           "height=\"%u\" viewBox=\"0 0 %d %u\" role=\"img\">\n<title>",
           WIDTH, height, WIDTH, height);
  put_title (m, out);
  fprintf (out, "</title>\n<style>text { font: 14px system-ui, \"DejaVu Sans\","
           " sans-serif; fill: #475569 } .h { font-size: 20px; font-weight: "
           "600; fill: #0f172a } .s { font-size: 12px }</style>\n"
           "<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n");
  put_head (m, out);
  put_bar (m, out);
  for (int i = 0; i < MAP_LEVELS; i++)
    put_cells (m, i, out);
  put_offsets (m, out);
  put_legend (m, legend, out);
  fputs ("</svg>\n", out);
}
