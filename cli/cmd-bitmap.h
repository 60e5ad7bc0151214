/* nbdferry - nbdferry bitmap
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_CMD_BITMAP_H
#define FERRY_CMD_BITMAP_H

#include <stdbool.h>
#include <stdint.h>

#include "command.h"

/* What the options said. */
struct bitmap_values {
  const char *node;     /* or NULL */
  uint64_t granularity; /* 0: not given */
  bool disabled, transient, json;
};

int bitmap_list_run (const struct command *cmd, char **args, void *values);

#endif /* FERRY_CMD_BITMAP_H */
