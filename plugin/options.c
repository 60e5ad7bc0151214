/* nbdferry - the plugin's parameters
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "cleanup.h"
#include "options.h"
#include "remote.h"

/* Export names may be this long in NBD; what we append must fit as well. */
#define MAX_NAME 3000

static bool
is_utf8 (const char *s)
{
  json_t *j = json_string (s); /* checks it */

  json_decref (j);
  return j != NULL;
}

static int
check_name (const struct options *o, const char *name)
{
  if (name[0] == '\0' || strlen (name) > MAX_NAME || !is_utf8 (name)) {
    nbdkit_error ("disk=: the name of a disk must be 1 to %d bytes of UTF-8",
                  MAX_NAME);
    return -1;
  }
  if (strstr (name, "@incoming") || strstr (name, "@forward/") ||
      strstr (name, "@backup/") || strstr (name, "@bitmap/") ||
      strstr (name, "@hash/") || strstr (name, "@self/")) {
    nbdkit_error ("disk=: the name '%s' is taken by an export of another "
                  "kind", name);
    return -1;
  }
  for (size_t i = 0; i < o->nr; i++)
    if (strcmp (o->drives[i].name, name) == 0) {
      nbdkit_error ("two disks are called '%s'; give them names with "
                    "disk=NAME=PATH", name);
      return -1;
    }
  return 0;
}

/* What a disk is called that was given no name: the base name of its file, or
 * the last part of its export's name.
 */
static char *
default_name (const char *value)
{
  CLEANUP_FREE char *export = NULL;
  const char *slash;

  if (remote_is_uri (value)) {
    struct error err;

    export = client_uri_export (value, &err);
    if (export == NULL) {
      nbdkit_error ("disk=%s: %s", value, err.msg);
      return NULL;
    }
    value = export[0] ? export : "nbd";
  }
  slash = strrchr (value, '/');
  return strdup (slash ? slash + 1 : value);
}

static char *
absolute (const char *value)
{
  struct error err;
  char *r;

  if (!remote_is_uri (value))
    return nbdkit_absolute_path (value);
  r = remote_absolute_uri (value, &err);
  if (r == NULL)
    nbdkit_error ("disk=%s: %s", value, err.msg);
  return r;
}

/* [NAME=]PATH or [NAME=]URI, where NAME holds no slash. */
static int
add_disk (struct options *o, const char *value)
{
  const char *equals = strchr (value, '=');
  const char *slash = strchr (value, '/');
  struct drive_options *d;
  CLEANUP_FREE char *name = NULL;
  char *path;

  if (equals && (slash == NULL || equals < slash)) {
    name = strndup (value, equals - value);
    value = equals + 1;
  }
  else
    name = default_name (value);
  if (name == NULL || check_name (o, name) == -1)
    return -1;
  if (value[0] == '\0') {
    nbdkit_error ("disk=%s=: a path must follow", name);
    return -1;
  }
  path = absolute (value);
  if (path == NULL)
    return -1;
  d = reallocarray (o->drives, o->nr + 1, sizeof *d);
  if (d == NULL) {
    nbdkit_error ("reallocarray: %m");
    free (path);
    return -1;
  }
  o->drives = d;
  d[o->nr++] = (struct drive_options){ .name = take_ptr (&name),
                                       .path = path };
  return 0;
}

/* state= and size= belong to the disk before them. */
static struct drive_options *
last_disk (struct options *o, const char *key)
{
  if (o->nr == 0) {
    nbdkit_error ("%s= must follow the disk= that it belongs to", key);
    return NULL;
  }
  return &o->drives[o->nr - 1];
}

static int
set_size (struct drive_options *d, const char *value)
{
  int64_t size = nbdkit_parse_size (value);

  if (size == -1)
    return -1;
  if (size == 0 || size % 512 != 0) {
    nbdkit_error ("size=%s: must be a multiple of 512 bytes, and not 0",
                  value);
    return -1;
  }
  d->create = size;
  return 0;
}

static int
set_nbd_timeout (struct drive_options *d, const char *value)
{
  if (nbdkit_parse_unsigned ("nbd-timeout", value, &d->nbd_timeout) == -1)
    return -1;
  if (d->nbd_timeout < 1 || d->nbd_timeout > 24 * 3600) {
    nbdkit_error ("nbd-timeout=%s: must be 1 to 86400 seconds", value);
    return -1;
  }
  return 0;
}

static int
set_import (struct drive_options *d, const char *value)
{
  char *copy;

  if (value[0] == '\0' || !is_utf8 (value)) {
    nbdkit_error ("import-bitmaps=: must be on, or names of bitmaps with "
                  "commas between them");
    return -1;
  }
  copy = strdup (value);
  if (copy == NULL) {
    nbdkit_error ("strdup: %m");
    return -1;
  }
  free ((char *) d->import_bitmaps);
  d->import_bitmaps = copy;
  return 0;
}

static int
set_granularity (struct drive_options *d, const char *value)
{
  int64_t g = nbdkit_parse_size (value);

  if (g == -1)
    return -1;
  if (g < 512 || g > INT64_C (1) << BITMAP_MAX_SHIFT || (g & (g - 1)) != 0) {
    nbdkit_error ("import-granularity=%s: must be a power of two from 512 to "
                  "2G", value);
    return -1;
  }
  d->import_granularity = g;
  return 0;
}

static int
set_path (char **path, const char *value)
{
  free (*path);
  *path = nbdkit_absolute_path (value);
  return *path ? 0 : -1;
}

static int
set_durability (struct options *o, const char *value)
{
  if (strcmp (value, "power") == 0)
    o->durability = DURABILITY_POWER;
  else if (strcmp (value, "process") == 0)
    o->durability = DURABILITY_PROCESS;
  else {
    nbdkit_error ("durability=%s: must be power (bitmaps survive a loss of "
                  "power) or process (they survive a crash of nbdkit)",
                  value);
    return -1;
  }
  return 0;
}

int
options_set (struct options *o, const char *key, const char *value)
{
  struct drive_options *d;

  if (strcmp (key, "disk") == 0)
    return add_disk (o, value);
  if (strcmp (key, "control") == 0)
    return set_path (&o->control, value);
  if (strcmp (key, "incoming") == 0) {
    int r;

    o->insecure = strcmp (value, "insecure") == 0;
    r = o->insecure ? 1 : nbdkit_parse_bool (value);
    o->incoming = r == 1;
    return r == -1 ? -1 : 0;
  }
  if (strcmp (key, "durability") == 0)
    return set_durability (o, value);
  if (strcmp (key, "state") == 0) {
    d = last_disk (o, key);
    return d ? set_path ((char **) &d->state_dir, value) : -1;
  }
  if (strcmp (key, "size") == 0) {
    d = last_disk (o, key);
    return d ? set_size (d, value) : -1;
  }
  if (strcmp (key, "nbd-timeout") == 0) {
    d = last_disk (o, key);
    return d ? set_nbd_timeout (d, value) : -1;
  }
  if (strcmp (key, "import-bitmaps") == 0) {
    d = last_disk (o, key);
    return d ? set_import (d, value) : -1;
  }
  if (strcmp (key, "import-granularity") == 0) {
    d = last_disk (o, key);
    return d ? set_granularity (d, value) : -1;
  }
  nbdkit_error ("unknown parameter '%s'", key);
  return -1;
}

/* What only files, and what only other servers' disks can have. */
static int
check_kind (const struct drive_options *d)
{
  if (!remote_is_uri (d->path)) {
    if (d->nbd_timeout == 0 && d->import_bitmaps == NULL &&
        d->import_granularity == 0)
      return 0;
    nbdkit_error ("%s= is for a disk that another NBD server holds, and '%s' "
                  "is none", d->nbd_timeout ? "nbd-timeout"
                  : d->import_bitmaps ? "import-bitmaps"
                  : "import-granularity", d->name);
    return -1;
  }
  if (d->create > 0) {
    nbdkit_error ("size=: disk '%s' is held by another NBD server, and has "
                  "the size that it has there", d->name);
    return -1;
  }
  if (d->state_dir == NULL) {
    nbdkit_error ("disk '%s' is held by another NBD server, and so has no "
                  "place of its own for its bitmaps; say where with state=DIR "
                  "after it", d->name);
    return -1;
  }
  return 0;
}

int
options_complete (struct options *o)
{
  if (o->nr == 0) {
    nbdkit_error ("no disk was given; try: nbdkit ferry disk=NAME=PATH");
    return -1;
  }
  for (size_t i = 0; i < o->nr; i++) {
    if (check_kind (&o->drives[i]) == -1)
      return -1;
    o->drives[i].incoming = o->incoming;
    o->drives[i].durability = o->durability;
  }
  return 0;
}

void
options_free (struct options *o)
{
  for (size_t i = 0; i < o->nr; i++) {
    free ((char *) o->drives[i].name);
    free ((char *) o->drives[i].path);
    free ((char *) o->drives[i].state_dir);
    free ((char *) o->drives[i].import_bitmaps);
  }
  free (o->drives);
  free (o->control);
}
