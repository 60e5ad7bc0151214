/* nbdferry - is a server that is no destination one of another kind?
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>

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
  struct error err = { 0 };
  struct client *c = connect_destination (uri, name, stop, ANSWER_MS,
                                          ANSWER_MS, &err);
  bool r;

  if (c == NULL)
    return err.errnum == ENOMEM;
  r = check_destination (c, &err) >= 0 || err.errnum != EPROTO;
  client_close (c);
  return r;
}

bool
is_other_server (const char *uri, const char *name, bool only,
                 const struct stop *stop)
{
  const char *there = only ? NULL : name; /* NULL: as the URI says */
  struct client *c = client_connect (uri, there, stop, ANSWER_MS, NULL);
  struct uuid id;

  if (c == NULL)
    return false;
  client_close (c);
  return !is_destination (uri, name, stop) &&
         identity_ask (uri, name, 0, stop, &id, NULL) == 0 &&
         (!only || identity_ask (uri, NULL, 0, stop, &id, NULL) == 0);
}
