/* nbdferry - begin a migration and stay with it until it ends
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_FOLLOW_H
#define FERRY_FOLLOW_H

#include <jansson.h>

#include "control.h"
#include "progress.h"

/* Send 'migrate' with those arguments (taken over), show how it goes, and
 * cancel it at SIGINT or SIGTERM.  Reports everything itself; returns an exit
 * status.  But if the server is of another kind, which can only get a copy of
 * the data, it says nothing and sets '*other' (unless that is NULL).
 */
int follow_migration (struct control *c, json_t *args, struct progress *p,
                      bool *other);

#endif /* FERRY_FOLLOW_H */
