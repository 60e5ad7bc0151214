/* nbdferry - which bitmaps of a sidecar belong to a migration under way
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Bitmaps that are coming in stand in the sidecar under their own names from
 * the beginning.  Until the migration is committed, incoming.json in the
 * state directory lists those names, so that after a crash they can be told
 * from the bitmaps that the disk had before.  It is durable before they enter
 * the sidecar's directory; a name that it lists in vain does no harm.
 */
#ifndef FERRY_INCOMING_NAMES_H
#define FERRY_INCOMING_NAMES_H

#include <jansson.h>

#include "drive.h"

/* List the entries that are persistent and incoming; none: remove the file. */
int incoming_names_write (const char *state_dir,
                          const struct drive_entry *entries, size_t nr,
                          struct error *err);

/* The list as a JSON array (the caller's), empty if there is no file. */
json_t *incoming_names_read (const char *state_dir, struct error *err);

/* The disk has become active: the list means nothing any more, and nobody
 * reads it (so its removal need not be durable).
 */
void incoming_names_forget (const char *state_dir);

bool incoming_names_has (const json_t *names, const char *name);

#endif /* FERRY_INCOMING_NAMES_H */
