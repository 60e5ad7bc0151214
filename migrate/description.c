/* nbdferry - what must be known of a migration after a restart
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
#include "blobs.h"
#include "description.h"
#include "fullio.h"
#include "mapping.h"

#define VERSION 1

void
description_free (struct description *d)
{
  for (size_t i = 0; d->disks && i < d->nr; i++) {
    free (d->disks[i].name);
    free (d->disks[i].state_dir);
    free (d->disks[i].target);
  }
  free (d->disks);
  json_decref (d->params.mapping);
  json_decref (d->attached);
  free (d->first);
  free (d->uri);
  memset (d, 0, sizeof *d);
}

/* ---- reading ---- */

static int
malformed (struct error *err)
{
  return error_set (err, EINVAL, "it is not the description of a migration");
}

/* A string of the object, copied; required. */
static int
get_string (json_t *o, const char *key, char **s, struct error *err)
{
  const char *text = json_string_value (json_object_get (o, key));

  if (text == NULL || text[0] == '\0')
    return malformed (err);
  *s = strdup (text);
  return *s ? 0 : error_set (err, ENOMEM, "%m");
}

static int
get_path (json_t *o, const char *key, char **s, struct error *err)
{
  if (get_string (o, key, s, err) == -1)
    return -1;
  return (*s)[0] == '/' ? 0 : malformed (err);
}

/* A number that is not negative; one that is missing is left as it is. */
static int
get_number (json_t *o, const char *key, uint64_t *n, struct error *err)
{
  json_t *v = json_object_get (o, key);

  if (v == NULL)
    return 0;
  if (!json_is_integer (v) || json_integer_value (v) < 0)
    return malformed (err);
  *n = json_integer_value (v);
  return 0;
}

static bool
has_strings (json_t *o, const char *a, const char *b)
{
  return json_is_string (json_object_get (o, a)) &&
         json_is_string (json_object_get (o, b));
}

/* A parameter's is one again after a restart, the other is not. */
static const char *
mapping_key (const struct migrate_params *p)
{
  return p->own_mapping ? "x-ferry-mapping" : "block-bitmap-mapping";
}

/* Its members' types, and then what a client's mapping is asked for. */
static int
get_mapping (json_t *mapping, struct migrate_params *p, struct error *err)
{
  json_t *node, *bitmaps, *b;
  size_t i, k;

  if (mapping == NULL)
    return 0;
  if (!json_is_array (mapping))
    return malformed (err);
  json_array_foreach (mapping, i, node) {
    bitmaps = json_object_get (node, "bitmaps");
    if (!has_strings (node, "node-name", "alias") ||
        !json_is_array (bitmaps))
      return malformed (err);
    json_array_foreach (bitmaps, k, b) {
      json_t *transform = json_object_get (b, "transform");

      if (!has_strings (b, "name", "alias") ||
          (transform && !json_is_object (transform)))
        return malformed (err);
    }
  }
  p->mapping = json_incref (mapping);
  return mapping_check (mapping, err);
}

static int
get_params (json_t *o, struct migrate_params *p, struct error *err)
{
  const char *compression =
    json_string_value (json_object_get (o, "multifd-compression"));
  const char *mode = json_string_value (json_object_get (o, "copy-mode"));
  uint64_t channels = p->channels, zlib = p->zlib_level,
           zstd = p->zstd_level;

  if (get_number (o, "max-bandwidth", &p->max_bandwidth, err) == -1 ||
      get_number (o, "downtime-limit", &p->downtime_limit, err) == -1 ||
      get_number (o, "multifd-channels", &channels, err) == -1 ||
      get_number (o, "multifd-zlib-level", &zlib, err) == -1 ||
      get_number (o, "multifd-zstd-level", &zstd, err) == -1)
    return -1;
  if (channels > MIGRATE_MAX_CHANNELS || zlib > 9 ||
      zstd > 20 ||
      (compression &&
       migrate_compression_parse (compression, &p->compression) == -1) ||
      (mode && migrate_copy_mode_parse (mode, &p->copy_mode) == -1))
    return malformed (err);
  p->channels = channels;
  p->zlib_level = zlib;
  p->zstd_level = zstd;
  p->overwrite = json_is_true (json_object_get (o, "x-ferry-overwrite"));
  p->own_mapping = json_object_get (o, "x-ferry-mapping") != NULL;
  return get_mapping (json_object_get (o, mapping_key (p)), p, err);
}

static int
get_attached (json_t *list, struct description *d, struct error *err)
{
  json_t *o;
  size_t i;

  if (list == NULL || json_is_null (list))
    return 0;
  if (!json_is_array (list) || json_array_size (list) > BLOBS_MAX)
    return malformed (err);
  json_array_foreach (list, i, o) {
    const char *name = json_string_value (json_object_get (o, "name"));
    const char *path = json_string_value (json_object_get (o, "path"));

    if (name == NULL || !blob_name_ok (name) || path == NULL ||
        path[0] != '/')
      return malformed (err);
  }
  d->attached = json_incref (list);
  return 0;
}

static int
get_lineage (json_t *o, struct description_disk *disk, struct error *err)
{
  const char *lineage = json_string_value (json_object_get (o, "lineage"));

  if (lineage == NULL || !uuid_parse (lineage, &disk->lineage))
    return malformed (err);
  return get_number (o, "generation", &disk->generation, err);
}

static int
get_disks (json_t *list, struct description *d, struct error *err)
{
  size_t nr = json_array_size (list);

  if (nr == 0 || nr > DESCRIPTION_MAX_DISKS)
    return malformed (err);
  d->disks = calloc (nr, sizeof d->disks[0]);
  if (d->disks == NULL)
    return error_set (err, ENOMEM, "%m");
  for (d->nr = 0; d->nr < nr; d->nr++) {
    struct description_disk *disk = &d->disks[d->nr];
    json_t *o = json_array_get (list, d->nr);

    if (get_string (o, "name", &disk->name, err) == -1 ||
        get_path (o, "state-dir", &disk->state_dir, err) == -1 ||
        get_string (o, "target", &disk->target, err) == -1 ||
        get_lineage (o, disk, err) == -1) {
      d->nr++; /* to be freed */
      return -1;
    }
  }
  return 0;
}

static int
get_all (json_t *o, struct description *d, struct error *err)
{
  const char *session = json_string_value (json_object_get (o, "session"));
  json_t *version = json_object_get (o, "version");

  if (json_is_integer (version) && json_integer_value (version) != VERSION)
    return error_set (err, EPROTONOSUPPORT, "it was written by another "
                      "release (version %lld)",
                      (long long) json_integer_value (version));
  if (version == NULL || session == NULL ||
      !uuid_parse (session, &d->session))
    return malformed (err);
  if (json_object_get (o, "first"))
    return get_path (o, "first", &d->first, err);
  if (get_string (o, "uri", &d->uri, err) == -1 ||
      get_number (o, "epoch", &d->epoch, err) == -1 ||
      get_number (o, "attempt", &d->attempt, err) == -1 ||
      get_params (json_object_get (o, "parameters"), &d->params, err) == -1 ||
      get_attached (json_object_get (o, "attached"), d, err) == -1)
    return -1;
  d->paused = json_is_true (json_object_get (o, "paused"));
  return get_disks (json_object_get (o, "disks"), d, err);
}

int
description_parse (const char *buf, size_t len, struct description *d,
                   struct error *err)
{
  json_auto_t *o = json_loadb (buf, len, JSON_REJECT_DUPLICATES, NULL);

  *d = (struct description){ .params = MIGRATE_PARAMS_DEFAULT };
  if (get_all (o, d, err) == 0)
    return 0;
  description_free (d);
  return -1;
}

static char *
file_path (const char *state_dir, const char *suffix)
{
  char *path;

  return asprintf (&path, "%s/migration.json%s", state_dir, suffix) == -1
           ? NULL : path;
}

int
description_read (const char *state_dir, struct description *d,
                  struct error *err)
{
  CLEANUP_FREE char *path = file_path (state_dir, "");
  CLEANUP_FREE char *buf = NULL;
  CLEANUP_CLOSE int fd = path ? open (path, O_RDONLY | O_CLOEXEC) : -1;
  off_t size;

  memset (d, 0, sizeof *d);
  if (path == NULL)
    return error_set (err, ENOMEM, "%m");
  if (fd == -1 && errno == ENOENT)
    return 0;
  if (fd == -1 || (size = lseek (fd, 0, SEEK_END)) == -1)
    return error_set (err, errno, "open %s: %m", path);
  if (size > DESCRIPTION_MAX_BYTES)
    return error_set (err, EFBIG, "%s: too large to be ours", path);
  buf = malloc (size + 1);
  if (buf == NULL)
    return error_set (err, ENOMEM, "%m");
  if (pread (fd, buf, size, 0) != size)
    return error_set (err, EIO, "%s cannot be read", path);
  if (description_parse (buf, size, d, err) == -1)
    return error_prefix (err, "%s", path);
  return 1;
}

/* ---- writing ---- */

static json_t *
params_json (const struct migrate_params *p)
{
  json_t *o;

  o = json_pack ("{s:I, s:I, s:I, s:I, s:I, s:s, s:s, s:b}",
                 "max-bandwidth", (json_int_t) p->max_bandwidth,
                 "downtime-limit", (json_int_t) p->downtime_limit,
                 "multifd-channels", (json_int_t) p->channels,
                 "multifd-zlib-level", (json_int_t) p->zlib_level,
                 "multifd-zstd-level", (json_int_t) p->zstd_level,
                 "multifd-compression",
                 migrate_compression_name (p->compression),
                 "copy-mode", migrate_copy_mode_name (p->copy_mode),
                 "x-ferry-overwrite", p->overwrite);
  if (p->mapping)
    json_object_set (o, mapping_key (p), p->mapping);
  return o;
}

static json_t *
to_json (const struct description *d)
{
  json_t *disks = json_array ();
  char session[UUID_TEXT];

  uuid_format (&d->session, session);
  if (d->first) {
    json_decref (disks);
    return json_pack ("{s:i, s:s, s:s}", "version", VERSION, "session",
                      session, "first", d->first);
  }
  for (size_t i = 0; i < d->nr; i++) {
    const struct description_disk *disk = &d->disks[i];
    char lineage[UUID_TEXT];

    uuid_format (&disk->lineage, lineage);
    json_array_append_new (
      disks, json_pack ("{s:s, s:s, s:s, s:s, s:I}", "name", disk->name,
                        "state-dir", disk->state_dir, "target", disk->target,
                        "lineage", lineage, "generation",
                        (json_int_t) disk->generation));
  }
  return json_pack ("{s:i, s:s, s:s, s:I, s:I, s:b, s:o, s:O?, s:o}",
                    "version", VERSION, "session", session, "uri", d->uri,
                    "epoch", (json_int_t) d->epoch,
                    "attempt", (json_int_t) d->attempt,
                    "paused", d->paused,
                    "parameters", params_json (&d->params),
                    "attached", d->attached,
                    "disks", disks);
}

char *
description_format (const struct description *d)
{
  json_auto_t *o = to_json (d);

  return o ? json_dumps (o, JSON_INDENT (1)) : NULL;
}

static int
sync_dir (const char *dir, struct error *err)
{
  CLEANUP_CLOSE int fd = open (dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

  if (fd == -1 || fsync (fd) == -1)
    return error_set (err, errno, "sync %s: %m", dir);
  return 0;
}

int
description_write (const char *state_dir, const struct description *d,
                   struct error *err)
{
  CLEANUP_FREE char *path = file_path (state_dir, "");
  CLEANUP_FREE char *tmp = file_path (state_dir, ".new");
  CLEANUP_CLOSE int fd = -1;
  CLEANUP_FREE char *text = description_format (d);

  if (path == NULL || tmp == NULL)
    return error_set (err, ENOMEM, "%m");
  if (text == NULL)
    return error_set (err, EINVAL, "the migration cannot be described in %s",
                      path);
  fd = open (tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd == -1 || full_pwrite (fd, text, strlen (text), 0) == -1 ||
      fsync (fd) == -1 || rename (tmp, path) == -1)
    return error_set (err, errno, "write %s: %m", path);
  return sync_dir (state_dir, err);
}

int
description_remove (const char *state_dir, struct error *err)
{
  CLEANUP_FREE char *path = file_path (state_dir, "");
  CLEANUP_FREE char *tmp = file_path (state_dir, ".new");

  if (path == NULL || tmp == NULL)
    return error_set (err, ENOMEM, "%m");
  unlink (tmp);
  if (unlink (path) == -1)
    return errno == ENOENT ? 0 : error_set (err, errno, "remove %s: %m",
                                            path);
  return sync_dir (state_dir, err);
}
