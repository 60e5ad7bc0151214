/* nbdferry - Ctrl-C for who waits with a struct stop
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_INTERRUPT_H
#define FERRY_INTERRUPT_H

#include "client.h"

/* What the first SIGINT or SIGTERM throws from now on, for as long as the
 * process lives; a second one ends it at once.  NULL on error.
 */
const struct stop *interrupt_catch (struct error *err);

#endif /* FERRY_INTERRUPT_H */
