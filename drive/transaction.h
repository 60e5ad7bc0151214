/* nbdferry - operations on bitmaps, all or nothing
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A list of actions over one or more drives takes effect at one instant, or
 * not at all.  A single operation is a list of one.  The words of the errors
 * are QEMU's.
 */
#ifndef FERRY_TRANSACTION_H
#define FERRY_TRANSACTION_H

#include "drive.h"

enum bitmap_action_type {
  BITMAP_ADD,
  BITMAP_REMOVE,
  BITMAP_CLEAR,
  BITMAP_ENABLE,
  BITMAP_DISABLE,
  BITMAP_MERGE,
  BITMAP_BACKUP_BEGIN, /* a hook begins, and a bitmap is frozen for it */
  BITMAP_BACKUP_END,   /* the hook ends, and the bitmap is as it was, or has
                          what was written since */
  BITMAP_BACKUP_FORGET, /* the bitmap that is frozen for the hook has no point
                           from here on, whatever comes */
  BITMAP_ABORT,        /* what came before it is checked; then it fails.  It has
                          no target */
};

struct bitmap_ref {
  struct drive *drive;
  const char *name;
};

struct bitmap_action {
  enum bitmap_action_type type;
  struct bitmap_ref target;
  /* BITMAP_ADD */
  uint64_t granularity; /* bytes, 0: the default */
  bool persistent, disabled;
  bool own;             /* nbdferry's, with a name that users cannot give */
  const struct bitmap *bits; /* what is dirty in it at once; NULL: nothing */
  /* BITMAP_MERGE; none is allowed, and does nothing */
  const struct bitmap_ref *sources;
  size_t nr_sources;
  /* BITMAP_BACKUP_...; target.name may be NULL */
  struct write_hook *hook;
  bool full;          /* BEGIN: may follow no other backup */
  bool success;       /* END */
  struct point point; /* END: what the bitmap gets if it was a success */
};

/* 0, or -1 with 'err' and nothing changed (unless the storage under the
 * sidecar failed in the end, which the message says).
 */
int bitmap_transaction (const struct bitmap_action *actions, size_t nr,
                        struct error *err);

#endif /* FERRY_TRANSACTION_H */
