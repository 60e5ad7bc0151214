/* nbdferry - migrations that a process before this one began
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_REVIVE_H
#define FERRY_REVIVE_H

#include "outgoing.h"

/* Look into the state directories of a daemon's drives, before clients come.
 * A migration that was under way goes on, paused at first; maps and
 * descriptions that belong to none are removed.  NULL if there is none.
 * 'params' becomes what it had.  The others are as outgoing_start's.
 */
struct outgoing *
outgoing_restore (struct drive *const *drives, size_t nr,
                  struct migrate_params *params,
                  void (*changed) (void *opaque, const struct migrate_info *),
                  void *opaque);

#endif /* FERRY_REVIVE_H */
