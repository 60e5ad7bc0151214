/* nbdferry - a destination's disk takes the size of the source's
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What depends on the size is the store, the activity log and the bits in
 * memory: they are closed and opened again, as a daemon that ends and starts
 * would do it.  The new ones are made in a drive of their own, which nobody
 * sees, and then put in place at one instant, because the control socket
 * looks at the list of bitmaps whenever it likes.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "drive.h"
#include "keeper.h"
#include "load.h"
#include "source.h"

/* Move what depends on the size, and what it is made with, between two drives.
 * 'to' has nothing of it.
 */
static void
move (struct drive *to, struct drive *from)
{
  to->size = from->size;
  to->disk = from->disk;
  to->mode = from->mode;
  to->store = from->store;
  to->journal = from->journal;
  to->trust = from->trust;
  to->verdict = from->verdict;
  to->touched = from->touched;
  to->found_clean = from->found_clean;
  to->activity = from->activity;
  to->unsure = from->unsure;
  to->bitmaps = from->bitmaps;
  to->nr_bitmaps = from->nr_bitmaps;
  to->next_id = from->next_id;
  to->list_version = from->list_version + 1;
  from->store = NULL;
  from->trust = NULL;
  from->activity = NULL;
  from->unsure = NULL;
  from->bitmaps = NULL;
  from->nr_bitmaps = 0;
}

/* Close what there is; what remains is a list of transient bitmaps, which is
 * returned.
 */
static int
close_all (struct drive *d, struct named_bitmap ***list, size_t *nr,
           struct error *err)
{
  int r = drive_close_store (d, err);
  size_t n = 0;

  activity_close (d->activity);
  trust_close (d->trust);
  d->activity = NULL;
  d->trust = NULL;
  for (size_t i = 0; i < d->nr_bitmaps; i++) {
    struct named_bitmap *nb = d->bitmaps[i];

    if (nb->persistent || nb->incoming)
      drive_free_bitmap (d, nb);
    else
      d->bitmaps[n++] = nb;
  }
  *list = d->bitmaps;
  *nr = n;
  d->bitmaps = NULL;
  d->nr_bitmaps = 0;
  return r;
}

static int
open_all (struct drive *d, uint64_t size, struct error *err)
{
  struct journal_record rec = *journal_get (d->journal);
  int r;

  d->size = size;
  rec.reasons = NULL;
  if (source_prepare (d, err) == -1)
    return -1;
  r = drive_open_store (d, false, &rec, err);
  if (r == 0) {
    rec.clean = false;
    r = journal_write (d->journal, &rec, err);
  }
  json_decref (rec.reasons);
  return r;
}

/* Transient bitmaps can be had in another size only as all dirty. */
static int
add_transient (struct drive *d, struct named_bitmap **list, size_t nr,
               struct error *err)
{
  struct named_bitmap **all =
    reallocarray (d->bitmaps, d->nr_bitmaps + nr + 1, sizeof all[0]);

  if (all == NULL)
    return error_set (err, ENOMEM, "%m");
  d->bitmaps = all;
  for (size_t i = 0; i < nr; i++) {
    if (list[i]->bits) {
      struct bitmap *bits = bitmap_new (d->size, list[i]->shift, err);

      if (bits == NULL)
        return -1;
      bitmap_free (list[i]->bits);
      list[i]->bits = bits;
      bitmap_set (bits, 0, d->size);
    }
    d->bitmaps[d->nr_bitmaps++] = list[i];
    list[i] = NULL;
  }
  return 0;
}

/* Shut down and start anew, in 't', which nobody knows. */
static int
change (struct drive *t, uint64_t size, struct error *err)
{
  struct named_bitmap **transient;
  uint64_t was = t->size;
  size_t nr;
  int r = close_all (t, &transient, &nr, err);

  if (r == 0 && open_all (t, size, err) == 0)
    r = add_transient (t, transient, nr, err);
  else if (r == 0) {
    struct error again;
    struct named_bitmap **none;
    size_t n;

    /* As it was, if that is possible. */
    r = -1;
    if (t->store)
      drive_close_store (t, NULL);
    close_all (t, &none, &n, NULL);
    free (none);
    if (open_all (t, was, &again) == -1 ||
        add_transient (t, transient, nr, &again) == -1)
      error_prefix (err, "%s cannot be opened again (%s)", t->sidecar,
                    again.msg);
  }
  for (size_t i = 0; i < nr; i++)
    if (transient[i])
      drive_free_bitmap (t, transient[i]);
  free (transient);
  return r;
}

/* 't' has no disk and no journal of its own. */
static void
free_shadow (struct drive *t)
{
  t->disk = NULL;
  t->journal = NULL;
  drive_free (t);
}

/* Control held, the keeper does not run. */
static int
resize (struct drive *d, uint64_t size, struct error *err)
{
  const struct drive_options opt = {
    .name = d->name, .path = d->path, .state_dir = d->state_dir,
    .durability = d->durability,
  };
  struct drive *t = drive_alloc (&opt, err);
  struct marks *marks;
  int r;

  if (t == NULL)
    return -1;
  drives_close (&d, 1, true);
  marks = drive_swap_marks (d, NULL); /* nobody writes */
  pthread_mutex_lock (&d->list);
  move (t, d);
  pthread_mutex_unlock (&d->list);
  free (marks);

  r = change (t, size, err);
  marks = drive_build_marks (t, NULL, 0);
  if (marks == NULL && r == 0)
    r = error_set (err, ENOMEM, "%m");

  pthread_mutex_lock (&d->list);
  move (d, t);
  pthread_mutex_unlock (&d->list);
  json_decref (d->points); /* of the file, which may be another now */
  d->points = NULL;
  if (d->store)
    qcow2_report_lost (d->store, &d->store_failed);
  if (atomic_load (&t->store_failed))
    atomic_store (&d->store_failed, true);
  drive_swap_marks (d, marks);
  drives_open (&d, 1, true);
  free_shadow (t);
  return r;
}

int
drive_resize (struct drive *d, uint64_t size, struct error *err)
{
  bool kept = d->keeper != NULL;
  int r = 0;

  keeper_stop (d); /* it may wait for the control lock */
  pthread_mutex_lock (&d->control);
  if (d->mode != DRIVE_INCOMING || d->store == NULL ||
      size > d->disk->size)
    r = error_set (err, EINVAL, "disk '%s' cannot be made %ju bytes",
                   d->name, (uintmax_t) size);
  else if (size != d->size)
    r = resize (d, size, err);
  pthread_mutex_unlock (&d->control);
  if (kept && d->activity && drive_start (d, r == 0 ? err : NULL) == -1)
    r = -1;
  return r;
}
