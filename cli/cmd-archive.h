/* nbdferry - nbdferry archive
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_CMD_ARCHIVE_H
#define FERRY_CMD_ARCHIVE_H

#include <stdbool.h>

#include "archive-pack.h"
#include "command.h"

/* What the options said. */
struct archive_values {
  bool json, chain, force;
  bool has_compression;
  struct pack_compression compression;
};

int archive_list_run (const struct command *cmd, char **args, void *values);

#endif /* FERRY_CMD_ARCHIVE_H */
