/* nbdferry - names inside the names of exports
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "export.h"

static bool
stands_for_itself (char c)
{
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
         (c >= '0' && c <= '9') || (c && strchr ("-._~", c));
}

static char *
encode (const char *text, char also)
{
  char *out = malloc (3 * strlen (text) + 1), *p = out;

  for (; p && *text; text++)
    if (stands_for_itself (*text) || *text == also)
      *p++ = *text;
    else
      p += sprintf (p, "%%%02X", (unsigned char) *text);
  if (p)
    *p = '\0';
  return out;
}

char *
export_encode (const char *text)
{
  return encode (text, '\0');
}

char *
export_encode_path (const char *path)
{
  return encode (path, '/');
}

static int
hex (char c)
{
  if (c >= '0' && c <= '9')
    return c - '0';
  c |= 0x20;
  return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* A byte that need not be encoded may be so, and one that must may be not. */
char *
export_decode (const char *text)
{
  char *out = malloc (strlen (text) + 1), *p = out;

  for (; p && *text; text++)
    if (*text != '%')
      *p++ = *text;
    else if (hex (text[1]) < 0 || hex (text[2]) < 0 ||
             (text[1] == '0' && text[2] == '0')) {
      free (out);
      return NULL;
    }
    else {
      *p++ = hex (text[1]) << 4 | hex (text[2]);
      text += 2;
    }
  if (p)
    *p = '\0';
  return out;
}
