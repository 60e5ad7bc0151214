/* nbdferry - archives: a backup as a file
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * docs/archive.md has the format byte for byte.  An archive is a stream of
 * packets (migrate/packet.h):
 *
 *   HEAD | DATA | DATA | ... | END
 *
 * HEAD says whose backup this is and what it builds upon, DATA packets follow
 * in the order of their offsets, END has the totals and a checksum over all
 * bytes before it.  It can be written to a pipe and read from one.
 *
 * An archive holds everything that was written between two points in time:
 * its parent and its own.  A full one has no parent and speaks of every byte
 * of the disk.
 */
#ifndef FERRY_ARCHIVE_H
#define FERRY_ARCHIVE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"
#include "packet.h"
#include "uuid.h"

#define ARCHIVE_FORMAT   "nbdferry-archive"
#define ARCHIVE_VERSION  1
#define ARCHIVE_MAX_HEAD (64 << 10) /* bytes of the HEAD's JSON */
#define ARCHIVE_MAX_RAW  (4 << 20)  /* data of one packet, bytes */
#define ARCHIVE_END_SIZE 1024       /* of the END packet, header and all */
#define ARCHIVE_SUFFIX   ".nbf"     /* where we choose the name */

/* What HEAD says.  Strings are owned; archive_head_free. */
struct archive_head {
  struct uuid id;      /* of this archive: the session of its packets */
  char *disk;          /* its name; UTF-8 */
  uint64_t size;       /* of the disk, bytes; a multiple of 512 */
  struct uuid lineage; /* of the disk, and its generation: they survive a */
  uint64_t generation; /* migration */
  struct uuid point;   /* the point in time that it leads to */
  struct uuid parent;  /* and the one it builds upon; all 0: a full one */
  char *bitmap;        /* what it was made by; NULL: none */
  uint64_t granularity; /* of the bitmap, bytes; 0: none */
  int64_t time;        /* of the point, s since 1970 */
  char *tool;          /* what has written it */
};

static inline bool
archive_is_full (const struct archive_head *h)
{
  return uuid_is_zero (&h->parent);
}

struct archive_hash {
  uint64_t high, low; /* XXH3, 128 bits */
};

/* What END says. */
struct archive_totals {
  uint64_t packets;            /* of DATA */
  uint64_t extents;            /* in them */
  uint64_t data, zeros, holes; /* bytes of the disk */
  uint64_t stored;             /* bytes of payload, compressed as it may be */
  uint64_t bytes;              /* of the archive, before END */
  struct archive_hash hash;    /* of those */
};

/* ---- JSON (archive-head.c) ---- */

/* The text, which the caller frees; NULL on error. */
char *archive_head_format (const struct archive_head *h, struct error *err);
/* 'h' is filled in but for the id, and owned by the caller; on error nothing
 * is.
 */
int archive_head_parse (const char *json, size_t len, struct archive_head *h,
                        struct error *err);
int archive_head_copy (struct archive_head *to,
                       const struct archive_head *from, struct error *err);
void archive_head_free (struct archive_head *h);

char *archive_totals_format (const struct archive_totals *t,
                             struct error *err);
int archive_totals_parse (const char *json, size_t len,
                          struct archive_totals *t, struct error *err);

/* Do those heads, in that order, make one chain?  'names' are for messages.
 * The first need not be a full one.
 */
int archive_chain_check (const struct archive_head *const *heads,
                         const char *const *names, size_t nr,
                         struct error *err);

/* ---- reading (archive-read.c) ---- */

struct archive_reader;

/* Skip payloads until they are asked for, for which the file must be one that
 * can be read anywhere.  The checksum over the whole is not computed then.
 */
#define ARCHIVE_LAZY 0x1

/* Read the HEAD.  'path' "-" is standard input.  NULL on error; each error
 * begins with the archive's name.  A reader belongs to one thread.
 */
struct archive_reader *archive_open (const char *path, unsigned flags,
                                     struct error *err);
/* The same with an open file, which is closed with the reader, or here on
 * error.
 */
struct archive_reader *archive_open_fd (int fd, const char *name,
                                        unsigned flags, struct error *err);
/* The file alone, for archive_peek_totals: a descriptor, or -1 and errno. */
int archive_open_file (const char *path);
void archive_close (struct archive_reader *r); /* NULL is allowed */

const struct archive_head *archive_get_head (const struct archive_reader *r);
const char *archive_get_name (const struct archive_reader *r);

/* What was read so far; all of it once archive_next has returned 0. */
const struct archive_totals *
archive_get_totals (const struct archive_reader *r);

/* The next DATA packet: 1, and its extents, which are valid until the next
 * call; 0: the end, and everything was right; -1.
 */
int archive_next (struct archive_reader *r,
                  const struct packet_extent **extents, size_t *nr,
                  struct error *err);

/* That packet's data, in the order of its extents, until it is unloaded or
 * the next packet is read.  NULL on error.
 */
const uint8_t *archive_load (struct archive_reader *r, struct error *err);
void archive_unload (struct archive_reader *r);

/* Read all that is left, and check it: archive_next to the end, with what is
 * compressed.
 */
int archive_verify (struct archive_reader *r, struct error *err);

/* Only the END of a file, for a quick look: 0, or -1 if it has none, which
 * means that it was cut off or is still being written.
 */
int archive_peek_totals (int fd, const char *name, struct archive_totals *t,
                         struct error *err);

#endif /* FERRY_ARCHIVE_H */
