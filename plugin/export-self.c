/* nbdferry - the export that says which disk it is
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <stdlib.h>
#include <string.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "cleanup.h"
#include "export.h"
#include "identity.h"
#include "remote.h"

struct self_export {
  struct export export;
  char content[IDENTITY_SIZE];
};

static int64_t
self_size (struct export *e UNUSED)
{
  return IDENTITY_SIZE;
}

static const char *
self_description (struct export *e UNUSED)
{
  return "which disk it is";
}

static int
self_pread (struct export *e, void *buf, uint32_t count, uint64_t offset)
{
  memcpy (buf, ((struct self_export *) e)->content + offset, count);
  return 0;
}

static void
self_close (struct export *e)
{
  free (e);
}

static const struct export_ops self_export_ops = {
  .size = self_size,
  .description = self_description,
  .pread = self_pread,
  .close = self_close,
};

/* Where the disk is, if that is not here; NULL otherwise.  To be freed. */
static char *
elsewhere (struct drive *d)
{
  const char *peer;
  char *uri = NULL;

  if (drive_get_mode (d) != DRIVE_FORWARD)
    return remote_is_uri (d->path) ? strdup (d->path) : NULL;
  pthread_mutex_lock (&d->control);
  peer = journal_get (d->journal)->peer;
  if (peer)
    uri = strdup (peer);
  pthread_mutex_unlock (&d->control);
  return uri;
}

struct export *
export_open_self (struct drive *d, unsigned hops)
{
  struct self_export *x = calloc (1, sizeof *x);
  CLEANUP_FREE char *there = hops > 0 ? elsewhere (d) : NULL;
  struct uuid id;
  struct error err;

  if (x == NULL) {
    nbdkit_error ("calloc: %m");
    return NULL;
  }
  if (there == NULL ||
      identity_ask (there, NULL, hops - 1, NULL, &id, &err) != 1)
    id = d->self;
  x->export.ops = &self_export_ops;
  identity_write (&id, x->content);
  return &x->export;
}
