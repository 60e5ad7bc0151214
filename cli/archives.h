/* nbdferry - archives on the command line
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_ARCHIVES_H
#define FERRY_ARCHIVES_H

#include <jansson.h>

#include "archive-pack.h"
#include "archive.h"
#include "copying.h"

/* A chain of files, in order. */
struct chain {
  struct archive_reader **readers; /* lazy, at their beginning */
  size_t nr;
};

/* Open them, and see that they follow one another.  -1 with nothing open. */
int chain_open (struct chain *c, char *const *paths, size_t nr,
                struct error *err);
void chain_close (struct chain *c);

/* Read and check all of a file, showing how it goes.  0 and, unless NULL, what
 * it holds; or -1, with ECANCELED if it was interrupted.  Only a file that can
 * be read twice, if it is to be read again.
 */
int archive_check (const char *path, struct copying *progress,
                   struct archive_totals *totals, struct error *err);

/* "none", "zlib", "zstd", or one of the latter with ":LEVEL". */
int compression_parse (const char *text, struct pack_compression *c);

/* What a head and, unless NULL, totals say, for programs. */
json_t *archive_json (const char *path, const struct archive_head *head,
                      const struct archive_totals *totals);
/* The same of one that could not be read. */
json_t *archive_error_json (const char *path, const char *why);

#define TIME_TEXT 32
/* "2026-11-21 03:14:15Z" */
char *time_format (int64_t time, char text[TIME_TEXT]);

#endif /* FERRY_ARCHIVES_H */
