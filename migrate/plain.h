/* nbdferry - drives copied to an NBD server that is not ours
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Their data goes there as plain NBD writes, round after round while clients
 * go on, until little is left; then writes are held, the rest is sent, and
 * what the server has is the disks as of that instant, all of them at the same
 * one.  Nothing is handed over: the source goes on serving, with its bitmaps.
 * Their state at that instant can be had in a qcow2 image.
 *
 * One struct plain is one such copy; it is to be used like a struct outgoing.
 */
#ifndef FERRY_PLAIN_H
#define FERRY_PLAIN_H

#include "drive.h"
#include "error.h"
#include "outgoing.h"

struct plain;

/* Begin to copy the drives to 'uri'; which export each goes to, and 'changed',
 * as in outgoing_start.  'bitmaps_to' (NULL: none) is a file that must not
 * exist yet, for the bitmaps of the only drive.  NULL on error.
 */
struct plain *plain_start (struct drive *const *drives, size_t nr,
                           const char *uri, const char *bitmaps_to,
                           const struct migrate_params *params,
                           void (*changed) (void *opaque,
                                            const struct migrate_info *),
                           void *opaque, struct error *err);

void plain_set_params (struct plain *p, const struct migrate_params *params);
void plain_info (struct plain *p, struct migrate_info *info);

/* Ask it to stop; what the server has then is neither here nor there. */
void plain_cancel (struct plain *p);

/* The daemon ends. */
void plain_stop (struct plain *p);

/* Wait for its threads; and free it.  Only after it ended by itself, or after
 * one of those above.
 */
void plain_join (struct plain *p);
void plain_free (struct plain *p);

bool plain_ended (struct plain *p);

#endif /* FERRY_PLAIN_H */
