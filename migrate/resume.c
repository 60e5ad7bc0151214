/* nbdferry - the source of a migration: pausing, resuming, and restarts
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "description.h"
#include "held.h"
#include "log.h"
#include "resume.h"
#include "ship-map.h"

#define RETRY_MIN (100 * NS_PER_MS)
#define RETRY_MAX (10 * NS_PER_S)

/* So many attempts are made before that is written down again. */
#define ATTEMPTS 64

/* ---- the description ---- */

/* As it stands, or with another URI (NULL: the present one, or that of
 * migrate-recover if it is still to be taken).  'writing' is held.
 */
static int
write_description (struct outgoing *o, const char *uri, bool paused,
                   struct error *err)
{
  struct description d = {
    .session = o->session, .epoch = o->epoch,
    .attempt = o->attempt + ATTEMPTS, .paused = paused, .nr = o->nr,
  };
  const char *first = o->shipments[0].drive->state_dir;
  CLEANUP_FREE char *name = NULL; /* of the disk there, if a new URI has it */
  int r;

  uri = uri ?: o->new_uri;
  if (uri && (name = client_uri_export (uri, err)) == NULL)
    return -1;
  d.uri = (char *) (uri ?: o->uri); /* borrowed */
  d.disks = calloc (o->nr, sizeof d.disks[0]);
  if (d.disks == NULL)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < o->nr; i++)
    d.disks[i] = (struct description_disk){
      .name = o->shipments[i].drive->name,
      .state_dir = o->shipments[i].drive->state_dir,
      .target = name && name[0] ? name : o->shipments[i].name,
      .lineage = o->shipments[i].lineage,
      .generation = o->shipments[i].generation,
    };
  pthread_mutex_lock (&o->lock);
  d.params = o->params;
  pthread_mutex_unlock (&o->lock);
  d.params.mapping = o->shipments[0].mapping; /* borrowed */
  d.attached = blobs_describe (o->blobs);
  r = description_write (first, &d, err);
  json_decref (d.attached);
  free (d.disks);
  if (r == 0)
    o->reserved = o->attempt + ATTEMPTS;
  return r;
}

/* The others say where that is; before it. */
static int
write_pointers (struct outgoing *o, struct error *err)
{
  struct description d = { .session = o->session,
                           .first = o->shipments[0].drive->state_dir };

  for (size_t i = 1; i < o->nr; i++)
    if (description_write (o->shipments[i].drive->state_dir, &d, err) == -1)
      return -1;
  return 0;
}

static bool
is_paused_by_hand (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  return o->pause_asked;
}

int
outgoing_next_epoch (struct outgoing *o, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->writing);

  o->epoch++;
  if (!o->described)
    return 0;
  return write_description (o, NULL, is_paused_by_hand (o), err);
}

int
outgoing_next_attempt (struct outgoing *o, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->writing);

  o->attempt++;
  if (!o->described || o->attempt <= o->reserved)
    return 0;
  return write_description (o, NULL, is_paused_by_hand (o), err);
}

/* ---- tracking ---- */

static void
remove_descriptions (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->writing);
  struct error err;

  /* The first one first: the others are nothing without it. */
  for (size_t i = 0; i < o->nr; i++)
    if (description_remove (o->shipments[i].drive->state_dir, &err) == -1)
      log_message ("a migration that has ended may come back at the next "
                   "start: %s", err.msg);
  o->described = false;
}

static int
make_descriptions (struct outgoing *o, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->writing);

  if (write_pointers (o, err) == -1 ||
      write_description (o, NULL, false, err) == -1)
    return -1;
  o->described = true;
  return 0;
}

static void
describe (struct outgoing *o)
{
  struct error err;

  if (make_descriptions (o, &err) == 0)
    return;
  remove_descriptions (o);
  log_message ("the migration cannot go on after a restart of this server: %s",
               err.msg);
}

int
outgoing_track (struct outgoing *o, struct error *err)
{
  bool resume;

  pthread_mutex_lock (&o->lock);
  resume = !o->params.no_resume;
  pthread_mutex_unlock (&o->lock);
  /* What is left of an older one would be taken for this one's. */
  remove_descriptions (o);
  for (size_t i = 0; i < o->nr; i++) {
    struct shipment *s = &o->shipments[i];

    if (resume &&
        ship_map_make (s->drive, bitmap_shift (s->ship), err) == -1)
      return -1;
    if (drive_set_ship (s->drive, s->ship, err) == -1)
      return -1;
  }
  if (resume)
    describe (o);
  pthread_mutex_lock (&o->lock);
  o->tracked = resume;
  pthread_mutex_unlock (&o->lock);
  return 0;
}

void
outgoing_untrack (struct outgoing *o, bool gone)
{
  remove_descriptions (o);
  for (size_t i = 0; i < o->nr && !gone; i++) {
    drive_drop_ship (o->shipments[i].drive);
    ship_map_remove (o->shipments[i].drive);
  }
}

/* ---- what the destination says ---- */

int
outgoing_check_held (struct outgoing *o, struct error *err)
{
  for (size_t i = 0; i < o->nr; i++) {
    struct shipment *s = &o->shipments[i];
    bool held;

    if (check_held (o->control, i, &held, err) == -1)
      return -1;
    if (held)
      continue;
    log_message ("disk '%s': the destination does not hold what it got before; "
                 "all of it is sent again", s->drive->name);
    if (held_nothing (s, err) == -1) {
      outgoing_is_lasting (o);
      return -1;
    }
  }
  return 0;
}

void
outgoing_is_lasting (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  o->lasting = true;
}

static bool
is_lasting (enum packet_type type, int errnum)
{
  switch (errnum) {
  case EPROTONOSUPPORT:
  case EEXIST:
  case EFBIG:
  case EINVAL:
  case EBUSY:
  case EROFS:
  case ENOENT:
  case EPERM:
    return true;
  case EPROTO:
    return type == PACKET_LIST;
  case ENOSPC:
    return type == PACKET_HELLO; /* the disk is too small */
  default:
    return false;
  }
}

void
outgoing_refused (struct outgoing *o, const struct client *c,
                  enum packet_type type, const struct error *err)
{
  /* Who has mistyped where to go on may say so again. */
  if (err && !client_is_dead (c) && is_lasting (type, err->errnum) &&
      !o->other_uri)
    outgoing_is_lasting (o);
}

/* ---- pausing ---- */

/* The stop was thrown by what has ended a connection.  It is made ready for
 * the next one; who throws it for another reason has said so before, so this
 * comes before one looks at what was said.
 */
static void
rearm (struct outgoing *o)
{
  stop_rearm (&o->cancel);
}

enum next { NEXT_WAIT, NEXT_TRY, NEXT_END };

static enum next
what_next (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  if (o->cancelled || o->let_go || !o->tracked || o->lasting)
    return NEXT_END;
  if (!o->recover_asked)
    return NEXT_WAIT;
  o->recover_asked = false;
  rearm (o); /* it was thrown for that; the next connection is to live */
  return NEXT_TRY;
}

static void
take_uri (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->writing);
  CLEANUP_FREE char *uri = NULL, *export = NULL;

  pthread_mutex_lock (&o->lock);
  uri = o->new_uri;
  o->new_uri = NULL;
  pthread_mutex_unlock (&o->lock);
  if (uri == NULL)
    return;
  export = client_uri_export (uri, NULL); /* was checked */
  for (size_t i = 0; i < o->nr; i++) {
    struct shipment *s = &o->shipments[i];
    char *name = export && export[0] ? strdup (export) : NULL;
    char *peer = client_uri_with_export (uri, name ? name : s->name, NULL);

    if (peer) {
      free (s->peer);
      s->peer = peer;
    }
    if (name) {
      free (s->name);
      s->name = name;
    }
  }
  free (o->uri);
  o->uri = take_ptr (&uri);
  o->other_uri = true;
}

static void
show_paused (struct outgoing *o, const struct error *why)
{
  pthread_mutex_lock (&o->lock);
  o->info.pauses += o->info.status != MIGRATE_PAUSED;
  memcpy (o->info.error, why->msg, sizeof o->info.error);
  pthread_mutex_unlock (&o->lock);
  outgoing_set_status (o, MIGRATE_PAUSED);
}

/* How long to wait: shorter again after a connection that got on. */
static uint64_t
next_wait (struct outgoing *o, const struct error *why)
{
  uint64_t wait = o->wait;

  if (wait == 0 || (o->progress && why->errnum != ENOSPC))
    wait = RETRY_MIN;
  o->wait = wait * 2 < RETRY_MAX ? wait * 2 : RETRY_MAX;
  return wait;
}

void
outgoing_explain_pause (struct outgoing *o, struct error *err)
{
  if (is_paused_by_hand (o))
    error_set (err, ECANCELED, "paused by migrate-pause, until "
               "migrate-recover");
}

static void
pause_by_hand (struct outgoing *o)
{
  struct error why = { 0 };

  outgoing_explain_pause (o, &why);
  show_paused (o, &why);
}

bool
outgoing_pause (struct outgoing *o, const struct error *why)
{
  bool by_hand = false;
  uint64_t until;
  enum next next;

  rearm (o);
  next = what_next (o);
  if (next == NEXT_END || stop_wait (&o->quit, 0))
    return false;
  for (size_t i = 0; i < o->nr; i++)
    held_lost (&o->shipments[i]);
  if (!is_paused_by_hand (o)) /* that is told below */
    show_paused (o, why);
  until = now_ns () + next_wait (o, why);

  while (next == NEXT_WAIT) {
    uint64_t now = now_ns ();

    if (!by_hand && is_paused_by_hand (o)) {
      by_hand = true;
      pause_by_hand (o);
    }
    if (!by_hand && now >= until)
      break;
    if (stop_wait (&o->cancel, by_hand ? 3600 * NS_PER_S : until - now))
      rearm (o);
    next = what_next (o);
    if (stop_wait (&o->quit, 0))
      next = NEXT_END;
  }
  if (next == NEXT_END)
    return false;
  take_uri (o);
  return true;
}

/* ---- from outside ---- */

static void
record_as_it_is (struct outgoing *o)
{
  if (o->described)
    write_description (o, NULL, is_paused_by_hand (o), NULL);
}

/* What is asked for is durable before it is answered, and only then done:
 * whoever has the answer may kill the daemon.  'writing' is held.
 */
static int
record (struct outgoing *o, const char *uri, bool paused, struct error *err)
{
  if (!o->described) /* a restart forgets all of it */
    return 0;
  if (write_description (o, uri, paused, err) == 0)
    return 0;
  /* It may be on the disk all the same. */
  record_as_it_is (o);
  return -1;
}

static int
check_new_uri (const struct outgoing *o, const char *uri, struct error *err)
{
  CLEANUP_FREE char *export = client_uri_export (uri, err);

  if (export == NULL)
    return -1;
  if (export[0] && o->nr != 1)
    return error_set (err, EINVAL, "%s names one disk, but %zu are to move; "
                      "name only the server", uri, o->nr);
  return 0;
}

static bool
is_paused (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  return o->info.status == MIGRATE_PAUSED;
}

int
outgoing_recover (struct outgoing *o, const char *uri, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->writing);
  CLEANUP_FREE char *copy = NULL;

  if (uri && check_new_uri (o, uri, err) == -1)
    return -1;
  if (uri && (copy = strdup (uri)) == NULL)
    return error_set (err, ENOMEM, "%m");
  if (!is_paused (o))
    return error_set (err, EINVAL, "Migrate recover can only be run when the "
                      "migration is paused.");
  if (record (o, uri, false, err) == -1)
    return -1;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);
  o->pause_asked = false;
  o->recover_asked = true;
  if (copy) {
    free (o->new_uri);
    o->new_uri = take_ptr (&copy);
  }
  /* Under the lock: who sees what was asked for takes this back with it, and
   * ends no connection that was made for it.
   */
  stop_throw (&o->cancel);
  return 0;
}

static int
may_pause (struct outgoing *o, struct error *err)
{
  if (!o->ended_ns && !o->let_go && !o->cancelled && o->tracked)
    return 0;
  if (!o->ended_ns && o->params.no_resume)
    return error_set (err, EINVAL, "this migration was started with "
                      "x-ferry-resume=false (--no-resume), and nothing is kept "
                      "from which a paused one could go on; cancel it and "
                      "start anew");
  return error_set (err, EINVAL, "migrate-pause is currently only supported "
                    "while data is sent, and until the disk is handed over");
}

int
outgoing_ask_pause (struct outgoing *o, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->writing);
  int r;

  pthread_mutex_lock (&o->lock);
  r = may_pause (o, err);
  pthread_mutex_unlock (&o->lock);
  if (r == -1 || record (o, NULL, true, err) == -1)
    return -1;
  pthread_mutex_lock (&o->lock);
  r = may_pause (o, err); /* it may have been handed over meanwhile */
  if (r == 0) {
    o->pause_asked = true;
    o->recover_asked = false;
  }
  pthread_mutex_unlock (&o->lock);
  if (r == 0)
    outgoing_interrupt (o);
  else
    record_as_it_is (o);
  return r;
}
