/* nbdferry - storage errors under a mapped file
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * When a page of a mapped file cannot be had (the file system cannot read it,
 * has no room for it, or the file was cut), touching it raises SIGBUS, which
 * kills.  For ranges that are watched, a page of ones is put in its place
 * instead, private to this process, and a flag says so: what was marked in
 * that page is lost to the file, but what looks at it sees too many bits,
 * never too few.  Every other SIGBUS goes where it would have gone.
 *
 * Threads: watch and unwatch from any thread.
 */
#ifndef FERRY_SIGBUS_H
#define FERRY_SIGBUS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#include "error.h"

struct sigbus_range;

/* Watch [addr, addr+len), whole pages, before they are touched first.
 * '*failed' becomes true before the first page that is replaced can be seen,
 * so who touches the range and then finds it false has touched the file.  It
 * must outlive the watching.  NULL on error.
 */
struct sigbus_range *sigbus_watch (void *addr, size_t len,
                                   atomic_bool *failed, struct error *err);

/* Have another flag set from now on, and at once if the old one is.  Nobody
 * touches the range meanwhile.
 */
void sigbus_report_to (struct sigbus_range *r, atomic_bool *failed);

/* Before it is unmapped; nobody touches it any more.  NULL is allowed. */
void sigbus_unwatch (struct sigbus_range *r);

#endif /* FERRY_SIGBUS_H */
