/* nbdferry - a handover that a process before this one began
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A drive whose journal says that it has let go is not served from here any
 * more.  Its handover is brought to an end: COMMIT is repeated until the
 * destination acknowledges it, and then clients are forwarded.  Until then
 * they are refused, with where the disk went.  When the journal names another
 * address later, they are forwarded there.
 */
#ifndef FERRY_FINISHER_H
#define FERRY_FINISHER_H

#include "drive.h"

struct finisher;

/* Starts a thread.  The drive is DRIVE_GONE, or forwards already; it outlives
 * the thread.
 */
struct finisher *finisher_start (struct drive *d, struct error *err);

/* The journal names another address (departure_redirect), or one is to try at
 * once.
 */
void finisher_wake (struct finisher *f);

/* Give up (the journal still knows), wait for the thread, free. */
void finisher_stop (struct finisher *f);

#endif /* FERRY_FINISHER_H */
