/* nbdferry - compression of payloads
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>

#include <zlib.h>
#include <zstd.h>

#include "compress.h"
#include "packet.h"

/* The fastest levels: the disk moves while a guest runs beside it. */
#define ZLIB_LEVEL 1
#define ZSTD_LEVEL 1

static size_t
with_zlib (struct compressor *c, void *out, size_t cap, const void *in,
           size_t len)
{
  z_stream *z = c->zlib;

  if (z == NULL) {
    z = calloc (1, sizeof *z);
    if (z == NULL || deflateInit (z, ZLIB_LEVEL) != Z_OK) {
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
  r = ZSTD_compressCCtx (c->zstd, out, cap, in, len, ZSTD_LEVEL);
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

void
compressor_free (struct compressor *c)
{
  if (c->zlib) {
    deflateEnd (c->zlib);
    free (c->zlib);
  }
  ZSTD_freeCCtx (c->zstd);
}

int
decompress_payload (uint32_t flags, void *out, size_t raw, const void *in,
                    size_t len, struct error *err)
{
  if (flags & PACKET_ZSTD) {
    size_t r = ZSTD_decompress (out, raw, in, len);

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
