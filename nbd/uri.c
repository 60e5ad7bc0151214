/* nbdferry - the export that an NBD URI names
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client.h"

/* The URI's export as it is written there: from *start, 'len' bytes. */
static int
find_export (const char *uri, const char **start, size_t *len,
             struct error *err)
{
  const char *authority = strstr (uri, "://");
  const char *end;

  if (authority == NULL || strncmp (uri, "nbd", 3) != 0)
    return error_set (err, EINVAL, "'%s' is not an NBD URI, such as "
                      "nbd://host/disk or nbd+unix:///disk?socket=PATH", uri);
  *start = authority + 3 + strcspn (authority + 3, "/?#");
  end = *start + strcspn (*start, "?#");
  *len = end - *start;
  return 0;
}

char *
client_uri_export (const char *uri, struct error *err)
{
  const char *from;
  char *name, *to;
  size_t len;

  if (find_export (uri, &from, &len, err) == -1)
    return NULL;
  if (len > 0) { /* the slash */
    from++;
    len--;
  }
  name = to = malloc (len + 1);
  if (name == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  while (len > 0) {
    unsigned v;

    if (*from == '%' && len >= 3 && sscanf (from + 1, "%2x", &v) == 1 &&
        v != 0) {
      *to++ = v;
      from += 3;
      len -= 3;
    }
    else {
      *to++ = *from++;
      len--;
    }
  }
  *to = '\0';
  return name;
}

char *
client_uri_with_export (const char *uri, const char *export,
                        struct error *err)
{
  static const char plain[] = "abcdefghijklmnopqrstuvwxyz"
                              "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
                              "0123456789-._~@/:";
  const char *old;
  size_t len;
  char *r, *to;

  if (find_export (uri, &old, &len, err) == -1)
    return NULL;
  r = malloc (strlen (uri) + 1 + 3 * strlen (export) + 1);
  if (r == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  to = mempcpy (r, uri, old - uri);
  *to++ = '/';
  for (; *export; export++) {
    if (strchr (plain, *export))
      *to++ = *export;
    else
      to += sprintf (to, "%%%02X", (unsigned char) *export);
  }
  strcpy (to, old + len);
  return r;
}
