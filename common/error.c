/* nbdferry - errors with a message
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "error.h"

int
error_set (struct error *err, int errnum, const char *fmt, ...)
{
  va_list args;

  if (err == NULL) {
    errno = errnum;
    return -1;
  }
  if (errnum == 0)
    errnum = EIO;
  err->errnum = errnum;
  errno = errnum; /* for %m */
  va_start (args, fmt);
  vsnprintf (err->msg, sizeof err->msg, fmt, args);
  va_end (args);
  errno = errnum;
  return -1;
}

int
error_prefix (struct error *err, const char *fmt, ...)
{
  char old[ERROR_MAX];
  va_list args;
  int n;

  if (err == NULL)
    return -1;
  memcpy (old, err->msg, sizeof old);
  va_start (args, fmt);
  n = vsnprintf (err->msg, sizeof err->msg, fmt, args);
  va_end (args);
  if (n >= 0 && (size_t) n < sizeof err->msg)
    snprintf (err->msg + n, sizeof err->msg - n, ": %s", old);
  return -1;
}
