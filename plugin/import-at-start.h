/* nbdferry - import-bitmaps=: what the disk's own server has tracked so far
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_IMPORT_AT_START_H
#define FERRY_IMPORT_AT_START_H

#include "drive.h"

/* Before the drive is served: bring in the bitmaps that its server offers, as
 * the options say, but not those that are here already.  0 or -1.
 */
int import_at_start (struct drive *d, const struct drive_options *opt,
                     struct error *err);

#endif /* FERRY_IMPORT_AT_START_H */
