/* nbdferry - random identities
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_UUID_H
#define FERRY_UUID_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

struct uuid {
  uint8_t b[16];
};

#define UUID_TEXT 37 /* with the NUL */

/* A random (version 4) UUID from the kernel. */
void uuid_new (struct uuid *u);
void uuid_format (const struct uuid *u, char text[UUID_TEXT]);
bool uuid_parse (const char *text, struct uuid *u);

static inline bool
uuid_equal (const struct uuid *a, const struct uuid *b)
{
  return memcmp (a->b, b->b, sizeof a->b) == 0;
}

static inline bool
uuid_is_zero (const struct uuid *u)
{
  static const struct uuid zero;

  return uuid_equal (u, &zero);
}

#endif /* FERRY_UUID_H */
