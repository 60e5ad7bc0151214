/* nbdferry - the control socket: where one message ends
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A client sends JSON values one after the other, with or without anything
 * between them, over any number of lines.  The framer takes bytes as they
 * come and says when a value is complete.  It splits them, and goes on after
 * garbage, exactly as QEMU's JSON lexer does, with its words.  It does no
 * I/O and has no lock: one framer belongs to one thread.
 *
 * What comes out is plain JSON: QEMU also reads 'single quotes' and \', and
 * integers of any length (which become reals).  The grammar has been checked,
 * but for keys that occur twice, surrogates and UTF-8, which whoever parses
 * the text must look at.
 *
 * Limits: QMP_FRAME_MAX bytes a message without white space, QMP_FRAME_DEPTH
 * levels.  What exceeds them is dropped to the end of its line.  (QEMU would
 * go on in the middle, and answer each token that is left with an error.)
 */
#ifndef FERRY_QMP_FRAME_H
#define FERRY_QMP_FRAME_H

#include <stdbool.h>
#include <stddef.h>

#include "error.h"

#define QMP_FRAME_MAX   (1024 * 1024)
#define QMP_FRAME_DEPTH 1024

enum qmp_frame_event {
  QMP_FRAME_MORE,    /* everything was taken, nothing is complete */
  QMP_FRAME_MESSAGE, /* text and len hold a value, until the next call */
  QMP_FRAME_ERROR,   /* err says what was wrong with it */
};

struct qmp_buf {
  char *ptr; /* NUL-terminated once it holds something */
  size_t len, alloc;
};

struct qmp_frame {
  struct qmp_buf text; /* the message so far, and when it is complete */
  struct error err;

  /* Private. */
  struct qmp_buf token;
  int state;                  /* of the lexer */
  int want;                   /* which token the grammar expects */
  unsigned depth;             /* levels that are open, as long as 'ok' */
  char open[QMP_FRAME_DEPTH]; /* '{' or '[' of each */
  int braces, brackets;       /* opened less closed, whether ok or not */
  bool ok;                    /* no error in this message so far */
  bool done;                  /* the last call completed it */
};

void qmp_frame_init (struct qmp_frame *f);
void qmp_frame_free (struct qmp_frame *f);

/* Take bytes until a value is complete or wrong, and return how many were
 * taken (all of them if the event is QMP_FRAME_MORE).  The caller comes back
 * with the rest.
 */
size_t qmp_frame_feed (struct qmp_frame *f, const char *bytes, size_t len,
                       enum qmp_frame_event *event);

#endif /* FERRY_QMP_FRAME_H */
