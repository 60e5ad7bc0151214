/* nbdferry - the options of migrate that choose and rename
 * SPDX-License-Identifier: BSD-3-Clause
 *
 *   --node NODE[=NAME]            the disk moves, and is called NAME there
 *   --bitmap [NODE/]NAME[=ALIAS]  the bitmap travels, and is called ALIAS there
 *   --no-bitmaps                  none does
 *
 * Names may hold any character, so they are read against the list of those
 * that there are: the longest one that fits is meant.
 */
#ifndef FERRY_MAPPING_OPTIONS_H
#define FERRY_MAPPING_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>

#include <jansson.h>

#include "error.h"

#define MAX_MAPPED 256

struct mapping_options {
  const char *nodes[MAX_MAPPED];
  size_t nr_nodes;
  const char *bitmaps[MAX_MAPPED];
  size_t nr_bitmaps;
  bool no_bitmaps;
};

/* Add what they mean to the arguments of the command "migrate".  'nodes' is
 * the daemon's list (nodes.h), or NULL if it is not needed; 0 or -1.
 */
int mapping_options_add (const struct mapping_options *v, const char *uri,
                         const json_t *nodes, json_t *args,
                         struct error *err);

/* Is the daemon's list needed?  Not to name disks as they are. */
bool mapping_options_need_list (const struct mapping_options *v);

#endif /* FERRY_MAPPING_OPTIONS_H */
