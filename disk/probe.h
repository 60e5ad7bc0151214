/* nbdferry - what is on a disk
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Any signature that libblkid knows: file systems, swap, partition tables,
 * members of RAIDs, LVM, LUKS and the like.
 */
#ifndef FERRY_PROBE_H
#define FERRY_PROBE_H

#include "disk.h"
#include "error.h"

/* 1: '*text' (the caller's to free) says what was found, such as "an ext4 file
 * system 'root' (UUID ...)"; several things are joined by " and ".  0: nothing
 * is known of what is on it, if anything is; '*text' is NULL.  -1: it could
 * not be read.  Reads up to 20 MiB.  Any thread.
 */
int disk_probe (struct disk *d, char **text, struct error *err);

#endif /* FERRY_PROBE_H */
