/* nbdferry - how far something long has come
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "meter.h"
#include "size.h"

void
meter_init (struct meter *m)
{
  const char *term = getenv ("TERM");

  *m = (struct meter){ 0 };
  m->on = isatty (STDERR_FILENO) && term && strcmp (term, "dumb") != 0;
}

void
meter_show (struct meter *m, const char *what, uint64_t done, uint64_t total)
{
  char a[SIZE_TEXT], b[SIZE_TEXT], c[SIZE_TEXT];
  uint64_t now, rate;

  if (!m->on)
    return;
  now = now_ns ();
  if (m->start_ns == 0)
    m->start_ns = now;
  if (m->drawn && now - m->last_ns < NS_PER_S / 10 && done < total)
    return;
  m->last_ns = now;
  m->drawn = true;
  rate = now > m->start_ns ? (double) done * NS_PER_S / (now - m->start_ns)
                           : 0;
  fprintf (stderr, "\r%s %3u%%  %s of %s  %s/s\033[K", what,
           total ? (unsigned) ((double) done / total * 100) : 100,
           size_compact (done, a), size_compact (total, b),
           size_compact (rate, c));
  fflush (stderr);
}

void
meter_clear (struct meter *m)
{
  if (!m->drawn)
    return;
  fputs ("\r\033[K", stderr);
  fflush (stderr);
  m->drawn = false;
}
