/* nbdferry - a disk that was let go of
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "departure.h"
#include "engine.h"
#include "log.h"
#include "outgoing-impl.h"
#include "pool.h"

int
departure_init (struct departure *p, struct drive *d, const struct stop *quit,
                struct error *err)
{
  *p = (struct departure){ .drive = d, .quit = quit };
  p->again.fd = -1;
  return stop_init (&p->again, err);
}

void
departure_destroy (struct departure *p)
{
  if (p->drive)
    stop_destroy (&p->again);
  free (p->at);
  free (p->next);
}

void
departure_wake (struct departure *p)
{
  stop_throw (&p->again);
}

/* ---- what the journal says ---- */

struct where {
  char *uri, *name; /* name: of its export */
  struct uuid session, lineage;
  uint64_t attempt;
};

static void
free_where (struct where *w)
{
  free (w->uri);
  free (w->name);
}

#define CLEANUP_WHERE __attribute__ ((cleanup (free_where)))

static int
find_peer (struct drive *d, struct where *w, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);
  const struct journal_record *rec = journal_get (d->journal);

  w->session = rec->session;
  w->lineage = rec->lineage;
  w->attempt = rec->attempt;
  w->uri = strdup (rec->peer ? rec->peer : "");
  if (w->uri == NULL)
    return error_set (err, ENOMEM, "%m");
  w->name = client_uri_export (w->uri, err);
  return w->name ? 0 : -1;
}

bool
departure_find (struct drive *d, struct uuid *session, char **name)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);
  const struct journal_record *rec;

  *name = NULL;
  if (!drive_is_elsewhere (d) || d->journal == NULL)
    return false;
  rec = journal_get (d->journal);
  *session = rec->session;
  if (rec->peer)
    *name = client_uri_export (rec->peer, NULL);
  if (*name == NULL)
    *name = strdup (d->name);
  return *name != NULL;
}

int
departure_redirect (struct drive *d, const char *uri, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);
  struct journal_record rec;

  if (!drive_is_elsewhere (d) || d->journal == NULL)
    return error_set (err, EINVAL, "disk '%s' was not handed over", d->name);
  rec = *journal_get (d->journal); /* its strings stay the journal's */
  rec.peer = (char *) uri;
  return drive_record (d, &rec, err);
}

/* ---- trying until it succeeds ---- */

void
say_once (struct error *said, const struct error *now, const char *what)
{
  if (strcmp (said->msg, now->msg) == 0)
    return;
  log_message ("%s: %s; trying again until it succeeds", what, now->msg);
  *said = *now;
}

uint64_t
longer (uint64_t wait)
{
  return wait * 2 < BACKOFF_MAX ? wait * 2 : BACKOFF_MAX;
}

/* False: it is the end.  Whoever wakes us has said why before, so it is made
 * ready before one looks.
 */
static bool
is_ready (struct departure *p)
{
  stop_rearm (&p->again);
  return !stop_wait (p->quit, 0);
}

/* Wait before the next try. */
static bool
try_again (struct departure *p, uint64_t *wait, struct error *said,
           const struct error *now, const char *what)
{
  say_once (said, now, what);
  *wait = stop_wait (&p->again, *wait) ? BACKOFF_MIN : longer (*wait);
  return is_ready (p);
}

/* ---- COMMIT ---- */

/* A connection to whom the disk went to, who has proved it. */
static struct client *
open_peer (struct departure *p, const struct where *w, struct error *err)
{
  struct client *c = connect_destination (w->uri, w->name, &p->again,
                                          CONNECT_TIMEOUT_MS,
                                          COMMIT_TIMEOUT_MS, err);

  if (c == NULL)
    return NULL;
  if (check_destination (c, err) != -1 &&
      check_prepared (c, &w->session, w->attempt, &w->lineage, err) == 0)
    return c;
  error_prefix (err, "%s", w->uri);
  client_close (c);
  return NULL;
}

/* One try, over a connection of its own unless there is one. */
static int
try_commit (struct departure *v, size_t nr, struct client *control,
            struct error *err)
{
  json_auto_t *disks = json_array (), *body = NULL;
  CLEANUP_WHERE struct where first = { 0 };
  struct packet_header h = { 0 };
  struct client *own = NULL;
  int r;

  for (size_t i = 0; i < nr; i++) {
    CLEANUP_WHERE struct where other = { 0 };
    struct where *w = i == 0 ? &first : &other;

    if (find_peer (v[i].drive, w, err) == -1)
      return -1;
    json_array_append_new (disks, json_string (w->name));
    free (v[i].next);
    v[i].next = strdup (control ? v[i].at : w->uri);
    if (v[i].next == NULL)
      return error_set (err, ENOMEM, "%m");
  }
  body = json_pack ("{s:I, s:O}", "attempt", (json_int_t) first.attempt,
                    "disks", disks);
  if (body == NULL)
    return error_set (err, ENOMEM, "%m");
  h.session = first.session;
  if (control == NULL && (own = open_peer (v, &first, err)) == NULL)
    return -1;
  r = send_control (control ? control : own, &h, PACKET_COMMIT, body, err);
  client_close (own);
  for (size_t i = 0; r == 0 && i < nr; i++) {
    free (v[i].at);
    v[i].at = take_ptr (&v[i].next);
  }
  return r;
}

int
departure_commit (struct departure *v, size_t nr, struct client *control)
{
  struct error said = { 0 }, err;
  uint64_t wait = BACKOFF_MIN;

  if (!is_ready (v))
    return -1;
  while (try_commit (v, nr, control, &err) == -1) {
    control = NULL;
    if (!try_again (v, &wait, &said, &err, "handing over"))
      return -1;
  }
  return 0;
}

/* ---- forwarding ---- */

struct forward_name {
  char session[UUID_TEXT];
  char disk[];
};

static void
forward_export (void *opaque, uint64_t epoch, char *name)
{
  const struct forward_name *f = opaque;

  snprintf (name, 4096, "%s@forward/%s/%ju", f->disk, f->session,
            (uintmax_t) epoch);
}

static struct forward_name *
forward_name (const struct where *w)
{
  struct forward_name *f = malloc (sizeof *f + strlen (w->name) + 1);

  if (f) {
    uuid_format (&w->session, f->session);
    strcpy (f->disk, w->name);
  }
  return f;
}

static struct disk *
open_forward (struct departure *p, const struct where *w,
              const struct stop *stop, struct error *err)
{
  struct forward_name *f = forward_name (w);

  if (f == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  /* The first epoch must be later than those of an earlier process. */
  return pool_open (w->uri, forward_export, f, FORWARD_CONNECTIONS,
                    p->drive->size, real_ns (), stop, CONNECT_TIMEOUT_MS,
                    err);
}

struct disk *
departure_ahead (struct departure *p, const char *uri,
                 const struct uuid *session, const struct stop *stop)
{
  CLEANUP_WHERE struct where w = { .session = *session };

  w.uri = strdup (uri);
  w.name = client_uri_export (uri, NULL);
  return w.uri && w.name ? open_forward (p, &w, stop, NULL) : NULL;
}

static struct disk *
try_forward (struct departure *p, struct error *err)
{
  CLEANUP_WHERE struct where w = { 0 };

  if (find_peer (p->drive, &w, err) == -1)
    return NULL;
  if ((p->at == NULL || strcmp (w.uri, p->at) != 0) &&
      try_commit (p, 1, NULL, err) == -1)
    return NULL;
  if (strcmp (w.uri, p->at) != 0) { /* yet another one in that moment */
    error_set (err, EAGAIN, "the address has changed");
    return NULL;
  }
  return open_forward (p, &w, &p->again, err);
}

struct disk *
departure_forward (struct departure *p)
{
  struct error said = { 0 }, err;
  uint64_t wait = BACKOFF_MIN;
  struct disk *disk;

  if (!is_ready (p))
    return NULL;
  while ((disk = try_forward (p, &err)) == NULL)
    if (!try_again (p, &wait, &said, &err, "forwarding"))
      return NULL;
  return disk;
}

/* Is it still where COMMIT was acknowledged?  Control held. */
static bool
is_at_peer (const struct departure *p)
{
  const char *peer = journal_get (p->drive->journal)->peer;

  return peer && p->at && strcmp (peer, p->at) == 0;
}

bool
departure_serve (struct departure *p, struct disk *remote)
{
  if (!is_at_peer (p)) {
    remote->ops->close (remote);
    return false;
  }
  drive_set_mode (p->drive, DRIVE_FORWARD, remote);
  return true;
}

/* ---- when it is forwarded already ---- */

/* The pool goes on with that address, unless it is another one by now. */
static bool
move_pool (struct departure *p)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->drive->control);
  const char *peer = journal_get (p->drive->journal)->peer;
  CLEANUP_WHERE struct where w = { 0 };
  struct forward_name *f;

  if (!is_at_peer (p))
    return false;
  w.session = journal_get (p->drive->journal)->session;
  w.name = client_uri_export (peer, NULL);
  f = w.name ? forward_name (&w) : NULL;
  if (f && pool_move (p->drive->remote, peer, f) == 0)
    log_message ("disk '%s' is forwarded to %s now", p->drive->name, peer);
  return true;
}

/* False: it was not woken for another address. */
static bool
has_moved (struct departure *p)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&p->drive->control);

  return !is_at_peer (p);
}

void
departure_follow (struct departure *p)
{
  for (;;) {
    while (!has_moved (p)) {
      stop_wait (&p->again, 3600 * NS_PER_S);
      if (!is_ready (p))
        return;
    }
    if (departure_commit (p, 1, NULL) == -1)
      return;
    move_pool (p); /* if not, it has moved once more */
  }
}
