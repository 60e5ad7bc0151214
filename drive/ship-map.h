/* nbdferry - what a migration's destination does not hold durably
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A persistent bitmap of the store with a reserved name.  Every write marks it
 * (after d->ship, and again after the data), and a bit is cleared only when the
 * destination has flushed what it got of the chunk.  It survives what the
 * drive's other bitmaps survive, and if it cannot be trusted all is sent
 * again.  It stands beside the drive's list, as d->unheld: nobody sees it, and
 * no migration carries it.
 *
 * Clearing (migrate/held.c) is not atomic to a write: a bit may be off for
 * moments although a write has just set it.  A daemon that is killed in such a
 * moment must not lose it, so the range is written to the file 'ship-clearing'
 * before, and struck out after; what stands there at the next start is dirty.
 * It is in the page cache by then, which a kill leaves alone.  For a loss of
 * power the activity log does the same, because the control lock, which
 * the keeper of that log needs as well, is held while bits are off.
 */
#ifndef FERRY_SHIP_MAP_H
#define FERRY_SHIP_MAP_H

#include "drive.h"

#define SHIP_MAP_NAME "x-ferry-ship"
#define SHIP_MAP_CLEARING_BYTES 32

/* Is it the map's name? */
bool ship_map_name (const char *name);

/* Is it a name that users cannot give to a new bitmap?  All that begin with
 * x-ferry- are.
 */
bool ship_map_reserved (const char *name);

/* Make d->unheld, with everything set, durably, and not marked yet:
 * drive_set_ship does that.  If the store cannot have it, it is in memory,
 * which is enough as long as the daemon lives.  One that is there is used
 * again if it has that granularity.  Takes control.
 */
int ship_map_make (struct drive *d, unsigned shift, struct error *err);

/* Everything is set, durably.  Takes control. */
int ship_map_fill (struct drive *d, struct error *err);

/* Remove it: nobody marks it any more, and the store forgets it.  If it cannot
 * be removed from the store, the next start does it.  Takes control and gate.
 */
void ship_map_remove (struct drive *d);

/* The range in which bits may be off from now on, until ship_map_cleared.
 * Control held throughout.  -1: nothing may be cleared.
 */
int ship_map_clearing (struct drive *d, uint64_t start, uint64_t end);
void ship_map_cleared (struct drive *d);

/* When the store is loaded: set what was being cleared.  -1 if what stands
 * there makes no sense: then nothing of the map can be relied upon.
 */
int ship_map_mend (struct drive *d);

/* There is no map: the file goes. */
void ship_map_forget (struct drive *d);

/* What that file says: 0 with the range (empty: nothing), or -1. */
int ship_map_parse (const uint8_t *buf, size_t len, struct range *range);

#endif /* FERRY_SHIP_MAP_H */
