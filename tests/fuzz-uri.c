/* nbdferry - fuzz what is done with NBD URIs
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The input is a URI.  An export that is put into it must come out again;
 * paths that were made absolute stay so.
 */
#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "client.h"
#include "remote.h"

int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

static void
must (bool ok)
{
  if (!ok)
    abort ();
}

/* The input itself is an export's name, too. */
static void
exports (const char *uri)
{
  struct error err = { 0 };
  char *name = client_uri_export (uri, &err), *other, *again;

  if (name == NULL) {
    must (err.errnum != 0 && err.msg[0] != 0);
    return;
  }
  must (strlen (name) <= strlen (uri));
  free (name);
  other = client_uri_with_export (uri, uri, &err);
  must (other != NULL);
  again = client_uri_export (other, &err);
  must (again != NULL && strcmp (again, uri) == 0);
  free (other);
  free (again);
}

static void
paths (const char *uri)
{
  struct error err = { 0 };
  char *once = remote_absolute_uri (uri, &err), *twice;

  must (once != NULL && remote_is_uri (once) == remote_is_uri (uri));
  must (strchr (uri, '?') != NULL || strcmp (uri, once) == 0);
  twice = remote_absolute_uri (once, &err);
  must (twice != NULL);
  /* At most three are changed at a time. */
  if (strlen (uri) < 30)
    must (strcmp (once, twice) == 0);
  free (once);
  free (twice);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  char *uri = malloc (size + 1);

  must (uri != NULL);
  memcpy (uri, data, size);
  uri[size] = '\0';
  exports (uri);
  paths (uri);
  free (uri);
  return 0;
}
