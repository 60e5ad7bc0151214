/* nbdferry - what the tests of archives share
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Archives are made in memory (memfd), from extents that a test names.
 */
#ifndef FERRY_ARCHIVE_TEST_H
#define FERRY_ARCHIVE_TEST_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "archive-merge.h"
#include "archive-write.h"
#include "archive.h"

/* UUIDs that can be told apart; 0 is none. */
static inline struct uuid
test_uuid (unsigned n)
{
  struct uuid u = { { 0 } };

  if (n > 0)
    u.b[0] = 0x40;
  u.b[14] = n >> 8;
  u.b[15] = n;
  return u;
}

static inline struct archive_head
test_head (uint64_t size, unsigned point, unsigned parent)
{
  return (struct archive_head){
    .id = test_uuid (1000 + point),
    .disk = (char *) "vda",
    .size = size,
    .lineage = test_uuid (7),
    .generation = 3,
    .point = test_uuid (point),
    .parent = test_uuid (parent),
    .bitmap = (char *) "daily",
    .granularity = 65536,
    .time = 1700000000 + point,
    .tool = (char *) "a test",
  };
}

struct test_archive {
  int fd;
  struct archive_writer *writer;
  struct archive_appender appender;
  struct archive_head head;
};

static inline void
test_must (int r)
{
  if (r == -1)
    abort ();
}

static inline void
test_begin (struct test_archive *t, const struct archive_head *head,
            enum migrate_compression how)
{
  *t = (struct test_archive){ .head = *head };
  t->fd = memfd_create ("archive", MFD_CLOEXEC);
  test_must (t->fd);
  t->writer = archive_writer_open (t->fd, "test", head, NULL);
  if (t->writer == NULL)
    abort ();
  t->appender = (struct archive_appender){
    .writer = t->writer, .id = &t->head.id, .number = 1,
    .compression = { .how = how },
  };
  test_must (pack_init (&t->appender.pack, NULL));
}

/* Returns the archive, to be read from its beginning. */
static inline int
test_end (struct test_archive *t)
{
  test_must (archive_append_end (&t->appender, NULL));
  pack_destroy (&t->appender.pack);
  archive_writer_free (t->writer);
  test_must (lseek (t->fd, 0, SEEK_SET));
  return t->fd;
}

/* Open it again and again: the reader has a file descriptor of its own. */
static inline struct archive_reader *
test_open (int fd, const char *name, unsigned flags, struct error *err)
{
  test_must (lseek (fd, 0, SEEK_SET));
  return archive_open_fd (dup (fd), name, flags, err);
}

#endif /* FERRY_ARCHIVE_TEST_H */
