/* nbdferry - the destination: what control packets do
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * HELLO     opens a channel; the first of a session takes the drives
 *           (incoming-hello.c)
 * LIST      makes the incoming bitmaps of a drive those of the source
 * PREPARE   everything is here: checked, durable, recorded, yet passive
 * COMMIT    the drives become active; the same COMMIT again is fine, for ever
 * CANCEL    the source gives up; what came in is worth nothing
 *
 * docs/handover.md has the states, and what may be lost between them.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "incoming-impl.h"
#include "incoming-names.h"

int
incoming_malformed (const char *what, struct error *err)
{
  return error_set (err, EBADMSG, "malformed %s packet", what);
}

/* ---- PREPARE ---- */

/* Has every bitmap as many bits as at the source?  Cheap, and it would betray
 * most of what can go wrong on the way.
 */
static int
check_counts (struct drive *d, json_t *disk, struct error *err)
{
  json_t *list = json_object_get (disk, "bitmaps"), *o;
  size_t i, incoming = 0;

  json_array_foreach (list, i, o) {
    const char *name;
    json_int_t bits;
    struct named_bitmap *nb;

    if (json_unpack (o, "{s:s, s:I}", "name", &name, "bits", &bits) == -1)
      return incoming_malformed ("PREPARE", err);
    nb = incoming_find_bitmap (d, name, strlen (name));
    if (nb == NULL || nb->bits == NULL)
      return error_set (err, EBADMSG, "bitmap '%s' did not arrive", name);
    if (bitmap_count_bits (nb->bits) != (uint64_t) bits)
      return error_set (err, EBADMSG, "bitmap '%s' arrived with %" PRIu64
                        " bits instead of %" PRIu64, name,
                        bitmap_count_bits (nb->bits), (uint64_t) bits);
  }
  for (size_t k = 0; k < d->nr_bitmaps; k++)
    incoming += d->bitmaps[k]->incoming;
  if (incoming != json_array_size (list))
    return error_set (err, EBADMSG, "%zu bitmaps arrived instead of %zu",
                      incoming, json_array_size (list));
  return 0;
}

/* Bitmaps that this side had before know nothing of what has come in. */
static void
distrust_own (struct drive *d)
{
  for (size_t i = 0; i < d->nr_bitmaps; i++) {
    struct named_bitmap *nb = d->bitmaps[i];

    if (!nb->incoming && nb->recording && nb->bits)
      bitmap_set (nb->bits, 0, d->size);
  }
}

static int
prepare_drive (struct session *s, size_t i, json_t *disk, uint64_t attempt,
               struct error *err)
{
  struct drive *d = s->drives[i];
  struct journal_record rec = *journal_get (d->journal);
  json_int_t generation;
  const char *lineage;

  if (json_unpack (disk, "{s:s, s:I}", "lineage", &lineage, "generation",
                   &generation) == -1 ||
      !uuid_parse (lineage, &rec.lineage))
    return incoming_malformed ("PREPARE", err);
  if (d->mode != DRIVE_INCOMING && d->mode != DRIVE_PREPARED)
    return error_set (err, EPROTO, "disk '%s' is %s; it cannot be prepared",
                      d->name, drive_mode_name (d->mode));
  /* A late one must not take the place of the one that will be committed. */
  if (uuid_equal (&rec.session, &s->id) && attempt < rec.attempt)
    return error_set (err, ESTALE, "attempt %" PRIu64 " for disk '%s' comes "
                      "after attempt %" PRIu64, attempt, d->name,
                      rec.attempt);
  if (check_counts (d, disk, err) == -1)
    return error_prefix (err, "disk '%s'", d->name);
  distrust_own (d);
  if (incoming_sync (s, i, err) == -1)
    return -1;
  if (qcow2_sync (d->store, err) == -1)
    return -1;
  rec.state = JOURNAL_PREPARED;
  rec.generation = generation;
  rec.session = s->id;
  rec.attempt = attempt;
  rec.peer = NULL;
  rec.together = s->nr;
  rec.coordinator = i == 0
                      ? NULL
                      : (char *) journal_path (s->drives[0]->journal);
  if (drive_record (d, &rec, err) == -1)
    return -1;
  drives_close (&d, 1, true);
  drive_set_mode (d, DRIVE_PREPARED, NULL);
  drives_open (&d, 1, true);
  return 0;
}

int
incoming_prepare (struct session *s, json_t *body, struct error *err)
{
  json_t *disks = json_object_get (body, "disks");
  json_int_t attempt;

  if (json_unpack (body, "{s:I}", "attempt", &attempt) == -1 ||
      json_array_size (disks) != s->nr)
    return incoming_malformed ("PREPARE", err);
  fence_drain (&s->fence);
  if (incoming_blobs_prepare (s->blobs, &s->id,
                              json_object_get (body, "attached"), err) == -1)
    return -1;
  for (size_t i = 0; i < s->nr; i++) {
    struct drive *d = s->drives[i];
    int r;

    pthread_mutex_lock (&d->control);
    r = prepare_drive (s, i, json_array_get (disks, i), attempt, err);
    pthread_mutex_unlock (&d->control);
    if (r == -1)
      return -1;
  }
  return 0;
}

/* ---- COMMIT ---- */

/* Serve the drive: its bitmaps record from here on.  Control held. */
static int
activate (struct drive *d, struct error *err)
{
  struct marks *marks = drive_build_marks (d, NULL, 0);

  if (marks == NULL)
    return error_set (err, ENOMEM, "%m");
  pthread_mutex_lock (&d->list);
  for (size_t i = 0; i < d->nr_bitmaps; i++)
    d->bitmaps[i]->incoming = false;
  pthread_mutex_unlock (&d->list);
  incoming_names_forget (d->state_dir);
  drives_close (&d, 1, true);
  marks = drive_swap_marks (d, marks);
  drive_set_mode (d, DRIVE_ACTIVE, NULL);
  drives_open (&d, 1, true);
  free (marks);
  return 0;
}

static int
commit_drive (struct drive *d, const struct uuid *session, uint64_t attempt,
              struct error *err)
{
  struct journal_record rec = *journal_get (d->journal);

  /* Long since done; the disk has even moved on. */
  if (uuid_equal (&rec.origin, session) && !uuid_equal (&rec.session, session))
    return 0;
  if (!uuid_equal (&rec.session, session) || rec.attempt != attempt)
    return error_set (err, EPROTO, "disk '%s' was not prepared by that "
                      "session and attempt", d->name);
  if (rec.state == JOURNAL_PREPARED) {
    if (incoming_blobs_publish (d->state_dir, session, err) == -1)
      return -1;
    rec.state = JOURNAL_ACTIVE;
    rec.stale = false;
    rec.origin = *session;
    rec.generation++;
    if (drive_record (d, &rec, err) == -1)
      return -1;
  }
  else if (rec.state != JOURNAL_ACTIVE)
    return error_set (err, EPROTO, "disk '%s' is %s; it cannot be committed",
                      d->name, journal_state_name (rec.state));
  /* A COMMIT that was interrupted before is finished here. */
  return d->mode == DRIVE_ACTIVE ? 0 : activate (d, err);
}

int
incoming_commit (struct incoming *in, const struct packet_header *h,
                 json_t *body, struct error *err)
{
  json_t *disks = json_object_get (body, "disks"), *o;
  json_int_t attempt;
  size_t i;

  if (json_unpack (body, "{s:I}", "attempt", &attempt) == -1 ||
      json_array_size (disks) == 0)
    return incoming_malformed ("COMMIT", err);
  /* The first disk is the coordinator: its record decides for all. */
  json_array_foreach (disks, i, o) {
    const char *name = json_string_value (o);
    struct incoming_drive *d = name ? incoming_find (in, name) : NULL;
    int r;

    if (d == NULL || d->drive->journal == NULL)
      return error_set (err, ENOENT, "the destination has no disk '%s'",
                        name ? name : "");
    pthread_mutex_lock (&d->drive->control);
    r = commit_drive (d->drive, &h->session, attempt, err);
    pthread_mutex_unlock (&d->drive->control);
    if (r == -1)
      return -1;
  }
  return 0;
}

/* ---- CANCEL ---- */

int
incoming_cancel (struct session *s, struct error *err)
{
  int r = 0;

  fence_drain (&s->fence);
  for (size_t i = 0; i < s->nr; i++) {
    struct drive *d = s->drives[i];

    pthread_mutex_lock (&d->control);
    if (d->mode == DRIVE_INCOMING || d->mode == DRIVE_PREPARED)
      if (incoming_take_drive (d, &s->id, err) == -1)
        r = -1;
    pthread_mutex_unlock (&d->control);
  }
  return r;
}
