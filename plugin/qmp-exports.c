/* nbdferry - the control socket: where this server can be reached
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * nbdkit does not tell a plugin where it listens, and with systemd it has not
 * chosen that itself.  But its listening sockets are among this process's
 * descriptors; the only one that is not nbdkit's is the control socket.
 */
#include <config.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <arpa/inet.h>
#include <linux/vm_sockets.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "cleanup.h"
#include "export.h"
#include "house.h"
#include "qmp-dispatch.h"
#include "qmp-listen.h"

union address {
  struct sockaddr_storage any;
  struct sockaddr sa;
  struct sockaddr_in in;
  struct sockaddr_in6 in6;
  struct sockaddr_un un;
  struct sockaddr_vm vm;
};

/* ---- TLS ---- */

enum tls { TLS_UNKNOWN, TLS_OFF, TLS_ON, TLS_REQUIRED };

/* What nbdkit was told, from its command line, which is all that a plugin can
 * see of it.
 */
static enum tls
tls_of_arg (const char *arg, const char *next)
{
  const char *value = NULL;

  if (!strncmp (arg, "--tls=", 6))
    value = arg + 6;
  else if (!strcmp (arg, "--tls"))
    value = next;
  if (value == NULL)
    return TLS_UNKNOWN;
  return !strcmp (value, "require") ? TLS_REQUIRED
         : !strcmp (value, "on")    ? TLS_ON
                                    : TLS_OFF;
}

static enum tls
find_tls (void)
{
  CLEANUP_FREE char *text = NULL;
  size_t room = 0;
  ssize_t len;
  FILE *f = fopen ("/proc/self/cmdline", "re");
  enum tls found = TLS_OFF;

  if (f == NULL)
    return TLS_UNKNOWN;
  len = getdelim (&text, &room, EOF, f); /* the whole file */
  fclose (f);
  if (len <= 0)
    return TLS_UNKNOWN;
  for (const char *p = text; p < text + len; p += strlen (p) + 1) {
    const char *next = p + strlen (p) + 1;
    enum tls t = tls_of_arg (p, next < text + len ? next : "");

    if (t != TLS_UNKNOWN)
      found = t;
  }
  return found;
}

/* ---- addresses ---- */

/* As an nbd-URI without the name of an export; NULL: none that we know. */
static char *
uri_of (const union address *a, socklen_t len, bool tls)
{
  char host[INET6_ADDRSTRLEN];
  CLEANUP_FREE char *path = NULL;
  const char *s = tls ? "s" : "";
  char *uri = NULL;
  int r = -1;

  switch (a->sa.sa_family) {
  case AF_INET:
    inet_ntop (AF_INET, &a->in.sin_addr, host, sizeof host);
    if (a->in.sin_addr.s_addr == htonl (INADDR_ANY))
      strcpy (host, "127.0.0.1");
    r = asprintf (&uri, "nbd%s://%s:%u", s, host, ntohs (a->in.sin_port));
    break;
  case AF_INET6:
    inet_ntop (AF_INET6, &a->in6.sin6_addr, host, sizeof host);
    if (IN6_IS_ADDR_UNSPECIFIED (&a->in6.sin6_addr))
      strcpy (host, "::1");
    r = asprintf (&uri, "nbd%s://[%s]:%u", s, host, ntohs (a->in6.sin6_port));
    break;
  case AF_VSOCK:
    r = asprintf (&uri, "nbd%s+vsock://%u:%u", s,
                  a->vm.svm_cid == VMADDR_CID_ANY ? VMADDR_CID_LOCAL
                                                  : a->vm.svm_cid,
                  a->vm.svm_port);
    break;
  case AF_UNIX:
    if (len <= offsetof (struct sockaddr_un, sun_path) ||
        a->un.sun_path[0] != '/')
      break; /* without a name, or one that only nbdkit could find again */
    path = export_encode_path (a->un.sun_path);
    if (path)
      r = asprintf (&uri, "nbd%s+unix:///?socket=%s", s, path);
    break;
  }
  return r == -1 ? NULL : uri;
}

static bool
is_control (const union address *a)
{
  return a->sa.sa_family == AF_UNIX && house.control_path &&
         !strcmp (a->un.sun_path, house.control_path);
}

static void
add_uri (json_t *uris, int fd, bool tls)
{
  union address a = { 0 };
  socklen_t len = sizeof a - 1; /* so that a path always ends */
  int listening = 0;
  socklen_t n = sizeof listening;
  CLEANUP_FREE char *uri = NULL;
  json_t *s;
  size_t i;

  if (getsockopt (fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &n) == -1 ||
      !listening || getsockname (fd, &a.sa, &len) == -1 || is_control (&a))
    return;
  uri = uri_of (&a, len, tls);
  if (uri == NULL)
    return;
  json_array_foreach (uris, i, s)
    if (!strcmp (json_string_value (s), uri))
      return;
  json_array_append_new (uris, json_string (uri));
}

static json_t *
query_exports (json_t *args, struct error *err)
{
  const enum tls tls = find_tls ();
  json_t *uris = json_array ();
  DIR *dir = opendir ("/proc/self/fd");
  struct dirent *e;

  (void) args;
  if (dir == NULL) {
    error_set (err, errno, "open /proc/self/fd: %m");
    json_decref (uris);
    return NULL;
  }
  while ((e = readdir (dir)) != NULL)
    if (e->d_name[0] != '.')
      add_uri (uris, atoi (e->d_name), tls == TLS_REQUIRED);
  closedir (dir);
  return json_pack ("{s:o, s:o}", "uris", uris, "tls",
                    tls == TLS_UNKNOWN ? json_null ()
                                       : json_boolean (tls != TLS_OFF));
}

const struct qmp_command qmp_exports_commands[] = {
  { "x-ferry-query-exports", NULL, query_exports },
  { .name = NULL },
};
