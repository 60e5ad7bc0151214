/* nbdferry - the named bitmaps of a drive
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <jansson.h>

#include "cleanup.h"
#include "drive.h"
#include "incoming-names.h"
#include "unsure.h"

struct named_bitmap *
drive_find_bitmap (struct drive *d, const char *name)
{
  for (size_t i = 0; i < d->nr_bitmaps; i++)
    if (strcmp (d->bitmaps[i]->name, name) == 0)
      return d->bitmaps[i];
  return NULL;
}

struct named_bitmap *
drive_new_bitmap (struct drive *d, const char *name, unsigned shift,
                  bool persistent, bool recording, struct error *err)
{
  struct named_bitmap *nb = calloc (1, sizeof *nb);

  if (nb == NULL || (nb->name = strdup (name)) == NULL) {
    error_set (err, ENOMEM, "%m");
    goto fail;
  }
  nb->shift = shift;
  nb->persistent = persistent;
  nb->recording = recording;
  nb->id = ++d->next_id;
  if (persistent) {
    if (d->store == NULL) {
      error_set (err, EROFS, "Cannot store dirty bitmaps: disk '%s' is "
                 "open for reading only", d->name);
      goto fail;
    }
    nb->slot = qcow2_alloc (d->store, shift, err);
    if (nb->slot == NULL)
      goto fail;
    nb->bits = bitmap_new_over_zeros (qcow2_words (nb->slot), d->size, shift,
                                      err);
  }
  else
    nb->bits = bitmap_new (d->size, shift, err);
  if (nb->bits == NULL)
    goto fail;
  return nb;

 fail:
  if (nb)
    drive_free_bitmap (d, nb);
  return NULL;
}

void
drive_free_bitmap (struct drive *d, struct named_bitmap *nb)
{
  bitmap_free (nb->bits);
  bitmap_free (nb->successor);
  if (nb->slot && d->store)
    qcow2_free (d->store, nb->slot);
  free (nb->reason);
  free (nb->alias);
  free (nb->name);
  free (nb);
}

void
drive_set_bitmaps (struct drive *d, struct named_bitmap **bitmaps, size_t nr)
{
  struct named_bitmap **old;

  pthread_mutex_lock (&d->list);
  old = d->bitmaps;
  d->bitmaps = bitmaps;
  d->nr_bitmaps = nr;
  d->list_version++;
  pthread_mutex_unlock (&d->list);
  free (old);
}

struct marks *
drive_build_marks (struct drive *d, struct bitmap **extra, size_t nr_extra)
{
  struct marks *m = marks_new (2 * d->nr_bitmaps + nr_extra + 4);

  if (m == NULL)
    return NULL;
  /* First, as in transaction.c. */
  for (size_t i = 0; i < d->nr_bitmaps; i++)
    if (d->bitmaps[i]->recording && d->bitmaps[i]->successor)
      m->map[m->nr++] = d->bitmaps[i]->successor;
  m->again = m->nr + nr_extra > 0;
  for (size_t i = 0; i < d->nr_bitmaps; i++) {
    struct named_bitmap *nb = d->bitmaps[i];

    if (nb->recording && nb->bits) {
      m->map[m->nr++] = nb->bits;
      m->persistent |= nb->persistent;
    }
  }
  for (size_t i = 0; i < nr_extra; i++)
    m->map[m->nr++] = extra[i];
  marks_add_ship (m, d);
  return m;
}

/* The ship map comes after the bitmaps: who finds a chunk in it must find the
 * chunk's bits as well.  And before the other one, in which nothing is cleared
 * that stands in the ship map.
 */
void
marks_add_ship (struct marks *m, const struct drive *d)
{
  const size_t nr = m->nr;

  if (d->watch)
    m->map[m->nr++] = d->watch;
  if (d->ship)
    m->map[m->nr++] = d->ship;
  if (d->unheld && d->unheld->recording && d->unheld->bits) {
    m->map[m->nr++] = d->unheld->bits;
    m->persistent |= d->unheld->persistent;
  }
  if (d->unsure)
    m->map[m->nr++] = unsure_map (d);
  m->again |= m->nr > nr;
  marks_ready (m);
}

struct marks *
drive_swap_marks (struct drive *d, struct marks *marks)
{
  struct marks *old = d->marks;

  unsure_settle (d);
  d->marks = marks;
  return old;
}

void
drive_end_hooks (struct drive *d, const char *why)
{
  struct hooks *hooks = d->hooks;

  d->hooks = NULL;
  for (size_t i = 0; hooks && i < hooks->nr; i++)
    hooks->hook[i]->ops->ended (hooks->hook[i], why);
  free (hooks);
}

void
drive_forget_hook (struct drive *d, const struct write_hook *h)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  for (size_t i = 0; i < d->nr_bitmaps; i++) {
    struct named_bitmap *nb = d->bitmaps[i];

    if (nb->backup != h)
      continue;
    bitmap_free (nb->successor);
    nb->successor = NULL;
    nb->backup = NULL;
    nb->busy = false;
  }
}

/* Mark what there is to mark now.  Control lock held. */
static int
remake_marks (struct drive *d, struct error *err)
{
  CLEANUP_FREE struct marks *marks = drive_build_marks (d, NULL, 0);

  if (marks == NULL)
    return error_set (err, ENOMEM, "%m");
  gate_close (&d->writes);
  marks = drive_swap_marks (d, marks);
  gate_open (&d->writes);
  return 0;
}

int
drive_set_ship (struct drive *d, struct bitmap *ship, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);

  d->ship = ship;
  if (remake_marks (d, err) == 0)
    return 0;
  d->ship = NULL;
  return -1;
}

int
drive_set_watch (struct drive *d, struct bitmap *watch, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);

  d->watch = watch;
  if (remake_marks (d, err) == 0)
    return 0;
  d->watch = NULL;
  return -1;
}

void
drive_stop_marking (struct drive *d, const struct bitmap *map)
{
  CLEANUP_FREE struct marks *marks = drive_build_marks (d, NULL, 0);

  gate_close (&d->writes);
  if (d->marks && marks)
    marks = drive_swap_marks (d, marks);
  else if (d->marks) /* no memory: taken out, and the short way is off */
    marks_remove (d->marks, map);
  gate_open (&d->writes);
}

void
drive_drop_watch (struct drive *d)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);
  const struct bitmap *watch = d->watch;

  d->watch = NULL;
  drive_stop_marking (d, watch);
}

void
drive_drop_ship (struct drive *d)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);

  const struct bitmap *ship = d->ship;

  d->ship = NULL;
  if (ship)
    drive_stop_marking (d, ship);
}

int
drive_write_directory (struct drive *d, const struct drive_entry *entries,
                       size_t nr, struct error *err)
{
  CLEANUP_FREE struct qcow2_entry *list =
    calloc (nr + 1, sizeof (struct qcow2_entry));
  size_t n = 0;

  if (d->store == NULL)
    return 0; /* no persistent bitmap can be among them */
  if (list == NULL)
    return error_set (err, ENOMEM, "%m");
  if (incoming_names_write (d->state_dir, entries, nr, err) == -1)
    return -1;
  for (size_t i = 0; i < nr; i++) {
    const struct named_bitmap *nb = entries[i].nb;

    if (!nb->persistent)
      continue;
    list[n].name = nb->name;
    list[n].shift = nb->shift;
    list[n].autoflag = entries[i].recording;
    list[n].inconsistent = nb->inconsistent;
    list[n].bits = nb->slot;
    n++;
  }
  if (d->unheld && d->unheld->persistent)
    list[n++] = (struct qcow2_entry){ .name = d->unheld->name,
                                      .shift = d->unheld->shift,
                                      .autoflag = true,
                                      .bits = d->unheld->slot };
  if (qcow2_write_directory (d->store, list, n, err) == 0)
    return 0;
  if (qcow2_failed (d->store))
    drive_store_failed (d, err ? err->msg : "its directory was not written");
  return -1;
}

int
drive_write_list (struct drive *d, struct error *err)
{
  CLEANUP_FREE struct drive_entry *entries =
    calloc (d->nr_bitmaps ? d->nr_bitmaps : 1, sizeof (struct drive_entry));

  if (entries == NULL)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < d->nr_bitmaps; i++) {
    entries[i].nb = d->bitmaps[i];
    entries[i].recording = d->bitmaps[i]->recording;
  }
  return drive_write_directory (d, entries, d->nr_bitmaps, err);
}
