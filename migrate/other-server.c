/* nbdferry - is a server that is no destination one of another kind?
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "cleanup.h"
#include "engine.h"
#include "identity.h"
#include "other-server.h"

#define ANSWER_MS 3000

/* One of ours, perhaps of another version, which has said no for a reason.
 * (Some servers give any export that they are asked for.)
 */
static bool
is_destination (const char *uri, const char *name, const struct stop *stop)
{
  CLEANUP_FREE char *export = NULL;
  struct client *c;
  struct error err;
  bool r;

  if (asprintf (&export, "%s@incoming", name) == -1) {
    export = NULL;
    return true;
  }
  c = client_connect (uri, export, stop, ANSWER_MS, NULL);
  if (c == NULL)
    return false;
  client_set_timeout (c, ANSWER_MS);
  r = check_destination (c, &err) >= 0 || err.errnum != EPROTO;
  client_close (c);
  return r;
}

bool
is_other_server (const char *uri, const char *name, bool only,
                 const struct stop *stop)
{
  CLEANUP_FREE char *export = client_uri_export (uri, NULL);
  const char *there;
  struct client *c;
  struct uuid id;

  if (export == NULL)
    return false;
  there = export[0] || only ? NULL : name; /* NULL: as the URI says */
  c = client_connect (uri, there, stop, ANSWER_MS, NULL);
  if (c == NULL)
    return false;
  client_close (c);
  return !is_destination (uri, name, stop) &&
         identity_ask (uri, there, 0, stop, &id, NULL) == 0 &&
         identity_ask (uri, name, 0, stop, &id, NULL) == 0;
}
