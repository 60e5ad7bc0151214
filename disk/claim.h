/* nbdferry - is a file or a block device used by the system?
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What nobody may overwrite, whatever he says: a device that is mounted, is
 * swap, or is part of another one (RAID, device-mapper, ...), or whose
 * partition is; a file that is swap, or that a loop device stands upon.
 */
#ifndef FERRY_CLAIM_H
#define FERRY_CLAIM_H

#include "error.h"

/* 'fd' is the open file or block device 'path'.  From here on nobody can mount
 * a block device, swap on it, or take it in another exclusive way; nobody but
 * those is kept away, and a file is only looked at.  '*claim' is for
 * claim_release, or -1 if that is not needed.  0, or -1 with EBUSY and who
 * uses it.
 */
int claim_fd (int fd, const char *path, int *claim, struct error *err);
void claim_release (int fd, int claim);

#endif /* FERRY_CLAIM_H */
