/* nbdferry - a thread that flushes the destination as it goes
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * So that little is sent again when a connection is lost, and the last flush
 * is small.  It has a connection of its own, and no channel waits for it.
 */
#ifndef FERRY_FLUSHER_H
#define FERRY_FLUSHER_H

#include "outgoing-impl.h"

struct flusher;

/* 'c' is connected, with its handshake done; taken over on success.  An error
 * of a flush is the engine's.
 */
struct flusher *flusher_start (struct outgoing *o, struct client *c,
                               struct error *err);

/* Packets of that many bytes were acknowledged.  Any thread. */
void flusher_note (struct flusher *f, uint64_t bytes);

/* Bytes that it has found to be held. */
uint64_t flusher_held (struct flusher *f);

/* End its thread (which heeds the stop of its client as well); and free it,
 * when no channel runs any more.  NULL is allowed.
 */
void flusher_end (struct flusher *f);
void flusher_free (struct flusher *f);

#endif /* FERRY_FLUSHER_H */
