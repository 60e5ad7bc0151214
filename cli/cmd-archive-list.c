/* nbdferry - nbdferry archive list
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "archives.h"
#include "cleanup.h"
#include "cmd-archive.h"
#include "output.h"
#include "size.h"

struct entry {
  char *path;
  struct archive_head head;
  struct archive_totals totals;
  uint64_t bytes; /* of the file */
  bool complete;  /* it has an end */
};

struct list {
  struct entry *entries;
  size_t nr;
  json_t *bad;    /* an array of what could not be read, and why */
};

static void
list_free (struct list *l)
{
  for (size_t i = 0; i < l->nr; i++) {
    free (l->entries[i].path);
    archive_head_free (&l->entries[i].head);
  }
  free (l->entries);
  json_decref (l->bad);
}

/* ---- finding them ---- */

static int
fill (struct entry *e, const char *path, struct error *err)
{
  struct archive_reader *r = archive_open (path, ARCHIVE_LAZY, err);
  CLEANUP_CLOSE int fd = -1;
  struct stat st;
  int n;

  if (r == NULL)
    return -1;
  n = archive_head_copy (&e->head, archive_get_head (r), err);
  archive_close (r);
  if (n == -1)
    return -1;
  e->path = strdup (path);
  fd = archive_open_file (path);
  if (e->path == NULL || fd == -1 || fstat (fd, &st) == -1) {
    free (e->path);
    archive_head_free (&e->head);
    return error_set (err, errno, "%s: %m", path);
  }
  e->bytes = st.st_size;
  e->complete = archive_peek_totals (fd, path, &e->totals, NULL) == 0;
  return 0;
}

static void
not_read (struct list *l, const char *path, const char *why)
{
  complain ("%s", why);
  json_array_append_new (l->bad, archive_error_json (path, why));
}

static void
add_file (struct list *l, const char *path)
{
  struct entry *more = realloc (l->entries,
                                (l->nr + 1) * sizeof l->entries[0]);
  struct error err;

  if (more == NULL) {
    not_read (l, path, strerror (errno));
    return;
  }
  l->entries = more;
  more[l->nr] = (struct entry){ 0 };
  if (fill (&more[l->nr], path, &err) == 0)
    l->nr++;
  else
    not_read (l, path, err.msg);
}

/* Does it begin like one?  Others in a folder are nobody's business here. */
static bool
looks_like_archive (const char *path)
{
  CLEANUP_CLOSE int fd = open (path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  char magic[8];
  struct stat st;

  return fd != -1 && fstat (fd, &st) == 0 && S_ISREG (st.st_mode) &&
         pread (fd, magic, sizeof magic, 0) == sizeof magic &&
         memcmp (magic, "NBDFERRY", sizeof magic) == 0;
}

static void
add_folder (struct list *l, const char *path)
{
  DIR *dir = opendir (path);
  struct dirent *d;
  struct error err;

  if (dir == NULL) {
    error_set (&err, errno, "%s: %m", path);
    not_read (l, path, err.msg);
    return;
  }
  while ((d = readdir (dir)) != NULL) {
    CLEANUP_FREE char *name = NULL;

    if (d->d_name[0] == '.')
      continue;
    if (asprintf (&name, "%s/%s", path, d->d_name) == -1) {
      name = NULL;
      continue;
    }
    if (looks_like_archive (name))
      add_file (l, name);
  }
  closedir (dir);
}

/* Those of one disk together, in order of time. */
static int
compare (const void *a, const void *b)
{
  const struct entry *x = a, *y = b;
  int r = memcmp (x->head.lineage.b, y->head.lineage.b,
                  sizeof x->head.lineage.b);

  if (r != 0)
    return r;
  if (x->head.generation != y->head.generation)
    return x->head.generation < y->head.generation ? -1 : 1;
  if (x->head.time != y->head.time)
    return x->head.time < y->head.time ? -1 : 1;
  /* In the same second: who builds upon the other comes later. */
  if (uuid_equal (&x->head.parent, &y->head.point))
    return 1;
  if (uuid_equal (&y->head.parent, &x->head.point))
    return -1;
  return strcmp (x->path, y->path);
}

/* ---- showing them ---- */

static const struct entry *
find_parent (const struct list *l, const struct entry *e)
{
  for (size_t i = 0; i < l->nr; i++) {
    const struct entry *p = &l->entries[i];

    /* Several disks may have been backed up at one point. */
    if (p->complete && uuid_equal (&p->head.point, &e->head.parent) &&
        uuid_equal (&p->head.lineage, &e->head.lineage))
      return p;
  }
  return NULL;
}

static const char *
base (const char *path)
{
  const char *slash = strrchr (path, '/');

  return slash && slash[1] ? slash + 1 : path;
}

static void
add_row (struct table *t, const struct list *l, const struct entry *e)
{
  const struct entry *parent = find_parent (l, e);
  char time[TIME_TEXT], size[SIZE_TEXT], bytes[SIZE_TEXT], point[UUID_TEXT];

  table_add (t, e->path);
  table_add (t, e->head.disk);
  table_add (t, time_format (e->head.time, time));
  table_add (t, size_format (e->head.size, size));
  table_add (t, size_format (e->bytes, bytes));
  uuid_format (&e->head.point, point);
  point[8] = '\0'; /* enough to tell them apart */
  table_add (t, point);
  if (!e->complete)
    table_add (t, "INCOMPLETE");
  else if (archive_is_full (&e->head))
    table_add (t, "full");
  else
    table_add (t, parent ? base (parent->path) : "(not listed)");
}

static void
print_table (const struct list *l)
{
  static const char *const heads[] = {
    "FILE", "DISK", "TIME", "DISK SIZE", "STORED", "POINT", "BUILDS UPON",
  };
  struct table t = { .columns = sizeof heads / sizeof heads[0] };

  for (size_t i = 0; i < t.columns; i++)
    table_add (&t, heads[i]);
  for (size_t i = 0; i < l->nr; i++)
    add_row (&t, l, &l->entries[i]);
  table_print (&t);
  table_clear (&t);
}

static void
print_list_json (const struct list *l)
{
  json_auto_t *array = json_array ();

  for (size_t i = 0; i < l->nr; i++) {
    const struct entry *e = &l->entries[i];
    const struct entry *parent = find_parent (l, e);
    json_t *json = archive_json (e->path, &e->head,
                                 e->complete ? &e->totals : NULL);

    json_object_set_new (json, "complete", json_boolean (e->complete));
    if (parent && !archive_is_full (&e->head))
      json_object_set_new (json, "builds-upon", json_shown (parent->path));
    json_array_append_new (array, json);
  }
  json_array_extend (array, l->bad);
  print_json (array);
}

int
archive_list_run (const struct command *cmd, char **args, void *values)
{
  const struct archive_values *v = values;
  struct list l = { .bad = json_array () };
  struct stat st;
  bool bad;

  (void) cmd;
  for (; *args; args++) {
    if (stat (*args, &st) == 0 && S_ISDIR (st.st_mode))
      add_folder (&l, *args);
    else
      add_file (&l, *args);
  }
  if (l.nr > 0)
    qsort (l.entries, l.nr, sizeof l.entries[0], compare);
  if (v->json)
    print_list_json (&l);
  else if (l.nr > 0)
    print_table (&l);
  bad = json_array_size (l.bad) > 0;
  list_free (&l);
  return output_finish () == 0 && !bad ? STATUS_DONE : STATUS_FAILED;
}
