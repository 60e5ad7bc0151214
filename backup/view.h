/* nbdferry - a disk as it was: the view of a backup
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A view begins and ends in a transaction on bitmaps (drive/transaction.h), as
 * a hook of the drive.  Between the two it reads as the disk was at the instant
 * at which it began, whatever is written to the disk; docs/backup.md says how.
 *
 * Views are counted: an export that is open holds one, and so does the list of
 * those that there are (views.h).  One that has ended, or has failed, can only
 * be freed; it is not read any more.
 *
 * Threads: everything may be called at the same time, but what begins and ends
 * it is for the transaction alone.
 */
#ifndef FERRY_VIEW_H
#define FERRY_VIEW_H

#include "drive.h"

struct view;

struct view_options {
  struct drive *drive;
  struct uuid id;
  const char *bitmap;     /* whose bits are frozen; NULL: none */
  bool full;              /* all of the disk is in the backup */
  bool needed;            /* only what is in the backup can be read for sure */
  uint64_t scratch_limit; /* bytes for old granules; 0: half of what is free */
  bool slow;              /* at that bound, slow writers down first */
  uint64_t client;        /* it fails when this one has gone; 0: nobody */
};

/* A view that has not begun, or NULL. */
struct view *view_new (const struct view_options *opt, struct error *err);
struct view *view_ref (struct view *v);
void view_unref (struct view *v); /* NULL is allowed */

/* For the transaction: its hook. */
struct write_hook *view_hook (struct view *v);

/* Has it begun (and has it ended since)?  Ended, not failed: it is no hook any
 * more.
 */
bool view_has_begun (const struct view *v);
bool view_has_ended (const struct view *v);

/* What it was begun with; strings are the view's. */
const struct view_options *view_options (const struct view *v);

/* Give it up, for that reason; only the first one counts.  Its space is freed,
 * and it fails all reads; its bitmap stays frozen until it is ended.
 */
void view_fail (struct view *v, const char *fmt, ...)
  __attribute__ ((format (printf, 2, 3)));

struct view_info {
  uint64_t granularity;      /* of what is in the backup, bytes */
  uint64_t dirty;            /* bytes in the backup */
  struct uuid lineage;
  uint64_t generation;
  struct point parent;       /* id of zero: none */
  int64_t time;              /* s since 1970 */
  uint64_t scratch_used, scratch_limit;
  bool failed;
  char error[ERROR_MAX];     /* if it has failed */
};

void view_info (struct view *v, struct view_info *info);

/* Read what was there at the instant.  0, or -1 with 'err'. */
int view_pread (struct view *v, void *buf, size_t count, uint64_t offset,
                struct error *err);

/* What lies at 'offset', as far as the backup is concerned, cut at 'end': data,
 * zeros, or (a hole) nothing that is in the backup.  In a full one holes are
 * the disk's.  0, or -1 with 'err'.
 */
int view_extent (struct view *v, uint64_t offset, uint64_t end,
                 struct extent *ext, struct error *err);

/* For who is to read the disk without us (direct.h): the disk, and the map.
 * The caller closes both.
 */
int view_direct (struct view *v, int fds[2], struct error *err);

/* Nobody will read that range again: what is kept of the granules that lie in
 * it wholly can go, and no more is.
 */
void view_release (struct view *v, uint64_t offset, uint64_t len);

#endif /* FERRY_VIEW_H */
