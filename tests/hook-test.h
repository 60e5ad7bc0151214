/* nbdferry - the hooks of a backup that does nothing, for tests
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * To be put into a struct hook_ops.
 */
#ifndef FERRY_HOOK_TEST_H
#define FERRY_HOOK_TEST_H

#include "hook.h"

static inline int
nothing_to_prepare (struct write_hook *h, const struct named_bitmap *nb,
                    const struct point *parent, struct error *e)
{
  return 0;
}

static inline int64_t
go_on (struct write_hook *h, uint64_t offset, uint64_t len, uint64_t waited)
{
  return HOOK_GO_ON;
}

static inline void
nothing_begun (struct write_hook *h)
{
}

static inline void
nothing_ended (struct write_hook *h, const char *why)
{
}

#endif /* FERRY_HOOK_TEST_H */
