/* nbdferry - what each write marks
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_MARKS_H
#define FERRY_MARKS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bitmap.h"

/* With more bitmaps than that there is no short way. */
#define MARKS_SHORT 16

/* A slot is for 32 granules: which ones, and which of them are known. */
#define MARKS_SLOTS 1024

/* Immutable once published, but for 'known'; replaced while the write gate is
 * shut.
 */
struct marks {
  bool persistent; /* one of them is: regions must be armed before a write */
  bool again;      /* somebody may be clearing some: mark after it as well */

  /* The short way, or nr_short 0; see marks.c.  'shift' is the finest. */
  unsigned shift;
  size_t nr_short;
  struct {
    const uint64_t *words;
    unsigned shift;
  } leaf[MARKS_SHORT];
  atomic_uint_fast64_t known[MARKS_SLOTS];

  size_t nr;
  struct bitmap *map[]; /* in this order */
};

/* Empty, with room for that many; to be freed with free.  NULL if there is no
 * memory.
 */
struct marks *marks_new (size_t room);

/* It is complete now. */
void marks_ready (struct marks *m);

/* Take one out, in place.  The write gate is shut. */
void marks_remove (struct marks *m, const struct bitmap *map);

/* Before a write is submitted, and once it has landed, or has failed.  Inside
 * the write gate.
 */
void marks_before (struct marks *m, uint64_t offset, uint64_t len);
void marks_after (struct marks *m, uint64_t offset, uint64_t len);

#endif /* FERRY_MARKS_H */
