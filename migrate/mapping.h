/* nbdferry - which bitmaps travel, and what they are called over there
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * QEMU's block-bitmap-mapping, as it came over the control socket: an array of
 *
 *   { "node-name": N, "alias": A, "bitmaps": [
 *       { "name": B, "alias": C, "transform": { "persistent": bool } }, ... ] }
 *
 * 'transform' and its member are optional.  A mapping that is NULL was never
 * set: everything travels, under its own name.  Once it is set, what it does
 * not name stays behind.  It is never changed, only replaced.
 */
#ifndef FERRY_MAPPING_H
#define FERRY_MAPPING_H

#include <stdbool.h>

#include <jansson.h>

#include "error.h"

/* Is it one to one?  Its members have the right types already. */
int mapping_check (const json_t *mapping, struct error *err);

/* What the disk is called at the destination, or NULL if it is not named. */
const char *mapping_disk (const json_t *mapping, const char *node);

/* What the bitmap is called at the destination, where it is to be persistent
 * as '*persistent' says, which is changed if the mapping does.  NULL: it stays
 * behind.  What is returned lives as long as the mapping and 'name'.
 */
const char *mapping_bitmap (const json_t *mapping, const char *node,
                            const char *name, bool *persistent);

/* The other way: what a bitmap is called here that comes for the disk 'node'
 * under that alias, and whether it is to be persistent.  NULL with 'err' in
 * QEMU's words: the mapping does not know it.
 */
const char *mapping_name (const json_t *mapping, const char *node,
                          const char *alias, bool *persistent,
                          struct error *err);

#endif /* FERRY_MAPPING_H */
