/* nbdferry - compression of payloads
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_COMPRESS_H
#define FERRY_COMPRESS_H

#include <stddef.h>
#include <stdint.h>

#include "error.h"
#include "outgoing.h"

/* What one thread needs to compress; made at the first use, freed with
 * compressor_free.  Begin with all zeros.
 */
struct compressor {
  void *zstd;
  void *zlib;
};

/* Compress into 'out' (cap bytes).  The compressed size, or 0 if it would not
 * become smaller than 'cap', or not at all.
 */
size_t compress_payload (struct compressor *c, enum migrate_compression how,
                         void *out, size_t cap, const void *in, size_t len);
void compressor_free (struct compressor *c);

/* Exactly 'raw' bytes must come out.  'flags' are the packet's. */
int decompress_payload (uint32_t flags, void *out, size_t raw,
                        const void *in, size_t len, struct error *err);

#endif /* FERRY_COMPRESS_H */
