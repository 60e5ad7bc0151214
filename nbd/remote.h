/* nbdferry - another NBD server's export as a disk
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Whatever the server can do or not: requests are cut to its largest block and
 * rounded to its smallest; what it lacks (zeroes, trims, FUA) is done in
 * another way.  When the connection is lost, see pool.h.
 */
#ifndef FERRY_REMOTE_H
#define FERRY_REMOTE_H

#include "client.h"
#include "disk.h"

struct remote_options {
  unsigned connections;    /* at most */
  unsigned patience_ms;    /* how long requests wait for a lost server */
  const struct stop *stop; /* of connecting for the first time; or NULL */
};

/* Connect.  NULL on error.  Sizes that are no multiple of 512 are one. */
struct disk *remote_open (const char *uri, const struct remote_options *opt,
                          struct error *err);

/* Is that an NBD URI, and not a path? */
bool remote_is_uri (const char *s);

/* A URI whose files (socket=, tls-…=) have absolute paths; the caller frees
 * it.
 */
char *remote_absolute_uri (const char *uri, struct error *err);

const struct client_abilities *remote_abilities (const struct disk *d);

/* Each request takes no longer than that from now on; 0: no limit. */
void remote_limit (struct disk *d, unsigned timeout_ms);

/* Give up all that is under way, for good. */
void remote_stop (struct disk *d);

#endif /* FERRY_REMOTE_H */
