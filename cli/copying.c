/* nbdferry - long copying: how it goes, and Ctrl-C
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "cleanup.h"
#include "clock.h"
#include "command.h"
#include "copying.h"
#include "output.h"
#include "size.h"

#define STEP_NS    (100 * NS_PER_MS)
#define GIVE_UP_NS (2 * NS_PER_S) /* how long threads may take to stop */
#define BAR_MAX    40

/* ---- Ctrl-C ---- */

/* So long a signal may go unnoticed. */
#define PATIENCE_MS 5000

/* Nobody looks for signals while a server's flush, a connection or a pipe is
 * waited for.  When a signal has not been taken up for long the process ends as
 * with kill -9, which all that it writes is made for.
 */
static void *
watch_thread (void *arg)
{
  struct copying *c = arg;
  struct pollfd p = { .fd = c->signals, .events = POLLIN };

  do {
    while (poll (&p, 1, -1) != 1)
      ;
    poll (NULL, 0, PATIENCE_MS);
  } while (poll (&p, 1, 0) != 1);
  copying_break (c);
  complain ("interrupted; what it waits for does not answer, so it is given "
            "up.  A bitmap is as it was, unless it was just being advanced; "
            "what was overwritten in place is not complete");
  _exit (copying_failed (c, true, "interrupted"));
}

static void
watch_signals (const struct copying *c)
{
  static struct copying mine; /* its thread's, for good */
  pthread_t thread;

  mine = *c;
  mine.drawn = c->mode == PROGRESS_BAR;
  if (pthread_create (&thread, NULL, watch_thread, &mine) == 0)
    pthread_detach (thread);
}

void
copying_init (struct copying *c, bool json, bool to_stderr)
{
  const char *term = getenv ("TERM");
  sigset_t set;

  *c = (struct copying){ .mode = PROGRESS_LINES };
  c->out = to_stderr ? stderr : stdout;
  if (json)
    c->mode = PROGRESS_JSON;
  else if (isatty (fileno (c->out)) && term && strcmp (term, "dumb") != 0)
    c->mode = PROGRESS_BAR;
  signal (SIGPIPE, SIG_IGN);
  signal (SIGXFSZ, SIG_IGN);
  sigemptyset (&set);
  sigaddset (&set, SIGINT);
  sigaddset (&set, SIGTERM);
  pthread_sigmask (SIG_BLOCK, &set, NULL);
  c->signals = signalfd (-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
  if (c->signals == -1) /* then they end us, as they always did */
    pthread_sigmask (SIG_UNBLOCK, &set, NULL);
  else {
    /* A script's background job has SIGINT ignored.  The signalfd has it all
     * the same; so has a FIFO's open, with this (backup/partial.c).
     */
    signal (SIGINT, SIG_DFL);
    signal (SIGTERM, SIG_DFL);
    watch_signals (c);
  }
}

void
copying_begin (struct copying *c, const char *what, uint64_t total)
{
  copying_break (c);
  c->what = what;
  c->total = total;
  c->start_ns = c->rate_ns = now_ns ();
  c->last_ns = 0;
  c->rate_done = 0;
  c->rate = 0;
}

bool
copying_interrupted (struct copying *c)
{
  struct signalfd_siginfo info;

  if (c->signals != -1 && read (c->signals, &info, sizeof info) ==
                            sizeof info)
    c->interrupted = true;
  return c->interrupted;
}

void
copying_break (struct copying *c)
{
  if (!c->drawn)
    return;
  fputc ('\n', c->out);
  fflush (c->out);
  c->drawn = false;
}

/* ---- how it goes ---- */

/* Over about a second, and smoothed. */
static void
count_rate (struct copying *c, uint64_t done, uint64_t now)
{
  double s = (double) (now - c->rate_ns) / NS_PER_S;
  double rate;

  if (s < 0.5)
    return;
  rate = (done - c->rate_done) / s;
  c->rate = c->rate_ns == c->start_ns ? rate : 0.7 * c->rate + 0.3 * rate;
  c->rate_ns = now;
  c->rate_done = done;
}

/* Seconds that are left; -1: nobody knows. */
static int64_t
estimate (const struct copying *c, uint64_t done)
{
  if (c->rate < 1 || c->total < done)
    return -1;
  return (c->total - done) / c->rate;
}

static unsigned
percent (const struct copying *c, uint64_t done)
{
  if (c->total == 0)
    return 0;
  return done >= c->total ? 100 : (double) done / c->total * 100;
}

static void
format_eta (char *text, size_t size, int64_t s)
{
  if (s < 0 || s >= 100 * 3600)
    snprintf (text, size, "-:--");
  else if (s >= 3600)
    snprintf (text, size, "%d:%02d:%02d", (int) (s / 3600),
              (int) (s / 60 % 60), (int) (s % 60));
  else
    snprintf (text, size, "%d:%02d", (int) (s / 60), (int) (s % 60));
}

static void
draw (struct copying *c, uint64_t done)
{
  CLEANUP_FREE char *what = text_printable (c->what);
  char a[SIZE_TEXT], b[SIZE_TEXT], r[SIZE_TEXT], eta[24], tail[128], bar[64];
  struct winsize ws = { 0 };
  size_t width = 79, used, n;

  if (ioctl (fileno (c->out), TIOCGWINSZ, &ws) == 0 && ws.ws_col > 1)
    width = ws.ws_col - 1;
  format_eta (eta, sizeof eta, estimate (c, done));
  snprintf (tail, sizeof tail, " %s/%s %s/s ETA %s", size_compact (done, a),
            size_compact (c->total, b), size_compact (c->rate, r), eta);
  used = text_width (what) + 5 + strlen (tail);
  bar[0] = '\0';
  if (used + 12 <= width) {
    n = width - used - 3 < BAR_MAX ? width - used - 3 : BAR_MAX;
    memset (bar, ' ', n + 3);
    bar[1] = '[';
    memset (bar + 2, '=', n * percent (c, done) / 100);
    bar[n + 2] = ']';
    bar[n + 3] = '\0';
  }
  if (used > width)
    fprintf (c->out, "\r%3u%%\033[K", percent (c, done));
  else
    fprintf (c->out, "\r%s %3u%%%s%s\033[K", what, percent (c, done), bar,
             tail);
  fflush (c->out);
  c->drawn = true;
}

static void
print_line (struct copying *c, uint64_t done)
{
  CLEANUP_FREE char *what = text_printable (c->what);
  char a[SIZE_TEXT], b[SIZE_TEXT], r[SIZE_TEXT];

  fprintf (c->out, "%s: %u%%, %s of %s, %s/s\n", what, percent (c, done),
           size_format (done, a), size_format (c->total, b),
           size_format (c->rate, r));
  fflush (c->out);
}

static void
print_object (struct copying *c, const json_t *json)
{
  json_dumpf (json, c->out, JSON_COMPACT);
  fputc ('\n', c->out);
  fflush (c->out);
}

void
copying_show (struct copying *c, uint64_t done)
{
  uint64_t now = now_ns ();
  json_auto_t *json = NULL;

  if (c->quiet && c->mode != PROGRESS_BAR)
    return;
  count_rate (c, done, now);
  if (now - c->last_ns <
      (c->mode == PROGRESS_BAR ? STEP_NS : NS_PER_S))
    return;
  /* Nothing to tell of what is over at once. */
  if (c->mode != PROGRESS_BAR && c->last_ns == 0) {
    c->last_ns = now;
    return;
  }
  c->last_ns = now;
  switch (c->mode) {
  case PROGRESS_BAR: draw (c, done); break;
  case PROGRESS_LINES: print_line (c, done); break;
  case PROGRESS_JSON:
    json = json_pack ("{s:s, s:s, s:I, s:I, s:I}", "status", "active", "disk",
                      c->what, "done", (json_int_t) done, "total",
                      (json_int_t) c->total, "rate", (json_int_t) c->rate);
    print_object (c, json);
    break;
  }
}

void
copying_result (struct copying *c, json_t *json)
{
  copying_break (c);
  if (c->mode == PROGRESS_JSON)
    print_object (c, json);
  json_decref (json);
}

int
copying_failed (struct copying *c, bool cancelled, const char *why)
{
  copying_result (c, json_pack ("{s:s, s:o}", "status", cancelled
                                ? "cancelled" : "failed", "error",
                                json_shown (why)));
  return cancelled ? STATUS_CANCELLED : STATUS_FAILED;
}

/* ---- until it ends ---- */

bool
copying_wait (struct copying *c, const struct copying_ops *ops, void *opaque)
{
  while (!ops->wait (opaque, STEP_NS)) {
    copying_show (c, ops->done (opaque));
    if (ops->tick)
      ops->tick (opaque);
    if (copying_interrupted (c)) {
      copying_break (c);
      complain ("giving up");
      ops->stop (opaque);
      return ops->wait (opaque, GIVE_UP_NS);
    }
  }
  if (ops->tick)
    ops->tick (opaque);
  if (c->mode == PROGRESS_BAR) {
    c->last_ns = 0;
    copying_show (c, ops->done (opaque));
  }
  return true;
}
