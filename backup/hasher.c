/* nbdferry - a disk's content as hashes of its blocks
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The range that is asked for is walked once, by extents and blocks at the
 * same time: a block that lies in zeros gets the hash that is known, and of
 * any other the pieces are fed to one running hash, zeros from a page of them
 * and data through a buffer that reads ahead over many small blocks.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "hash.h"
#include "hasher.h"

#define BUFFER (UINT64_C (512) << 10)

static const uint8_t zero_page[64 << 10];

int
hash_block_ok (uint64_t block, struct error *err)
{
  if (block >= HASH_BLOCK_MIN && block <= HASH_BLOCK_MAX &&
      (block & (block - 1)) == 0)
    return 0;
  return error_set (err, EINVAL, "a hash is of a block of 4K to 64M bytes, a "
                    "power of two, not of %" PRIu64, block);
}

uint64_t
hash_blocks (uint64_t size, uint64_t block)
{
  return size / block + (size % block != 0);
}

static void
feed_zeros (XXH3_state_t *state, uint64_t len)
{
  while (len > 0) {
    size_t n = len < sizeof zero_page ? len : sizeof zero_page;

    XXH3_128bits_update (state, zero_page, n);
    len -= n;
  }
}

static void
digest (XXH3_state_t *state, uint8_t *out)
{
  XXH128_canonical_t c;

  XXH128_canonicalFromHash (&c, XXH3_128bits_digest (state));
  memcpy (out, c.digest, HASH_SIZE);
}

static void
hash_zeros (uint64_t len, uint8_t *out)
{
  XXH3_state_t state;

  XXH3_128bits_reset (&state);
  feed_zeros (&state, len);
  digest (&state, out);
}

void
hasher_init (struct hasher *h, const struct hash_source *source,
             uint64_t block)
{
  uint64_t tail = source->size % block;

  h->source = *source;
  h->block = block;
  h->nr = hash_blocks (source->size, block);
  hash_zeros (block, h->zeros);
  hash_zeros (tail ? tail : block, h->last_zeros);
}

struct walk {
  const struct hasher *h;
  uint64_t end;        /* of what is walked, bytes */
  struct extent ext;   /* the last that was looked at */
  uint8_t *buf;        /* BUFFER bytes, which hold [from, to) of the disk */
  uint64_t from, to;
};

/* Have 'ext' reach beyond 'at'. */
static int
look (struct walk *w, uint64_t at)
{
  const struct hash_source *s = &w->h->source;

  if (at >= w->ext.start && at < w->ext.end)
    return 0;
  w->ext = (struct extent){ at, w->end, EXTENT_DATA };
  return s->extent ? s->extent (s->opaque, at, w->end, &w->ext) : 0;
}

/* Have the buffer hold 'at'; no more is read than the extent has. */
static int
fill (struct walk *w, uint64_t at)
{
  const struct hash_source *s = &w->h->source;
  uint64_t n = w->ext.end - at < BUFFER ? w->ext.end - at : BUFFER;

  if (at >= w->from && at < w->to)
    return 0;
  w->from = w->to = at;
  if (s->pread (s->opaque, w->buf, n, at) == -1)
    return -1;
  w->to = at + n;
  return 0;
}

/* [at, end) is one block, or the rest of one. */
static int
feed (struct walk *w, XXH3_state_t *state, uint64_t at, uint64_t end)
{
  while (at < end) {
    uint64_t n;

    if (look (w, at) == -1)
      return -1;
    n = (w->ext.end < end ? w->ext.end : end) - at;
    if (w->ext.type != EXTENT_DATA)
      feed_zeros (state, n);
    else {
      if (fill (w, at) == -1)
        return -1;
      if (n > w->to - at)
        n = w->to - at;
      XXH3_128bits_update (state, w->buf + (at - w->from), n);
    }
    at += n;
  }
  return 0;
}

static int
hash_block (struct walk *w, uint64_t at, uint64_t end, uint8_t *out)
{
  const struct hasher *h = w->h;
  XXH3_state_t state;

  if (look (w, at) == -1)
    return -1;
  if (w->ext.type != EXTENT_DATA && w->ext.end >= end) {
    memcpy (out, end - at == h->block ? h->zeros : h->last_zeros, HASH_SIZE);
    return 0;
  }
  XXH3_128bits_reset (&state);
  if (feed (w, &state, at, end) == -1)
    return -1;
  digest (&state, out);
  return 0;
}

int
hasher_read (const struct hasher *h, uint64_t first, uint64_t nr,
             uint8_t *out)
{
  CLEANUP_FREE uint8_t *buf = malloc (BUFFER);
  struct walk w = { .h = h, .buf = buf };
  uint64_t at = first * h->block;

  if (buf == NULL)
    return -1;
  w.end = first + nr == h->nr ? h->source.size : at + nr * h->block;
  for (; at < w.end; out += HASH_SIZE) {
    uint64_t end = w.end - at < h->block ? w.end : at + h->block;

    if (hash_block (&w, at, end, out) == -1)
      return -1;
    at = end;
  }
  return 0;
}
