/* nbdferry - writers are slowed step by step until a migration converges
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What one round leaves the next one must send, and while it does so, writers
 * leave something again: their rate, by the link's, of what there was, and of
 * what the fixed time of a round is worth.  So with a low enough rate what is
 * left becomes as small as is wanted, whoever writes in whatever way; and with
 * mirrored writes, of which any number may be under way at once, too.
 */
#ifndef FERRY_BRAKE_H
#define FERRY_BRAKE_H

#include <stddef.h>
#include <stdint.h>

#include "drive.h"

struct brake {
  unsigned rounds;
  uint64_t before; /* bytes that the last round left */
  uint64_t rate;   /* bytes a second for all drives together, 0: no limit */
};

/* A round has ended, and left so much to be sent over a link of that rate,
 * which is too much.
 */
void brake_round (struct brake *b, struct drive *const *drives, size_t nr,
                  uint64_t dirty, uint64_t link);

/* Nobody is slowed any more. */
void brake_release (struct brake *b, struct drive *const *drives, size_t nr);

#endif /* FERRY_BRAKE_H */
