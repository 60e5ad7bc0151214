/* nbdferry - where two disks differ
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_COMPARE_H
#define FERRY_COMPARE_H

#include "bitmap.h"
#include "side.h"

struct compare_options {
  unsigned threads;        /* connections to each side; at least 1 */
  const struct stop *stop; /* gives it up; may be NULL */
  /* How far it has come, a few times a second, in the caller's thread; may be
   * NULL.
   */
  void (*progress) (void *opaque, uint64_t done, uint64_t total);
  void *opaque;
};

/* Compare two sides of the same block size, as far as the shorter one goes,
 * and mark in 'differs' (of a size not below that, its granularity the block)
 * each block that is not the same.  The sides are clipped to that.
 *
 * Both may be written to meanwhile: each block is seen as it was at some time
 * of the comparison.  0, or -1.
 */
int compare_sides (struct side *a, struct side *b, struct bitmap *differs,
                   const struct compare_options *opt, struct error *err);

#endif /* FERRY_COMPARE_H */
