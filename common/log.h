/* nbdferry - messages of threads that have nobody to tell
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * An error is returned to whoever asked.  A thread that goes on trying in the
 * background has nobody; it says here what is wrong, once for each change.
 */
#ifndef FERRY_LOG_H
#define FERRY_LOG_H

/* Where messages go (default: standard error).  Before any thread starts. */
void log_set (void (*sink) (const char *msg));

void log_message (const char *fmt, ...)
  __attribute__ ((format (printf, 1, 2)));

#endif /* FERRY_LOG_H */
