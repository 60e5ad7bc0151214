/* nbdferry - errors with a message
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A function that can fail for a reason that a person must understand takes
 * a struct error that its caller owns (usually on the stack).  It is written
 * once, where the error happens, with what, where and why; it is reported
 * once, where it is consumed.  On success it is left untouched.
 */
#ifndef FERRY_ERROR_H
#define FERRY_ERROR_H

#include <stdarg.h>

/* Long enough for a path or a bitmap's name beside the words; longer
 * messages are cut, never overrun.
 */
#define ERROR_MAX 2048

struct error {
  int errnum;          /* errno that fits best; never 0 once set */
  char msg[ERROR_MAX]; /* UTF-8, no newline at the end */
};

/* Set 'err' (which may be NULL) and return -1, so that a function can end
 * with "return error_set (...)".  %m prints strerror (errnum), not errno.
 */
int error_set (struct error *err, int errnum, const char *fmt, ...)
  __attribute__ ((format (printf, 3, 4)));

/* Put "what: " before the message that 'err' already has; returns -1. */
int error_prefix (struct error *err, const char *fmt, ...)
  __attribute__ ((format (printf, 2, 3)));

#endif /* FERRY_ERROR_H */
