/* nbdferry - the source of a migration: writes that are mirrored
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * With copy-mode=write-blocking each write, zero or trim is at the destination
 * before it is acknowledged, so that what is dirty cannot grow: the migration
 * converges under any load.
 */
#ifndef FERRY_MIRROR_H
#define FERRY_MIRROR_H

#include <stdbool.h>
#include <stdint.h>

#include "error.h"

struct outgoing;
struct buffer;
struct mirror;

struct mirror_stats {
  uint64_t bytes;      /* data and zeros that were sent for writers */
  uint64_t requests;   /* that waited */
  uint64_t wait_us;    /* all of them together */
  uint64_t longest_us;
  uint64_t given_up;   /* went on without having been mirrored */
};

/* Made once, before the first start; freed when nobody writes or sends any
 * more.  NULL and ENOMEM.
 */
struct mirror *mirror_new (struct outgoing *o, struct error *err);
void mirror_free (struct mirror *m);

/* The engine runs: mirror, if that is wanted.  mirror_end ends it, before the
 * engine is freed: all writers go on, and none waits any more.  Both may be
 * called again and again.
 */
int mirror_start (struct mirror *m, struct error *err);
void mirror_end (struct mirror *m);

/* No drive asks the mirror any more.  By itself part of mirror_end. */
void mirror_detach (struct mirror *m);

/* Is it wanted? */
void mirror_set_wanted (struct mirror *m, bool wanted);

/* Between: nothing of ours is put into the engine, and nobody waits. */
void mirror_pause (struct mirror *m);
void mirror_go (struct mirror *m);

/* A channel's thread: a packet has arrived, shipment_acked was called. */
void mirror_acked (struct mirror *m, struct buffer *b);

void mirror_stats (struct mirror *m, struct mirror_stats *stats);

#endif /* FERRY_MIRROR_H */
