/* nbdferry - disks that were let go of, and are looked for elsewhere
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What may be believed of the new address is for departure.h to say.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "departure.h"
#include "house.h"
#include "redirect.h"

/* One disk that was let go of. */
struct departed {
  size_t index; /* of house.drives */
  struct uuid session;
  char *name;   /* over there */
};

static size_t
find_departed (struct departed *v)
{
  size_t nr = 0;

  for (size_t i = 0; i < house.nr_drives; i++)
    if (departure_find (house.drives[i], &v[nr].session, &v[nr].name))
      v[nr++].index = i;
  return nr;
}

static void
free_departed (struct departed *v, size_t nr)
{
  for (size_t i = 0; v && i < nr; i++)
    free (v[i].name);
  free (v);
}

/* Those that the URI means: the one that is called so over there, or all that
 * went together.  They become the first ones; returns how many, or -1.
 */
static int
choose (struct departed *v, size_t nr, const char *uri, const char *export,
        struct error *err)
{
  size_t found = 0;

  for (size_t i = 0; export[0] && i < nr; i++)
    if (strcmp (v[i].name, export) == 0) {
      struct departed one = v[i];

      v[i] = v[found];
      v[found++] = one;
    }
  if (found == 1 || nr == 1)
    return 1;
  if (export[0])
    return error_set (err, EINVAL, "%s names a disk, and %zu of those that "
                      "were handed over are called so", uri, found);
  for (size_t i = 1; i < nr; i++)
    if (!uuid_equal (&v[i].session, &v[0].session))
      return error_set (err, EINVAL, "disks were handed over to more than one "
                        "server; name the one that %s is to have", uri);
  return nr;
}

static int
change (const struct departed *p, const char *uri, const char *export,
        struct error *err)
{
  CLEANUP_FREE char *peer =
    client_uri_with_export (uri, export[0] ? export : p->name, err);

  if (peer == NULL)
    return -1;
  return departure_redirect (house.drives[p->index], peer, err);
}

static int
wake (const struct departed *p, bool changed, struct error *err)
{
  struct finisher **f = &house.finishers[p->index];
  struct drive *d = house.drives[p->index];

  if (*f)
    finisher_wake (*f);
  else if (drive_get_mode (d) == DRIVE_FORWARD && changed) {
    *f = finisher_start (d, err);
    return *f ? 0 : -1;
  }
  else if (house.outgoing)
    outgoing_wake (house.outgoing);
  return 0;
}

static int
redirect_some (struct departed *v, size_t nr, const char *uri,
               struct error *err)
{
  CLEANUP_FREE char *export = uri ? client_uri_export (uri, err) : NULL;
  int n = nr;

  if (nr == 0)
    return error_set (err, EINVAL, "Cannot resume if there is no paused "
                      "migration");
  if (uri && export == NULL)
    return -1;
  if (uri)
    n = choose (v, nr, uri, export, err);
  for (int i = 0; uri && i < n; i++)
    if (change (&v[i], uri, export, err) == -1)
      return -1;
  for (int i = 0; i < n; i++)
    if (wake (&v[i], uri != NULL, err) == -1)
      return -1;
  return n == -1 ? -1 : 0;
}

int
redirect (const char *uri, struct error *err)
{
  struct departed *v = calloc (house.nr_drives, sizeof v[0]);
  size_t nr;
  int r;

  if (v == NULL)
    return error_set (err, ENOMEM, "%m");
  nr = find_departed (v);
  r = redirect_some (v, nr, uri, err);
  free_departed (v, nr);
  return r;
}
