/* nbdferry - nbdferry bitmap
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_CMD_BITMAP_H
#define FERRY_CMD_BITMAP_H

#include <stdbool.h>
#include <stdint.h>

#include "command.h"
#include "control.h"

/* What the options said. */
struct bitmap_values {
  const char *node;     /* or NULL */
  const char *as;       /* or NULL */
  uint64_t granularity; /* 0: not given */
  bool disabled, transient, json;
};

/* The arguments of a QMP command about the disk 'node', or about the only one
 * there is if that is NULL: 'args' (taken over; NULL: no memory) with "node".
 * NULL on error.
 */
json_t *bitmap_on_disk (struct control *c, json_t *args, const char *node,
                        struct error *err);

int bitmap_audit_run (const struct command *cmd, char **args, void *values);
int bitmap_import_run (const struct command *cmd, char **args, void *values);
int bitmap_list_run (const struct command *cmd, char **args, void *values);

extern const struct command bitmap_map_command;

#endif /* FERRY_CMD_BITMAP_H */
