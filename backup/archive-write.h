/* nbdferry - writing archives
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A writer belongs to one thread at a time.  It writes to any file descriptor,
 * a pipe too, and never seeks.
 */
#ifndef FERRY_ARCHIVE_WRITE_H
#define FERRY_ARCHIVE_WRITE_H

#include "archive-pack.h"

struct archive_writer;

/* Write the HEAD.  'fd' stays the caller's; 'name' is for messages.  NULL on
 * error.
 */
struct archive_writer *archive_writer_open (int fd, const char *name,
                                            const struct archive_head *head,
                                            struct error *err);
void archive_writer_free (struct archive_writer *w); /* NULL is allowed */

/* Write a sealed pack: number 1 first, then 2 ... */
int archive_write (struct archive_writer *w, const struct pack *p,
                   struct error *err);

/* Write the END.  Nothing is durable yet. */
int archive_writer_end (struct archive_writer *w, struct error *err);

const struct archive_totals *
archive_writer_totals (const struct archive_writer *w);

/* Going through extents in order of their offsets, and writing them: 'data' is
 * for EXTENT_DATA, of any length, and copied.  archive_append_end writes what
 * is left, and END.
 */
struct archive_appender {
  struct archive_writer *writer;
  const struct uuid *id;
  struct pack_compression compression;
  struct pack pack;
  uint64_t number; /* of the packet that is being filled; begins at 1 */
};

int archive_append (struct archive_appender *a, uint64_t offset,
                    uint64_t length, enum extent_type type,
                    const uint8_t *data, struct error *err);
int archive_append_end (struct archive_appender *a, struct error *err);

#endif /* FERRY_ARCHIVE_WRITE_H */
