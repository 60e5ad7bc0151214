/* nbdferry - the daemon's disks, as QMP lists them
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_NODES_H
#define FERRY_NODES_H

#include <jansson.h>

#include "control.h"

/* What query-named-block-nodes lists, disks and their "dirty-bitmaps" in the
 * order in which they were made: an array that the caller drops, or NULL.
 */
json_t *nodes_query (struct control *c, struct error *err);

/* The element with that name, borrowed; NULL with an error that lists the
 * names there are.
 */
const json_t *nodes_find (const json_t *nodes, const char *name,
                          struct error *err);

/* The only element, borrowed; NULL with an error that lists the names if
 * there are several.
 */
const json_t *nodes_only (const json_t *nodes, struct error *err);

const char *node_name (const json_t *node); /* never NULL */

#endif /* FERRY_NODES_H */
