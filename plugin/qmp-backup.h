/* nbdferry - the control socket: backups, for transactions
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_QMP_BACKUP_H
#define FERRY_QMP_BACKUP_H

#include "qmp-dispatch.h"
#include "transaction.h"
#include "views.h"

extern const struct qmp_param qmp_backup_begin_params[];
extern const struct qmp_param qmp_backup_end_params[];

/* Fill an action that begins or ends a backup (as 'type' says) from the
 * arguments.  The view, to be handed to views_settle; NULL on error.
 */
struct view *qmp_backup_action (struct bitmap_action *a,
                                enum bitmap_action_type type, json_t *args,
                                struct error *err);

#endif /* FERRY_QMP_BACKUP_H */
