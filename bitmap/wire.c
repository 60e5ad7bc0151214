/* nbdferry - a bitmap's bits as bytes
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The writer goes from dirty run to dirty run.  A run costs a skip and a set,
 * one or two bytes each if they are short; where five or more runs share the
 * next 64 bits, literal words are shorter.  A skip is written only before
 * something that is set, so that any number of clean regions, over any number
 * of calls, become one number.
 */
#include <config.h>

#include <endian.h>
#include <errno.h>
#include <string.h>

#include "impl.h"
#include "wire.h"

enum { SKIP = 0, SET = 1, WORDS = 2 };

#define VARINT_MAX 10 /* bytes of 7 bits that hold 64 */

/* Literals are gathered so many words at a time: a buffer on the stack, and
 * two bytes of header for 4 KiB.
 */
#define LITERALS 512

/* From how many runs in 64 bits literal words pay, to begin and to go on. */
#define RUNS_TO_BEGIN 5
#define RUNS_TO_GO_ON 4

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
    len += put_op (head, pos - w->next, SKIP);
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

static unsigned
runs_in (uint64_t w)
{
  return __builtin_popcountll (w & ~(w << 1));
}

/* Gather words at 'pos' for as long as they are better off as literals, at
 * most 'max'.  A literal must not reach beyond 'end' (the next call begins
 * there), unless nothing can follow.
 */
static unsigned
gather (const struct bitmap *bm, uint64_t pos, uint64_t end,
        uint64_t words[LITERALS], unsigned max)
{
  unsigned n = 0;
  uint64_t w;

  while (n < max && (end - pos >= WORD_BITS || end == bm->nr_bits)) {
    w = word_at (bm, pos);
    if (runs_in (w) < (n == 0 ? RUNS_TO_BEGIN : RUNS_TO_GO_ON))
      break;
    words[n++] = htole64 (w);
    if (end - pos <= WORD_BITS)
      break;
    pos += WORD_BITS;
  }
  return n;
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

uint64_t
bits_write (struct bits_writer *w, const struct bitmap *bm, uint64_t start,
            uint64_t end)
{
  uint64_t words[LITERALS], pos, run_end, last;
  unsigned n;
  bool fits;

  last = bitmap_bits_for (end < bm->size ? end : bm->size, bm->shift);
  pos = start >> bm->shift;
  if (pos < w->next)
    pos = w->next;

  while ((pos = bm_find (bm, DIRTY, pos, last)) < last) {
    n = gather (bm, pos, last, words, room (w));
    if (n > 0) {
      fits = append (w, pos, WORDS, n, (uint64_t) n * WORD_BITS, words, n * 8);
    }
    else {
      run_end = bm_find (bm, CLEAN, pos + 1, last);
      fits = append (w, pos, SET, run_end - pos, run_end - pos, NULL, 0);
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

/* One number at buf[*at]; false if it is cut off, does not fit in 64 bits or
 * is longer than it has to be.
 */
static bool
get_number (const uint8_t *buf, size_t len, size_t *at, uint64_t *v)
{
  uint8_t c;

  *v = 0;
  for (unsigned i = 0; i < VARINT_MAX && *at < len; i++) {
    c = buf[(*at)++];
    if (i == VARINT_MAX - 1 && c > 1)
      return false;
    *v |= (uint64_t) (c & 0x7f) << 7 * i;
    if (c < 0x80)
      return c != 0 || i == 0;
  }
  return false;
}

static uint64_t
get_word (const uint8_t *p)
{
  uint64_t w;

  memcpy (&w, p, sizeof w);
  return le64toh (w);
}

/* Bad literals: cut off, beyond the end, or with bits there. */
static const char *
check_words (const uint8_t *p, size_t len, uint64_t n, uint64_t left)
{
  uint64_t beyond;

  if (n > len / 8)
    return "literal words are cut off";
  if (n > left / WORD_BITS + (left % WORD_BITS != 0))
    return "literal words beyond the end";
  if (n * WORD_BITS > left) {
    beyond = get_word (p + (n - 1) * 8);
    if (beyond & ~low_bits (left % WORD_BITS))
      return "bits set beyond the end";
  }
  return NULL;
}

int
bits_check (const uint8_t *buf, size_t len, uint64_t first, uint64_t nr_bits,
            uint64_t total_bits, struct error *err)
{
  const char *why = NULL;
  size_t at = 0, op = 0;
  uint64_t left = nr_bits, n;
  unsigned kind;

  if (first > total_bits || nr_bits > total_bits - first)
    return error_set (err, EBADMSG,
                      "bitmap section: %llu bits at bit %llu of %llu",
                      (unsigned long long) nr_bits, (unsigned long long) first,
                      (unsigned long long) total_bits);
  while (why == NULL && at < len) {
    op = at;
    if (!get_number (buf, len, &at, &n)) {
      why = "malformed number";
      break;
    }
    kind = n & 3;
    n >>= 2;
    if (n == 0)
      why = "operation without length";
    else if (kind == WORDS) {
      why = check_words (buf + at, len - at, n, left);
      if (why == NULL) {
        at += n * 8;
        left -= n * WORD_BITS < left ? n * WORD_BITS : left;
      }
    }
    else if (kind != SKIP && kind != SET)
      why = "unknown operation";
    else if (n > left)
      why = "operation beyond the end";
    else
      left -= n;
  }
  if (why != NULL)
    return error_set (err, EBADMSG, "bitmap section: %s, at byte %zu", why,
                      op);
  return 0;
}

/* Set the bits of 'n' literal words at bit 'pos'. */
static void
apply_words (struct bitmap *bm, uint64_t pos, const uint8_t *p, uint64_t n)
{
  const unsigned s = pos % WORD_BITS;
  const uint64_t leaf0 = pos / WORD_BITS;
  uint64_t block[64], mask = 0, prev = 0, w, k, leaf;

  for (k = 0; k < n + (s > 0); k++) {
    w = k < n ? get_word (p + k * 8) : 0;
    leaf = leaf0 + k;
    block[leaf % WORD_BITS] = w << s | (s > 0 ? prev >> (WORD_BITS - s) : 0);
    /* An empty word may lie beyond the end. */
    if (block[leaf % WORD_BITS] != 0)
      mask |= UINT64_C (1) << leaf % WORD_BITS;
    prev = w;
    if (mask && (leaf % WORD_BITS == WORD_BITS - 1 || k + 1 == n + (s > 0))) {
      bm_or_block (bm, leaf / WORD_BITS, block, mask);
      mask = 0;
    }
  }
}

int
bits_apply (struct bitmap *bm, const uint8_t *buf, size_t len, uint64_t first,
            uint64_t nr_bits, struct error *err)
{
  uint64_t pos = first, n;
  size_t at = 0;
  unsigned kind;

  if (bits_check (buf, len, first, nr_bits, bm->nr_bits, err) == -1)
    return -1;
  while (at < len && get_number (buf, len, &at, &n)) {
    kind = n & 3;
    n >>= 2;
    if (kind == WORDS) {
      apply_words (bm, pos, buf + at, n);
      at += n * 8;
      pos += n * WORD_BITS;
    }
    else {
      if (kind == SET)
        bm_set_bits (bm, pos, n);
      pos += n;
    }
  }
  return 0;
}
