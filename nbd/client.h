/* nbdferry - one connection to an NBD server
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A thin layer over libnbd that adds what it lacks here: every call can be
 * given up, by time or by a struct stop that another thread throws, and the
 * export can be chosen apart from the URI.  A client belongs to one thread at
 * a time and has one request in flight.
 */
#ifndef FERRY_CLIENT_H
#define FERRY_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "disk.h"
#include "error.h"

/* Thrown once, by any thread; whoever waits with it ends with ECANCELED. */
struct stop {
  int fd; /* an eventfd */
};

int stop_init (struct stop *s, struct error *err);
void stop_destroy (struct stop *s);
void stop_throw (struct stop *s);
/* As if it had not been thrown; while nobody waits with it. */
void stop_rearm (struct stop *s);
/* Wait that long, or until it is thrown: true if it was. */
bool stop_wait (const struct stop *s, uint64_t ns);

struct client;

/* Connect to 'uri'.  'export' replaces the URI's export name, unless NULL.
 * 'stop' must outlive the client.  NULL on error, also when that takes longer
 * than 'timeout_ms' (0: no limit).
 */
struct client *client_connect (const char *uri, const char *export,
                               const struct stop *stop, unsigned timeout_ms,
                               struct error *err);
void client_close (struct client *c); /* says good-bye if it still can */

/* From now on it is lost once the other host has not answered at all for half a
 * minute, not even its kernel.  For who can go on where he was.
 */
void client_notice_silence (struct client *c);

/* The same in steps, for an export of which no more is asked than reads, writes
 * and flushes: that is two round trips less.  After the first the server's name
 * is resolved, after the second the other side is reached, after the third an
 * NBD server has answered; the fourth takes one more round trip, and the export
 * can be used.  The timeout is for all together.
 */
struct client *client_begin (const char *uri, const char *export,
                             const struct stop *stop, unsigned timeout_ms,
                             struct error *err);
int client_reach (struct client *c, const char *uri, struct error *err);
int client_hear (struct client *c, const char *uri, struct error *err);
int client_open (struct client *c, const char *uri, struct error *err);

/* Is that the export that was named at first? */
bool client_is_for (const struct client *c, const char *export);

/* The server did not give that export: ask for another one. */
int client_reopen (struct client *c, const char *uri, const char *export,
                   struct error *err);

/* Is the connection lost?  If not, an error was the server's answer. */
bool client_is_dead (const struct client *c);

/* With no request in flight: look whether the server has hung up meanwhile. */
bool client_has_died (struct client *c);

/* Each request that takes longer than this is given up, and the connection
 * with it.  0 (the default): no limit.
 */
void client_set_timeout (struct client *c, unsigned timeout_ms);

/* Listen to another stop from now on. */
void client_set_stop (struct client *c, const struct stop *stop);

/* The same for all requests from now on together: none is waited for longer
 * than until that time (ns, CLOCK_MONOTONIC; 0: no limit).
 */
void client_set_deadline (struct client *c, uint64_t deadline);

uint64_t client_size (struct client *c);

/* What the server says about the export; NULL: nothing.  To be freed. */
char *client_description (struct client *c);
bool client_can_extents (struct client *c);

/* What the export at the other end can do. */
struct client_abilities {
  bool readonly, rotational, flush, fua, zero, fast_zero, trim, multi_conn,
    extents;
  uint64_t min_block, max_block; /* bytes; 0: the server did not say */
};

void client_get_abilities (struct client *c, struct client_abilities *a);

/* 0, or -1 with errno; 'flags' as in disk.h.  Lengths up to 2^32 - 1; data up
 * to 32 MiB.
 */
int client_pread (struct client *c, void *buf, size_t count, uint64_t offset);
int client_pwrite (struct client *c, const void *buf, size_t count,
                   uint64_t offset, unsigned flags);
int client_zero (struct client *c, uint64_t len, uint64_t offset,
                 unsigned flags);
int client_trim (struct client *c, uint64_t len, uint64_t offset,
                 unsigned flags);
int client_flush (struct client *c);
int client_cache (struct client *c, uint64_t len, uint64_t offset);
int client_extent (struct client *c, uint64_t offset, uint64_t end,
                   struct extent *ext);

/* As many extents as the server gives in one answer, in order from 'offset',
 * cut at 'end'; *next is where they end.  The server must have extents.
 */
typedef void (*client_found) (void *opaque, const struct extent *ext);

int client_extents (struct client *c, uint64_t offset, uint64_t end,
                    client_found found, void *opaque, uint64_t *next);

/* The same in two steps: between them the server looks, and nothing else is
 * asked of it on this connection.  'found' is called in the second one.
 */
struct client_question {
  uint64_t start, at, end;
  client_found found;
  void *opaque;
  int64_t cookie;
};

int client_extents_ask (struct client *c, struct client_question *q,
                        uint64_t offset, uint64_t end, client_found found,
                        void *opaque);
int client_extents_answer (struct client *c, struct client_question *q,
                           uint64_t *next);

/* The export that an NBD URI names, "" if none; the caller frees it. */
char *client_uri_export (const char *uri, struct error *err);

/* The same URI with another export; the caller frees it. */
char *client_uri_with_export (const char *uri, const char *export,
                              struct error *err);

#endif /* FERRY_CLIENT_H */
