/* nbdferry - a disk that an NBD server holds, through a pool of connections
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Each connection has one request in flight; a request takes an idle one, or
 * makes a new one, or waits for one.  When a connection dies, all of them are
 * made anew, with a new epoch, with back-off and for as long as it takes;
 * requests that were not answered are sent again only then.  What the epoch
 * does is the caller's affair: it is part of the export's name (the fence of
 * docs/protocol.md).
 *
 * A server may be started again, and its machine, too.  Its export's
 * description says which it was: as long as it stays the same, what was
 * acknowledged is still there (if only in a page cache).  If it has changed,
 * writes that were acknowledged and not flushed may be lost, and the next flush
 * fails.
 */
#ifndef FERRY_POOL_H
#define FERRY_POOL_H

#include "client.h"
#include "disk.h"

/* Writes the export's name for an epoch into 'name' (4096 bytes).  Must be
 * quick: called with a lock.
 */
typedef void (*pool_export_name) (void *opaque, uint64_t epoch, char *name);

/* Connect once, and later up to 'nr' times as requests come.  'opaque' is freed
 * with free () when the pool is closed, or here on error.  'size' is what the
 * export must have.  The disk's close operation turns waiting requests away
 * with ESHUTDOWN; it must not be called while there are any (pool_stop first).
 */
struct disk *pool_open (const char *uri, pool_export_name name, void *opaque,
                        unsigned nr, uint64_t size, uint64_t epoch,
                        const struct stop *stop, unsigned timeout_ms,
                        struct error *err);

/* The same for a server that is not ours: as many connections as it takes, one
 * if a flush on one does not count for the others.  It has no fence, so only
 * what changes nothing is sent again when a connection was lost; a write that
 * was under way fails with EIO, and so does the first flush after writes that
 * were acknowledged and not flushed.  When the server has been away for
 * 'patience_ms', requests fail at once until it is back.
 */
struct disk *pool_open_foreign (const char *uri, unsigned nr,
                                unsigned patience_ms, const struct stop *stop,
                                unsigned timeout_ms, struct error *err);

/* How often a foreign server may have lost writes that it had acknowledged. */
unsigned pool_losses (const struct disk *d);

/* What the (foreign) server can do. */
const struct client_abilities *pool_abilities (const struct disk *d);

/* Each request takes no longer than that from now on; 0: no limit. */
void pool_limit (struct disk *d, unsigned timeout_ms);

/* The daemon ends: nobody waits for a lost server any more.  Returns when no
 * request is under way, or at the deadline (ns); what is under way then, is
 * given up.  A later request takes no longer than this takes at most, or
 * HURRY_MS.
 */
#define HURRY_MS 1000
void pool_hurry (struct disk *d, uint64_t deadline);

/* The same server is at another address: all connections are made anew there,
 * as if one had died.  'opaque' (taken over, also on error) replaces that of
 * pool_open.  -1: it was stopped, or no memory.
 */
int pool_move (struct disk *d, const char *uri, void *opaque);

/* Give up all that is under way, for good: requests end with ESHUTDOWN. */
void pool_stop (struct disk *d);

#endif /* FERRY_POOL_H */
