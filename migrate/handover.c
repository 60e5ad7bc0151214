/* nbdferry - the source: hold and handover
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The steps, and what is durable where after each (docs/handover.md):
 *
 *                                   source          destination
 *   hold: writes wait               active          incoming
 *   the rest is sent
 *   PREPARE, acknowledged           active          prepared
 *   reads wait as well; let go      gone            prepared
 *   COMMIT, until acknowledged      gone            active
 *   forward; requests go on         gone            active
 *
 * Up to "let go" every failure ends the hold and leaves the source as it was;
 * what can be overcome is tried again with the next connection (resume.c), and
 * a higher attempt.
 * From there on the only way is forward: COMMIT is repeated until it is
 * acknowledged, by this process or by the next one that opens the drive.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "forwarding.h"
#include "resume.h"

/* Percent of a second's limit that need not wait for their turn in the hold:
 * somebody waits.
 */
#define HOLD_LOAN 3

/* ---- trying until it succeeds ---- */

/* Wait before the next try, and say what is wrong, unless that was said.
 * False: it is the end.
 */
static bool
try_again (uint64_t *wait, struct error *said, const struct error *now,
           const char *what, const struct stop *quit)
{
  say_once (said, now, what);
  if (stop_wait (quit, *wait))
    return false;
  *wait = longer (*wait);
  return true;
}

/* ---- PREPARE ---- */

static json_t *
prepare_body (struct outgoing *o)
{
  json_t *disks = json_array ();

  for (size_t i = 0; i < o->nr; i++) {
    struct shipment *s = &o->shipments[i];
    const struct journal_record *rec = journal_get (s->drive->journal);
    char lineage[UUID_TEXT];

    uuid_format (&rec->lineage, lineage);
    json_array_append_new (
      disks, json_pack ("{s:s, s:s, s:I, s:o}", "name", s->name, "lineage",
                        lineage, "generation", (json_int_t) rec->generation,
                        "bitmaps", shipment_counts (s)));
  }
  return json_pack ("{s:I, s:o, s:o}", "attempt", (json_int_t) o->attempt,
                    "disks", disks, "attached", blobs_list (o->blobs));
}

/* Everything that is left, and the destination's word that it has it all.
 * All of it is bounded in time, because writers wait.
 */
static int
send_rest (struct outgoing *o, struct error *err)
{
  json_auto_t *body = NULL;
  uint64_t deadline = now_ns () + HOLD_EXTRA_MS * NS_PER_MS, loan;

  pthread_mutex_lock (&o->lock);
  deadline += o->params.downtime_limit * NS_PER_MS;
  loan = o->params.max_bandwidth / 100 * HOLD_LOAN;
  pthread_mutex_unlock (&o->lock);
  client_set_deadline (o->control, deadline);
  engine_set_deadline (o->engine, deadline);
  engine_lend (o->engine, loan);
  if (engine_drain (o->engine, err) == -1)
    return -1;
  hold_has_drained (o);
  if (outgoing_sync_bitmaps (o, err) == -1 ||
      blobs_send (o->blobs, o->engine, err) == -1)
    return -1;
  /* One round is enough, unless a chunk did not fit into its packet. */
  do
    if (outgoing_round (o, err) == -1)
      return -1;
  while (outgoing_dirty (o) > 0);
  if (outgoing_next_attempt (o, err) == -1)
    return -1;
  body = prepare_body (o);
  if (body == NULL)
    return error_set (err, ENOMEM, "%m");
  hold_has_sent (o);
  if (send_control (o->control, &o->h, PACKET_PREPARE, body, err) == -1)
    return error_prefix (err, "prepare the handover");
  return 0;
}

/* ---- letting go ---- */

static int
record_shipment (struct outgoing *o, size_t i, enum journal_state state,
                 struct error *err)
{
  struct shipment *s = &o->shipments[i];
  struct journal_record rec = *journal_get (s->drive->journal);

  rec.state = state;
  rec.session = o->session;
  rec.attempt = o->attempt;
  rec.peer = s->peer;
  rec.acknowledged = false;
  rec.coordinator = NULL;
  rec.together = o->nr;
  if (i > 0) {
    struct journal *first = o->shipments[0].drive->journal;

    rec.coordinator = (char *) journal_path (first);
    rec.coordinator_lineage = journal_get (first)->lineage;
    rec.coordinator_generation = journal_get (first)->generation;
  }
  return drive_record (s->drive, &rec, err);
}

/* Nothing was let go: each journal says what it said before. */
static int
record_active (struct outgoing *o, struct error *err)
{
  int r = 0;

  for (size_t i = 0; i < o->nr; i++) {
    struct drive *d = o->shipments[i].drive;
    struct journal_record rec = *journal_get (d->journal);

    rec.state = JOURNAL_ACTIVE;
    if (drive_record (d, &rec, err) == -1)
      r = -1;
  }
  return r;
}

/* Over a new connection if this one is lost: neither a link that was cut nor a
 * destination that was started again must keep requests waiting for ever.
 */
static int
cancel_attempt (struct outgoing *o)
{
  client_set_deadline (o->control, 0);
  client_set_timeout (o->control, CANCEL_TIMEOUT_MS);
  if (client_is_dead (o->control)) {
    struct client *c;

    /* In this process it is enough that it grows. */
    outgoing_next_epoch (o, NULL);
    c = outgoing_open_channel (o, &o->quit, CANCEL_TIMEOUT_MS, NULL);
    if (c == NULL)
      return -1;
    client_close (o->control);
    o->control = c;
    o->h.epoch = o->epoch;
    client_set_timeout (c, CANCEL_TIMEOUT_MS);
  }
  return send_control (o->control, &o->h, PACKET_CANCEL, NULL, NULL);
}

/* A record that failed may be on the disk all the same.  Before anything is
 * served again, either the journals say that the disks are here, or the
 * destination has forgotten this attempt.
 */
static void
undo_gone (struct outgoing *o)
{
  struct error said = { 0 }, err;
  uint64_t wait = BACKOFF_MIN;

  client_set_stop (o->control, &o->quit);
  while (record_active (o, &err) == -1 && cancel_attempt (o) == -1)
    if (!try_again (&wait, &said, &err, "taking the disk back", &o->quit))
      return;
}

/* The first disk's record decides for all; the others say until then that
 * they are in doubt, where to look, and how that journal was: if it is found
 * changed otherwise, nothing can be concluded from it.
 */
static int
record_gone (struct outgoing *o, struct error *err)
{
  for (size_t i = 1; i < o->nr; i++)
    if (record_shipment (o, i, JOURNAL_DOUBT, err) == -1)
      goto fail;
  if (record_shipment (o, 0, JOURNAL_GONE, err) == -1)
    goto fail;
  return 0;

 fail:
  undo_gone (o);
  return error_prefix (err, "record the handover");
}

static void
let_go (struct outgoing *o)
{
  mirror_detach (o->mirror);
  for (size_t i = 0; i < o->nr; i++) {
    struct drive *d = o->shipments[i].drive;

    drive_set_mode (d, DRIVE_LEAVING, NULL);
    d->ship = NULL;
    free (drive_swap_marks (d, NULL)); /* nobody is inside */
    drive_end_hooks (d, "the disk was handed over to another server");
  }
}

/* ---- COMMIT, and forwarding ---- */

/* The rest stands there; but the peer may have changed since. */
static int
record_no_doubt (struct drive *d, struct error *err)
{
  struct journal_record rec = *journal_get (d->journal);

  rec.state = JOURNAL_GONE;
  return drive_record (d, &rec, err);
}

/* Those in doubt say that they are gone, too.  Before COMMIT: after it the
 * first disk may come back one day, and its record with it.
 */
static int
resolve_doubts (struct outgoing *o)
{
  for (size_t i = 1; i < o->nr; i++) {
    struct drive *d = o->shipments[i].drive;
    struct error said = { 0 }, err;
    uint64_t wait = BACKOFF_MIN;
    int r;

    for (;;) {
      pthread_mutex_lock (&d->control);
      r = record_no_doubt (d, &err);
      pthread_mutex_unlock (&d->control);
      if (r == 0)
        break;
      /* The next start finds it in doubt, and decides. */
      if (!try_again (&wait, &said, &err, "handing over", &o->quit))
        return -1;
    }
  }
  return 0;
}

/* COMMIT, then a forwarding disk for each drive.  The gates are shut. */
static int
finish (struct outgoing *o)
{
  bool known = true; /* where the control channel leads to */

  for (size_t i = 0; i < o->nr; i++) {
    o->departures[i].at = strdup (o->shipments[i].peer);
    known &= o->departures[i].at != NULL;
  }
  client_set_stop (o->control, &o->departures[0].again);
  client_set_deadline (o->control, 0);
  client_set_timeout (o->control, COMMIT_TIMEOUT_MS);
  if (resolve_doubts (o) == -1 ||
      departure_commit (o->departures, o->nr, known ? o->control : NULL) ==
      -1)
    return -1;
  return o->forwarding ? forwarding_finish (o->forwarding) : -1;
}

/* ---- all of it ---- */

/* From here on a cancel is refused, unless one came before. */
static bool
point_of_no_return (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  if (o->cancelled || o->pause_asked)
    return false;
  o->let_go = true;
  return true;
}

static void
take_back (struct outgoing *o)
{
  pthread_mutex_lock (&o->lock);
  o->let_go = false;
  pthread_mutex_unlock (&o->lock);
}

/* The part up to letting go.  Writes are held; control locks too. */
static int
hand_over_held (struct outgoing *o, struct error *err)
{
  if (send_rest (o, err) == -1)
    return -1;
  for (size_t i = 0; i < o->nr; i++)
    gate_close (&o->drives[i]->reads);
  if (!point_of_no_return (o))
    error_set (err, ECANCELED, "cancelled");
  else if (record_gone (o, err) == 0) {
    let_go (o);
    return 0;
  }
  else {
    outgoing_is_lasting (o); /* our own disk */
    take_back (o);
  }
  for (size_t i = 0; i < o->nr; i++)
    gate_open (&o->drives[i]->reads);
  return -1;
}

int
outgoing_handover (struct outgoing *o, struct error *err)
{
  uint64_t held;
  int r;

  outgoing_set_status (o, MIGRATE_DEVICE);
  drives_lock (o->drives, o->nr);
  drives_close (o->drives, o->nr, false);
  hold_begins (o);
  mirror_pause (o->mirror); /* what it has not sent is sent with the rest */
  r = hand_over_held (o, err);
  drives_unlock (o->drives, o->nr);
  if (r == -1) {
    hold_ends (o);
    drives_open (o->drives, o->nr, false);
    mirror_go (o->mirror);
    return -1;
  }
  r = finish (o);
  hold_ends (o);
  held = drives_open (o->drives, o->nr, true);
  if (r == -1)
    return error_set (err, ESHUTDOWN, "the server ends before the handover "
                      "was acknowledged; it goes on at the next start");
  for (size_t i = 0; i < o->nr; i++)
    drive_record_acknowledged (o->drives[i]);
  pthread_mutex_lock (&o->lock);
  o->info.downtime_ms = (held + NS_PER_MS - 1) / NS_PER_MS;
  pthread_mutex_unlock (&o->lock);
  return 0;
}
