/* nbdferry - begin a migration and stay with it until it ends
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * One loop waits for the control socket and for signals, and never for one
 * of them alone: so Ctrl-C works however slow the daemon is.  There is at
 * most one query-migrate under way; events only bring the next one forward.
 *
 * Ctrl-C:
 *
 *   NOT_ASKED --signal--> ASKED --migrate was accepted--> SENT
 *                                                          |
 *      ended <-- waits for the status, CANCEL_S -- AGREED <-+-> REFUSED
 *                                                               |
 *                                 goes on as if nothing was <---+
 *
 * migrate-cancel is held back until the daemon has accepted `migrate`: if it
 * refuses because another migration is running, that one is not ours to
 * cancel.  A second signal leaves at once, from any state.
 */
#include <config.h>

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "clock.h"
#include "command.h"
#include "follow.h"
#include "migration-info.h"
#include "output.h"

#define QUERY_NS (200 * NS_PER_MS)    /* between queries */
#define QUERY_MIN_NS (20 * NS_PER_MS) /* the same, however many events come */
#define CANCEL_S 30                   /* a cancel takes no longer */

enum cancel { NOT_ASKED, ASKED, SENT, AGREED, REFUSED };

struct follow {
  struct control *c;
  struct progress *progress;
  int signals;         /* a signalfd */
  unsigned migrate_id, query_id, cancel_id;
  bool accepted;       /* the daemon has begun */
  bool querying;       /* a reply to query_id is to come */
  uint64_t last_query; /* when it was sent */
  uint64_t next_query;
  enum cancel cancel;
  uint64_t cancel_deadline;
  char paused[ERROR_MAX]; /* the reason that was told last, or "" */
  bool *other;         /* see follow_migration */
  int status;          /* the exit status, or -1: go on */
};

/* The error is reported here, once, and is the end. */
static void
fail (struct follow *f, const struct error *err, const char *what)
{
  progress_break (f->progress);
  complain ("%s%s", what, err->msg);
  f->status = STATUS_FAILED;
}

static void
refused (struct follow *f, const struct error *err)
{
  json_t *last;

  fail (f, err, "the migration was refused: ");
  if (f->progress->mode == PROGRESS_JSON) {
    /* The last line always says how it ended. */
    last = json_pack ("{s:s, s:s}", "status", "failed",
                      "error-desc", err->msg);
    progress_show (f->progress, last);
    json_decref (last);
  }
}

static void
ended (struct follow *f, const json_t *info, const struct migration *m)
{
  progress_break (f->progress);
  if (strcmp (m->status, "completed") == 0) {
    progress_summary (f->progress, info);
    if (f->cancel != NOT_ASKED)
      complain ("it was too late to cancel: the disk has moved");
    f->status = STATUS_DONE;
  }
  else if (strcmp (m->status, "cancelled") == 0) {
    complain ("the migration was cancelled; the source is as it was");
    f->status = f->cancel == NOT_ASKED ? STATUS_FAILED : STATUS_CANCELLED;
  }
  else {
    complain ("the migration failed: %s",
              m->error ? m->error : "the daemon gave no reason");
    f->status = STATUS_FAILED;
  }
}

/* A pause is told once for each reason. */
static void
tell_pause (struct follow *f, const json_t *info, const struct migration *m)
{
  const json_t *x = json_object_get (info, "x-ferry");

  if (strcmp (m->status, "active") == 0 && f->paused[0]) {
    f->paused[0] = '\0';
    progress_break (f->progress);
    complain ("the migration goes on");
  }
  if (strcmp (m->status, "postcopy-paused") != 0 || m->error == NULL ||
      strncmp (f->paused, m->error, sizeof f->paused - 1) == 0)
    return;
  snprintf (f->paused, sizeof f->paused, "%s", m->error);
  progress_break (f->progress);
  complain ("paused: %s%s", f->paused,
            json_is_true (json_object_get (x, "waits")) ? ""
                                                        : "; trying again");
}

static bool
is_for_others (const struct follow *f, const json_t *info)
{
  const json_t *x = json_object_get (info, "x-ferry");

  return f->other && f->cancel == NOT_ASKED &&
         json_is_true (json_object_get (x, "other-server"));
}

static void
query_reply (struct follow *f, const json_t *msg)
{
  struct error err;
  json_t *info = control_result (msg, &err);
  struct migration m;

  f->querying = false;
  if (info == NULL) {
    fail (f, &err, "query-migrate: ");
    return;
  }
  migration_parse (info, &m);
  if (m.status[0] == '\0' || strcmp (m.status, "none") == 0) {
    error_set (&err, EPROTO, "the daemon knows of no migration any more");
    fail (f, &err, "");
    return;
  }
  if (is_for_others (f, info)) {
    *f->other = true;
    f->status = STATUS_FAILED;
    return;
  }
  tell_pause (f, info, &m);
  progress_show (f->progress, info);
  if (migration_ended (&m))
    ended (f, info, &m);
}

static void
cancel_reply (struct follow *f, const json_t *msg)
{
  struct error err;

  if (control_result (msg, &err)) {
    f->cancel = AGREED;
    return;
  }
  f->cancel = REFUSED;
  progress_break (f->progress);
  complain ("it cannot be cancelled any more (%s); waiting for its end",
            err.msg);
}

/* After an event: at once if that was the end, and else not too often. */
static void
query_soon (struct follow *f, const json_t *msg)
{
  const char *status = json_string_value (
    json_object_get (json_object_get (msg, "data"), "status"));
  bool ended = status && (strcmp (status, "completed") == 0 ||
                          strcmp (status, "failed") == 0 ||
                          strcmp (status, "cancelled") == 0);

  f->next_query = ended ? 0 : f->last_query + QUERY_MIN_NS;
}

static void
handle_message (struct follow *f, const json_t *msg)
{
  const char *event = json_string_value (json_object_get (msg, "event"));
  struct error err;

  if (event && strcmp (event, "MIGRATION") == 0)
    query_soon (f, msg);
  else if (event)
    return;
  else if (!f->accepted && control_is_reply (msg, f->migrate_id)) {
    if (control_result (msg, &err))
      f->accepted = true;
    else
      refused (f, &err);
  }
  else if (f->querying && control_is_reply (msg, f->query_id))
    query_reply (f, msg);
  else if (f->cancel == SENT && control_is_reply (msg, f->cancel_id))
    cancel_reply (f, msg);
}

static void
handle_signal (struct follow *f)
{
  struct signalfd_siginfo info;

  if (read (f->signals, &info, sizeof info) != sizeof info)
    return;
  progress_break (f->progress);
  if (f->cancel == NOT_ASKED) {
    f->cancel = ASKED;
    f->cancel_deadline = now_ns () + CANCEL_S * NS_PER_S;
    complain ("cancelling; once more leaves at once");
    return;
  }
  if (f->cancel == REFUSED)
    complain ("leaving; the migration goes on without us");
  else if (f->cancel == ASKED)
    complain ("leaving; the daemon has not answered yet and may go on");
  else
    complain ("leaving; the daemon has been asked to cancel");
  f->status = STATUS_CANCELLED;
}

/* Send what is due; -1 if the connection is lost. */
static int
send_due (struct follow *f, struct error *err)
{
  uint64_t now = now_ns ();

  if (!f->accepted)
    return 0;
  if (f->cancel == ASKED) {
    if (control_send (f->c, "migrate-cancel", json_object (), &f->cancel_id,
                      err) == -1)
      return -1;
    f->cancel = SENT;
  }
  if (!f->querying && now >= f->next_query) {
    if (control_send (f->c, "query-migrate", json_object (), &f->query_id,
                      err) == -1)
      return -1;
    f->querying = true;
    f->last_query = now;
    f->next_query = now + QUERY_NS;
  }
  return 0;
}

/* Handle all messages that are here; -1 if the connection is lost. */
static int
receive (struct follow *f, struct error *err)
{
  json_t *msg;
  int r = 0;

  while (f->status == -1 && (r = control_receive (f->c, 0, &msg, err)) == 1) {
    handle_message (f, msg);
    json_decref (msg);
  }
  return r == -1 ? -1 : 0;
}

/* Wait for a message, a signal, or the time of the next query. */
static void
wait_for_more (struct follow *f)
{
  struct pollfd pfd[2] = {
    { .fd = control_fd (f->c), .events = POLLIN },
    { .fd = f->signals, .events = POLLIN },
  };
  uint64_t now = now_ns (), ms = 1000; /* often enough for the deadline */

  if (f->accepted && !f->querying)
    ms = f->next_query <= now ? 0
      : (f->next_query - now + NS_PER_MS - 1) / NS_PER_MS;
  poll (pfd, 2, ms < 1000 ? ms : 1000);
  if (pfd[1].revents)
    handle_signal (f);
}

static void
follow_loop (struct follow *f)
{
  struct error err;

  while (f->status == -1) {
    if (send_due (f, &err) == -1 || receive (f, &err) == -1) {
      fail (f, &err, "");
      if (f->accepted)
        complain ("how the migration ends is not known here: "
                  "see 'nbdferry status'");
      return;
    }
    if (f->status == -1)
      wait_for_more (f);
    if (f->status == -1 && f->cancel != NOT_ASKED && f->cancel != REFUSED &&
        now_ns () > f->cancel_deadline) {
      error_set (&err, ETIMEDOUT, "the migration was not cancelled within %d "
                 "seconds; see 'nbdferry status'", CANCEL_S);
      fail (f, &err, "");
    }
  }
}

int
follow_migration (struct control *c, json_t *args, struct progress *p,
                  bool *other)
{
  struct follow f = { .c = c, .progress = p, .other = other, .status = -1 };
  struct error err;
  sigset_t set, old;

  sigemptyset (&set);
  sigaddset (&set, SIGINT);
  sigaddset (&set, SIGTERM);
  sigprocmask (SIG_BLOCK, &set, &old);
  f.signals = signalfd (-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
  if (f.signals == -1) {
    json_decref (args);
    error_set (&err, errno, "signalfd: %m");
    fail (&f, &err, "");
  }
  else if (control_send (c, "migrate", args, &f.migrate_id, &err) == -1)
    fail (&f, &err, "");
  follow_loop (&f);
  if (f.signals != -1)
    close (f.signals);
  sigprocmask (SIG_SETMASK, &old, NULL);
  return f.status;
}
