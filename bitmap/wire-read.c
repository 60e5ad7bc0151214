/* nbdferry - a bitmap's bits out of bytes
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A section is checked by one walk and applied by another, so that nothing of
 * a bad one is done.  Bits are gathered for a whole block of the bitmap before
 * they are set in it.
 */
#include <config.h>

#include <errno.h>
#include <string.h>

#include "impl.h"
#include "rice.h"
#include "wire-ops.h"
#include "wire.h"

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

/* ---- gathering ---- */

/* Bits that are to be set in one block of the bitmap. */
struct batch {
  struct bitmap *bm;
  uint64_t block;
  uint64_t mask; /* which words have any */
  uint64_t words[64];
};

static void
batch_flush (struct batch *t)
{
  if (t->mask)
    bm_or_block (t->bm, t->block, t->words, t->mask);
  t->mask = 0;
}

static void
batch_word (struct batch *t, uint64_t leaf, uint64_t bits)
{
  const unsigned j = leaf % WORD_BITS;

  if (leaf / WORD_BITS != t->block) {
    batch_flush (t);
    t->block = leaf / WORD_BITS;
  }
  if (!(t->mask >> j & 1))
    t->words[j] = 0;
  t->words[j] |= bits;
  t->mask |= UINT64_C (1) << j;
}

/* Set n bits from 'pos' on. */
static void
batch_run (struct batch *t, uint64_t pos, uint64_t n)
{
  if (n == 1) {
    batch_word (t, pos / WORD_BITS, UINT64_C (1) << pos % WORD_BITS);
    return;
  }
  if (n >= BLOCK_BITS) {
    bm_set_bits (t->bm, pos, n);
    return;
  }
  while (n > 0) {
    const unsigned s = pos % WORD_BITS;
    const unsigned k = n < WORD_BITS - s ? n : WORD_BITS - s;

    batch_word (t, pos / WORD_BITS, low_bits (k) << s);
    pos += k;
    n -= k;
  }
}

/* Set the bits of n literal words at bit 'pos'.  An empty word may lie beyond
 * the bitmap's end.
 */
static void
batch_words (struct batch *t, uint64_t pos, const uint8_t *p, uint64_t n)
{
  const unsigned s = pos % WORD_BITS;
  uint64_t leaf = pos / WORD_BITS;

  for (uint64_t k = 0; k < n; k++, leaf++) {
    const uint64_t w = get_word (p + k * 8);

    if (w << s)
      batch_word (t, leaf, w << s);
    if (s > 0 && w >> (WORD_BITS - s))
      batch_word (t, leaf + 1, w >> (WORD_BITS - s));
  }
}

/* ---- operations ---- */

/* Walking through a section.  With a batch the bits are set; the section was
 * checked before.
 */
struct walk {
  const uint8_t *buf;
  size_t len, at;
  uint64_t pos, left; /* bits */
  struct batch *batch; /* or NULL */
};

/* Bad literals: cut off, beyond the end, or with bits there. */
static const char *
walk_words (struct walk *w, uint64_t n)
{
  const uint8_t *p = w->buf + w->at;
  uint64_t bits;

  if (n > (w->len - w->at) / 8)
    return "literal words are cut off";
  if (n > w->left / WORD_BITS + (w->left % WORD_BITS != 0))
    return "literal words beyond the end";
  if (n * WORD_BITS > w->left &&
      get_word (p + (n - 1) * 8) & ~low_bits (w->left % WORD_BITS))
    return "bits set beyond the end";
  if (w->batch)
    batch_words (w->batch, w->pos, p, n);
  bits = n * WORD_BITS < w->left ? n * WORD_BITS : w->left;
  w->at += n * 8;
  w->pos += bits;
  w->left -= bits;
  return NULL;
}

/* n runs of set bits, and the n - 1 that are not set between them. */
static const char *
walk_runs (struct walk *w, uint64_t n)
{
  struct bit_source s;
  uint64_t pos = w->pos, left = w->left;
  unsigned k_set, k_skip;
  uint32_t x;

  if (w->len - w->at < 2)
    return "runs are cut off";
  k_set = w->buf[w->at];
  k_skip = w->buf[w->at + 1];
  if (k_set > RICE_MAX_K || k_skip > RICE_MAX_K)
    return "unknown code of runs";
  s = (struct bit_source){ w->buf + w->at + 2, w->len - w->at - 2, 0 };
  while (n-- > 0) {
    if (!rice_get (&s, k_set, &x))
      return "malformed run";
    if (x >= left)
      return "run beyond the end";
    if (w->batch)
      batch_run (w->batch, pos, (uint64_t) x + 1);
    pos += (uint64_t) x + 1;
    left -= (uint64_t) x + 1;
    if (n == 0)
      break;
    if (!rice_get (&s, k_skip, &x))
      return "malformed run";
    if (x >= left)
      return "run beyond the end";
    pos += (uint64_t) x + 1;
    left -= (uint64_t) x + 1;
  }
  if (s.at % 8 != 0 && s.p[s.at / 8] >> s.at % 8 != 0)
    return "bits after the runs";
  w->at += 2 + (s.at + 7) / 8;
  w->pos = pos;
  w->left = left;
  return NULL;
}

static const char *
walk_op (struct walk *w)
{
  unsigned kind;
  uint64_t n;

  if (!get_number (w->buf, w->len, &w->at, &n))
    return "malformed number";
  kind = n & 3;
  n >>= 2;
  if (n == 0)
    return "operation without length";
  if (kind == OP_WORDS)
    return walk_words (w, n);
  if (kind == OP_RUNS)
    return walk_runs (w, n);
  if (n > w->left)
    return "operation beyond the end";
  if (kind == OP_SET && w->batch)
    batch_run (w->batch, w->pos, n);
  w->pos += n;
  w->left -= n;
  return NULL;
}

int
bits_check (const uint8_t *buf, size_t len, uint64_t first, uint64_t nr_bits,
            uint64_t total_bits, struct error *err)
{
  struct walk w = { .buf = buf, .len = len, .left = nr_bits };

  if (first > total_bits || nr_bits > total_bits - first)
    return error_set (err, EBADMSG,
                      "bitmap section: %llu bits at bit %llu of %llu",
                      (unsigned long long) nr_bits, (unsigned long long) first,
                      (unsigned long long) total_bits);
  while (w.at < w.len) {
    const size_t op = w.at;
    const char *why = walk_op (&w);

    if (why != NULL)
      return error_set (err, EBADMSG, "bitmap section: %s, at byte %zu", why,
                        op);
  }
  return 0;
}

void
bits_apply_checked (struct bitmap *bm, const uint8_t *buf, size_t len,
                    uint64_t first, uint64_t nr_bits)
{
  struct batch batch;
  struct walk w = { .buf = buf, .len = len, .pos = first, .left = nr_bits,
                    .batch = &batch };

  batch.bm = bm;
  batch.block = batch.mask = 0;
  while (w.at < w.len && walk_op (&w) == NULL)
    ;
  batch_flush (&batch);
}

int
bits_apply (struct bitmap *bm, const uint8_t *buf, size_t len, uint64_t first,
            uint64_t nr_bits, struct error *err)
{
  if (bits_check (buf, len, first, nr_bits, bm->nr_bits, err) == -1)
    return -1;
  bits_apply_checked (bm, buf, len, first, nr_bits);
  return 0;
}
