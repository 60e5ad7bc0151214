/* nbdferry - a migration in this process, for disks nobody has open
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The disks are opened as a daemon opens them, state directory, locks and all;
 * so a daemon that has one open, or QEMU, keeps us out, and we keep them out.
 * When a disk has been handed over its journal says so, as a daemon's would.
 * Killed in between, the next one to open it, daemon or command, goes on.
 */
#include <config.h>

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <poll.h>

#include "absolute.h"
#include "cleanup.h"
#include "client.h"
#include "command.h"
#include "drive.h"
#include "finisher.h"
#include "info-json.h"
#include "log.h"
#include "migrate-local.h"
#include "output.h"
#include "plain.h"
#include "pool.h"
#include "remote.h"

#define LOOK_MS 200 /* between two looks at how it goes */

struct local {
  const struct migrate_local *m;
  struct progress *progress;
  struct drive **drives;
  size_t nr;
  struct outgoing *outgoing; /* one of these */
  struct plain *plain;
  int signals;               /* a signalfd */
  unsigned interrupts;       /* how often Ctrl-C came */
  bool too_late;             /* to cancel */
};

/* ---- which disks ---- */

/* Where the path begins in [NAME=]PATH: NAME holds no slash. */
static const char *
skip_name (const char *arg)
{
  const char *equals = strchr (arg, '='), *slash = strchr (arg, '/');

  return equals && (slash == NULL || equals < slash) ? equals + 1 : arg;
}

bool
migrate_is_disk (const char *arg)
{
  struct stat st;

  if (skip_name (arg) != arg || remote_is_uri (arg))
    return true;
  return stat (arg, &st) == 0 && !S_ISSOCK (st.st_mode);
}

/* What a daemon would call it; the caller frees it. */
static char *
disk_name (const char *arg, struct error *err)
{
  const char *path = skip_name (arg), *base = path, *slash;
  CLEANUP_FREE char *export = NULL;
  char *name;

  if (path != arg)
    name = strndup (arg, path - 1 - arg);
  else {
    if (remote_is_uri (path)) {
      export = client_uri_export (path, err);
      if (export == NULL)
        return NULL;
      base = export[0] ? export : "nbd";
    }
    slash = strrchr (base, '/');
    name = strdup (slash ? slash + 1 : base);
  }
  if (name == NULL || name[0] == '\0') {
    error_set (err, EINVAL, "'%s' gives the disk no name", arg);
    free (name);
    return NULL;
  }
  return name;
}

static struct drive *
open_disk (const struct migrate_local *m, const char *arg, struct error *err)
{
  const char *path = skip_name (arg);
  CLEANUP_FREE char *name = disk_name (arg, err);
  CLEANUP_FREE char *full = NULL, *state = NULL;
  struct drive_options opt = { .name = name };

  if (name == NULL)
    return NULL;
  full = remote_is_uri (path) ? remote_absolute_uri (path, err)
                              : absolute_path (path, err);
  if (full == NULL)
    return NULL;
  if (m->state) {
    state = absolute_path (m->state, err);
    if (state == NULL)
      return NULL;
  }
  opt.path = full;
  opt.state_dir = state;
  if (remote_is_uri (full) && state == NULL) {
    error_set (err, EINVAL, "%s: is held by an NBD server, and so has no "
               "state directory of its own; say which with --state", full);
    return NULL;
  }
  return drive_open (&opt, err);
}

static int
open_disks (struct local *l, struct error *err)
{
  l->drives = calloc (l->m->nr, sizeof l->drives[0]);
  if (l->drives == NULL)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < l->m->nr; i++) {
    struct drive *d = open_disk (l->m, l->m->disks[i], err);

    if (d == NULL)
      return -1;
    l->drives[l->nr++] = d;
    for (size_t k = 0; k < i; k++)
      if (strcmp (l->drives[k]->name, d->name) == 0)
        return error_set (err, EINVAL, "two disks are called '%s'; give them "
                          "names with NAME=PATH", d->name);
  }
  return 0;
}

static int
close_disks (struct local *l, struct error *err)
{
  int r = 0;

  for (size_t i = 0; i < l->nr; i++) {
    struct drive *d = l->drives[i];

    if (d->remote)
      pool_stop (d->remote);
    if (drive_shutdown (d, err) == -1)
      r = error_prefix (err, "close disk '%s'", d->name);
    drive_free (d);
  }
  free (l->drives);
  return r;
}

/* ---- one that was handed over before ---- */

static enum drive_mode
mode_of (struct drive *d)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  return d->mode;
}

/* Wait for a signal, or that long; true if one came. */
static bool
wait_for_signal (struct local *l, int ms)
{
  struct pollfd p = { .fd = l->signals, .events = POLLIN };
  struct signalfd_siginfo info;

  return poll (&p, 1, ms) == 1 &&
         read (l->signals, &info, sizeof info) == sizeof info;
}

/* Its handover was begun, and nobody knows whether it has arrived. */
static int
finish_handover (struct local *l, struct drive *d, struct error *err)
{
  /* A copy: the journal's own goes when it is written. */
  CLEANUP_FREE char *peer = strdup (journal_get (d->journal)->peer ?: "?");
  struct finisher *f;
  bool interrupted = false;

  if (peer == NULL)
    return error_set (err, ENOMEM, "%m");
  if (journal_get (d->journal)->acknowledged)
    return error_set (err, EPERM, "disk '%s' was handed over to %s; it is "
                      "served there", d->name, peer);
  f = finisher_start (d, err);
  if (f == NULL)
    return -1;
  while (mode_of (d) != DRIVE_FORWARD && !interrupted)
    interrupted = wait_for_signal (l, 50);
  finisher_stop (f);
  if (interrupted) {
    l->interrupts++;
    return error_set (err, EINTR, "disk '%s' has been let go to %s, which has "
                      "not answered yet; run this again, or start a daemon "
                      "with the disk", d->name, peer);
  }
  if (l->progress->mode != PROGRESS_JSON)
    complain ("the handover of disk '%s' to %s, which was begun before, is "
              "completed", d->name, peer);
  return 0;
}

/* 1: all were handed over before, and that is done now; 0: none was. */
static int
resolve (struct local *l, struct error *err)
{
  size_t gone = 0;

  for (size_t i = 0; i < l->nr; i++) {
    struct drive *d = l->drives[i];

    switch (d->mode) {
    case DRIVE_ACTIVE:
      break;
    case DRIVE_GONE:
      if (finish_handover (l, d, err) == -1)
        return -1;
      gone++;
      break;
    default:
      return error_set (err, EBUSY, "disk '%s' is the destination of a "
                        "migration that has not completed", d->name);
    }
  }
  if (gone > 0 && gone < l->nr)
    return error_set (err, EPERM, "some of the disks have been handed over "
                      "before; try again without them");
  return gone > 0;
}

/* ---- following it ---- */

static json_t *
info_json (const struct migrate_info *i)
{
  CLEANUP_FREE char *error = text_printable (i->error);
  json_t *info = migrate_info_to_json (i);

  if (i->status == MIGRATE_FAILED)
    json_object_set_new (info, "error-desc", json_string (error));
  return info;
}

static bool
is_over (struct local *l, struct migrate_info *info)
{
  if (l->plain) {
    plain_info (l->plain, info);
    return plain_ended (l->plain);
  }
  outgoing_info (l->outgoing, info);
  return outgoing_ended (l->outgoing);
}

static void
interrupted (struct local *l)
{
  struct error err;

  progress_break (l->progress);
  if (++l->interrupts > 1) {
    complain ("leaving");
    return;
  }
  if (l->plain)
    plain_cancel (l->plain);
  else if (outgoing_cancel (l->outgoing, &err) == -1) {
    l->too_late = true;
    complain ("it cannot be cancelled any more (%s); waiting for its end",
              err.msg);
    return;
  }
  complain ("cancelling; once more leaves at once");
}

static int
report (struct local *l, const struct migrate_info *i)
{
  json_t *info = info_json (i);
  json_t *hints = l->outgoing ? outgoing_hints (l->outgoing) : NULL;

  if (hints)
    json_object_set_new (json_object_get (info, "x-ferry"), "hints", hints);
  progress_show (l->progress, info);
  progress_break (l->progress);
  if (i->status == MIGRATE_COMPLETED)
    progress_summary (l->progress, info);
  json_decref (info);
  switch (i->status) {
  case MIGRATE_COMPLETED:
    if (l->interrupts > 0)
      complain ("it was too late to cancel");
    return STATUS_DONE;
  case MIGRATE_CANCELLED:
  case MIGRATE_CANCELLING: /* it was left, and is waited for below */
    complain ("the migration was cancelled; the source is as it was");
    return STATUS_CANCELLED;
  case MIGRATE_FAILED:
    complain ("the migration failed: %s", i->error);
    return STATUS_FAILED;
  default:
    complain ("the disk has been let go, and the other side has not answered "
              "yet; run this again, or start a daemon with the disk");
    return STATUS_CANCELLED;
  }
}

/* As plain NBD, perhaps after a migration was turned away. */
static int
copy (struct local *l, struct error *err)
{
  const struct migrate_local *m = l->m;

  if (l->outgoing) {
    outgoing_stop (l->outgoing);
    outgoing_free (l->outgoing);
    l->outgoing = NULL;
  }
  l->plain = plain_start (l->drives, l->nr, m->uri, m->bitmaps_to, &m->params,
                          NULL, NULL, err);
  return l->plain ? 0 : -1;
}

/* Until it is over, or was left. */
static void
stay (struct local *l, struct migrate_info *info)
{
  uint64_t again = 0;

  while (!is_over (l, info) && l->interrupts < 2) {
    if (again++ % 4 == 0) {
      json_t *json = info_json (info);

      progress_show (l->progress, json);
      json_decref (json);
    }
    if (wait_for_signal (l, LOOK_MS / 4))
      interrupted (l);
  }
}

static int
follow (struct local *l)
{
  struct migrate_info info;
  struct error err;

  stay (l, &info);
  if (info.status == MIGRATE_FAILED && info.other_server &&
      l->m->before_copy && l->interrupts == 0) {
    progress_break (l->progress);
    l->m->before_copy (l->m->uri);
    if (copy (l, &err) == -1) {
      complain ("%s", err.msg);
      return STATUS_FAILED;
    }
    stay (l, &info);
  }
  /* Past the point of no return it may have failed only to answer. */
  if (l->too_late && info.status == MIGRATE_FAILED)
    info.status = MIGRATE_DEVICE;
  return report (l, &info);
}

static int
begin (struct local *l, struct error *err)
{
  const struct migrate_local *m = l->m;

  if (m->data_only)
    return copy (l, err);
  l->outgoing = outgoing_start (l->drives, l->nr, m->uri, &m->params, NULL,
                                NULL, err);
  return l->outgoing ? 0 : -1;
}

static int
run (struct local *l)
{
  struct error err = { 0 };
  int r = open_disks (l, &err);

  if (r == 0)
    r = resolve (l, &err);
  if (r == 0)
    r = begin (l, &err);
  else if (r == 1) {
    struct migrate_info info = { .status = MIGRATE_COMPLETED };

    if (l->progress->mode == PROGRESS_JSON)
      return report (l, &info);
    return STATUS_DONE;
  }
  if (r == -1) {
    complain ("%s", err.msg);
    return l->interrupts ? STATUS_CANCELLED : STATUS_FAILED;
  }
  return follow (l);
}

static void
end (struct local *l)
{
  if (l->plain) {
    plain_stop (l->plain);
    plain_free (l->plain);
  }
  if (l->outgoing) {
    outgoing_stop (l->outgoing);
    outgoing_free (l->outgoing);
  }
}

static void
say (const char *msg)
{
  complain ("%s", msg);
}

int
migrate_locally (const struct migrate_local *m, struct progress *p)
{
  struct local l = { .m = m, .progress = p };
  struct error err;
  sigset_t set;
  int status = STATUS_FAILED;

  /* Before any thread, which would take them otherwise. */
  sigemptyset (&set);
  sigaddset (&set, SIGINT);
  sigaddset (&set, SIGTERM);
  sigprocmask (SIG_BLOCK, &set, NULL);
  signal (SIGPIPE, SIG_IGN);
  log_set (say);
  drive_set_log (complain);
  l.signals = signalfd (-1, &set, SFD_CLOEXEC);
  if (l.signals == -1)
    complain ("signalfd: %s", strerror (errno));
  else
    status = run (&l);
  end (&l);
  if (close_disks (&l, &err) == -1) {
    complain ("%s", err.msg);
    if (status == STATUS_DONE)
      status = STATUS_FAILED;
  }
  if (l.signals != -1)
    close (l.signals);
  return status;
}
