/* nbdferry - a handover that a process before this one began
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A drive whose journal says that it has let go is not served from here any
 * more.  Its handover is brought to an end: COMMIT is repeated until the
 * destination acknowledges it, and then clients are forwarded.  Until then
 * they are refused, with where the disk went.
 */
#ifndef FERRY_FINISHER_H
#define FERRY_FINISHER_H

#include "drive.h"

struct finisher;

/* Starts a thread.  The drive is DRIVE_GONE, and outlives it. */
struct finisher *finisher_start (struct drive *d, struct error *err);

/* Give up (the journal still knows), wait for the thread, free. */
void finisher_stop (struct finisher *f);

#endif /* FERRY_FINISHER_H */
