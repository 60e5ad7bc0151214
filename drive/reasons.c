/* nbdferry - why a bitmap is not what it was
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * In memory a reason belongs to a bitmap, so that it comes and goes with it.
 * In the journal, which has little room, those that say the same at the same
 * time (mostly all of them) are one, with the names of the bitmaps.
 */
#include <config.h>

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cleanup.h"
#include "drive.h"

#define MAX_TEXT 600  /* bytes of one reason */
#define MAX_ALL  6000 /* bytes of JSON for all of them */

static struct reason *
new_reason (int64_t time, const char *text)
{
  struct reason *r = malloc (sizeof *r + strlen (text) + 1);

  if (r) {
    r->time = time;
    strcpy (r->text, text);
  }
  return r;
}

static void
put_reason (struct drive *d, struct named_bitmap *nb, struct reason *r)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  free (nb->reason);
  nb->reason = r;
}

void
drive_set_reason (struct drive *d, struct named_bitmap *nb,
                  const char *fmt, ...)
{
  char text[MAX_TEXT];
  va_list args;

  va_start (args, fmt);
  vsnprintf (text, sizeof text, fmt, args);
  va_end (args);
  put_reason (d, nb, new_reason (time (NULL), text));
}

void
drive_forget_reason (struct drive *d, struct named_bitmap *nb)
{
  put_reason (d, nb, NULL);
}

/* ---- to the journal and back ---- */

/* The entry of 'list' that says the same, or a new one. */
static json_t *
entry_for (json_t *list, const struct reason *r, bool inconsistent)
{
  json_t *e, *text;
  size_t i;

  json_array_foreach (list, i, e)
    if (json_integer_value (json_object_get (e, "time")) == r->time &&
        json_is_true (json_object_get (e, "inconsistent")) == inconsistent &&
        strcmp (json_string_value (json_object_get (e, "text")), r->text) == 0)
      return e;
  text = json_string (r->text);
  if (text == NULL) /* a path that is not UTF-8 */
    text = json_string ("the disk changed while no daemon had it open (its "
                        "path is not UTF-8, so no more can be said)");
  e = json_pack ("{s:I, s:o, s:b, s:[]}", "time", (json_int_t) r->time,
                 "text", text, "inconsistent", (int) inconsistent, "bitmaps");
  json_array_append_new (list, e);
  return e;
}

static size_t
dumped_size (const json_t *j)
{
  /* As the journal lays it out: each item on a line of its own. */
  return json_dumpb (j, NULL, 0, JSON_INDENT (1)) +
         64 * json_array_size (j);
}

/* Names go first, then what is oldest. */
static void
make_fit (json_t *list)
{
  json_t *e;
  size_t i;

  json_array_foreach (list, i, e) {
    if (dumped_size (list) <= MAX_ALL)
      return;
    json_object_del (e, "bitmaps");
  }
  while (dumped_size (list) > MAX_ALL)
    json_array_remove (list, 0);
}

json_t *
reasons_to_json (struct drive *d)
{
  json_t *list = json_array ();

  for (size_t i = 0; i < d->nr_bitmaps; i++) {
    const struct named_bitmap *nb = d->bitmaps[i];

    if (nb->reason && nb->persistent)
      json_array_append_new (
        json_object_get (entry_for (list, nb->reason, nb->inconsistent),
                         "bitmaps"), json_string (nb->name));
  }
  if (json_array_size (list) == 0) {
    json_decref (list);
    return NULL;
  }
  make_fit (list);
  return list;
}

static bool
is_about (const json_t *e, const struct named_bitmap *nb)
{
  const json_t *names = json_object_get (e, "bitmaps");
  size_t i;
  json_t *n;

  if (json_is_true (json_object_get (e, "inconsistent")) != nb->inconsistent)
    return false;
  if (names == NULL)
    return true;
  json_array_foreach ((json_t *) names, i, n)
    if (strcmp (json_string_value (n), nb->name) == 0)
      return true;
  return false;
}

void
reasons_from_json (struct drive *d, const json_t *reasons)
{
  size_t i;
  json_t *e;

  for (size_t k = 0; k < d->nr_bitmaps; k++)
    json_array_foreach ((json_t *) reasons, i, e)
      if (is_about (e, d->bitmaps[k])) {
        struct reason *r = new_reason (
          json_integer_value (json_object_get (e, "time")),
          json_string_value (json_object_get (e, "text")));

        put_reason (d, d->bitmaps[k], r);
      }
}
