/* nbdferry - how a migration goes, shown
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * On a terminal one line that is redrawn in place; elsewhere lines, at most
 * one a second and one for each change of status; or, for programs, each
 * answer of the daemon as JSON on a line.
 */
#ifndef FERRY_PROGRESS_H
#define FERRY_PROGRESS_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

enum progress_mode { PROGRESS_BAR, PROGRESS_LINES, PROGRESS_JSON };

struct progress {
  enum progress_mode mode;
  bool drawn;            /* a bar stands on the line of the cursor */
  uint64_t last_line_ns; /* when a line was printed last, or 0 */
  char last_status[32];
};

void progress_init (struct progress *p, bool json);

/* Show an answer of the daemon; the last one too. */
void progress_show (struct progress *p, const json_t *info);

/* What there is to say once it has completed. */
void progress_summary (struct progress *p, const json_t *info);

/* Leave the line of the bar, before anything else is printed. */
void progress_break (struct progress *p);

#endif /* FERRY_PROGRESS_H */
