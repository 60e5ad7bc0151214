/* nbdferry - archives on the command line
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>

#include "archives.h"
#include "cleanup.h"
#include "output.h"
#include "size.h"

/* ---- chains ---- */

static int
check_links (const struct chain *c, struct error *err)
{
  CLEANUP_FREE const struct archive_head **heads =
    calloc (c->nr, sizeof heads[0]);
  CLEANUP_FREE const char **names = calloc (c->nr, sizeof names[0]);

  if (heads == NULL || names == NULL)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < c->nr; i++) {
    heads[i] = archive_get_head (c->readers[i]);
    names[i] = archive_get_name (c->readers[i]);
  }
  return archive_chain_check (heads, names, c->nr, err);
}

/* Each archive is an open file. */
static void
allow_files (size_t nr)
{
  struct rlimit limit;

  if (getrlimit (RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < nr + 100) {
    limit.rlim_cur = limit.rlim_max;
    setrlimit (RLIMIT_NOFILE, &limit);
  }
}

int
chain_open (struct chain *c, char *const *paths, size_t nr,
            struct error *err)
{
  *c = (struct chain){ .readers = calloc (nr + 1, sizeof c->readers[0]) };
  if (c->readers == NULL)
    return error_set (err, ENOMEM, "%m");
  allow_files (nr);
  for (; c->nr < nr; c->nr++) {
    c->readers[c->nr] = archive_open (paths[c->nr], ARCHIVE_LAZY, err);
    if (c->readers[c->nr] == NULL)
      break;
  }
  if (c->nr == nr && check_links (c, err) == 0)
    return 0;
  chain_close (c);
  return -1;
}

void
chain_close (struct chain *c)
{
  for (size_t i = 0; i < c->nr; i++)
    archive_close (c->readers[i]);
  free (c->readers);
  *c = (struct chain){ 0 };
}

/* ---- checking ---- */

int
archive_check (const char *path, struct copying *progress,
               struct archive_totals *totals, struct error *err)
{
  struct archive_reader *r = archive_open (path, 0, err);
  const struct packet_extent *extents;
  struct stat st;
  size_t nr;
  int n;

  if (r == NULL)
    return -1;
  copying_begin (progress, path, stat (path, &st) == 0 ? st.st_size : 0);
  while ((n = archive_next (r, &extents, &nr, err)) == 1) {
    if (archive_load (r, err) == NULL) {
      n = -1;
      break;
    }
    if (copying_interrupted (progress)) {
      n = error_set (err, ECANCELED, "interrupted");
      break;
    }
    copying_show (progress, archive_get_totals (r)->bytes);
  }
  copying_break (progress);
  if (n == 0 && totals)
    *totals = *archive_get_totals (r);
  archive_close (r);
  return n;
}

/* ---- words ---- */

int
compression_parse (const char *text, struct pack_compression *c)
{
  size_t len = strcspn (text, ":");
  uint64_t level = 0, max;

  if (len == 4 && strncmp (text, "none", 4) == 0 && text[4] == '\0') {
    c->how = MIGRATE_COMPRESSION_NONE;
    return 0;
  }
  if (len == 4 && strncmp (text, "zlib", 4) == 0) {
    c->how = MIGRATE_COMPRESSION_ZLIB;
    max = 9;
  }
  else if (len == 4 && strncmp (text, "zstd", 4) == 0) {
    c->how = MIGRATE_COMPRESSION_ZSTD;
    max = 19;
  }
  else
    return -1;
  if (text[len] == ':' && (number_parse (text + len + 1, &level) == -1 ||
                           level < 1 || level > max))
    return -1;
  c->level = level;
  return 0;
}

static void
set_uuid (json_t *json, const char *member, const struct uuid *u)
{
  char text[UUID_TEXT];

  uuid_format (u, text);
  json_object_set_new (json, member, json_string (text));
}

static void
set_number (json_t *json, const char *member, uint64_t n)
{
  json_object_set_new (json, member, json_integer (n));
}

json_t *
archive_json (const char *path, const struct archive_head *h,
              const struct archive_totals *t)
{
  json_t *json = json_pack ("{s:o, s:s, s:I}", "file", json_shown (path), "disk",
                            h->disk, "size", (json_int_t) h->size);

  json_object_set_new (json, "full", json_boolean (archive_is_full (h)));
  set_uuid (json, "id", &h->id);
  set_uuid (json, "lineage", &h->lineage);
  set_number (json, "generation", h->generation);
  set_uuid (json, "point", &h->point);
  if (!archive_is_full (h))
    set_uuid (json, "parent", &h->parent);
  if (h->bitmap) {
    json_object_set_new (json, "bitmap", json_string (h->bitmap));
    set_number (json, "granularity", h->granularity);
  }
  json_object_set_new (json, "time", json_integer (h->time));
  if (h->tool)
    json_object_set_new (json, "tool", json_string (h->tool));
  if (t == NULL)
    return json;
  set_number (json, "packets", t->packets);
  set_number (json, "extents", t->extents);
  set_number (json, "data", t->data);
  set_number (json, "zeros", t->zeros);
  set_number (json, "holes", t->holes);
  set_number (json, "stored", t->stored);
  set_number (json, "bytes", t->bytes + ARCHIVE_END_SIZE);
  return json;
}

char *
time_format (int64_t time, char text[TIME_TEXT])
{
  time_t t = time;
  struct tm tm;

  if (gmtime_r (&t, &tm) == NULL ||
      strftime (text, TIME_TEXT, "%Y-%m-%d %H:%M:%SZ", &tm) == 0)
    strcpy (text, "?");
  return text;
}

json_t *
archive_error_json (const char *path, const char *why)
{
  return json_pack ("{s:o, s:o}", "file", json_shown (path), "error",
                    json_shown (why));
}
