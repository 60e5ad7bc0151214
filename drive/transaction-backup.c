/* nbdferry - operations on bitmaps: backups begin and end
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A backup that begins has a hook, which is asked before each write from the
 * instant on, and mostly a bitmap, which gets a successor: what is written
 * after the instant is marked in both, the successor first.  So the bitmap
 * always has all bits, and whatever happens nothing needs to be put back.
 *
 * When the backup has failed the successor is dropped.  When it was a success
 * the bitmap is to have what the successor has: this is a clear as of the
 * instant at which the backup began, whose companion is the successor, and
 * transaction.c says why that is exact and survives a crash.  What it has
 * reached, the point, is on disk before the first bit goes.  Killed in between,
 * the bitmap has more than was written since that point.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "points.h"
#include "transaction-impl.h"

/* ---- prepare ---- */

static int
freeze (struct transaction *t, struct plan *p, const struct bitmap_action *a,
        struct planned **frozen, struct error *err)
{
  struct planned *b = transaction_usable (t, &a->target, false, err);

  if (b == NULL)
    return -1;
  if (!b->recording)
    return error_set (err, EINVAL, "Bitmap '%s' does not record, so nothing "
                      "would tell what is written from now on",
                      a->target.name);
  if (!a->full && point_is_none (&b->point))
    return error_set (err, EINVAL, "Bitmap '%s' does not follow a backup: "
                      "none by it was completed, or it was cleared, disabled "
                      "or given up since; a full one is needed",
                      a->target.name);
  /* What is merged comes after the instant. */
  if (b->grows)
    return error_set (err, EINVAL, "Bitmap '%s' cannot be merged into and "
                      "backed up in one transaction", a->target.name);
  b->successor = bitmap_new (p->drive->size, b->nb->shift, err);
  if (b->successor == NULL)
    return -1;
  b->begins = true;
  b->hook = a->hook;
  *frozen = b;
  return 0;
}

int
transaction_prepare_begin (struct transaction *t, struct plan *p,
                           const struct bitmap_action *a, struct error *err)
{
  struct drive *d = p->drive;
  struct planned *b = NULL;

  if (d->mode != DRIVE_ACTIVE)
    return error_set (err, EPERM, "disk '%s' is not served from here, so "
                      "there is nothing to back up", d->name);
  if (a->target.name && freeze (t, p, a, &b, err) == -1)
    return -1;
  return a->hook->ops->prepare (a->hook, b ? b->nb : NULL,
                                b ? &b->point : NULL, err);
}

static struct planned *
find_frozen (struct plan *p, const struct bitmap_action *a, struct error *err)
{
  struct planned *b = planned_find (p, a->target.name);

  if (b && b->nb->backup == a->hook && !b->ended)
    return b;
  error_set (err, ENOENT, "Dirty bitmap '%s' is not frozen for that backup",
             a->target.name);
  return NULL;
}

int
transaction_prepare_forget (struct plan *p, const struct bitmap_action *a,
                            struct error *err)
{
  struct planned *b;

  if (a->target.name == NULL)
    return 0;
  b = find_frozen (p, a, err);
  if (b == NULL)
    return -1;
  transaction_lose_point (p, b);
  return 0;
}

int
transaction_prepare_end (struct plan *p, const struct bitmap_action *a,
                         struct error *err)
{
  struct drive *d = p->drive;
  struct planned *b;

  if (a->target.name == NULL)
    return 0;
  b = find_frozen (p, a, err);
  if (b == NULL)
    return -1;
  if (a->success && b->nb->persistent && drive_failure (d))
    return error_set (err, EIO, "Bitmap '%s' cannot be used: %s has failed "
                      "(%s)", a->target.name, d->sidecar, drive_failure (d));
  b->ended = b->nb->successor;
  b->successor = NULL;
  if (a->success) {
    b->companion = b->ended;
    b->point = a->point;
    p->pointed = true;
  }
  return 0;
}

static bool
is_ended (const struct bitmap_action *actions, size_t nr,
          const struct write_hook *h)
{
  for (size_t i = 0; i < nr; i++)
    if (actions[i].type == BITMAP_BACKUP_END && actions[i].hook == h)
      return true;
  return false;
}

static int
plan_hooks (struct plan *p, const struct bitmap_action *actions, size_t nr,
            struct error *err)
{
  const struct hooks *now = p->drive->hooks;
  const size_t nr_now = now ? now->nr : 0;
  struct hooks *hooks =
    malloc (sizeof *hooks + (nr_now + nr) * sizeof hooks->hook[0]);

  if (hooks == NULL)
    return error_set (err, ENOMEM, "%m");
  hooks->nr = 0;
  for (size_t i = 0; i < nr_now; i++)
    if (is_ended (actions, nr, now->hook[i]))
      p->hooked = true;
    else
      hooks->hook[hooks->nr++] = now->hook[i];
  for (size_t i = 0; i < nr; i++)
    if (actions[i].type == BITMAP_BACKUP_BEGIN &&
        actions[i].target.drive == p->drive) {
      hooks->hook[hooks->nr++] = actions[i].hook;
      p->hooked = true;
    }
  p->hooks = hooks;
  return 0;
}

int
transaction_plan_hooks (struct transaction *t,
                        const struct bitmap_action *actions, size_t nr,
                        struct error *err)
{
  for (size_t i = 0; i < t->nr; i++)
    if (plan_hooks (&t->plans[i], actions, nr, err) == -1)
      return -1;
  return 0;
}

/* ---- the instant, and after ---- */

static bool
has_hook (const struct hooks *hooks, const struct write_hook *h)
{
  for (size_t i = 0; hooks && i < hooks->nr; i++)
    if (hooks->hook[i] == h)
      return true;
  return false;
}

void
transaction_backups_instant (struct plan *p)
{
  struct drive *d = p->drive;
  struct hooks *was = d->hooks;

  pthread_mutex_lock (&d->list);
  for (size_t i = 0; i < p->nr; i++) {
    struct planned *b = &p->list[i];

    b->nb->successor = b->successor;
    if (b->begins) {
      b->nb->backup = b->hook;
      b->nb->busy = true;
    }
  }
  pthread_mutex_unlock (&d->list);
  if (!p->hooked)
    return;
  d->hooks = p->hooks;
  p->hooks = was;
  for (size_t i = 0; was && i < was->nr; i++)
    if (!has_hook (d->hooks, was->hook[i]))
      was->hook[i]->ops->ended (was->hook[i], NULL);
}

void
transaction_backups_done (struct plan *p)
{
  struct drive *d = p->drive;
  const struct hooks *hooks = d->hooks;

  pthread_mutex_lock (&d->list);
  for (size_t i = 0; i < p->nr; i++) {
    struct planned *b = &p->list[i];

    b->nb->point = b->point;
    if (b->ended) {
      b->nb->backup = NULL;
      b->nb->busy = false;
    }
  }
  if (p->pointed)
    d->list_version++; /* a migration sends the list anew */
  pthread_mutex_unlock (&d->list);
  /* Nobody replaces the hooks while the control lock is held. */
  for (size_t i = 0; p->hooked && hooks && i < hooks->nr; i++)
    if (!has_hook (p->hooks, hooks->hook[i]))
      hooks->hook[i]->ops->begun (hooks->hook[i]);
}

void
transaction_free_backup (struct planned *b, bool done)
{
  if (b->begins && !done)
    bitmap_free (b->successor);
  if (b->ended && !done)
    b->companion = NULL; /* it is the successor still */
  if (b->ended && done && b->companion == NULL)
    bitmap_free (b->ended);
}
