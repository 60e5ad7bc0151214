/* nbdferry - Ctrl-C for who waits with a struct stop
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <signal.h>

#include "interrupt.h"

static struct stop stop = { .fd = -1 };

static void
on_signal (int sig)
{
  int saved = errno;

  (void) sig;
  stop_throw (&stop);
  errno = saved;
}

const struct stop *
interrupt_catch (struct error *err)
{
  struct sigaction sa = { .sa_handler = on_signal,
                          .sa_flags = SA_RESTART | SA_RESETHAND };

  if (stop_init (&stop, err) == -1)
    return NULL;
  sigaction (SIGINT, &sa, NULL);
  sigaction (SIGTERM, &sa, NULL);
  return &stop;
}
