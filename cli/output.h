/* nbdferry - what the command prints
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Names of disks and bitmaps are UTF-8 that anybody may have chosen, so they
 * are never printed for people as they are: control characters, and those
 * that turn the direction of writing, are shown as \x1b or \u202e.
 */
#ifndef FERRY_OUTPUT_H
#define FERRY_OUTPUT_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

/* Have UTF-8 understood, in whatever locale; once, at the start. */
void output_init (void);

/* Is it valid UTF-8?  (What is not cannot be said in JSON.) */
bool text_is_utf8 (const char *text);

/* A string as JSON: as it is, or printable if it is not UTF-8. */
json_t *json_shown (const char *text);

/* A copy that is safe on a terminal; the caller frees it.  Never NULL for a
 * text that is not (it aborts if there is no memory).
 */
char *text_printable (const char *text);

/* The columns that a printable text takes on a terminal. */
size_t text_width (const char *text);

/* "nbdferry: MESSAGE" and a newline on standard error, made printable. */
void complain (const char *fmt, ...) __attribute__ ((format (printf, 1, 2)));

/* All that was complained of, on lines; "" if nothing was.  The caller frees
 * it.
 */
char *complaints (void);

/* JSON on standard output, indented, or on one line that is flushed. */
void print_json (const json_t *json);
void print_json_line (const json_t *json);

/* Has print_json printed anything? */
bool has_json (void);

/* Has all of standard output been written?  0, or -1 after a complaint. */
int output_finish (void);

/* A table, filled cell by cell, row by row. */
struct table {
  size_t columns;
  char **cells; /* owned; printable */
  size_t nr;
};

void table_add (struct table *t, const char *text);
void table_print (const struct table *t);
void table_clear (struct table *t);

#endif /* FERRY_OUTPUT_H */
