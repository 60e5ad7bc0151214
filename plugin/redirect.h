/* nbdferry - disks that were let go of, and are looked for elsewhere
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_REDIRECT_H
#define FERRY_REDIRECT_H

#include "error.h"

/* For the disks of this daemon that were handed over, or are about to be:
 * COMMIT, or the connections of forwarded clients, are tried again at once;
 * with 'uri' (or NULL) over there from now on, durably.  house.lock is held.
 */
int redirect (const char *uri, struct error *err);

#endif /* FERRY_REDIRECT_H */
