/* nbdferry - a disk that QEMU has rounded up
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_ROUNDED_H
#define FERRY_ROUNDED_H

#include "drive.h"

/* QEMU, writing through the sidecar, may leave the file larger than the disk,
 * rounded up to a cluster.  If so, cut it back to the disk, durably; what can't
 * be written is only served without the rest.  For a drive whose disk was just
 * opened, before its store is.  0 or -1.
 */
int rounded_cut (struct drive *d, struct error *err);

#endif /* FERRY_ROUNDED_H */
