/* nbdferry - the library's hashes, as fast as the processor can
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Distributions build libxxhash for the oldest processors; its dispatching
 * functions, under the usual names, use AVX2 or AVX-512 where there is such.
 * The hashes are the same, and twice as fast or more.
 */
#ifndef FERRY_HASH_H
#define FERRY_HASH_H

#define XXH_STATIC_LINKING_ONLY /* the size of a state */
#include <xxhash.h>
#ifdef HAVE_XXH_DISPATCH
#include <xxh_x86dispatch.h>
#endif

#endif /* FERRY_HASH_H */
