/* nbdferry - from an export's name to what it is
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "cleanup.h"
#include "export.h"
#include "house.h"
#include "identity.h"
#include "peer.h"

/* The drive that 'name' names before its last 'suffix', and what follows it,
 * or NULL.
 */
static struct drive *
split (const char *name, const char *suffix, const char **rest)
{
  CLEANUP_FREE char *prefix = NULL;
  const char *at = NULL;

  for (const char *p = name; (p = strstr (p, suffix)) != NULL; p++)
    at = p;
  if (at == NULL || (prefix = strndup (name, at - name)) == NULL)
    return NULL;
  *rest = at + strlen (suffix);
  return house_drive (prefix);
}

static struct export *
open_forward (struct drive *d, const char *rest, int readonly)
{
  char text[UUID_TEXT];
  struct uuid session;
  struct error err;
  uint64_t epoch;
  int n = 0;

  if (sscanf (rest, "%36[^/]/%" SCNu64 "%n", text, &epoch, &n) != 2 ||
      rest[n] != '\0' || !uuid_parse (text, &session)) {
    nbdkit_error ("malformed name of a forwarding export");
    return NULL;
  }
  if (incoming_forward (house.incoming, d, &session, epoch, &err) == -1) {
    nbdkit_error ("%s", err.msg);
    return NULL;
  }
  return export_open_forward (d, readonly, &session, epoch);
}

static struct export *
no_such_disk (const char *name)
{
  nbdkit_error ("there is no disk '%s' here", name);
  errno = ENOENT;
  return NULL;
}

/* What stands before the last 'suffix', which is in 'name': to be freed; and
 * what follows it.  NULL, reported, if there is no memory.
 */
static char *
split_last (const char *name, const char *suffix, const char **rest)
{
  char *of = strdup (name), *last = NULL;

  if (of == NULL) {
    nbdkit_error ("strdup: %m");
    return NULL;
  }
  for (char *p = of; (p = strstr (p, suffix)) != NULL; p++)
    last = p;
  *last = '\0';
  *rest = last + strlen (suffix);
  return of;
}

/* What has hashes is named before the last "@hash/". */
static struct export *
open_hash (const char *name)
{
  const char *block, *id;
  CLEANUP_FREE char *of = split_last (name, "@hash/", &block);
  struct drive *d;

  if (of == NULL)
    return NULL;
  d = of[0] ? house_drive (of) : house.drives[0]; /* the default export */
  if (d)
    return export_open_hash (d, block);
  d = split (of, "@backup/", &id);
  if (strncmp (of, "@backup/", strlen ("@backup/")) == 0)
    d = house.drives[0];
  return d ? export_open_backup_hash (d, id, block) : no_such_disk (name);
}

/* The drive of which 'name' is an export, of whatever kind, or NULL. */
static struct drive *
drive_behind (const char *name)
{
  struct drive *found = NULL;
  size_t longest = 0;

  if (name[0] == '\0' || name[0] == '@')
    return house.drives[0]; /* the default export */
  for (size_t i = 0; i < house.nr_drives; i++) {
    struct drive *d = house.drives[i];
    size_t len = strlen (d->name);

    if (len > longest && strncmp (name, d->name, len) == 0 &&
        (name[len] == '\0' || name[len] == '@')) {
      found = d;
      longest = len;
    }
  }
  return found;
}

/* What it is asked of is named before the last "@self/". */
static struct export *
open_self (const char *name)
{
  const char *rest;
  CLEANUP_FREE char *of = split_last (name, IDENTITY_EXPORT, &rest);
  unsigned hops;
  struct drive *d;
  int n = 0;

  if (of == NULL)
    return NULL;
  d = drive_behind (of);
  if (d == NULL || sscanf (rest, "%1u%n", &hops, &n) != 1 || rest[n])
    return no_such_disk (name);
  return export_open_self (d, hops);
}

struct export *
export_open (const char *name, int readonly)
{
  struct drive *d = house_drive (name);
  const char *rest;

  if (d)
    return export_open_disk (d, readonly);
  if (strstr (name, IDENTITY_EXPORT))
    return open_self (name);
  d = split (name, "@incoming", &rest);
  if (d && rest[0] == '\0')
    return peer_allowed (d) ? export_open_incoming (d, NULL) : NULL;
  d = split (name, "@incoming/", &rest);
  if (d)
    return peer_allowed (d) ? export_open_incoming (d, rest) : NULL;
  d = split (name, "@forward/", &rest);
  if (d)
    return peer_allowed (d) ? open_forward (d, rest, readonly) : NULL;
  if (strstr (name, "@hash/"))
    return open_hash (name);
  d = split (name, "@backup/", &rest);
  if (d)
    return export_open_backup (d, rest);
  d = split (name, "@bitmap/", &rest);
  if (d)
    return export_open_bitmap (d, rest);
  return no_such_disk (name);
}
