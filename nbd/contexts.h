/* nbdferry - what an NBD server says of an export's ranges
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Metadata contexts other than base:allocation, such as QEMU's
 * qemu:dirty-bitmap:NAME.  Each function makes a connection of its own.
 */
#ifndef FERRY_CONTEXTS_H
#define FERRY_CONTEXTS_H

#include "client.h"

/* Call 'found' for each context of the export that begins with 'prefix'; a
 * server that has none is no error.  What 'found' returns other than 0 ends
 * it.  0 or -1.
 */
int contexts_list (const char *uri, const char *prefix,
                   int (*found) (void *opaque, const char *context,
                                 struct error *err),
                   void *opaque, const struct stop *stop, struct error *err);

/* Call 'range' for each range of the export, in order and without gaps, with
 * its flags in that context; 'size' is what the export must have.  -1 ends
 * it.
 */
int contexts_walk (const char *uri, const char *context, uint64_t size,
                   int (*range) (void *opaque, uint64_t start, uint64_t end,
                                 uint32_t flags),
                   void *opaque, const struct stop *stop, struct error *err);

#endif /* FERRY_CONTEXTS_H */
