/* nbdferry - the backups that are under way
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "views.h"

enum state {
  BEGINNING, /* its transaction has not taken place */
  RUNNING,   /* or failed */
  ENDING,    /* the transaction that ends it has not taken place */
};

struct entry {
  struct view *view;
  enum state state;
  struct entry *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* a leaf */
static struct entry *list; /* protected by lock, as is each entry */

static struct entry *
find_locked (const struct drive *d, const struct uuid *id)
{
  for (struct entry *e = list; e; e = e->next) {
    const struct view_options *opt = view_options (e->view);

    if (opt->drive == d && uuid_equal (&opt->id, id))
      return e;
  }
  return NULL;
}

static struct entry *
entry_of_locked (const struct view *v)
{
  const struct view_options *opt = view_options (v);

  return find_locked (opt->drive, &opt->id);
}

/* The newest last. */
static void
append_locked (struct entry *e)
{
  struct entry **at = &list;

  while (*at)
    at = &(*at)->next;
  *at = e;
}

static void
remove_locked (struct entry *e)
{
  struct entry **at = &list;

  while (*at != e)
    at = &(*at)->next;
  *at = e->next;
  view_unref (e->view);
  free (e);
}

/* ---- beginning and ending ---- */

static int
put_in_list (struct view *v, struct error *err)
{
  const struct view_options *opt = view_options (v);
  struct entry *e = calloc (1, sizeof *e);
  char id[UUID_TEXT];

  if (e == NULL)
    return error_set (err, ENOMEM, "%m");
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  if (find_locked (opt->drive, &opt->id)) {
    free (e);
    uuid_format (&opt->id, id);
    return error_set (err, EEXIST, "Node '%s' has a backup '%s' already",
                      opt->drive->name, id);
  }
  e->view = view_ref (v);
  e->state = BEGINNING;
  append_locked (e);
  return 0;
}

struct view *
views_begin (const struct view_options *opt, struct bitmap_action *a,
             struct error *err)
{
  struct view *v = view_new (opt, err);

  if (v == NULL)
    return NULL;
  if (put_in_list (v, err) == -1) {
    view_unref (v);
    return NULL;
  }
  *a = (struct bitmap_action){
    .type = BITMAP_BACKUP_BEGIN,
    .target = { .drive = opt->drive, .name = view_options (v)->bitmap },
    .hook = view_hook (v),
    .full = opt->full,
  };
  return v;
}

/* Can it be ended, and in that way? */
static int
check_end (const struct entry *e, const struct drive *d,
           const struct uuid *id, bool success, struct error *err)
{
  struct view_info info;
  char text[UUID_TEXT];

  uuid_format (id, text);
  if (e == NULL || e->state == BEGINNING)
    return error_set (err, ENOENT, "Node '%s' has no backup '%s'", d->name,
                      text);
  if (e->state == ENDING)
    return error_set (err, EBUSY, "Backup '%s' of node '%s' is ending "
                      "already", text, d->name);
  view_info (e->view, &info);
  if (success && info.failed)
    return error_set (err, EIO, "Backup '%s' of node '%s' has failed: %s",
                      text, d->name, info.error);
  return 0;
}

struct view *
views_end (struct drive *d, const struct uuid *id, bool success,
           struct bitmap_action *a, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  struct entry *e = find_locked (d, id);
  struct view_info info;

  if (check_end (e, d, id, success, err) == -1)
    return NULL;
  e->state = ENDING;
  view_info (e->view, &info);
  *a = (struct bitmap_action){
    .type = BITMAP_BACKUP_END,
    .target = { .drive = d, .name = view_options (e->view)->bitmap },
    .hook = view_hook (e->view),
    .success = success,
    .point = { .id = *id, .time = info.time },
  };
  return view_ref (e->view);
}

void
views_settle (struct view *v)
{
  const bool ended = view_has_ended (v);

  if (ended)
    /* Its disk was handed over, perhaps; then no transaction has done that. */
    drive_forget_hook (view_options (v)->drive, view_hook (v));
  pthread_mutex_lock (&lock);
  if (ended || !view_has_begun (v))
    remove_locked (entry_of_locked (v));
  else
    entry_of_locked (v)->state = RUNNING;
  pthread_mutex_unlock (&lock);
  view_unref (v);
}

int
views_forget (struct drive *d, const struct uuid *id, struct error *err)
{
  struct bitmap_action a;
  struct view *v = views_end (d, id, false, &a, err);
  int r;

  if (v == NULL)
    return -1;
  a.type = BITMAP_BACKUP_FORGET;
  r = bitmap_transaction (&a, 1, err);
  views_settle (v);
  return r;
}

int
views_give_up (struct drive *d, const struct uuid *id, struct error *err)
{
  struct bitmap_action a;
  struct view *v = views_end (d, id, false, &a, err);
  int r;

  if (v == NULL)
    return -1;
  r = bitmap_transaction (&a, 1, err);
  if (view_has_ended (v))
    r = 0;
  views_settle (v);
  return r;
}

void
views_client_gone (uint64_t client)
{
  CLEANUP_FREE struct view **views = NULL;
  size_t nr;

  views = views_all (&nr);
  for (size_t i = 0; i < nr; i++) {
    const struct view_options *opt = view_options (views[i]);

    if (opt->client == client) {
      view_fail (views[i], "the client that had begun it has gone");
      views_give_up (opt->drive, &opt->id, NULL);
    }
    view_unref (views[i]);
  }
}

/* ---- looking ---- */

struct view *
views_find (const struct drive *d, const struct uuid *id)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  struct entry *e = find_locked (d, id);

  return e && e->state != BEGINNING ? view_ref (e->view) : NULL;
}

struct view **
views_all (size_t *nr)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  struct view **all;
  size_t n = 0;

  *nr = 0;
  for (struct entry *e = list; e; e = e->next)
    n++;
  all = calloc (n + 1, sizeof all[0]);
  for (struct entry *e = list; all && e; e = e->next)
    if (e->state != BEGINNING)
      all[(*nr)++] = view_ref (e->view);
  return all;
}

void
views_free (void)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);

  while (list)
    remove_locked (list);
}
