/* nbdferry - a bitmap's bits as bytes
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The encoding (docs/protocol.md, "Bits"): a sequence of operations, each an
 * unsigned LEB128 number  n << 2 | kind  with n >= 1:
 *
 *   kind 0  skip    n bits that are not said to be set
 *   kind 1  set     n bits that are set
 *   kind 2  words   n literal words of 64 bits follow, 8 bytes each, the
 *                   first bit in bit 0 of byte 0
 *   kind 3  runs    n runs of set bits, and the n - 1 gaps between them, in
 *                   Rice codes (rice.h) behind two bytes of parameters
 *
 * The operations begin at bit 'first' of the section and together cover at
 * most its number of bits (the last literal word may reach beyond; its bits
 * there must be 0).  The writer chooses, region by region, what is shorter:
 * never much more than the plain bits, and at random within a fifth of their
 * entropy, whatever their density.  An empty sequence is a section without a
 * set bit.
 */
#ifndef FERRY_BITMAP_WIRE_H
#define FERRY_BITMAP_WIRE_H

#include "bitmap.h"

/* A section under construction.  Owned by one thread. */
struct bits_writer {
  uint8_t *buf;   /* the caller's; cap bytes */
  size_t cap, len;
  uint64_t first; /* the section's first bit */
  uint64_t next;  /* the first bit that no operation covers yet */
};

/* Begin a section at bit 'first' in the caller's buffer. */
void bits_writer_init (struct bits_writer *w, void *buf, size_t cap,
                       uint64_t first);

/* Append the set bits of the granules that [start, end) touches.  Calls must
 * ascend; a granule shared with the call before is written once.  Returns the
 * offset in bytes up to which the bits are in: 'end' if all fitted, less
 * (on a granule boundary, or 'start') if the buffer is full.
 */
uint64_t bits_write (struct bits_writer *w, const struct bitmap *bm,
                     uint64_t start, uint64_t end);

/* Check a section's bytes: well formed, within [first, first + nr_bits), and
 * within 'total_bits'.  Nothing is allocated.  Returns 0, or -1 with 'err'.
 */
int bits_check (const uint8_t *buf, size_t len, uint64_t first,
                uint64_t nr_bits, uint64_t total_bits, struct error *err);

/* Set in 'bm' the bits of a section.  The bytes are checked first: on error
 * nothing was changed.
 */
int bits_apply (struct bitmap *bm, const uint8_t *buf, size_t len,
                uint64_t first, uint64_t nr_bits, struct error *err);

/* The same for what bits_check has accepted for a bitmap of as many bits. */
void bits_apply_checked (struct bitmap *bm, const uint8_t *buf, size_t len,
                         uint64_t first, uint64_t nr_bits);

#endif /* FERRY_BITMAP_WIRE_H */
