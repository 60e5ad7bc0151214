/* nbdferry - one connection to an NBD server, made in steps
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "client-impl.h"

static int
nbd_errno (void)
{
  int e = nbd_get_errno ();

  return e ? e : EIO;
}

static int
reached (struct nbd_handle *nbd)
{
  struct sockaddr_storage peer;
  socklen_t len = sizeof peer;
  int fd = nbd_aio_get_fd (nbd);

  return fd != -1 && getpeername (fd, (struct sockaddr *) &peer, &len) == 0;
}

struct client *
client_begin (const char *uri, const char *export, const struct stop *stop,
              unsigned timeout_ms, struct error *err)
{
  struct client *c = client_start (uri, NULL, true, stop, timeout_ms, err);

  if (c && (c->export = strdup (export)) == NULL) {
    error_set (err, ENOMEM, "%m");
    client_close (c);
    c = NULL;
  }
  return c;
}

int
client_reach (struct client *c, const char *uri, struct error *err)
{
  return client_drive_until (c, reached, c->connect_deadline, uri, err);
}

int
client_hear (struct client *c, const char *uri, struct error *err)
{
  return client_greet (c, uri, c->export, err);
}

int
client_open (struct client *c, const char *uri, struct error *err)
{
  return client_go (c, uri, err);
}

bool
client_is_for (const struct client *c, const char *export)
{
  return c->export && export && strcmp (c->export, export) == 0;
}

int
client_reopen (struct client *c, const char *uri, const char *export,
               struct error *err)
{
  if (!nbd_aio_is_negotiating (c->nbd))
    return error_set (err, ENOTCONN, "%s: the server hung up", uri);
  if (nbd_set_export_name (c->nbd, export) == -1)
    return error_set (err, nbd_errno (), "%s: %s", uri, nbd_get_error ());
  return client_go (c, uri, err);
}
