/* nbdferry - how a migration goes, as query-migrate says it
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_INFO_JSON_H
#define FERRY_INFO_JSON_H

#include <jansson.h>

#include "outgoing.h"

/* QEMU's MigrationInfo, with "x-ferry" (docs/control.md).  The caller adds
 * "error-desc", in whose text there may be anything.
 */
json_t *migrate_info_to_json (const struct migrate_info *i);

#endif /* FERRY_INFO_JSON_H */
