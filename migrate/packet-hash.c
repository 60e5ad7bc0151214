/* nbdferry - the checksum of packets
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Distributions build libxxhash for the oldest processors.  XXH3 with AVX2 is
 * twice as fast, and it is a good part of what a packet costs; so we have it
 * compiled once more, and use it where the processor can.
 */
#include <config.h>

#if defined __x86_64__ && defined __GNUC__ && !defined __clang__
#pragma GCC target("avx2")
#define HAVE_AVX2_HASH 1
#define XXH_INLINE_ALL
#endif
#include <xxhash.h>

#include "packet-hash.h"

#ifdef HAVE_AVX2_HASH

static uint64_t
hash_avx2 (const void *data, size_t len)
{
  return XXH3_64bits (data, len);
}

#pragma GCC reset_options

/* The library's; its name is another one in this file. */
#undef XXH3_64bits
extern XXH64_hash_t plain_hash (const void *data, size_t len)
  __asm__ ("XXH3_64bits");

uint64_t
packet_hash (const void *data, size_t len)
{
  return __builtin_cpu_supports ("avx2") ? hash_avx2 (data, len)
                                         : plain_hash (data, len);
}

#else

uint64_t
packet_hash (const void *data, size_t len)
{
  return XXH3_64bits (data, len);
}

#endif
