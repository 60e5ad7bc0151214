/* nbdferry - bitmaps as they were left
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_LOAD_H
#define FERRY_LOAD_H

#include "drive.h"

/* Open the store of a drive whose journal is open and whose mode is set, judge
 * whether what it holds can be trusted, and list its bitmaps.  Those that can
 * not are made inconsistent, durably; '*news': the reasons of some are to be
 * recorded.  'created': so was the journal.  0 or -1.
 */
int drive_load (struct drive *d, bool created, bool *news, struct error *err);

/* Then, when all that came of it is recorded: make the bits durable, and begin
 * a new activity log.
 */
int drive_start_log (struct drive *d, struct error *err);

#endif /* FERRY_LOAD_H */
