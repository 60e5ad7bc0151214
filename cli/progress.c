/* nbdferry - how a migration goes, shown
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "clock.h"
#include "migration-info.h"
#include "output.h"
#include "progress.h"
#include "size.h"

#define BAR_MIN 12 /* columns, with a blank and the brackets */
#define BAR_MAX 43
#define LINE_MAX_COLUMNS 256

/* The line on a terminal, in the order in which it stands there.  Where not
 * all fits, those of higher number are left out.
 */
enum { PERCENT, BAR, DONE, RATE, ROUND, LEFT, DIRTY, ETA, NR_PIECES };
static const unsigned char by_importance[NR_PIECES] = {
  PERCENT, DONE, RATE, BAR, ETA, LEFT, ROUND, DIRTY,
};

struct pieces {
  char text[NR_PIECES][48]; /* that of BAR is drawn last */
  bool shown[NR_PIECES];
};

void
progress_init (struct progress *p, bool json)
{
  const char *term = getenv ("TERM");

  *p = (struct progress) { .mode = PROGRESS_LINES };
  if (json)
    p->mode = PROGRESS_JSON;
  else if (isatty (STDOUT_FILENO) && term && strcmp (term, "dumb") != 0)
    p->mode = PROGRESS_BAR;
}

/* The columns that a line may have: the last one of the terminal stays free,
 * for some terminals wrap as soon as it is filled.
 */
static size_t
columns (void)
{
  struct winsize ws;
  size_t n = 80;

  if (ioctl (STDOUT_FILENO, TIOCGWINSZ, &ws) == 0 && ws.ws_col > 0)
    n = ws.ws_col;
  n--;
  return n < LINE_MAX_COLUMNS ? n : LINE_MAX_COLUMNS;
}

/* What stands at the end: how long it will take, or the status if that says
 * more.
 */
static void
format_eta (const struct migration *m, char *text, size_t size)
{
  int64_t s = migration_estimate (m);

  if (strcmp (m->status, "active") != 0)
    snprintf (text, size, " %.20s", m->status);
  else if (s < 0 || s >= 100 * 3600)
    snprintf (text, size, " ETA -:--");
  else if (s >= 3600)
    snprintf (text, size, " ETA %d:%02d:%02d", (int) (s / 3600),
              (int) (s / 60 % 60), (int) (s % 60));
  else
    snprintf (text, size, " ETA %d:%02d", (int) (s / 60), (int) (s % 60));
}

static double
fraction_done (const struct migration *m)
{
  /* It is not done before it says so, and a setup has not begun. */
  if (m->total == 0 || m->remaining >= m->total)
    return 0;
  return (double) (m->total - m->remaining) / m->total;
}

static void
fill_pieces (const struct migration *m, struct pieces *pieces)
{
  char a[SIZE_TEXT], b[SIZE_TEXT];
  uint64_t done = m->total > m->remaining ? m->total - m->remaining : 0;
  const size_t size = sizeof pieces->text[0];

  snprintf (pieces->text[PERCENT], size, "%3u%%",
            (unsigned) (fraction_done (m) * 100));
  snprintf (pieces->text[BAR], size, "%*s", BAR_MIN, "");
  snprintf (pieces->text[DONE], size, " %s/%s", size_compact (done, a),
            size_compact (m->total, b));
  snprintf (pieces->text[RATE], size, " %s/s", size_compact (m->rate, a));
  snprintf (pieces->text[ROUND], size, " round %" PRIu64, m->rounds);
  snprintf (pieces->text[LEFT], size, " left %s",
            size_compact (m->remaining, a));
  snprintf (pieces->text[DIRTY], size, " dirty %s/s",
            size_compact (m->dirty_rate, a));
  format_eta (m, pieces->text[ETA], size);
}

/* " [=====>     ]" in 'width' columns. */
static void
draw_bar (char *text, size_t width, double fraction)
{
  size_t inner = width - 3, done = inner * fraction;

  memcpy (text, " [", 2);
  memset (text + 2, ' ', inner);
  memset (text + 2, '=', done);
  if (done < inner)
    text[2 + done] = '>';
  memcpy (text + 2 + inner, "]", 2);
}

/* The line for that many columns; returns its length. */
static size_t
format_bar_line (const struct migration *m, size_t width,
                 char line[LINE_MAX_COLUMNS + 1])
{
  struct pieces pieces = { 0 };
  size_t used = 0, i, n;
  unsigned piece;

  fill_pieces (m, &pieces);
  for (i = 0; i < NR_PIECES; i++) {
    piece = by_importance[i];
    n = strlen (pieces.text[piece]);
    if (used + n > width)
      break;
    pieces.shown[piece] = true;
    used += n;
  }
  n = BAR_MIN + width - used;
  if (pieces.shown[BAR])
    draw_bar (pieces.text[BAR], n < BAR_MAX ? n : BAR_MAX, fraction_done (m));
  line[0] = '\0';
  for (i = 0, n = 0; i < NR_PIECES; i++)
    if (pieces.shown[i])
      n = stpcpy (line + n, pieces.text[i]) - line;
  return n;
}

static void
draw (struct progress *p, const struct migration *m)
{
  char line[LINE_MAX_COLUMNS + 1];

  format_bar_line (m, columns (), line);
  printf ("\r%s\033[K", line); /* and clear what a longer one has left */
  fflush (stdout);
  p->drawn = true;
}

static void
print_line (struct progress *p, const struct migration *m)
{
  uint64_t now = now_ns ();
  char line[512];

  if (strcmp (p->last_status, m->status) == 0 &&
      now - p->last_line_ns < NS_PER_S)
    return;
  snprintf (p->last_status, sizeof p->last_status, "%s", m->status);
  p->last_line_ns = now;
  migration_describe (m, line, sizeof line);
  puts (line);
  fflush (stdout);
}

void
progress_show (struct progress *p, const json_t *info)
{
  struct migration m;

  migration_parse (info, &m);
  switch (p->mode) {
  case PROGRESS_JSON: print_json_line (info); break;
  case PROGRESS_BAR: draw (p, &m); break;
  case PROGRESS_LINES: print_line (p, &m); break;
  }
}

void
progress_break (struct progress *p)
{
  if (!p->drawn)
    return;
  putchar ('\n');
  fflush (stdout);
  p->drawn = false;
}

/* What file systems said is free. */
static void
summarise_hints (const json_t *info)
{
  const json_t *list =
    json_object_get (json_object_get (info, "x-ferry"), "hints"), *h;
  char a[SIZE_TEXT], b[SIZE_TEXT];
  size_t i;

  json_array_foreach (list, i, h) {
    const char *node = json_string_value (json_object_get (h, "node"));
    const char *type = json_string_value (json_object_get (h, "type"));
    const char *reason = json_string_value (json_object_get (h, "reason"));
    json_int_t at = json_integer_value (json_object_get (h, "offset"));
    json_int_t n = json_integer_value (json_object_get (h, "cleared-bytes"));

    printf ("  hints     %s at %s, %s: ", node ? node : "?",
            size_format (at, a), type ? type : "unknown");
    if (reason)
      printf ("refused, %s\n", reason);
    else
      printf ("%s of it free, not sent\n", size_format (n, b));
  }
}

void
progress_summary (struct progress *p, const json_t *info)
{
  char a[SIZE_TEXT], b[SIZE_TEXT];
  struct migration m;

  if (p->mode == PROGRESS_JSON)
    return;
  progress_break (p);
  migration_parse (info, &m);
  printf ("completed in %" PRIu64 ".%03" PRIu64 " s\n", m.total_ms / 1000,
          m.total_ms % 1000);
  printf ("  sent      %s (%s of it bitmaps)\n",
          size_format (m.transferred, a), size_format (m.bitmap_bytes, b));
  printf ("  zeros     %s skipped\n", size_format (m.zeros, a));
  summarise_hints (info);
  printf ("  downtime  %" PRIu64 " ms\n", m.downtime_ms);
  printf ("  rounds    %" PRIu64 "\n", m.rounds);
  fflush (stdout);
}
