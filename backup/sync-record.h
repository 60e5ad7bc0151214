/* nbdferry - what is known of a standby
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A standby is any disk that `nbdferry sync` brings up to date again and
 * again by a bitmap.  What that bitmap records is what was written since a
 * certain point in time, so it is of use only for a disk which is as the
 * source was at just that point.  The record says which disk that is, and how
 * it can be recognised (docs/sync.md):
 *
 *   from  the point that the standby was brought to last
 *   to    the point of the run that was begun after that; when it is written
 *         into the record the standby is not yet touched
 *
 * Which of the two holds is told by the bitmap itself, whose own point changes
 * in one durable step (x-ferry-backup-end):
 *
 *   bitmap's point   the standby
 *   to               is at 'to': the run was completed
 *   from             is at 'from', or on its way to 'to': wherever it is not at
 *                    'from', the bitmap is dirty
 *   anything else    holds part of a copy from nowhere, if 'from' is none;
 *                    otherwise it is not known: somebody else has used the
 *                    bitmap
 *
 * With each point goes a sample: hashes of some places of what was written to
 * the standby.  They are read again before the next run, so a disk that was
 * rolled back, or written by others, or is another one, is noticed.
 */
#ifndef FERRY_SYNC_RECORD_H
#define FERRY_SYNC_RECORD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "disk.h"
#include "error.h"
#include "uuid.h"

#define SYNC_SAMPLES    64          /* of one point, at most */
#define SYNC_FRESH      32          /* of them, from one run */
#define SYNC_SAMPLE_MAX (64 << 10)  /* bytes of a place */

struct sync_sample {
  uint64_t offset;
  uint32_t len;  /* bytes */
  uint64_t hash; /* XXH3, 64 bits */
};

struct sync_samples {
  size_t nr;
  struct sync_sample sample[SYNC_SAMPLES];
};

struct sync_record {
  char *standby;       /* as it was named; owned; UTF-8 */
  uint64_t size;       /* of the standby, bytes */
  struct uuid from, to; /* of zeros: none */
  struct sync_samples at_from, at_to;
};

void sync_record_free (struct sync_record *r);

/* A new reference, or NULL if there is no memory. */
json_t *sync_record_to_json (const struct sync_record *r);

/* Strict: 'r' is filled in, or nothing is owned. */
int sync_record_parse (const json_t *json, struct sync_record *r,
                       struct error *err);

/* ---- samples ---- */

uint64_t sync_sample_hash (const void *buf, size_t len);

/* Collects a few places of many, each with the same chance; but data rather
 * than zeros.
 */
struct sync_sampler {
  struct sync_samples picked; /* at most SYNC_FRESH */
  bool zero[SYNC_FRESH];      /* whether it is */
  uint64_t seen[2];           /* so much data, so many zeros */
  uint64_t random; /* state; seeded by sync_sampler_init */
};

void sync_sampler_init (struct sync_sampler *s);

/* 'len' bytes at 'offset' were written; 'buf' NULL: zeros.  Not for several
 * threads at once.
 */
void sync_sampler_add (struct sync_sampler *s, const void *buf, uint64_t len,
                       uint64_t offset);

/* What is in 'old' and does not touch what was written, of which 'written'
 * says so, and what was picked.
 */
void sync_samples_merge (struct sync_samples *to,
                         const struct sync_samples *old,
                         bool (*written) (void *opaque, uint64_t offset,
                                          uint64_t len),
                         void *opaque, const struct sync_sampler *fresh);

/* Read them again.  Those for which 'skip' is true (NULL: none) are passed
 * over.  1: as they were; 0: not, and where in *offset; -1 with errno.
 */
int sync_samples_check (const struct sync_samples *s, struct disk *d,
                        bool (*skip) (void *opaque, uint64_t offset,
                                      uint64_t len),
                        void *opaque, uint64_t *offset);

/* ---- the file sync.json of a state directory ---- */

/* The record of a bitmap: a new reference; json_null if there is none. */
json_t *sync_store_get (const char *state_dir, const char *bitmap,
                        struct error *err);

/* Replace it, durably, or remove it ('record' NULL).  Records of bitmaps for
 * which 'exists' is false are dropped.  Calls for one directory must not run
 * at the same time.
 */
int sync_store_set (const char *state_dir, const char *bitmap, json_t *record,
                    bool (*exists) (void *opaque, const char *bitmap),
                    void *opaque, struct error *err);

#endif /* FERRY_SYNC_RECORD_H */
