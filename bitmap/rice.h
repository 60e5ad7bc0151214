/* nbdferry - numbers as a stream of bits
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Private to bitmap/.  Rice codes of numbers below 2^32, bit by bit, the
 * lowest bit of each byte first (docs/protocol.md, "Bits").  With the
 * parameter k, x is  q = x >> k  ones, a zero, and the k lowest bits of x; if
 * q would be RICE_LONG or more, it is RICE_LONG ones and the 32 bits of x.
 */
#ifndef FERRY_BITMAP_RICE_H
#define FERRY_BITMAP_RICE_H

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define RICE_LONG  20
#define RICE_MAX_K 31
#define RICE_WORST (RICE_LONG + 32) /* bits of the longest code */

static inline unsigned
rice_len (uint32_t x, unsigned k)
{
  const uint32_t q = x >> k;

  return q < RICE_LONG ? q + 1 + k : RICE_WORST;
}

/* Where bits are put: 8 bytes from 'p' on must be writable. */
struct bit_sink {
  uint8_t *p;
  uint64_t acc;
  unsigned n; /* bits in acc, less than 8 between two calls */
};

static inline void
rice_put (struct bit_sink *s, uint32_t x, unsigned k)
{
  const uint32_t q = x >> k;
  uint64_t code, le;

  if (q < RICE_LONG)
    code = ((uint64_t) (x & ((UINT64_C (1) << k) - 1)) << (q + 1)) |
           ((UINT64_C (1) << q) - 1);
  else
    code = (uint64_t) x << RICE_LONG | ((UINT64_C (1) << RICE_LONG) - 1);
  s->acc |= code << s->n;
  s->n += rice_len (x, k);
  le = htole64 (s->acc);
  memcpy (s->p, &le, 8);
  s->p += s->n / 8;
  s->acc >>= s->n & ~7u;
  s->n &= 7;
}

/* Where bits are got from. */
struct bit_source {
  const uint8_t *p;
  size_t len;  /* bytes */
  uint64_t at; /* in bits */
};

/* The next 57 bits or more; zeros beyond the end. */
static inline uint64_t
bits_peek (const struct bit_source *s)
{
  const size_t byte = s->at / 8;
  uint64_t w = 0;

  if (s->len >= 8 && byte <= s->len - 8)
    memcpy (&w, s->p + byte, 8);
  else if (byte < s->len)
    memcpy (&w, s->p + byte, s->len - byte);
  return le64toh (w) >> s->at % 8;
}

/* False if it is cut off, or longer than it has to be. */
static inline bool
rice_get (struct bit_source *s, unsigned k, uint32_t *x)
{
  const uint64_t w = bits_peek (s);
  const unsigned q = __builtin_ctzll (~w | UINT64_C (1) << 63);

  if (q < RICE_LONG) {
    *x = q << k | (w >> (q + 1) & ((UINT64_C (1) << k) - 1));
    s->at += q + 1 + k;
    if (k > 0 && q > (UINT32_MAX >> k))
      return false;
  }
  else {
    *x = w >> RICE_LONG;
    s->at += RICE_WORST;
    if (*x >> k < RICE_LONG)
      return false;
  }
  return s->at <= (uint64_t) s->len * 8;
}

#endif /* FERRY_BITMAP_RICE_H */
