/* nbdferry - messages of threads that have nobody to tell
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <stdarg.h>
#include <stdio.h>

#include "error.h"
#include "log.h"

static void
to_stderr (const char *msg)
{
  fprintf (stderr, "nbdferry: %s\n", msg);
}

static void (*log_sink) (const char *msg) = to_stderr;

void
log_set (void (*sink) (const char *msg))
{
  log_sink = sink;
}

void
log_message (const char *fmt, ...)
{
  char msg[ERROR_MAX + 256];
  va_list args;

  va_start (args, fmt);
  vsnprintf (msg, sizeof msg, fmt, args);
  va_end (args);
  log_sink (msg);
}
