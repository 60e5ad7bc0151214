/* nbdferry - the thread that disarms regions of the activity log
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_KEEPER_H
#define FERRY_KEEPER_H

#include "drive.h"

/* End the thread that drive_start started; nothing if there is none. */
void keeper_stop (struct drive *d);

/* One look: what was quiet since the last one is disarmed.  What the thread
 * does every few seconds; not beside it.  0, or -1 if the store failed.
 */
int keeper_look (struct drive *d);

#endif /* FERRY_KEEPER_H */
