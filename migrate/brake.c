/* nbdferry - writers are slowed step by step until a migration converges
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include "brake.h"

/* So many rounds may show that it must be. */
#define PATIENT_ROUNDS 2

/* Never less than that part of the link's rate, or that much: a guest must
 * get on.
 */
#define LEAST_PART  1024
#define LEAST_BYTES (16 << 10)

static uint64_t
dirty_of (struct drive *d)
{
  uint64_t n = d->ship ? bitmap_count (d->ship) : 0;

  return n < d->size ? n : d->size;
}

/* Each drive gets its part, by what is dirty there, and a little. */
static void
set_rates (const struct brake *b, struct drive *const *drives, size_t nr)
{
  uint64_t sum = 0;

  for (size_t i = 0; i < nr; i++)
    sum += dirty_of (drives[i]);
  for (size_t i = 0; i < nr; i++) {
    double part = (dirty_of (drives[i]) + sum / 16.0 / nr + 1) /
      (sum + sum / 16.0 + nr);

    throttle_set (&drives[i]->throttle, b->rate ? b->rate * part + 1 : 0);
  }
}

void
brake_round (struct brake *b, struct drive *const *drives, size_t nr,
             uint64_t dirty, uint64_t link)
{
  uint64_t least =
    link / LEAST_PART > LEAST_BYTES ? link / LEAST_PART : LEAST_BYTES;

  if (++b->rounds >= PATIENT_ROUNDS && dirty > b->before / 2) {
    if (b->rate == 0 || b->rate > link)
      b->rate = link;
    b->rate /= dirty > b->before / 10 * 9 ? 4 : 2;
    if (b->rate < least)
      b->rate = least;
  }
  /* Who is slowed more than it takes gets some of it back; but not all:
   * without any limit it would begin anew.
   */
  else if (b->rate > 0 && dirty < b->before / 5)
    b->rate = b->rate < link / 4 ? b->rate * 2 : link / 2;
  b->before = dirty;
  set_rates (b, drives, nr);
}

void
brake_release (struct brake *b, struct drive *const *drives, size_t nr)
{
  *b = (struct brake){ 0 };
  for (size_t i = 0; i < nr; i++)
    throttle_set (&drives[i]->throttle, 0);
}
