/* nbdferry - is a bitmap right?
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Compares a drive with a reference (a backup: the disk as it was when the
 * bitmap was clean), and names what differs although the bitmap says that it
 * does not.  Writers may go on meanwhile: there is no false alarm.
 */
#ifndef FERRY_AUDIT_H
#define FERRY_AUDIT_H

#include "client.h"
#include "drive.h"

/* An audit ends early, at a granule's end, when it has found so many. */
#define AUDIT_MAX_RANGES 1024

struct audit_options {
  const char *bitmap;
  const char *reference;   /* absolute path of a raw file or device, or URI */
  uint64_t offset, length; /* bytes; what to compare.  'offset' is a multiple
                              of the granularity; 'length' is rounded up to
                              one, and cut at the end of the disk */
  const struct stop *stop; /* gives it up; required */
};

/* All in bytes.  A granule that the end of the disk cuts counts as what there
 * is of it.
 */
struct audit {
  uint64_t size, reference_size;
  uint64_t granularity;
  bool recording;       /* the bitmap */
  uint64_t next;        /* where a next audit goes on; 'size': all was seen */
  uint64_t dirty;       /* what is marked */
  uint64_t over_marked; /* of that, in granules that do not differ at all */
  uint64_t differing;   /* what differs, in steps of 'unit' */
  uint64_t unit;        /* granularity or less */
  uint64_t missed;      /* of that, what is not marked */
  struct range *ranges; /* of 'missed', ascending, neighbours made one; to be
                           freed by the caller */
  size_t nr;
};

/* 0, or -1.  The bitmap is busy meanwhile. */
int drive_audit (struct drive *d, const struct audit_options *opt,
                 struct audit *result, struct error *err);

#endif /* FERRY_AUDIT_H */
