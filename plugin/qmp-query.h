/* nbdferry - the control socket: what its commands share
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_QMP_QUERY_H
#define FERRY_QMP_QUERY_H

#include <jansson.h>

#include "drive.h"

/* What query-migrate returns (qmp-migrate.c). */
json_t *qmp_migration_info (void);

/* Of a parameter that is a block-bitmap-mapping (qmp-migrate-params.c). */
struct error;
int qmp_check_mapping (json_t *value, const char *path, struct error *err);

/* Who serves the disk, as of now. */
enum drive_mode qmp_drive_mode (struct drive *d);

/* The 'changed' of outgoing_start: sends events. */
struct migrate_info;
void qmp_migration_changed (void *opaque, const struct migrate_info *info);

#endif /* FERRY_QMP_QUERY_H */
