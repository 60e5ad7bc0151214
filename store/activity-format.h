/* nbdferry - the activity log: its file
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A header and records, each one sector (docs/activity.md).  Nothing outside
 * store/activity*.c and its tests includes this.
 */
#ifndef FERRY_ACTIVITY_FORMAT_H
#define FERRY_ACTIVITY_FORMAT_H

#include <stdint.h>
#include <stddef.h>
#include <sys/types.h>

#include "error.h"

#define ACTIVITY_SECTOR       512
#define ACTIVITY_MAGIC        "FERRYACT"
#define ACTIVITY_RECORD_MAGIC "FERRYARM"
#define ACTIVITY_VERSION      1
#define ACTIVITY_RECORD_WORDS 60 /* of 64 regions each */

/* Where things are in a sector; big-endian, but for the words of regions. */
enum {
  ACTIVITY_AT_VERSION = 8,  /* header, 32 bits */
  ACTIVITY_AT_FLAGS = 12,   /* header, 32 bits */
  ACTIVITY_AT_SIZE = 16,    /* header, 64 bits: of the disk, bytes */
  ACTIVITY_AT_SHIFT = 24,   /* header, 32 bits: log2 of a region */
  ACTIVITY_AT_NUMBER = 8,   /* record, 64 bits: 0, 1, ... */
  ACTIVITY_AT_WORDS = 16,   /* record: little-endian words */
  ACTIVITY_AT_SEQUENCE = 496, /* both, 64 bits */
  ACTIVITY_AT_CHECKSUM = 504, /* both: XXH3 of what is before it */
};

struct activity_geometry {
  uint64_t size;  /* of the disk, bytes */
  unsigned shift; /* log2 of a region */
  uint64_t nr;    /* regions */
};

size_t activity_nr_records (uint64_t nr_regions);

void activity_make_header (uint8_t *sector, const struct activity_geometry *g,
                           unsigned flags, uint64_t sequence);
void activity_make_record (uint8_t *sector, uint64_t number,
                           uint64_t sequence, const uint64_t *words,
                           size_t nr_words);
uint64_t activity_record_word (const uint8_t *sector, size_t i);

/* Read a log.  '*words' becomes one bit a region, to be freed, or NULL if
 * there is no log that could be read ('flags' is 0 then).  -1 only for want
 * of memory, and for what is no regular file.
 */
int activity_read (const char *path, struct activity_geometry *g,
                   unsigned *flags, uint64_t **words, struct error *err);

/* A new one with nothing armed, durable; open for writing, or -1. */
int activity_create (const char *path, const struct activity_geometry *g,
                     unsigned flags, struct error *err);

#endif /* FERRY_ACTIVITY_FORMAT_H */
