/* nbdferry - which disk an export is
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "identity.h"

#define FIRST_LINE "nbdferry: the disk %s\n"

void
identity_write (const struct uuid *id, char content[IDENTITY_SIZE])
{
  char text[UUID_TEXT];

  uuid_format (id, text);
  memset (content, 0, IDENTITY_SIZE);
  snprintf (content, IDENTITY_SIZE, FIRST_LINE, text);
}

/* Some servers give every export that they are asked for: only one that reads
 * just so is an answer.
 */
static bool
parse (const char content[IDENTITY_SIZE], struct uuid *id)
{
  char text[UUID_TEXT], again[IDENTITY_SIZE];
  struct uuid said;

  if (memchr (content, '\0', IDENTITY_SIZE) == NULL ||
      sscanf (content, "nbdferry: the disk %36s", text) != 1 ||
      !uuid_parse (text, &said))
    return false;
  identity_write (&said, again);
  if (memcmp (content, again, IDENTITY_SIZE) != 0)
    return false;
  *id = said;
  return true;
}

int
identity_ask (const char *uri, const char *export, unsigned hops,
              const struct stop *stop, struct uuid *id, struct error *err)
{
  CLEANUP_FREE char *own = export ? strdup (export)
                                  : client_uri_export (uri, err);
  CLEANUP_FREE char *name = NULL;
  char content[IDENTITY_SIZE];
  const unsigned ms = IDENTITY_MS / (IDENTITY_HOPS + 1) * (hops + 1);
  struct error why = { 0 };
  struct client *c;
  int r = 0;

  if (own == NULL)
    return export ? error_set (err, ENOMEM, "%m") : -1;
  if (asprintf (&name, "%s" IDENTITY_EXPORT "%u", own, hops) == -1) {
    name = NULL;
    return error_set (err, ENOMEM, "%m");
  }
  c = client_connect (uri, name, stop, ms, &why);
  if (c == NULL) {
    /* What else is wrong with it, who opens it will say. */
    if (why.errnum != ECANCELED && why.errnum != ETIMEDOUT)
      return 0;
    if (err)
      *err = why;
    return error_prefix (err, "cannot find out which disk %s is", uri);
  }
  client_set_timeout (c, ms);
  if (client_size (c) == IDENTITY_SIZE &&
      client_pread (c, content, sizeof content, 0) == 0)
    r = parse (content, id);
  client_close (c);
  return r;
}
