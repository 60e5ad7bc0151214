/* nbdferry - the parts of a transaction, among themselves
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_TRANSACTION_IMPL_H
#define FERRY_TRANSACTION_IMPL_H

#include "clear-note.h"
#include "transaction.h"

/* A bitmap as it will be. */
struct planned {
  struct named_bitmap *nb;
  struct bitmap *companion; /* of one that is cleared: what it is to keep */
  struct bitmap *merged;    /* what was merged into it after that */
  struct bitmap *successor; /* beside nb->bits from the instant on */
  struct bitmap *ended;     /* the one of a backup that ends */
  struct write_hook *hook;  /* of a backup that begins */
  struct point point;
  bool recording;
  bool added, removed;
  bool grows;            /* something is merged into it */
  bool begins;           /* a backup does, and it ends if 'ended' is set */
  bool cleared, touched; /* so far, in the walk */
};

struct plan {
  struct drive *drive;
  struct planned *list; /* room for all that may be added */
  size_t nr;
  bool changed;         /* the list, or what is recording */
  bool persistent;      /* the sidecar's directory changes */
  bool disables;        /* a persistent bitmap stops to record */
  bool clears;          /* one that records is cleared */
  struct clear_note *note; /* then; or NULL: the activity log says so */
  bool merges;          /* into a persistent one */
  bool pointed;         /* a point changes */
  struct hooks *hooks;  /* for the instant; NULL: as they are.  Afterwards the
                           old ones */
  bool hooked;          /* they change */
  struct named_bitmap **bitmaps; /* the new list, and its length */
  size_t nr_bitmaps;
  struct marks *marks;        /* for the instant; afterwards the old ones */
  struct marks *marks_after;  /* without the companions */
};

struct transaction {
  struct plan *plans;
  struct drive **drives; /* in the order of their locks */
  size_t nr;
};

struct plan *plan_of (struct transaction *t, const struct drive *d);

/* The bitmap of that name, as the actions so far leave the list, or NULL. */
struct planned *planned_find (struct plan *p, const char *name);

/* A bitmap that may be worked on; NULL, with QEMU's words, if not. */
struct planned *transaction_usable (struct transaction *t,
                                    const struct bitmap_ref *ref,
                                    bool even_inconsistent,
                                    struct error *err);

/* ---- backups (transaction-backup.c) ---- */

int transaction_prepare_begin (struct transaction *t, struct plan *p,
                               const struct bitmap_action *a,
                               struct error *err);
/* What was written since the last backup is not all in it any more, or what
 * that backup was written to is none.
 */
void transaction_lose_point (struct plan *p, struct planned *b);

int transaction_prepare_forget (struct plan *p, const struct bitmap_action *a,
                                struct error *err);
int transaction_prepare_end (struct plan *p, const struct bitmap_action *a,
                             struct error *err);

/* Make the hooks that will be in place at the instant. */
int transaction_plan_hooks (struct transaction *t,
                            const struct bitmap_action *actions, size_t nr,
                            struct error *err);

/* At the instant, the gates shut; and when all is done. */
void transaction_backups_instant (struct plan *p);
void transaction_backups_done (struct plan *p);

/* Free what is nobody's any more.  'done': the transaction has taken place. */
void transaction_free_backup (struct planned *b, bool done);

/* Merges and clears.  -1: bits may be lost by a loss of power; then nothing
 * was cleared.
 */
int transaction_walk (struct transaction *t,
                      const struct bitmap_action *actions, size_t nr,
                      struct error *err);

#endif /* FERRY_TRANSACTION_IMPL_H */
