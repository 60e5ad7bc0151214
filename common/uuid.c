/* nbdferry - random identities
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>

#include "uuid.h"

void
uuid_new (struct uuid *u)
{
  size_t got = 0;

  while (got < sizeof u->b) {
    ssize_t r = getrandom (u->b + got, sizeof u->b - got, 0);

    if (r > 0)
      got += r;
  }
  u->b[6] = (u->b[6] & 0x0f) | 0x40;
  u->b[8] = (u->b[8] & 0x3f) | 0x80;
}

void
uuid_format (const struct uuid *u, char text[UUID_TEXT])
{
  char *p = text;

  for (size_t i = 0; i < sizeof u->b; i++) {
    if (i == 4 || i == 6 || i == 8 || i == 10)
      *p++ = '-';
    p += sprintf (p, "%02x", u->b[i]);
  }
}

bool
uuid_parse (const char *text, struct uuid *u)
{
  struct uuid r;

  if (strlen (text) != UUID_TEXT - 1)
    return false;
  for (size_t i = 0; i < sizeof r.b; i++) {
    unsigned v;
    int n = 0;

    if (i == 4 || i == 6 || i == 8 || i == 10)
      if (*text++ != '-')
        return false;
    if (sscanf (text, "%2x%n", &v, &n) != 1 || n != 2)
      return false;
    r.b[i] = v;
    text += 2;
  }
  *u = r;
  return true;
}
