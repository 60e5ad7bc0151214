/* nbdferry - the thread that ends the daemon in good order
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_WATCHER_H
#define FERRY_WATCHER_H

#include "error.h"

/* After the fork. */
int watcher_start (struct error *err);

/* nbdkit has no clients any more: see that the daemon ends, and wait until
 * the drives are closed.
 */
void watcher_join (void);

#endif /* FERRY_WATCHER_H */
