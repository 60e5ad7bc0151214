/* nbdferry - bitmaps as they were left
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What is found is judged by four things: what the journal says, what the
 * sidecar says (enum qcow2_found, and in_use of each bitmap), the files'
 * times (store/trust.c), and whether the machine has been started since.
 * Each bitmap that is given up or widened gets a reason.
 */
#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "clear-note.h"
#include "incoming-names.h"
#include "load.h"
#include "points.h"
#include "ship-map.h"

struct load {
  struct drive *drive;
  const struct journal_record *was;
  enum qcow2_found found;
  bool created;              /* the journal is new */
  char why[TRUST_WHY_MAX];   /* of the drive's verdict */
  bool failed;               /* 'lastwrite' says that the store failed */
  bool lost;                 /* bits may be missing in armed regions */
  bool news;
};

/* Is the log missing, or damaged?  It may have said that the store failed. */
static bool
log_says_nothing (const struct drive *d)
{
  return (activity_was_flags (d->activity) & ACTIVITY_UNREADABLE) != 0;
}

/* After a crash of the machine, or of writes that the kernel lost, the map may
 * lack bits whose pages never reached the disk: then what the activity log has
 * as armed is dirty in everything that was recording.
 */
static bool
lost_bits (const struct load *l, const char *boot_id)
{
  const unsigned flags = activity_was_flags (l->drive->activity);

  if (l->found != QCOW2_UNCLEAN)
    return l->found == QCOW2_LOST;
  return l->failed || boot_id[0] == '\0' ||
         strcmp (boot_id, l->was->boot_id) != 0 ||
         (flags & (ACTIVITY_CLEARING | ACTIVITY_FAILED)) ||
         log_says_nothing (l->drive);
}

/* Has the store failed?  Then pages of the map may have been lost wherever, of
 * any bitmap, and long after their regions had been disarmed.
 */
static bool
has_failed (const struct load *l)
{
  return l->failed ||
         (activity_was_flags (l->drive->activity) & ACTIVITY_FAILED) != 0;
}

static void
dirty_armed (const struct load *l, struct named_bitmap *nb)
{
  struct drive *d = l->drive;
  struct range run;

  if (has_failed (l))
    bitmap_set (nb->bits, 0, d->size);
  for (uint64_t at = 0; activity_was_armed (d->activity, at, &run);
       at = run.end)
    bitmap_set (nb->bits, run.start, run.end - run.start);
}

/* Is 'nb' among those that lack bits then? */
static bool
lacks_bits (const struct load *l, const struct named_bitmap *nb)
{
  struct range run;

  if (l->lost && nb->bits && has_failed (l))
    return true;
  return l->lost && nb->bits &&
         (nb->recording ||
          (activity_was_flags (l->drive->activity) & ACTIVITY_EVERY)) &&
         activity_was_armed (l->drive->activity, 0, &run);
}

/* Say why the store has it as inconsistent. */
static void
explain (struct load *l, struct named_bitmap *nb, const struct qcow2_entry *e)
{
  struct drive *d = l->drive;

  l->news = true;
  /* We were killed last time, before it was noted. */
  if (d->verdict == TRUST_BROKEN && l->found != QCOW2_FOREIGN)
    drive_set_reason (d, nb, "%s", l->why);
  else if (d->size > 0 && (d->size - 1) >> nb->shift >> 32 > 0)
    drive_set_reason (d, nb, "the disk has grown to more than 2^32 granules");
  else if (l->found != QCOW2_FOREIGN)
    drive_set_reason (d, nb, "it was found so%s", l->created
                      ? ", and the journal, which would know why, was missing"
                      : ", and nothing says why");
  else if (!e->in_use)
    drive_set_reason (d, nb, "a program that knows no bitmaps has written to "
                      "bitmaps.qcow2");
  else if (!l->created && !l->was->clean)
    drive_set_reason (d, nb, "another program (QEMU) opened bitmaps.qcow2 for "
                      "writing after a daemon had died, and did not track "
                      "what it wrote");
  else
    drive_set_reason (d, nb, "another program (QEMU) had bitmaps.qcow2 open, "
                      "and did not close it in good order");
}

/* The bitmap in memory; freed with the drive as soon as it is listed. */
static struct named_bitmap *
list_bitmap (struct drive *d, const struct qcow2_entry *e, struct error *err)
{
  struct named_bitmap *nb = calloc (1, sizeof *nb);

  if (nb == NULL || (nb->name = strdup (e->name)) == NULL) {
    free (nb);
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  nb->shift = e->shift;
  nb->recording = e->autoflag && !e->inconsistent;
  nb->inconsistent = e->inconsistent;
  nb->persistent = true;
  nb->id = ++d->next_id;
  d->bitmaps[d->nr_bitmaps++] = nb;
  return nb;
}

/* Taken over when only a part had come: bitmaps that were here before know
 * nothing of that.
 */
static bool
is_patchwork (const struct load *l)
{
  return l->drive->taken_over && l->was->state == JOURNAL_INCOMING;
}

static int
load_bitmap (struct load *l, const struct qcow2_entry *e, bool incoming,
             struct error *err)
{
  struct drive *d = l->drive;
  struct named_bitmap *nb = list_bitmap (d, e, err);

  if (nb == NULL)
    return -1;
  nb->incoming = incoming;
  if (d->verdict == TRUST_BROKEN && nb->recording) {
    nb->inconsistent = true;
    nb->recording = false;
    return 0;
  }
  if (nb->inconsistent)
    return 0;
  nb->slot = e->bits;
  nb->bits = bitmap_new_over (qcow2_words (nb->slot), d->size, nb->shift,
                              err);
  if (nb->bits == NULL)
    return -1;
  if (lacks_bits (l, nb))
    dirty_armed (l, nb);
  if (nb->recording && is_patchwork (l))
    bitmap_set (nb->bits, 0, d->size);
  /* The store sees to it, unless QEMU made it larger: that leaves it clean. */
  if (nb->recording && d->verdict == TRUST_RESIZED &&
      d->size > l->was->trust.disk_size)
    bitmap_set (nb->bits, l->was->trust.disk_size,
                d->size - l->was->trust.disk_size);
  return 0;
}

static const char *
what_armed (const struct load *l)
{
  const struct drive *d = l->drive;
  struct range run;

  return has_failed (l) ||
         (activity_was_armed (d->activity, 0, &run) && run.start == 0 &&
          run.end == d->size) ? "all of it" : "what was written to last";
}

static const char *
what_happened (const struct load *l)
{
  char boot[37];

  if (l->found == QCOW2_LOST || has_failed (l))
    return "an error of the storage under bitmaps.qcow2";
  journal_boot_id (boot);
  if (boot[0] == '\0' || strcmp (boot, l->was->boot_id) != 0)
    return "the machine had gone down with the disk open";
  if (log_says_nothing (l->drive))
    return "a daemon had died and left no readable activity log";
  return "a daemon had died while a bitmap was being cleared";
}

/* Reasons from the journal, and new ones. */
static void
give_reasons (struct load *l)
{
  struct drive *d = l->drive;
  size_t nr;
  const struct qcow2_entry *e = qcow2_entries (d->store, &nr);

  reasons_from_json (d, l->was->reasons);
  for (size_t i = 0; i < nr; i++) {
    struct named_bitmap *nb = drive_find_bitmap (d, e[i].name);

    if (nb == NULL)
      continue;
    if (nb->inconsistent && !e[i].inconsistent) {
      drive_set_reason (d, nb, "%s", l->why);
      l->news = true;
    }
    else if (nb->inconsistent && nb->reason == NULL)
      explain (l, nb, &e[i]);
    else if (lacks_bits (l, nb)) {
      drive_set_reason (d, nb, "%s was made dirty after %s", what_armed (l),
                        what_happened (l));
      l->news = true;
    }
    else if (nb->recording && is_patchwork (l)) {
      drive_set_reason (d, nb, "all of it was made dirty, because a migration "
                        "to the disk had begun");
      l->news = true;
    }
    else if (nb->recording && d->verdict == TRUST_RESIZED) {
      drive_set_reason (d, nb, "%s", l->why);
      l->news = true;
    }
  }
}

/* Write the list without what was dropped, then free the bits of what is not
 * in it any more: until then they belong to the directory.
 */
static int
rewrite_list (struct drive *d, struct error *err)
{
  size_t nr, n = 0;
  const struct qcow2_entry *e = qcow2_entries (d->store, &nr);
  CLEANUP_FREE struct qcow2_bits **gone = calloc (nr, sizeof gone[0]);

  if (gone == NULL)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < nr; i++) {
    const struct named_bitmap *nb = ship_map_name (e[i].name)
                                      ? d->unheld
                                      : drive_find_bitmap (d, e[i].name);

    if (e[i].bits && (nb == NULL || nb->slot == NULL))
      gone[n++] = e[i].bits;
  }
  if (drive_write_list (d, err) == -1)
    return -1;
  while (n > 0)
    qcow2_free (d->store, gone[--n]);
  return 0;
}

/* Another program may have cleared bits, or made a bitmap anew under the same
 * name: then points mean nothing.  The same if we were killed when we had found
 * that, before it was noted.  And a disk that was taken over is another one, of
 * a new lineage: what builds upon a point of the old one could not be restored.
 */
static bool
may_lack_points (const struct load *l)
{
  return l->created || l->drive->taken_over || l->found == QCOW2_CREATED ||
         l->found == QCOW2_FOREIGN ||
         (l->found != QCOW2_CLEAN && l->was->clean);
}

/* The map of a migration that goes out.  If it cannot be relied upon, or its
 * disk is not served from here any more, or again only now, it goes.
 */
static int
load_ship_map (struct load *l, const struct qcow2_entry *e, bool *dropped,
               struct error *err)
{
  struct drive *d = l->drive;
  struct named_bitmap *nb;

  *dropped = true;
  if (d->mode != DRIVE_ACTIVE || d->taken_over || d->unheld)
    return 0;
  if (load_bitmap (l, e, false, err) == -1)
    return -1;
  nb = d->bitmaps[--d->nr_bitmaps];
  d->unheld = nb;
  if (nb->bits && nb->recording && ship_map_mend (d) == 0) {
    *dropped = false;
    return 0;
  }
  d->unheld = NULL;
  nb->slot = NULL; /* rewrite_list gives it back */
  drive_free_bitmap (d, nb);
  return 0;
}

/* Bitmaps of a migration that was not prepared, or all of them if the disk
 * had been given away (and may come back), are dropped.
 */
static int
load_bitmaps (struct load *l, struct error *err)
{
  struct drive *d = l->drive;
  json_auto_t *coming = incoming_names_read (d->state_dir, err);
  const struct qcow2_entry *entries;
  bool changed = false;
  size_t nr;

  if (coming == NULL)
    return -1;
  entries = qcow2_entries (d->store, &nr);
  d->bitmaps = calloc (nr ? nr : 1, sizeof d->bitmaps[0]);
  if (d->bitmaps == NULL)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < nr; i++) {
    bool in = incoming_names_has (coming, entries[i].name);

    if ((in && l->was->state == JOURNAL_INCOMING) ||
        (l->was->state == JOURNAL_GONE && !d->taken_over)) {
      changed = true;
      continue;
    }
    if (ship_map_name (entries[i].name)) {
      bool dropped;

      if (load_ship_map (l, &entries[i], &dropped, err) == -1)
        return -1;
      changed |= dropped;
      continue;
    }
    if (load_bitmap (l, &entries[i], in && d->mode == DRIVE_PREPARED,
                     err) == -1)
      return -1;
    changed |= d->bitmaps[d->nr_bitmaps - 1]->slot != entries[i].bits;
  }
  clear_note_mend (d);
  give_reasons (l);
  if (d->unheld == NULL)
    ship_map_forget (d);
  if (changed && rewrite_list (d, err) == -1)
    return -1;
  return points_load (d, may_lack_points (l), err);
}

/* Of a disk that is taken back the journal was written since its bitmaps were
 * left, perhaps in another boot; only 'lastwrite' tells.
 */
static void
forget_boot (const struct drive *d, const struct trust_left *left,
             struct journal_record *was)
{
  if (d->taken_over && !left->valid &&
      (was->state == JOURNAL_GONE || was->state == JOURNAL_DOUBT))
    was->boot_id[0] = '\0';
}

/* As if nothing had been under way at the crash: bitmaps have all that was, but
 * what a destination says that it holds does not.  Nor does that know of what
 * QEMU wrote through the sidecar, as bitmaps do.
 */
static bool
is_touched (const struct trust_case *c)
{
  struct trust_case strict = *c;
  char why[TRUST_WHY_MAX];
  enum trust_verdict v;

  strict.left.in_flight = false;
  v = trust_judge (&strict, why);
  return v == TRUST_BROKEN || v == TRUST_RESIZED || c->found == QCOW2_FOREIGN;
}

int
drive_load (struct drive *d, bool created, bool *news, struct error *err)
{
  struct journal_record was = *journal_get (d->journal);
  struct load l = {
    .drive = d, .was = &was, .created = created,
  };
  struct trust_case c = {
    .disk_path = d->path, .state_dir = d->state_dir,
    .was = l.was, .no_journal = created,
  };
  CLEANUP_FREE char *path = NULL, *log = NULL;
  char boot[37];
  size_t nr;

  if (asprintf (&path, "%s/lastwrite", d->state_dir) == -1)
    path = NULL;
  if (asprintf (&log, "%s/activity", d->state_dir) == -1)
    log = NULL;
  if (path == NULL || log == NULL)
    return error_set (err, ENOMEM, "%m");
  /* The look comes first: to open the sidecar changes it. */
  if (trust_look (&c, d->disk, d->sidecar, err) == -1)
    return -1;
  journal_boot_id (boot);
  d->trust = trust_open (path, boot, &c.left, err);
  if (d->trust == NULL)
    return -1;
  d->store = qcow2_open (d->sidecar, d->data_file, d->size,
                         trust_sidecar_is_as_closed (&c), &l.found, err);
  if (d->store == NULL)
    return -1;
  qcow2_report_lost (d->store, &d->store_failed);
  /* There is nobody else to tell: the list has nothing to give a reason for. */
  if (l.found == QCOW2_CREATED && was.trust.known)
    drive_log ("disk '%s': %s was missing, and any bitmaps with it; an empty "
               "one was made", d->name, d->sidecar);
  forget_boot (d, &c.left, &was);
  c.found = l.found;
  qcow2_entries (d->store, &nr);
  c.no_bitmaps = nr == 0;
  l.failed = c.left.failed;
  d->verdict = trust_judge (&c, l.why);
  d->touched = is_touched (&c);
  d->found_clean = l.found == QCOW2_CLEAN && l.was->clean &&
                   d->verdict != TRUST_BROKEN && d->verdict != TRUST_RESIZED;
  d->activity = activity_open (log, d->size, err);
  if (d->activity == NULL)
    return -1;
  l.lost = lost_bits (&l, boot);
  if (load_bitmaps (&l, err) == -1)
    return -1;
  *news = l.news;
  return 0;
}

int
drive_start_log (struct drive *d, struct error *err)
{
  const bool power = d->durability == DURABILITY_POWER;

  if (qcow2_sync (d->store, err) == -1)
    return -1;
  return activity_start (d->activity, power ? 0 : ACTIVITY_UNLOGGED, err);
}
