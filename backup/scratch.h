/* nbdferry - where old granules are kept aside
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A scratch file without a name, sparse, of slots of one size, with a bound on
 * how many may be in use.  It is gone when it is closed, whoever closes it.
 *
 * Threads: all functions but open and close may run at the same time.
 */
#ifndef FERRY_SCRATCH_H
#define FERRY_SCRATCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

struct scratch;

/* Slots of 'slot_size' bytes in a file in 'dir'; at most 'limit' bytes, 0: half
 * of what is free there now.  NULL on error.
 */
struct scratch *scratch_open (const char *dir, uint32_t slot_size,
                              uint64_t limit, struct error *err);
void scratch_close (struct scratch *s);

/* A free slot, or false if there is none within the limit. */
bool scratch_take (struct scratch *s, uint32_t *slot);
void scratch_give_back (struct scratch *s, uint32_t slot);

/* 0, or -1 with errno.  Inside one slot. */
int scratch_write (struct scratch *s, uint32_t slot, const void *buf,
                   size_t len);
int scratch_read (struct scratch *s, uint32_t slot, uint32_t skip, void *buf,
                  size_t len);

/* Give all space back to the file system; what is read after is garbage. */
void scratch_drop (struct scratch *s);

/* Bytes in slots that are in use, and the bound. */
uint64_t scratch_used (struct scratch *s);
uint64_t scratch_limit (const struct scratch *s);

#endif /* FERRY_SCRATCH_H */
