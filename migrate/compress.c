/* nbdferry - compression of payloads
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include <zlib.h>
#include <zstd.h>

#include "cleanup.h"
#include "compress.h"
#include "packet.h"

/* The fastest level: the disk moves while a guest runs beside it. */
#define DEFAULT_LEVEL 1

/* A sample is so many pieces of so many bytes, evenly spread. */
#define PIECES 4
#define PIECE  4096

#define WORTH_A_SAMPLE (64 << 10) /* less is simply tried */
#define PAYS(len)      ((len) - (len) / 8)
#define TRY_EVERY      16 /* payloads whose samples did not shrink */
#define TRUST_FOR      32 /* payloads after one whose sample was wrong */

static int
level_of (const struct compressor *c)
{
  return c->level ? c->level - 1 : DEFAULT_LEVEL;
}

void
compressor_set_level (struct compressor *c,
                      const struct migrate_params *params)
{
  switch (params->compression) {
  case MIGRATE_COMPRESSION_ZLIB: c->level = params->zlib_level + 1; break;
  case MIGRATE_COMPRESSION_ZSTD: c->level = params->zstd_level + 1; break;
  default: break;
  }
}

static size_t
with_zlib (struct compressor *c, void *out, size_t cap, const void *in,
           size_t len)
{
  z_stream *z = c->zlib;

  if (z == NULL) {
    z = calloc (1, sizeof *z);
    if (z == NULL || deflateInit (z, level_of (c)) != Z_OK) {
      free (z);
      return 0;
    }
    c->zlib = z;
  }
  deflateReset (z);
  z->next_in = (void *) in;
  z->avail_in = len;
  z->next_out = out;
  z->avail_out = cap;
  return deflate (z, Z_FINISH) == Z_STREAM_END ? cap - z->avail_out : 0;
}

static size_t
with_zstd (struct compressor *c, void *out, size_t cap, const void *in,
           size_t len)
{
  size_t r;

  if (c->zstd == NULL && (c->zstd = ZSTD_createCCtx ()) == NULL)
    return 0;
  r = ZSTD_compressCCtx (c->zstd, out, cap, in, len, level_of (c));
  return ZSTD_isError (r) ? 0 : r;
}

size_t
compress_payload (struct compressor *c, enum migrate_compression how,
                  void *out, size_t cap, const void *in, size_t len)
{
  switch (how) {
  case MIGRATE_COMPRESSION_ZLIB: return with_zlib (c, out, cap, in, len);
  case MIGRATE_COMPRESSION_ZSTD: return with_zstd (c, out, cap, in, len);
  default: return 0;
  }
}

/* Does a sample of it shrink?  By zstd at its fastest, whatever the method is:
 * that takes some ten microseconds.
 */
static bool
sample_shrinks (struct compressor *c, const uint8_t *in, size_t len)
{
  uint8_t sample[PIECES * PIECE];
  const size_t step = (len - PIECE) / (PIECES - 1);
  size_t r;

  if (c->zstd == NULL && (c->zstd = ZSTD_createCCtx ()) == NULL)
    return true;
  for (unsigned i = 0; i < PIECES; i++)
    memcpy (sample + i * PIECE, in + i * step, PIECE);
  r = ZSTD_compressCCtx (c->zstd, c->out, PAYS (sizeof sample), sample,
                         sizeof sample, 1);
  return !ZSTD_isError (r);
}

static bool
is_hopeless (struct compressor *c, const uint8_t *in, size_t len)
{
  if (len < WORTH_A_SAMPLE)
    return false;
  if (c->trusting > 0) {
    c->trusting--;
    return false;
  }
  if (sample_shrinks (c, in, len)) {
    c->hopeless = 0;
    return false;
  }
  return ++c->hopeless % TRY_EVERY != 0;
}

size_t
compress_if_it_pays (struct compressor *c, enum migrate_compression how,
                     void *payload, size_t len)
{
  size_t r;

  if (how == MIGRATE_COMPRESSION_NONE || len < 512)
    return 0;
  if (c->out_size < len) {
    free (c->out);
    c->out = malloc (len);
    c->out_size = c->out ? len : 0;
    if (c->out == NULL)
      return 0;
  }
  if (is_hopeless (c, payload, len))
    return 0;
  r = compress_payload (c, how, c->out, PAYS (len), payload, len);
  if (r == 0)
    return 0;
  if (c->hopeless > 0) {
    c->trusting = TRUST_FOR;
    c->hopeless = 0;
  }
  memcpy (payload, c->out, r);
  return r;
}

void
compressor_free (struct compressor *c)
{
  if (c->zlib) {
    deflateEnd (c->zlib);
    free (c->zlib);
  }
  ZSTD_freeCCtx (c->zstd);
  free (c->out);
}

/* ---- the other side ---- */

/* Contexts that nobody uses at present. */
#define MAX_SPARE 16

static struct {
  pthread_mutex_t lock; /* protects what follows; nothing is above it */
  ZSTD_DCtx *v[MAX_SPARE];
  unsigned nr;
} spare = { .lock = PTHREAD_MUTEX_INITIALIZER };

static ZSTD_DCtx *
get_context (void)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&spare.lock);

  return spare.nr > 0 ? spare.v[--spare.nr] : ZSTD_createDCtx ();
}

static void
put_context (ZSTD_DCtx *d)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&spare.lock);

  if (spare.nr < MAX_SPARE)
    spare.v[spare.nr++] = d;
  else
    ZSTD_freeDCtx (d);
}

/* When the plugin goes. */
static void __attribute__ ((destructor))
free_contexts (void)
{
  while (spare.nr > 0)
    ZSTD_freeDCtx (spare.v[--spare.nr]);
}

int
decompress_payload (uint32_t flags, void *out, size_t raw, const void *in,
                    size_t len, struct error *err)
{
  if (flags & PACKET_ZSTD) {
    ZSTD_DCtx *d = get_context ();
    size_t r;

    if (d == NULL)
      return error_set (err, ENOMEM, "%m");
    r = ZSTD_decompressDCtx (d, out, raw, in, len);
    put_context (d);
    if (!ZSTD_isError (r) && r == raw)
      return 0;
  }
  else {
    uLongf got = raw;

    if (uncompress (out, &got, in, len) == Z_OK && got == raw)
      return 0;
  }
  return error_set (err, EBADMSG, "damaged packet: its payload does not "
                    "decompress to %zu bytes", raw);
}
