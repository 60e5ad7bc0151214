/* nbdferry - the journal's record, in memory and as JSON
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * For store/journal.c only.
 */
#ifndef FERRY_JOURNAL_RECORD_H
#define FERRY_JOURNAL_RECORD_H

#include <stddef.h>

#include "journal.h"

/* 'dst' becomes a copy that owns its strings; 0, or -1 with errno. */
int journal_copy_record (struct journal_record *dst,
                         const struct journal_record *src);

/* The record as JSON text, to be freed, or NULL.  Paths and URIs that are not
 * UTF-8 have no place in JSON.
 */
char *journal_record_to_json (const struct journal_record *rec,
                              const char *path, struct error *err);

/* 0, or -1 with nothing left in 'rec' to be freed. */
int journal_record_from_json (const char *text, size_t len,
                              struct journal_record *rec);

#endif /* FERRY_JOURNAL_RECORD_H */
