/* nbdferry - the source of a migration: from outside
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Making it and beginning, and what may be asked of it from any thread.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "description.h"
#include "held.h"
#include "mapping.h"
#include "resume.h"
#include "ship-map.h"

/* ---- from outside ---- */

static void
free_outgoing (struct outgoing *o)
{
  for (size_t i = 0; o->shipments && i < o->nr; i++)
    if (o->shipments[i].drive)
      shipment_destroy (&o->shipments[i]);
  for (size_t i = 0; o->departures && i < o->nr; i++)
    departure_destroy (&o->departures[i]);
  mirror_free (o->mirror);
  blobs_free (o->blobs);
  stop_destroy (&o->cancel);
  stop_destroy (&o->quit);
  pthread_mutex_destroy (&o->writing);
  pthread_mutex_destroy (&o->lock);
  pthread_cond_destroy (&o->cond);
  json_decref (o->hints);
  free (o->shipments);
  free (o->departures);
  free (o->drives);
  free (o->uri);
  free (o->new_uri);
  free (o);
}

static struct outgoing *
alloc_outgoing (struct drive *const *drives, size_t nr, const char *uri,
                struct error *err)
{
  struct outgoing *o = calloc (1, sizeof *o);

  if (o == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  pthread_mutex_init (&o->writing, NULL);
  pthread_mutex_init (&o->lock, NULL);
  pthread_cond_init (&o->cond, NULL);
  o->cancel.fd = o->quit.fd = -1;
  o->nr = nr;
  o->uri = strdup (uri);
  o->drives = calloc (nr, sizeof o->drives[0]);
  o->shipments = calloc (nr, sizeof o->shipments[0]);
  o->departures = calloc (nr, sizeof o->departures[0]);
  if (!o->uri || !o->drives || !o->shipments || !o->departures) {
    error_set (err, ENOMEM, "%m");
    goto fail;
  }
  if (stop_init (&o->cancel, err) == -1 || stop_init (&o->quit, err) == -1)
    goto fail;
  for (size_t i = 0; i < nr; i++)
    if (departure_init (&o->departures[i], drives[i], &o->quit, err) == -1)
      goto fail;
  memcpy (o->drives, drives, nr * sizeof o->drives[0]);
  drives_sort (o->drives, nr);
  o->mirror = mirror_new (o, err);
  if (o->mirror == NULL)
    goto fail;
  return o;

 fail:
  free_outgoing (o);
  return NULL;
}

/* What the drive is called over there; NULL: the URI and the mapping do not
 * agree.
 */
static const char *
name_there (const struct outgoing *o, const struct drive *d,
            const char *export, const json_t *mapping, struct error *err)
{
  const char *alias = mapping_disk (mapping, d->name);

  if (export[0] && alias && strcmp (export, alias) != 0) {
    error_set (err, EINVAL, "%s names the disk '%s', but block-bitmap-mapping "
               "calls it '%s'", o->uri, export, alias);
    return NULL;
  }
  return export[0] ? export : alias ? alias : d->name;
}

static int
load_shipments (struct outgoing *o, struct drive *const *drives,
                json_t *mapping, struct error *err)
{
  CLEANUP_FREE char *export = client_uri_export (o->uri, err);

  if (export == NULL)
    return -1;
  if (export[0] != '\0' && o->nr != 1)
    return error_set (err, EINVAL, "%s names one disk, but %zu are to move; "
                      "name only the server", o->uri, o->nr);
  for (size_t i = 0; i < o->nr; i++) {
    const char *name = name_there (o, drives[i], export, mapping, err);

    if (name == NULL)
      return -1;
    for (size_t k = 0; k < i; k++)
      if (strcmp (o->shipments[k].name, name) == 0)
        return error_set (err, EINVAL, "two disks would be called '%s' at "
                          "the destination", name);
    if (atomic_load (&drives[i]->store_failed))
      return error_set (err, EIO, "disk '%s' has lost bits of its bitmaps to "
                        "an error of the storage under %s; restart the server "
                        "before it is moved", drives[i]->name,
                        drives[i]->state_dir);
    if (drives[i]->journal == NULL)
      return error_set (err, EROFS, "disk '%s' is open for reading only, and "
                        "cannot be handed over", drives[i]->name);
    if (shipment_init (&o->shipments[i], drives[i], i, o->uri, name, err) ==
        -1)
      return -1;
    o->shipments[i].mapping = json_incref (mapping);
    shipment_mark_all (&o->shipments[i]);
  }
  return 0;
}

/* Begin to work: the shipments are there. */
static int
start (struct outgoing *o, const struct migrate_params *params,
       void (*changed) (void *opaque, const struct migrate_info *),
       void *opaque, struct error *err)
{
  int r;

  o->changed = changed;
  o->opaque = opaque;
  o->params = *params;
  o->params.mapping = NULL; /* the shipments have it */
  o->params.blobs = NULL;   /* o->blobs */
  o->started_ns = o->sample_ns = now_ns ();
  for (size_t i = 0; i < o->nr; i++) {
    o->info.total += o->drives[i]->size;
    gate_reset_longest (&o->drives[i]->writes);
    throttle_reset_longest (&o->drives[i]->throttle);
  }
  r = pthread_create (&o->thread, NULL, outgoing_lead, o);
  return r == 0 ? 0 : error_set (err, r, "start a thread: %m");
}

struct outgoing *
outgoing_start (struct drive *const *drives, size_t nr, const char *uri,
                const struct migrate_params *params,
                void (*changed) (void *opaque, const struct migrate_info *),
                void *opaque, struct error *err)
{
  struct outgoing *o = alloc_outgoing (drives, nr, uri, err);

  if (o == NULL)
    return NULL;
  uuid_new (&o->session);
  o->blobs = params->blobs;
  o->info.status = MIGRATE_SETUP;
  if (load_shipments (o, drives, params->mapping, err) == 0 &&
      start (o, params, changed, opaque, err) == 0)
    return o;
  o->blobs = NULL; /* still the caller's */
  free_outgoing (o);
  return NULL;
}

/* What is known to be held stands in the drive's map, unless it is another's
 * or none.
 */
static int
restore_shipment (struct shipment *s, struct drive *d, uint32_t index,
                  const struct description *all, bool fresh,
                  struct error *err)
{
  unsigned shift;

  if (shipment_init (s, d, index, all->uri, all->disks[index].target, err) ==
      -1)
    return -1;
  s->mapping = json_incref (all->params.mapping);
  shift = bitmap_shift (s->ship);
  if ((fresh || d->unheld == NULL || d->unheld->bits == NULL ||
       d->unheld->shift != shift) && ship_map_make (d, shift, err) == -1)
    return -1;
  held_lost (s);
  return drive_set_ship (d, s->ship, err);
}

struct outgoing *
outgoing_go_on (struct drive *const *drives, const bool *fresh,
                const struct description *d,
                void (*changed) (void *opaque, const struct migrate_info *),
                void *opaque, struct error *err)
{
  struct outgoing *o = alloc_outgoing (drives, d->nr, d->uri, err);
  struct error why;

  if (o == NULL)
    return NULL;
  o->session = d->session;
  o->epoch = d->epoch;
  o->attempt = o->reserved = d->attempt;
  o->restored = o->tracked = o->described = o->connected = true;
  o->pause_asked = d->paused;
  o->blobs = d->params.blobs;
  o->info.status = MIGRATE_PAUSED;
  error_set (&why, ESHUTDOWN, "the server was started again");
  outgoing_explain_pause (o, &why);
  memcpy (o->info.error, why.msg, sizeof o->info.error);
  for (size_t i = 0; i < d->nr; i++)
    if (restore_shipment (&o->shipments[i], drives[i], i, d, fresh[i], err) ==
        -1)
      goto fail;
  if (start (o, &d->params, changed, opaque, err) == 0)
    return o;

 fail:
  for (size_t i = 0; i < d->nr; i++)
    drive_drop_ship (drives[i]);
  o->blobs = NULL; /* still the description's */
  free_outgoing (o);
  return NULL;
}

void
outgoing_set_params (struct outgoing *o, const struct migrate_params *params)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  /* Channels and compression are those of the start. */
  o->params.max_bandwidth = params->max_bandwidth;
  o->params.downtime_limit = params->downtime_limit;
  o->params.copy_mode = params->copy_mode;
  mirror_set_wanted (o->mirror, params->copy_mode == MIGRATE_WRITE_BLOCKING);
  if (o->running) {
    engine_set_bandwidth (o->engine, params->max_bandwidth);
    outgoing_give_way (o);
  }
}

void
outgoing_interrupt (struct outgoing *o)
{
  struct error err;

  stop_throw (&o->cancel);
  error_set (&err, ECANCELED, "the connection is given up");
  pthread_mutex_lock (&o->lock);
  if (o->running)
    engine_fail (o->engine, &err);
  pthread_mutex_unlock (&o->lock);
}

int
outgoing_cancel (struct outgoing *o, struct error *err)
{
  pthread_mutex_lock (&o->lock);
  if (o->let_go) {
    pthread_mutex_unlock (&o->lock);
    return error_set (err, EBUSY, "the disk has been handed over already; it "
                      "cannot be taken back by a cancel");
  }
  if (o->ended_ns == 0) {
    o->cancelled = true;
    o->info.status = MIGRATE_CANCELLING;
  }
  pthread_mutex_unlock (&o->lock);
  outgoing_interrupt (o);
  outgoing_tell (o);
  return 0;
}

void
outgoing_stop (struct outgoing *o)
{
  stop_throw (&o->quit);
  outgoing_wake (o);
  outgoing_interrupt (o);
}

void
outgoing_wake (struct outgoing *o)
{
  for (size_t i = 0; i < o->nr; i++)
    departure_wake (&o->departures[i]);
}

bool
outgoing_has_let_go (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  return o->let_go;
}

void
outgoing_join (struct outgoing *o)
{
  if (!o->joined)
    pthread_join (o->thread, NULL);
  o->joined = true;
}

void
outgoing_free (struct outgoing *o)
{
  outgoing_join (o);
  free_outgoing (o);
}

bool
outgoing_ended (struct outgoing *o)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  return o->ended_ns != 0;
}
