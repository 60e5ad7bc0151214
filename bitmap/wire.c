/* nbdferry - a bitmap's bits as bytes
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The writer takes up to RUNS runs of set bits at a time, and works out what
 * they cost in each of three ways:
 *
 *   a skip and a set for each, one or two bytes each if they are short,
 *   all of them in one operation, their lengths in Rice codes,
 *   literal words over all that they span.
 *
 * The second is close to the entropy where bits are set at random, with
 * whatever density: run lengths are distributed geometrically then, which is
 * what Rice codes are made for.  Where bits are as many as not, runs are not
 * worth looking at: words are taken at once.
 *
 * A skip is written only before something that is set, so that any number of
 * clean regions, over any number of calls, become one number.
 */
#include <config.h>

#include <endian.h>
#include <errno.h>
#include <string.h>

#include "impl.h"
#include "rice.h"
#include "wire-ops.h"
#include "wire.h"

/* So many runs are looked at together: few enough to follow a change of the
 * density, and many enough for the operation's head not to count.
 */
#define RUNS 512

/* Literals are gathered so many words at a time. */
#define LITERALS 512

/* From how many runs on, in a stretch of words, no other way is shorter by
 * more than a few in a hundred.
 */
#define STRETCH        16
#define RUNS_FOR_WORDS (STRETCH * 14)

/* Words that are looked at before the tree is climbed. */
#define NEAR 16

/* Runs of set bits, the first at bit 'pos'. */
struct runs {
  uint64_t pos;
  unsigned n;
  uint32_t set[RUNS];  /* length - 1 */
  uint32_t skip[RUNS]; /* length - 1; behind run i, if i + 1 < n */
};

static size_t
put_op (uint8_t *p, uint64_t n, unsigned kind)
{
  uint64_t v = n << 2 | kind;
  size_t len = 0;

  while (v >= 0x80) {
    p[len++] = v | 0x80;
    v >>= 7;
  }
  p[len++] = v;
  return len;
}

/* Bytes of an operation over n bits. */
static size_t
op_len (uint64_t n)
{
  return (WORD_BITS - 1 - __builtin_clzll (n << 2 | 1)) / 7 + 1;
}

void
bits_writer_init (struct bits_writer *w, void *buf, size_t cap, uint64_t first)
{
  w->buf = buf;
  w->cap = cap;
  w->len = 0;
  w->first = w->next = first;
}

/* Append an operation over 'bits' bits at 'pos', with a skip before it if
 * need be, and with its data.  False, and nothing written, if it does not fit.
 */
static bool
append (struct bits_writer *w, uint64_t pos, unsigned kind, uint64_t n,
        uint64_t bits, const void *data, size_t data_len)
{
  uint8_t head[2 * VARINT_MAX];
  size_t len = 0;

  if (pos > w->next)
    len += put_op (head, pos - w->next, OP_SKIP);
  len += put_op (head + len, n, kind);
  if (len > w->cap - w->len || data_len > w->cap - w->len - len)
    return false;
  memcpy (w->buf + w->len, head, len);
  if (data_len)
    memcpy (w->buf + w->len + len, data, data_len);
  w->len += len + data_len;
  w->next = pos + bits;
  return true;
}

/* ---- literal words ---- */

/* The 64 bits at 'pos', which need not be a multiple of 64. */
static uint64_t
word_at (const struct bitmap *bm, uint64_t pos)
{
  const uint64_t i = pos / WORD_BITS;
  const unsigned s = pos % WORD_BITS;
  uint64_t w = leaf_get (bm, i) >> s;

  if (s > 0 && i + 1 < bm->levels[0].nr)
    w |= leaf_get (bm, i + 1) << (WORD_BITS - s);
  return w;
}

/* How many literal words there is room for, headers and all. */
static unsigned
room (const struct bits_writer *w)
{
  const size_t left = w->cap - w->len;
  size_t n;

  if (left < 2 * VARINT_MAX)
    return 0;
  n = (left - 2 * VARINT_MAX) / 8;
  return n < LITERALS ? n : LITERALS;
}

/* How many words from 'pos' on are dense enough to be literals whatever else
 * there is: whole stretches of them, before 'end', at most 'max'.
 */
static unsigned
dense_words (const struct bitmap *bm, uint64_t pos, uint64_t end, unsigned max)
{
  unsigned n = 0, runs;
  uint64_t w;

  while (n + STRETCH <= max && end - pos >= STRETCH * WORD_BITS) {
    runs = 0;
    for (unsigned i = 0; i < STRETCH; i++, pos += WORD_BITS) {
      w = word_at (bm, pos);
      runs += popcount (w & ~(w << 1));
    }
    if (runs < RUNS_FOR_WORDS)
      break;
    n += STRETCH;
  }
  return n;
}

/* How many words span 'bits' bits at 'pos'.  A literal must not reach beyond
 * 'end' (the next call begins there), unless nothing can follow.
 */
static uint64_t
words_for (const struct bitmap *bm, uint64_t pos, uint64_t bits, uint64_t end)
{
  uint64_t n = (bits + WORD_BITS - 1) / WORD_BITS;

  return n * WORD_BITS > end - pos && end != bm->nr_bits ? n - 1 : n;
}

static bool
write_words (struct bits_writer *w, const struct bitmap *bm, uint64_t pos,
             unsigned n)
{
  uint64_t words[LITERALS];

  for (unsigned i = 0; i < n; i++)
    words[i] = htole64 (word_at (bm, pos + i * WORD_BITS));
  return append (w, pos, OP_WORDS, n, (uint64_t) n * WORD_BITS, words, n * 8);
}

/* ---- runs ---- */

/* As bm_find.  Where runs are many the next one is mostly in this word or in
 * one of the next few: there is no need to climb the tree for it.
 */
static inline uint64_t
find_near (const struct bitmap *bm, enum kind kind, uint64_t from,
           uint64_t to)
{
  const uint64_t flip = kind == CLEAN ? UINT64_MAX : 0;
  uint64_t i = from / WORD_BITS, bit, w;
  const uint64_t far = i + NEAR < bm->levels[0].nr ? i + NEAR : 0;

  if (from >= to)
    return to;
  w = (leaf_get (bm, i) ^ flip) & ~low_bits (from % WORD_BITS);
  while (w == 0 && ++i < far)
    w = leaf_get (bm, i) ^ flip;
  if (w == 0)
    return bm_find (bm, kind, i * WORD_BITS > from ? i * WORD_BITS : from, to);
  bit = i * WORD_BITS + __builtin_ctzll (w);
  return bit < to ? bit : to;
}

/* The runs from 'pos', which is set, to 'end'. */
static void
gather (const struct bitmap *bm, uint64_t pos, uint64_t end, struct runs *r)
{
  uint64_t stop, next;

  r->pos = pos;
  r->n = 0;
  for (;;) {
    stop = find_near (bm, CLEAN, pos + 1, end);
    if (stop - pos > UINT32_MAX)
      return;
    r->set[r->n++] = stop - pos - 1;
    if (r->n == RUNS || stop == end)
      return;
    next = find_near (bm, DIRTY, stop, end);
    if (next == end || next - stop > UINT32_MAX)
      return;
    r->skip[r->n - 1] = next - stop - 1;
    pos = next;
  }
}

/* Bits from the first run's start to the last one's end. */
static uint64_t
span (const struct runs *r)
{
  uint64_t bits = 0;

  for (unsigned i = 0; i < r->n; i++)
    bits += (uint64_t) r->set[i] + 1 +
            (i + 1 < r->n ? (uint64_t) r->skip[i] + 1 : 0);
  return bits;
}

static size_t
rice_bits (const uint32_t *x, unsigned n, unsigned k)
{
  size_t bits = (size_t) n * (1 + k);

  for (unsigned i = 0; i < n; i++) {
    const uint32_t q = x[i] >> k;

    bits += q < RICE_LONG ? q : RICE_WORST - 1 - k;
  }
  return bits;
}

/* A good parameter for these numbers, and what they cost with it.  One guess
 * comes from the mean, which is right for what is random; the other from the
 * mean number of their digits, which a few large numbers do not spoil.
 */
static unsigned
choose_k (const uint32_t *x, unsigned n, size_t *bits)
{
  uint64_t sum = 0, digits = 0;
  unsigned a, b;
  size_t other;

  *bits = 0;
  if (n == 0)
    return 0;
  for (unsigned i = 0; i < n; i++) {
    sum += x[i];
    digits += 63 - __builtin_clzll ((uint64_t) x[i] << 1 | 1);
  }
  b = digits / n < RICE_MAX_K ? digits / n : RICE_MAX_K;
  /* log2 (0.69 * mean), rounded: 0.69 * sqrt (2) is about 1. */
  a = sum / n > 0 ? 63 - __builtin_clzll (sum / n) : 0;
  if (a > RICE_MAX_K)
    a = RICE_MAX_K;
  *bits = rice_bits (x, n, a);
  if (a == b)
    return a;
  other = rice_bits (x, n, b);
  if (other >= *bits)
    return a;
  *bits = other;
  return b;
}

static size_t
bytes_cost (const struct runs *r)
{
  size_t len = 0;

  for (unsigned i = 0; i < r->n; i++)
    len += op_len ((uint64_t) r->set[i] + 1) +
           (i + 1 < r->n ? op_len ((uint64_t) r->skip[i] + 1) : 0);
  return len;
}

/* As one operation each, for as long as there is room. */
static bool
write_bytes (struct bits_writer *w, const struct runs *r)
{
  uint64_t pos = r->pos, n;

  for (unsigned i = 0; i < r->n; i++) {
    n = (uint64_t) r->set[i] + 1;
    if (!append (w, pos, OP_SET, n, n, NULL, 0))
      return i > 0;
    if (i + 1 < r->n)
      pos += n + r->skip[i] + 1;
  }
  return true;
}

static bool
write_rice (struct bits_writer *w, const struct runs *r, unsigned k_set,
            unsigned k_skip)
{
  uint8_t data[2 + 2 * RUNS * RICE_WORST / 8 + 16];
  struct bit_sink s = { .p = data + 2 };

  data[0] = k_set;
  data[1] = k_skip;
  for (unsigned i = 0; i < r->n; i++) {
    rice_put (&s, r->set[i], k_set);
    if (i + 1 < r->n)
      rice_put (&s, r->skip[i], k_skip);
  }
  return append (w, r->pos, OP_RUNS, r->n, span (r), data,
                 s.p - data + (s.n > 0));
}

/* In the shortest way; fewer runs if not all fit.  False if none does. */
static bool
write_runs (struct bits_writer *w, const struct bitmap *bm, struct runs *r,
            uint64_t end)
{
  for (; r->n > 0; r->n /= 2) {
    size_t set_bits, skip_bits;
    unsigned k_set = choose_k (r->set, r->n, &set_bits);
    unsigned k_skip = choose_k (r->skip, r->n - 1, &skip_bits);
    size_t rice = 2 + op_len (r->n) + (set_bits + skip_bits + 7) / 8;
    /* Nothing is coded in less than a byte there. */
    size_t bytes = rice < 2 * r->n - 1 ? rice + 1 : bytes_cost (r);
    uint64_t words = words_for (bm, r->pos, span (r), end);
    bool fits;

    if (words > 0 && words * 8 + 2 < rice && words * 8 + 2 < bytes)
      fits = room (w) > 0 &&
             write_words (w, bm, r->pos, words < room (w) ? words : room (w));
    else if (rice < bytes)
      fits = write_rice (w, r, k_set, k_skip);
    else
      fits = write_bytes (w, r);
    if (fits)
      return true;
  }
  return false;
}

uint64_t
bits_write (struct bits_writer *w, const struct bitmap *bm, uint64_t start,
            uint64_t end)
{
  struct runs r;
  uint64_t pos, last, n;
  bool fits;

  last = bitmap_bits_for (end < bm->size ? end : bm->size, bm->shift);
  pos = start >> bm->shift;
  if (pos < w->next)
    pos = w->next;

  while ((pos = bm_find (bm, DIRTY, pos, last)) < last) {
    n = dense_words (bm, pos, last, room (w));
    if (n > 0)
      fits = write_words (w, bm, pos, n);
    else {
      gather (bm, pos, last, &r);
      if (r.n > 0)
        fits = write_runs (w, bm, &r, last);
      else {
        n = bm_find (bm, CLEAN, pos + 1, last) - pos;
        fits = append (w, pos, OP_SET, n, n, NULL, 0);
      }
    }
    if (!fits) {
      pos <<= bm->shift;
      return pos > start ? pos : start;
    }
    /* The last literal word may reach beyond the end of the bitmap. */
    if (w->next > bitmap_bits (bm))
      w->next = bitmap_bits (bm);
    pos = w->next;
  }
  return end;
}
