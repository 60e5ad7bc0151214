/* nbdferry - a disk whose other side is gone for good
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A handover that nobody will ever finish leaves a disk that nobody serves.
 * To take it over is to say that the other side is dead.  The disk becomes
 * active with a new lineage, and of no session that the other side knows: if
 * that one comes back all the same, neither takes the other for itself.
 */
#ifndef FERRY_TAKEOVER_H
#define FERRY_TAKEOVER_H

#include "drive.h"

/* May a disk with that record be taken over?  'force': also if that loses what
 * was written elsewhere, or if only a part of the disk is here.  0, or -1 with
 * the reason.
 */
int takeover_check (const struct journal_record *rec, bool force,
                    struct error *err);

/* Make it the record of one that was. */
void takeover_record (struct journal_record *rec);

/* What an administrator must know before, in a sentence or two. */
const char *takeover_warning (const struct journal_record *rec);

#endif /* FERRY_TAKEOVER_H */
