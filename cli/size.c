/* nbdferry - sizes as people write and read them
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "size.h"

static const char suffixes[] = "BKMGTPE";

/* Read digits up to the first other character; -1 if there is none, or too
 * many of them.
 */
static int
parse_digits (const char **text, uint64_t *value)
{
  const char *p = *text;
  uint64_t v = 0;

  for (; *p >= '0' && *p <= '9'; p++)
    if (__builtin_mul_overflow (v, UINT64_C (10), &v) ||
        __builtin_add_overflow (v, (uint64_t) (*p - '0'), &v))
      return -1;
  if (p == *text)
    return -1;
  *text = p;
  *value = v;
  return 0;
}

int
number_parse (const char *text, uint64_t *value)
{
  uint64_t v;

  if (parse_digits (&text, &v) == -1 || *text != '\0')
    return -1;
  *value = v;
  return 0;
}

int
size_parse (const char *text, uint64_t *value)
{
  const char *suffix = suffixes;
  uint64_t v;
  unsigned shift;

  if (parse_digits (&text, &v) == -1)
    return -1;
  if (*text != '\0') {
    /* No toupper: it follows the locale. */
    suffix = strchr (suffixes, *text >= 'a' && *text <= 'z'
                               ? *text - 'a' + 'A' : *text);
    if (suffix == NULL || text[1] != '\0')
      return -1;
  }
  shift = 10 * (suffix - suffixes);
  if (v > UINT64_MAX >> shift)
    return -1;
  *value = v << shift;
  return 0;
}

/* At most three digits of 'value' into 'text', and the power of 1024 that
 * they stand for.
 */
static unsigned
format_digits (uint64_t value, char text[SIZE_TEXT])
{
  unsigned power = 0;
  double v = value;
  bool whole;

  while (v >= 1023.5) {
    v /= 1024;
    power++;
  }
  whole = v == (uint64_t) v;
  snprintf (text, SIZE_TEXT, "%.*f",
            whole || v >= 99.95 ? 0 : v >= 9.995 ? 1 : 2, v);
  return power;
}

char *
size_format (uint64_t value, char text[SIZE_TEXT])
{
  unsigned power = format_digits (value, text);
  size_t len = strlen (text);

  snprintf (text + len, SIZE_TEXT - len, power ? " %ciB" : " %c",
            suffixes[power]);
  return text;
}

char *
size_compact (uint64_t value, char text[SIZE_TEXT])
{
  unsigned power = format_digits (value, text);
  size_t len = strlen (text);

  snprintf (text + len, SIZE_TEXT - len, "%c", suffixes[power]);
  return text;
}
