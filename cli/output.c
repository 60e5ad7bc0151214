/* nbdferry - what the command prints
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <langinfo.h>
#include <locale.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <wchar.h>
#include <wctype.h>

#include "cleanup.h"
#include "output.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *said;        /* all complaints, under lock */
static bool json_printed; /* of the main thread */

/* What is opened later must not become standard output or error.  To write or
 * read them fails, as it does without.
 */
static void
reserve_descriptors (void)
{
  static const int flags[] = { O_WRONLY, O_RDONLY, O_RDONLY };

  for (int fd = 0; fd < 3; fd++)
    if (fcntl (fd, F_GETFD) == -1 && errno == EBADF)
      open ("/dev/null", flags[fd]); /* takes the lowest one */
}

void
output_init (void)
{
  reserve_descriptors ();
  /* Nothing but the characters: numbers must keep their dots for JSON.
   * Without C.UTF-8, what is not ASCII is shown as \xNN, which is safe.
   */
  setlocale (LC_CTYPE, "");
  if (strcmp (nl_langinfo (CODESET), "UTF-8") != 0)
    setlocale (LC_CTYPE, "C.UTF-8");
}

bool
text_is_utf8 (const char *text)
{
  json_t *json = json_string (text); /* refuses anything else */

  json_decref (json);
  return json != NULL;
}

static void *
must (void *p)
{
  if (p == NULL) {
    fputs ("nbdferry: out of memory\n", stderr);
    abort ();
  }
  return p;
}

static bool
is_harmless (wchar_t c)
{
  bool turns = (c >= 0x202a && c <= 0x202e) || (c >= 0x2066 && c <= 0x2069);

  return iswprint (c) && wcwidth (c) >= 0 && !turns;
}

char *
text_printable (const char *text)
{
  size_t left = strlen (text), n;
  char *copy = must (malloc (4 * left + 1)), *out = copy;
  mbstate_t state = { 0 };
  wchar_t c;

  while (left > 0) {
    n = mbrtowc (&c, text, left, &state);
    if (n == (size_t) -1 || n == (size_t) -2) {
      state = (mbstate_t) { 0 };
      n = 1;
      out += sprintf (out, "\\x%02x", (unsigned char) *text);
    }
    else if (is_harmless (c))
      out = mempcpy (out, text, n);
    else
      /* At least two bytes of UTF-8 become four, three six, four ten. */
      out += sprintf (out, c < 0x100 ? "\\x%02x" :
                           c < 0x10000 ? "\\u%04x" : "\\U%08x", (unsigned) c);
    text += n;
    left -= n;
  }
  *out = '\0';
  return copy;
}

json_t *
json_shown (const char *text)
{
  json_t *json = json_string (text);

  if (json == NULL) {
    CLEANUP_FREE char *safe = text_printable (text);

    json = json_string (safe);
  }
  return json;
}

size_t
text_width (const char *text)
{
  CLEANUP_FREE wchar_t *wide = must (calloc (strlen (text) + 1, sizeof *wide));
  size_t n = mbstowcs (wide, text, strlen (text));
  int width = n == (size_t) -1 ? -1 : wcswidth (wide, n);

  return width < 0 ? strlen (text) : (size_t) width;
}

static void
remember (const char *text)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  CLEANUP_FREE char *before = said;

  if (asprintf (&said, "%s%s%s", before ? before : "", before ? "\n" : "",
                text) == -1)
    said = NULL;
}

void
complain (const char *fmt, ...)
{
  CLEANUP_FREE char *msg = NULL, *safe = NULL;
  va_list args;
  int n;

  va_start (args, fmt);
  n = vasprintf (&msg, fmt, args);
  va_end (args);
  if (n == -1)
    msg = NULL;
  safe = text_printable (must (msg));
  fflush (stdout); /* so that the two stay in order */
  fprintf (stderr, "nbdferry: %s\n", safe);
  remember (safe);
}

char *
complaints (void)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  return must (strdup (said ? said : ""));
}

bool
has_json (void)
{
  return json_printed;
}

void
print_json (const json_t *json)
{
  json_printed = true;
  json_dumpf (json, stdout, JSON_INDENT (2));
  putchar ('\n');
}

void
print_json_line (const json_t *json)
{
  json_dumpf (json, stdout, JSON_COMPACT);
  putchar ('\n');
  fflush (stdout);
}

int
output_finish (void)
{
  if (fflush (stdout) == 0 && !ferror (stdout))
    return 0;
  complain ("cannot write to standard output: %s", strerror (errno));
  return -1;
}

void
table_add (struct table *t, const char *text)
{
  t->cells = must (realloc (t->cells, (t->nr + 1) * sizeof *t->cells));
  t->cells[t->nr++] = text_printable (text);
}

/* printf counts bytes, terminals count columns: so pad by hand. */
static void
print_cell (const char *text, size_t width)
{
  fputs (text, stdout);
  printf ("%*s", (int) (width - text_width (text)), "");
}

void
table_print (const struct table *t)
{
  CLEANUP_FREE size_t *widths = must (calloc (t->columns, sizeof *widths));
  size_t i, column, width;

  for (i = 0; i < t->nr; i++) {
    width = text_width (t->cells[i]);
    if (width > widths[i % t->columns])
      widths[i % t->columns] = width;
  }
  for (i = 0; i < t->nr; i++) {
    column = i % t->columns;
    if (column == t->columns - 1)
      printf ("%s\n", t->cells[i]);
    else
      print_cell (t->cells[i], widths[column] + 2);
  }
}

void
table_clear (struct table *t)
{
  while (t->nr > 0)
    free (t->cells[--t->nr]);
  free (t->cells);
  t->cells = NULL;
}
