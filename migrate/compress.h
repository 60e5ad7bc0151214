/* nbdferry - compression of payloads
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * It is given up where it does not pay: what does not shrink by an eighth is
 * sent as it is, and so that not much time is spent on finding that out, a
 * sample of a few pages is looked at first.  A sample can be wrong (what
 * repeats may do so farther apart), and a disk changes from one place to the
 * next: so now and then a payload is tried whatever its sample says, and if
 * that pays, samples are not heeded for a while.
 */
#ifndef FERRY_COMPRESS_H
#define FERRY_COMPRESS_H

#include <stddef.h>
#include <stdint.h>

#include "error.h"
#include "outgoing.h"

/* What one thread needs to compress; made at the first use, freed with
 * compressor_free.  Begin with all zeros, and compressor_set_level if it is
 * not to be the default.
 */
struct compressor {
  int level;         /* + 1; 0: the default */
  void *zstd;
  void *zlib;
  uint8_t *out;      /* what was compressed last */
  size_t out_size;
  unsigned hopeless; /* samples in a row that did not shrink */
  unsigned trusting; /* so many payloads are tried without a sample */
};

/* The level that the parameters have for their method; before the first use. */
void compressor_set_level (struct compressor *c,
                           const struct migrate_params *params);

/* Compress into 'out' (cap bytes).  The compressed size, or 0 if it would not
 * become smaller than 'cap', or not at all.
 */
size_t compress_payload (struct compressor *c, enum migrate_compression how,
                         void *out, size_t cap, const void *in, size_t len);

/* Compress a payload in place if that pays: the new size; 0: it is as it was.
 */
size_t compress_if_it_pays (struct compressor *c,
                            enum migrate_compression how, void *payload,
                            size_t len);
void compressor_free (struct compressor *c);

/* Exactly 'raw' bytes must come out.  'flags' are the packet's.  Any thread. */
int decompress_payload (uint32_t flags, void *out, size_t raw,
                        const void *in, size_t len, struct error *err);

#endif /* FERRY_COMPRESS_H */
