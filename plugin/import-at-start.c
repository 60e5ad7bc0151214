/* nbdferry - import-bitmaps=: what the disk's own server has tracked so far
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A bitmap is taken over once: at a later start the one here is the one that
 * counts, and what the server says is not asked for again.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "house.h"
#include "import.h"
#include "import-at-start.h"

static bool
is_here (void *opaque, const char *name)
{
  struct drive *d = opaque;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  return drive_find_bitmap (d, name) != NULL;
}

static int
take (struct drive *d, const struct drive_options *opt, const char *name,
      struct error *err)
{
  struct import_options import = {
    .path = d->path, .name = name, .size = d->size,
    .granularity = opt->import_granularity,
    .skip = name ? NULL : is_here, .skip_opaque = d,
  };
  struct import im = { 0 };
  int r = import_from_server (&im, &import, d, err);

  for (size_t i = 0; r == 0 && i < im.nr; i++)
    house_log ("disk '%s': bitmap '%s' was taken over from its server, with %"
               PRIu64 " bytes dirty", d->name, im.list[i].name,
               bitmap_count (im.list[i].bits));
  import_free (&im);
  return r;
}

int
import_at_start (struct drive *d, const struct drive_options *opt,
                 struct error *err)
{
  CLEANUP_FREE char *names = NULL;
  char *name, *save;

  /* Elsewhere, or still to come in: its bitmaps are not to be had here. */
  if (opt->import_bitmaps == NULL || d->mode != DRIVE_ACTIVE)
    return 0;
  if (d->store == NULL)
    return error_set (err, EROFS, "import-bitmaps=: disk '%s' cannot be "
                      "written, so no bitmaps are kept for it", d->name);
  if (strcmp (opt->import_bitmaps, "on") == 0)
    return take (d, opt, NULL, err);
  names = strdup (opt->import_bitmaps);
  if (names == NULL)
    return error_set (err, ENOMEM, "%m");
  for (name = strtok_r (names, ",", &save); name;
       name = strtok_r (NULL, ",", &save))
    if (!is_here (d, name) && take (d, opt, name, err) == -1)
      return -1;
  return 0;
}
