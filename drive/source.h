/* nbdferry - where a drive's data is
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A file or block device, or what another NBD server holds.  A qcow2 image can
 * only name a file as its data file, so that of a disk that an NBD server
 * holds names a stand-in: a sparse file in the state directory, with a note in
 * its first sector for whoever takes it for the disk.
 */
#ifndef FERRY_SOURCE_H
#define FERRY_SOURCE_H

#include "drive.h"

/* What bitmaps.qcow2 is to name; the caller frees it.  NULL: no memory. */
char *source_data_file (const char *path, const char *state_dir);

/* Open d->path, as the options say; NULL on error. */
struct disk *source_open (const struct drive *d,
                          const struct drive_options *opt, struct error *err);

/* The state directory exists: make the stand-in, if one is needed, as large as
 * the disk.  0 or -1.
 */
int source_prepare (const struct drive *d, struct error *err);

#endif /* FERRY_SOURCE_H */
