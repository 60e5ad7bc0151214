/* nbdferry - fuzz the decoder of a bitmap's bits
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The first two bytes place the section in a bitmap of 10000 bits; the rest is
 * the section.  What is accepted must have set bits of the section alone, and
 * must come out of the writer and in again the same.
 */
#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "wire.h"

#define SHIFT 9
#define G     (UINT64_C (1) << SHIFT)
#define NR    10000

int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

static void
must (bool ok)
{
  if (!ok)
    abort ();
}

static void
same (const struct bitmap *a, const struct bitmap *b)
{
  struct range ra = { 0, 0 }, rb = { 0, 0 };
  bool more = true;

  while (more) {
    more = bitmap_next_dirty (a, ra.end, UINT64_MAX, &ra);
    must (more == bitmap_next_dirty (b, rb.end, UINT64_MAX, &rb));
    must (ra.start == rb.start && ra.end == rb.end);
  }
}

static void
again (const struct bitmap *bm, struct bitmap *copy, uint64_t first,
       uint64_t nr)
{
  static uint8_t buf[NR];
  struct bits_writer w;

  bits_writer_init (&w, buf, sizeof buf, first);
  must (bits_write (&w, bm, first * G, (first + nr) * G) == (first + nr) * G);
  must (bits_apply (copy, buf, w.len, first, nr, NULL) == 0);
  same (bm, copy);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  struct bitmap *bm, *copy;
  struct error err = { 0 };
  struct range run;
  uint64_t first, nr;

  if (size < 2)
    return 0;
  first = data[0] * 16;
  nr = data[1] * 23;
  bm = bitmap_new (NR * G, SHIFT, NULL);
  copy = bitmap_new (NR * G, SHIFT, NULL);
  must (bm != NULL && copy != NULL);
  if (bits_apply (bm, data + 2, size - 2, first, nr, &err) == 0) {
    must (!bitmap_next_dirty (bm, 0, first * G, &run));
    must (!bitmap_next_dirty (bm, (first + nr) * G, UINT64_MAX, &run));
    again (bm, copy, first, nr);
  }
  else {
    must (err.errnum != 0 && err.msg[0] != 0);
    must (bitmap_count_bits (bm) == 0);
  }
  must (bitmap_is_consistent (bm));
  bitmap_free (bm);
  bitmap_free (copy);
  return 0;
}
