/* nbdferry - opening and closing a drive, and its points in time
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A drive that is active, or a destination, has its sidecar open; one that was
 * handed over leaves it alone, in_use and all, because its bits say nothing any
 * more.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include "cleanup.h"
#include "clock.h"
#include "drive.h"
#include "keeper.h"
#include "load.h"
#include "remote.h"
#include "rounded.h"
#include "source.h"
#include "takeover.h"
#include "unsure.h"

/* ---- opening ---- */

/* Judge, load, and record what came of it, in this order: killed anywhere
 * between, the next open comes to the same judgement.  The reasons are recorded
 * at once, since 'lastwrite' will no longer say them; not in the name of this
 * boot, though, if the crash was in another one.
 */
int
drive_open_store (struct drive *d, bool created, struct journal_record *rec,
                  struct error *err)
{
  const struct journal_record *was = journal_get (d->journal);
  bool given_up;
  char boot[37];

  if (drive_load (d, created, &given_up, err) == -1)
    return -1;
  /* A server that took what the last daemon wrote, and can't keep it, is
   * better found out now.
   */
  if (!d->found_clean && d->disk->ops->times == NULL &&
      d->disk->ops->flush (d->disk) == -1)
    return error_set (err, errno, "flush %s: %m", d->path);
  rec->reasons = reasons_to_json (d);
  journal_boot_id (boot);
  /* The source must send all of it again, and another one must ask before it
   * overwrites it.
   */
  rec->stale = rec->state != JOURNAL_ACTIVE && (rec->stale || d->touched);
  if ((given_up || rec->stale != was->stale) &&
      (was->clean || strcmp (was->boot_id, boot) == 0)) {
    struct journal_record same = *was;

    same.reasons = rec->reasons;
    same.stale = rec->stale;
    if (journal_write (d->journal, &same, err) == -1)
      return -1;
  }
  if (drive_start_log (d, err) == -1 ||
      trust_record (d->disk, d->sidecar, false, &rec->trust, err) == -1)
    return -1;
  trust_start (d->trust, boot, rec->trust.disk_mtime);
  return 0;
}

/* Of a device that is larger than the disk that came to it, so much is the
 * disk.
 */
static int
serve_part (struct drive *d, const struct journal_record *rec,
            struct error *err)
{
  if (rec->served_size > d->disk->size)
    return error_set (err, EINVAL, "%s has %" PRIu64 " bytes, but the disk on "
                      "it has %" PRIu64, d->path, d->disk->size,
                      rec->served_size);
  if (rec->served_size > 0)
    d->size = rec->served_size;
  return 0;
}

/* A device outlives the machine's end, but what stands beside it in /dev does
 * not: the bitmaps, and that the disk has been handed over.
 */
static void
warn_of_memory (const struct drive *d)
{
  struct statfs fs;

  if (d->disk->fixed_size && !remote_is_uri (d->path) &&
      statfs (d->state_dir, &fs) == 0 && fs.f_type == TMPFS_MAGIC)
    drive_log ("disk '%s': what is kept of it, in %s, is in memory and goes "
               "when the machine is started again; give it another state=DIR",
               d->name, d->state_dir);
}

static int
open_state (struct drive *d, const struct drive_options *opt,
            struct error *err)
{
  CLEANUP_FREE char *path = NULL;
  struct journal_record rec;
  bool created;
  int r;

  if (mkdir (d->state_dir, 0700) == -1 && errno != EEXIST)
    return error_set (err, errno, "create the state directory %s: %m",
                      d->state_dir);
  warn_of_memory (d);
  if (asprintf (&path, "%s/journal", d->state_dir) == -1) {
    path = NULL;
    return error_set (err, ENOMEM, "%m");
  }
  d->journal = journal_open (path, &created, err);
  if (d->journal == NULL)
    return -1;
  rec = *journal_get (d->journal); /* its strings stay the journal's */
  rec.reasons = NULL;
  if (opt->takeover) {
    r = takeover_check (&rec, opt->force, err);
    takeover_record (&rec);
    d->mode = DRIVE_ACTIVE;
    d->taken_over = true;
  }
  else
    r = drive_decide_mode (d, &rec, opt->incoming, err);
  if (r == -1)
    return error_prefix (err, "%s", path);
  if (serve_part (d, &rec, err) == -1 || source_prepare (d, err) == -1)
    return -1;
  r = d->mode == DRIVE_GONE ? 0 : drive_open_store (d, created, &rec, err);
  if (r == 0) {
    rec.clean = false;
    r = journal_write (d->journal, &rec, err);
  }
  json_decref (rec.reasons);
  return r;
}

/* The store goes, and the leaves of its bitmaps with it. */
static void
drop_leaves (struct named_bitmap *nb)
{
  if (nb == NULL || !nb->persistent)
    return;
  bitmap_free (nb->bits);
  nb->bits = NULL;
  nb->slot = NULL;
}

struct drive *
drive_alloc (const struct drive_options *opt, struct error *err)
{
  /* Aligned for the shards of its gates. */
  struct drive *d = aligned_alloc (_Alignof (struct drive), sizeof *d);

  if (d == NULL)
    goto nomem;
  memset (d, 0, sizeof *d);
  uuid_new (&d->self);
  d->clearing_fd = -1;
  gate_init (&d->writes);
  gate_init (&d->reads);
  throttle_init (&d->throttle);
  pthread_mutex_init (&d->control, NULL);
  pthread_mutex_init (&d->list, NULL);
  pthread_mutex_init (&d->flush, NULL);
  d->durability = opt->durability;
  d->name = strdup (opt->name);
  d->path = strdup (opt->path);
  if (opt->state_dir)
    d->state_dir = strdup (opt->state_dir);
  else if (asprintf (&d->state_dir, "%s.ferry", opt->path) == -1)
    d->state_dir = NULL;
  if (d->state_dir && asprintf (&d->sidecar, "%s/bitmaps.qcow2",
                                d->state_dir) == -1)
    d->sidecar = NULL;
  if (d->state_dir)
    d->data_file = source_data_file (d->path, d->state_dir);
  if (d->name && d->path && d->sidecar && d->data_file)
    return d;
  drive_free (d);
 nomem:
  error_set (err, ENOMEM, "%m");
  return NULL;
}

/* What was closed in good order stays so when it could not be opened: nothing
 * was served, but in_use was set.
 */
static void
close_as_found (struct drive *d)
{
  struct journal_record rec = *journal_get (d->journal);
  struct qcow2 *store = d->store;

  for (size_t i = 0; i < d->nr_bitmaps; i++)
    drop_leaves (d->bitmaps[i]);
  drop_leaves (d->unheld);
  d->store = NULL;
  if (qcow2_close (store, NULL) == -1 ||
      trust_record (d->disk, d->sidecar, true, &rec.trust, NULL) == -1)
    return;
  rec.clean = true;
  journal_write (d->journal, &rec, NULL);
}

struct drive *
drive_open (const struct drive_options *opt, struct error *err)
{
  struct drive *d = drive_alloc (opt, err);

  if (d == NULL)
    return NULL;
  d->disk = source_open (d, opt, err);
  if (d->disk == NULL)
    goto fail;
  if (rounded_cut (d, err) == -1)
    goto fail;
  d->size = d->disk->size;
  if (opt->create > 0 && d->size != opt->create) {
    error_set (err, EINVAL, "%s has %" PRIu64 " bytes, not the %" PRIu64
               " of size=; leave size= out to serve it as it is",
               d->path, d->size, opt->create);
    goto fail;
  }
  if (opt->incoming && d->disk->readonly) {
    error_set (err, EROFS, "%s cannot be written, so it cannot be the "
               "destination of a migration", d->path);
    goto fail;
  }
  /* What can't be written is served without bitmaps. */
  if (!d->disk->readonly && open_state (d, opt, err) == -1)
    goto fail;
  if (unsure_open (d, err) == -1)
    goto fail;
  d->marks = drive_build_marks (d, NULL, 0);
  if (d->marks == NULL) {
    error_set (err, ENOMEM, "%m");
    goto fail;
  }
  return d;

 fail:
  if (d->store && d->found_clean)
    close_as_found (d);
  drive_free (d);
  return NULL;
}

/* ---- closing ---- */

static int
settle (struct disk *disk)
{
  return disk->ops->settle ? disk->ops->settle (disk)
                           : disk->ops->flush (disk);
}

/* The store as a clean close leaves it.  Control lock held, nobody inside. */
int
drive_close_store (struct drive *d, struct error *err)
{
  json_auto_t *reasons = reasons_to_json (d);
  struct journal_record rec;
  struct qcow2 *store = d->store;
  bool ours = !drive_is_elsewhere (d);

  d->store = NULL;
  for (size_t i = 0; i < d->nr_bitmaps; i++)
    drop_leaves (d->bitmaps[i]);
  drop_leaves (d->unheld);
  if (store == NULL)
    return 0;
  if (!ours) {
    qcow2_abandon (store);
    return 0;
  }
  /* The disk's times too must be durable before they are recorded. */
  if (settle (d->disk) == -1) {
    qcow2_abandon (store);
    return error_set (err, errno, "flush %s: %m", d->path);
  }
  if (drive_failure (d)) {
    /* It stays in use, and the next open takes it for what it is. */
    qcow2_abandon (store);
    return error_set (err, EIO, "%s", drive_failure (d));
  }
  if (qcow2_close (store, err) == -1 ||
      activity_finish (d->activity, err) == -1)
    return -1;
  rec = *journal_get (d->journal);
  if (trust_record (d->disk, d->sidecar, true, &rec.trust, err) == -1)
    return -1;
  rec.clean = true;
  rec.reasons = reasons;
  return journal_write (d->journal, &rec, err);
}

void
drive_hurry (struct drive *d, uint64_t deadline)
{
  gate_stop (&d->writes);
  gate_stop (&d->reads);
  throttle_stop (&d->throttle);
  if (d->disk->ops->hurry)
    d->disk->ops->hurry (d->disk, deadline);
}

int
drive_shutdown (struct drive *d, struct error *err)
{
  struct marks *marks;
  int r, lost = 0;

  drive_hurry (d, now_ns () + DRIVE_HURRY);
  keeper_stop (d);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);
  gate_close (&d->writes);
  gate_close (&d->reads);
  /* What the server has lost must be found out while bitmaps record it. */
  if (d->unsure && d->mode == DRIVE_ACTIVE && unsure_flush (d) == -1)
    lost = errno;
  marks = drive_swap_marks (d, NULL);
  free (marks);
  drive_end_hooks (d, "the daemon ends");
  pthread_mutex_lock (&d->list);
  r = drive_close_store (d, err);
  if (r == 0 && lost)
    r = error_set (err, lost, "flush %s: %s", d->path, strerror (lost));
  pthread_mutex_unlock (&d->list);
  gate_open (&d->reads);
  gate_open (&d->writes);
  return r;
}

void
drive_free (struct drive *d)
{
  if (d == NULL)
    return;
  keeper_stop (d);
  free (d->marks);
  unsure_close (d);
  free (d->hooks);
  json_decref (d->points);
  for (size_t i = 0; i < d->nr_bitmaps; i++) {
    d->bitmaps[i]->slot = NULL; /* the store keeps its clusters */
    drive_free_bitmap (d, d->bitmaps[i]);
  }
  free (d->bitmaps);
  if (d->unheld) {
    d->unheld->slot = NULL;
    drive_free_bitmap (d, d->unheld);
  }
  if (d->clearing_fd >= 0)
    close (d->clearing_fd);
  if (d->store)
    qcow2_abandon (d->store);
  if (d->journal)
    journal_close (d->journal);
  if (d->remote)
    d->remote->ops->close (d->remote);
  if (d->disk)
    d->disk->ops->close (d->disk);
  trust_close (d->trust);
  activity_close (d->activity);
  free (d->store_reason);
  pthread_mutex_destroy (&d->control);
  pthread_mutex_destroy (&d->list);
  pthread_mutex_destroy (&d->flush);
  gate_destroy (&d->writes);
  gate_destroy (&d->reads);
  throttle_destroy (&d->throttle);
  free (d->sidecar);
  free (d->data_file);
  free (d->name);
  free (d->path);
  free (d->state_dir);
  free (d);
}

/* ---- points in time ---- */

static int
by_address (const void *a, const void *b)
{
  uintptr_t x = (uintptr_t) *(struct drive *const *) a;
  uintptr_t y = (uintptr_t) *(struct drive *const *) b;

  return x < y ? -1 : x > y;
}

void
drives_sort (struct drive **drives, size_t nr)
{
  qsort (drives, nr, sizeof drives[0], by_address);
}

void
drives_lock (struct drive *const *drives, size_t nr)
{
  for (size_t i = 0; i < nr; i++)
    pthread_mutex_lock (&drives[i]->control);
}

void
drives_unlock (struct drive *const *drives, size_t nr)
{
  while (nr > 0)
    pthread_mutex_unlock (&drives[--nr]->control);
}

void
drives_close (struct drive *const *drives, size_t nr, bool reads)
{
  for (size_t i = 0; i < nr; i++) {
    gate_close (&drives[i]->writes);
    if (reads)
      gate_close (&drives[i]->reads);
  }
}

uint64_t
drives_open (struct drive *const *drives, size_t nr, bool reads)
{
  uint64_t longest = 0;

  while (nr-- > 0) {
    uint64_t ns;

    if (reads)
      gate_open (&drives[nr]->reads);
    ns = gate_open (&drives[nr]->writes);
    if (ns > longest)
      longest = ns;
  }
  return longest;
}
