/* nbdferry - the destination: bitmaps that come in
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The bitmaps of an unfinished session stand in the drive's list, and in the
 * sidecar, beside those that the drive had before.  A list from the source
 * replaces them all or not at all: the sidecar is written first.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "incoming-impl.h"
#include "mapping.h"
#include "points.h"
#include "ship-map.h"

static bool
contains (const struct drive_entry *v, size_t nr,
          const struct named_bitmap *nb)
{
  for (size_t i = 0; i < nr; i++)
    if (v[i].nb == nb)
      return true;
  return false;
}

/* Make these the drive's bitmaps, in the sidecar first.  What is not among
 * them any more is freed.  On error nothing has changed, and new ones are
 * still the caller's.  Control held.
 */
static int
replace_bitmaps (struct drive *d, const struct drive_entry *now, size_t nr,
                 struct error *err)
{
  CLEANUP_FREE struct named_bitmap **list =
    malloc ((nr + 1) * sizeof list[0]);
  CLEANUP_FREE struct named_bitmap **was =
    malloc ((d->nr_bitmaps + 1) * sizeof was[0]);
  size_t nr_was = d->nr_bitmaps;

  if (list == NULL || was == NULL)
    return error_set (err, ENOMEM, "%m");
  if (points_write (d, now, nr, err) == -1 ||
      drive_write_directory (d, now, nr, err) == -1) {
    drive_write_list (d, NULL); /* it may be there all the same */
    points_write_list (d, NULL);
    return -1;
  }
  memcpy (was, d->bitmaps, nr_was * sizeof was[0]);
  for (size_t i = 0; i < nr; i++)
    list[i] = now[i].nb;
  drive_set_bitmaps (d, take_ptr (&list), nr);
  pthread_mutex_lock (&d->list);
  for (size_t i = 0; i < nr; i++) {
    now[i].nb->recording = now[i].recording;
    now[i].nb->point = now[i].point;
  }
  pthread_mutex_unlock (&d->list);
  for (size_t i = 0; i < nr_was; i++)
    if (!contains (now, nr, was[i]))
      drive_free_bitmap (d, was[i]);
  return 0;
}

/* The drive's own bitmaps, not those that are coming in.  Returns how many.
 */
static size_t
own_bitmaps (struct drive *d, struct drive_entry *own)
{
  size_t nr = 0;

  for (size_t i = 0; i < d->nr_bitmaps; i++) {
    struct named_bitmap *nb = d->bitmaps[i];

    if (!nb->incoming)
      own[nr++] = (struct drive_entry){ nb, nb->recording, nb->point };
  }
  return nr;
}

/* Forget the bitmaps that an unfinished session brought.  Control held. */
int
incoming_drop_bitmaps (struct drive *d, struct error *err)
{
  CLEANUP_FREE struct drive_entry *keep =
    malloc ((d->nr_bitmaps + 1) * sizeof keep[0]);

  if (keep == NULL)
    return error_set (err, ENOMEM, "%m");
  return replace_bitmaps (d, keep, own_bitmaps (d, keep), err);
}

struct listed {
  const char *alias; /* as the source calls it */
  const char *name;  /* and as it is called here */
  json_int_t granularity;
  int recording, persistent;
  struct point point;
};

static int
unpack_listed (json_t *o, struct listed *l, struct error *err)
{
  const char *point = NULL;
  json_int_t time = 0;

  if (json_unpack (o, "{s:s, s:I, s:b, s:b, s?s, s?I}", "name", &l->name,
                   "granularity", &l->granularity, "recording",
                   &l->recording, "persistent", &l->persistent,
                   "point", &point, "point-time", &time) == -1 ||
      l->granularity < 1 << BITMAP_MIN_SHIFT ||
      l->granularity > INT64_C (1) << BITMAP_MAX_SHIFT ||
      (l->granularity & (l->granularity - 1)) != 0 || l->name[0] == '\0' ||
      strlen (l->name) > 1023 ||
      (point && !uuid_parse (point, &l->point.id)))
    return incoming_malformed ("LIST", err);
  l->point.time = time;
  return 0;
}

static int
check_name (const char *name, struct error *err)
{
  return ship_map_name (name)
           ? error_set (err, EINVAL, "bitmap name '%s' is reserved at the "
                        "destination", name)
           : 0;
}

static int
check_once (const struct drive_entry *v, size_t nr, const char *name,
            struct error *err)
{
  for (size_t i = 0; i < nr; i++)
    if (strcmp (v[i].nb->name, name) == 0)
      return incoming_malformed ("LIST", err);
  return 0;
}

/* The bitmap that the list asks for: one that came before, or a new one. */
static struct named_bitmap *
listed_bitmap (struct drive *d, const struct listed *l, struct error *err)
{
  unsigned shift = __builtin_ctzll (l->granularity);
  struct named_bitmap *nb = drive_find_bitmap (d, l->name);

  if (nb && !nb->incoming) {
    error_set (err, EEXIST, "Bitmap already exists: %s (disk '%s' at the "
               "destination)", l->name, d->name);
    return NULL;
  }
  if (nb && nb->shift == shift && nb->persistent == l->persistent)
    return nb;
  nb = drive_new_bitmap (d, l->name, shift, l->persistent, l->recording, err);
  if (nb == NULL) {
    error_prefix (err, "bitmap '%s' at the destination", l->name);
    return NULL;
  }
  nb->incoming = true;
  return nb;
}

struct named_bitmap *
incoming_find_bitmap (struct drive *d, const char *name, size_t len)
{
  for (size_t i = 0; i < d->nr_bitmaps; i++) {
    struct named_bitmap *nb = d->bitmaps[i];
    const char *theirs = nb->alias ?: nb->name;

    if (nb->incoming && strlen (theirs) == len &&
        memcmp (theirs, name, len) == 0)
      return nb;
  }
  return NULL;
}

/* What it is to be here. */
static int
translate (const json_t *mapping, const struct drive *d, struct listed *l,
           struct error *err)
{
  bool persistent = l->persistent;

  l->alias = l->name;
  l->name = mapping_name (mapping, d->name, l->alias, &persistent, err);
  l->persistent = persistent;
  return l->name ? 0 : -1;
}

/* A section finds the bitmap by its alias, at any time. */
static int
set_alias (struct drive *d, struct named_bitmap *nb, const struct listed *l,
           struct error *err)
{
  bool same = strcmp (l->alias, l->name) == 0;
  char *alias = same ? NULL : strdup (l->alias);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  if (!same && alias == NULL)
    return error_set (err, ENOMEM, "%m");
  free (nb->alias);
  nb->alias = alias;
  return 0;
}

int
incoming_list (struct incoming *in, struct session *s,
               const struct packet_header *h, json_t *body, struct error *err)
{
  json_t *list = json_object_get (body, "bitmaps"), *o;
  json_auto_t *mapping = NULL;
  struct drive_entry *now;
  struct drive *d;
  size_t nr, own, i;

  if (!json_is_array (list) || h->disk >= s->nr)
    return incoming_malformed ("LIST", err);
  d = s->drives[h->disk];
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);
  if (d->mode != DRIVE_INCOMING)
    return error_set (err, EPROTO, "disk '%s' is %s; it takes no bitmaps",
                      d->name, drive_mode_name (d->mode));
  now = malloc ((d->nr_bitmaps + json_array_size (list) + 1) *
                sizeof now[0]);
  if (now == NULL)
    return error_set (err, ENOMEM, "%m");
  pthread_mutex_lock (&in->lock);
  mapping = json_incref (in->mapping);
  pthread_mutex_unlock (&in->lock);
  nr = own = own_bitmaps (d, now);
  json_array_foreach (list, i, o) {
    struct listed l = { 0 };
    struct named_bitmap *nb;

    if (unpack_listed (o, &l, err) == -1 ||
        translate (mapping, d, &l, err) == -1 ||
        check_name (l.name, err) == -1 ||
        check_once (now + own, nr - own, l.name, err) == -1 ||
        (nb = listed_bitmap (d, &l, err)) == NULL)
      goto fail;
    now[nr++] = (struct drive_entry){ nb, l.recording, l.point };
    if (set_alias (d, nb, &l, err) == -1)
      goto fail;
  }
  if (replace_bitmaps (d, now, nr, err) == -1)
    goto fail;
  free (now);
  return 0;

 fail:
  for (size_t k = 0; k < nr; k++)
    if (drive_find_bitmap (d, now[k].nb->name) != now[k].nb)
      drive_free_bitmap (d, now[k].nb);
  free (now);
  return -1;
}
