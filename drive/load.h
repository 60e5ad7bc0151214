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

/* ---- mode.c ---- */

/* What the journal's state means now, incoming=on taken into account.  'rec'
 * is changed to what must be recorded.  Nobody knows the drive yet.
 */
int drive_decide_mode (struct drive *d, struct journal_record *rec,
                       bool incoming, struct error *err);

/* ---- drive.c, for drive/resize.c ---- */

/* A drive without a disk, its names copied.  NULL on error. */
struct drive *drive_alloc (const struct drive_options *opt,
                           struct error *err);

/* Load the store, and record in the journal what came of it; 'rec' is what is
 * to be recorded next, by the caller.  Control held, or nobody knows it yet.
 */
int drive_open_store (struct drive *d, bool created,
                      struct journal_record *rec, struct error *err);

/* Close the store in good order, and say so in the journal.  Its persistent
 * bitmaps have no bits any more.  Control held, nobody inside the gates.
 */
int drive_close_store (struct drive *d, struct error *err);

#endif /* FERRY_LOAD_H */
