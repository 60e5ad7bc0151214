/* nbdferry - nbdferry bitmap map
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <langinfo.h>
#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"
#include "cmd-bitmap.h"
#include "keep-out.h"
#include "map.h"
#include "output.h"
#include "size.h"

#define TEXT_ROWS  16
#define SVG_CELLS  2048
#define JSON_CELLS 1024
#define MAX_WIDTH  4096

enum { OPT_NODE = 256, OPT_SVG, OPT_WIDTH, OPT_ASCII, OPT_JSON };

struct map_values {
  const char *node, *svg; /* or NULL */
  uint64_t width;         /* columns; 0: the terminal's */
  bool ascii, json;
};

static int
map_option (const struct command *cmd, int c, const char *arg, void *values)
{
  struct map_values *v = values;

  switch (c) {
  case OPT_NODE: v->node = arg; break;
  case OPT_SVG: v->svg = arg; break;
  case OPT_ASCII: v->ascii = true; break;
  case OPT_JSON: v->json = true; break;
  case OPT_WIDTH:
    if (number_parse (arg, &v->width) == -1 || v->width < 24 ||
        v->width > MAX_WIDTH)
      return usage_error (cmd, "--width: '%s' is not a number from 24 to %d",
                          arg, MAX_WIDTH);
    break;
  }
  return -1;
}

static unsigned
terminal_width (void)
{
  struct winsize ws;

  if (ioctl (STDOUT_FILENO, TIOCGWINSZ, &ws) == 0 && ws.ws_col > 0)
    return ws.ws_col < MAX_WIDTH ? ws.ws_col : MAX_WIDTH;
  return 80;
}

/* output_init takes UTF-8 whatever the locale is; here it is asked what the
 * terminal can show.
 */
static bool
locale_is_utf8 (void)
{
  locale_t l = newlocale (LC_CTYPE_MASK, "", NULL);
  bool is = l && strcmp (nl_langinfo_l (CODESET, l), "UTF-8") == 0;

  if (l)
    freelocale (l);
  return is;
}

/* 0, or -1 after a complaint. */
static int
write_svg (const struct dirty_map *m, const char *path)
{
  CLEANUP_CLOSE int used = -1;
  struct error err;
  struct stat st;
  bool exists;
  FILE *f;
  int r;

  if (strcmp (path, "-") == 0) {
    map_print_svg (m, stdout);
    return output_finish ();
  }
  exists = stat (path, &st) == 0;
  if (exists && S_ISBLK (st.st_mode)) {
    complain ("%s is a block device", path);
    return -1;
  }
  if (exists && S_ISREG (st.st_mode) &&
      (used = keep_out_of_use (path, &err)) == -1) {
    complain ("%s", err.msg);
    return -1;
  }
  f = fopen (path, "we");
  if (f) {
    map_print_svg (m, f);
    r = ferror (f);
    if (fclose (f) == 0 && r == 0)
      return 0;
  }
  complain ("cannot write %s: %s", path, strerror (errno));
  return -1;
}

static int
show (const json_t *answer, const struct map_values *v, unsigned width,
      struct error *err)
{
  struct dirty_map m;

  if (map_parse (&m, answer, err) == -1) {
    complain ("%s", err->msg);
    return -1;
  }
  if (v->json) {
    json_object_set_new ((json_t *) answer, "share",
                         json_real (map_share (&m)));
    print_json (answer);
  }
  else if (v->svg)
    return write_svg (&m, v->svg);
  else
    map_print_text (&m, width, v->ascii || !locale_is_utf8 (), stdout);
  return output_finish ();
}

int
bitmap_map_run (const struct command *cmd, char **args, void *values)
{
  const struct map_values *v = values;
  unsigned width = v->width ? v->width : terminal_width ();
  json_int_t cells = v->json ? JSON_CELLS : v->svg ? SVG_CELLS
                     : map_text_columns (width) * TEXT_ROWS;
  struct error err = { 0 };
  struct control *c = control_open (args[0], &err);
  json_t *json, *answer = NULL;
  int status = STATUS_FAILED;

  (void) cmd;
  if (c) {
    json = json_pack ("{s:s, s:I}", "name", args[1], "cells", cells);
    json = bitmap_on_disk (c, json, v->node, &err);
    if (json)
      answer = control_command (c, "x-ferry-bitmap-map", json, &err);
  }
  if (answer == NULL)
    complain ("%s", err.msg);
  else if (show (answer, v, width, &err) == 0)
    status = STATUS_DONE;
  json_decref (answer);
  control_close (c);
  return status;
}

static const struct option map_options[] = {
  { "help", no_argument, NULL, 'h' },
  { "node", required_argument, NULL, OPT_NODE },
  { "svg", required_argument, NULL, OPT_SVG },
  { "width", required_argument, NULL, OPT_WIDTH },
  { "ascii", no_argument, NULL, OPT_ASCII },
  { "json", no_argument, NULL, OPT_JSON },
  { 0 },
};

const struct command bitmap_map_command = {
  .name = "map",
  .full_name = "nbdferry bitmap map",
  .synopsis = "CONTROL NAME [OPTION]...",
  .summary = "Draw where a disk is dirty.",
  .help =
    "Options:\n"
    "  --svg FILE         draw an SVG image (-: to standard output)\n"
    "  --width COLUMNS    of the drawing in the terminal (default: all)\n"
    "  --ascii            draw with ASCII characters\n"
    "  --node NODE        the disk; needed if the daemon has several\n"
    "  --json             print the numbers as JSON\n"
    "  -h, --help         print this help\n",
  .min_args = 2,
  .max_args = 2,
  .run = bitmap_map_run,
  .options = map_options,
  .option = map_option,
  .values_size = sizeof (struct map_values),
  .json_result = true,
};
