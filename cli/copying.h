/* nbdferry - long copying: how it goes, and Ctrl-C
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * On a terminal one line that is redrawn in place; elsewhere lines, at most
 * one a second; or, for programs, JSON on lines.
 */
#ifndef FERRY_COPYING_H
#define FERRY_COPYING_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include <jansson.h>

#include "progress.h"

struct copying {
  enum progress_mode mode;
  FILE *out;            /* where it is shown */
  const char *what;     /* is copied: the name of a disk */
  uint64_t total;       /* bytes; 0: unknown */
  uint64_t start_ns;
  uint64_t last_ns;     /* when it was shown last; 0: never */
  uint64_t rate_ns, rate_done; /* where the rate is counted from */
  double rate;          /* bytes a second */
  bool quiet;           /* a bar or nothing */
  bool drawn;
  int signals;          /* a signalfd, or -1 */
  bool interrupted;
};

/* From here on SIGINT and SIGTERM are taken up by copying_wait; before any
 * thread is started.  SIGPIPE and SIGXFSZ are ignored from now on: what they
 * tell is an error as others are.  With 'to_stderr' standard output is left
 * alone.
 */
void copying_init (struct copying *c, bool json, bool to_stderr);

/* Begin with another disk. */
void copying_begin (struct copying *c, const char *what, uint64_t total);

/* Show how much is done, if it is time to. */
void copying_show (struct copying *c, uint64_t done);

/* Has Ctrl-C been pressed? */
bool copying_interrupted (struct copying *c);

/* Leave the line of the bar, before anything else is printed. */
void copying_break (struct copying *c);

/* The last line for programs, where the others went; 'json' is dropped. */
void copying_result (struct copying *c, json_t *json);

/* The same of what has failed, or was cancelled.  Returns the exit status. */
int copying_failed (struct copying *c, bool cancelled, const char *why);

/* Something under way (backup/copy.h, backup/restore.h). */
struct copying_ops {
  bool (*wait) (void *opaque, uint64_t ns);
  uint64_t (*done) (void *opaque);
  void (*stop) (void *opaque);
  void (*tick) (void *opaque); /* ten times a second, and at the end; or NULL */
};

/* Show how it goes until it ends.  false: it was interrupted, and does not
 * end: its threads hang in the file system or the network.
 */
bool copying_wait (struct copying *c, const struct copying_ops *ops,
                   void *opaque);

#endif /* FERRY_COPYING_H */
