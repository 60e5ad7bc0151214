/* nbdferry - migrations that a process before this one began
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "blobs.h"
#include "cleanup.h"
#include "description.h"
#include "log.h"
#include "outgoing-impl.h"
#include "revive.h"
#include "ship-map.h"

static struct drive *
find_drive (struct drive *const *drives, size_t nr,
            const struct description_disk *disk)
{
  for (size_t i = 0; i < nr; i++)
    if (strcmp (drives[i]->state_dir, disk->state_dir) == 0)
      return drives[i];
  return NULL;
}

/* Does that drive take part in the session?  The first one says so itself,
 * the others point to it.
 */
static bool
takes_part (struct drive *d, const struct description *all, size_t index)
{
  struct description own;
  bool r;

  if (index == 0)
    return true;
  if (description_read (d->state_dir, &own, NULL) != 1)
    return false;
  r = own.first && uuid_equal (&own.session, &all->session) &&
      strcmp (own.first, all->disks[0].state_dir) == 0;
  description_free (&own);
  return r;
}

/* Is there another session that the drive takes part in? */
static bool
is_elsewhere (struct drive *d, const struct description *all)
{
  struct description own;
  bool r;

  if (description_read (d->state_dir, &own, NULL) != 1)
    return false;
  r = !uuid_equal (&own.session, &all->session);
  description_free (&own);
  return r;
}

/* It has not been handed over since, nor taken over.  Nobody else runs yet. */
static bool
is_same_disk (const struct drive *d, const struct description_disk *disk)
{
  const struct journal_record *rec;

  if (d->journal == NULL) /* open for reading only */
    return false;
  rec = journal_get (d->journal);
  return uuid_equal (&rec->lineage, &disk->lineage) &&
         rec->generation == disk->generation;
}

/* The drives of that migration, all of them here and served from here: 1.
 * 0: it has ended; -1: not all are here.
 */
static int
find_drives (struct drive *const *drives, size_t nr,
             const struct description *d, struct drive **found)
{
  for (size_t i = 0; i < d->nr; i++) {
    found[i] = find_drive (drives, nr, &d->disks[i]);
    if (found[i] == NULL) {
      log_message ("a migration to %s was under way, and cannot go on: disk "
                   "'%s' (state in %s) is not here; start the server with all "
                   "disks of the migration, or begin a new one", d->uri,
                   d->disks[i].name, d->disks[i].state_dir);
      return -1;
    }
    if (drive_get_mode (found[i]) != DRIVE_ACTIVE ||
        is_elsewhere (found[i], d) ||
        !is_same_disk (found[i], &d->disks[i]))
      return 0;
  }
  return 1;
}

/* A description that stands for nothing any more. */
static void
forget (struct drive *const *drives, size_t nr, const struct description *d,
        struct drive *first)
{
  description_remove (first->state_dir, NULL);
  for (size_t i = 1; i < d->nr; i++) {
    struct drive *o = find_drive (drives, nr, &d->disks[i]);

    if (o && takes_part (o, d, i))
      description_remove (o->state_dir, NULL);
  }
}

/* The files that travel with it. */
static int
add_blobs (struct description *d, struct error *err)
{
  json_t *o;
  size_t i;

  if (json_array_size (d->attached) == 0)
    return 0;
  d->params.blobs = blobs_new ();
  if (d->params.blobs == NULL)
    return error_set (err, ENOMEM, "%m");
  json_array_foreach (d->attached, i, o)
    if (blobs_add (d->params.blobs,
                   json_string_value (json_object_get (o, "name")),
                   json_string_value (json_object_get (o, "path")), err) ==
        -1) {
      blobs_free (d->params.blobs);
      d->params.blobs = NULL;
      return -1;
    }
  return 0;
}

/* The migration that this drive's description describes. */
static struct outgoing *
restore_from (struct drive *const *drives, size_t nr, struct drive *first,
              struct description *d, struct migrate_params *params,
              void (*changed) (void *, const struct migrate_info *),
              void *opaque)
{
  CLEANUP_FREE struct drive **found = calloc (d->nr, sizeof found[0]);
  CLEANUP_FREE bool *fresh = calloc (d->nr, sizeof fresh[0]);
  struct outgoing *o = NULL;
  struct error err = { 0 };
  int r;

  if (found == NULL || fresh == NULL)
    return NULL;
  r = find_drives (drives, nr, d, found);
  if (r == 0)
    forget (drives, nr, d, first);
  if (r != 1)
    return NULL;
  if (add_blobs (d, &err) == -1) {
    log_message ("a migration to %s was under way, and cannot go on: %s",
                 d->uri, err.msg);
    return NULL;
  }
  for (size_t i = 0; i < d->nr; i++)
    fresh[i] = !takes_part (found[i], d, i);
  o = outgoing_go_on (found, fresh, d, changed, opaque, &err);
  if (o == NULL) {
    log_message ("a migration to %s was under way, and cannot go on: %s",
                 d->uri, err.msg);
    blobs_free (d->params.blobs);
    return NULL;
  }
  *params = d->params;
  params->blobs = NULL;
  params->overwrite = false;
  if (params->own_mapping)
    params->mapping = NULL;
  params->own_mapping = false;
  json_incref (params->mapping);
  log_message ("a migration to %s was under way; it goes on%s", d->uri,
               d->paused ? " when it is told to (migrate-recover)" : "");
  return o;
}

static bool
points_to_something (const struct description *own)
{
  struct description all;
  int r = description_read (own->first, &all, NULL);
  bool same;

  if (r != 1)
    return r == -1; /* whoever can read it may know */
  same = uuid_equal (&all.session, &own->session);
  description_free (&all);
  return same;
}

static bool
is_open (struct drive *const *drives, size_t nr, const char *state_dir)
{
  for (size_t i = 0; i < nr; i++)
    if (strcmp (drives[i]->state_dir, state_dir) == 0)
      return true;
  return false;
}

/* Maps that nobody will use, and pointers to nothing.  A drive whose migration
 * waits for other drives keeps its map.
 */
static void
drop_orphan (struct drive *const *drives, size_t nr, struct drive *d)
{
  struct description own;
  int r;

  r = description_read (d->state_dir, &own, NULL);
  if (r == 1 && own.first && !points_to_something (&own)) {
    description_remove (d->state_dir, NULL);
    description_free (&own);
    r = 0;
  }
  else if (r == 1) {
    if (own.first && !is_open (drives, nr, own.first))
      log_message ("disk '%s' was moving together with another one, whose "
                   "state is in %s, and cannot go on without it; start the "
                   "server with all disks of the migration, or begin a new "
                   "one", d->name, own.first);
    description_free (&own);
  }
  if (r == 0 && d->unheld)
    ship_map_remove (d);
}

struct outgoing *
outgoing_restore (struct drive *const *drives, size_t nr,
                  struct migrate_params *params,
                  void (*changed) (void *opaque, const struct migrate_info *),
                  void *opaque)
{
  struct outgoing *o = NULL;
  struct description d;
  struct error err;

  for (size_t i = 0; i < nr; i++) {
    int r = description_read (drives[i]->state_dir, &d, &err);

    if (r == -1)
      log_message ("a migration of disk '%s' cannot go on: %s",
                   drives[i]->name, err.msg);
    if (r != 1)
      continue;
    if (d.first == NULL && strcmp (d.disks[0].state_dir,
                                   drives[i]->state_dir) != 0)
      log_message ("%s/migration.json belongs to another disk",
                   drives[i]->state_dir);
    else if (d.first == NULL && o)
      log_message ("a migration of disk '%s' to %s was under way as well, and "
                   "cannot go on beside the other one", drives[i]->name,
                   d.uri);
    else if (d.first == NULL)
      o = restore_from (drives, nr, drives[i], &d, params, changed, opaque);
    description_free (&d);
  }
  for (size_t i = 0; i < nr; i++)
    drop_orphan (drives, nr, drives[i]);
  return o;
}
