/* nbdferry - a drive: a disk, its bitmaps, and who may use it
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A drive is what an export serves.  It puts together a disk (disk/), its
 * named bitmaps (bitmap/), what is kept of them on disk (store/), and the
 * gates that all requests pass.  It knows nothing of nbdkit.
 *
 * The rule of every write, zero and trim (drive/io.c): mark, submit, mark
 * again.  Marking first means that a crash leaves too many bits, never too
 * few.  Marking again is for whoever clears bits meanwhile: without it
 * "write marks, sender clears, sender reads old data, write lands" would lose
 * the write.  It is left out while nobody can be clearing any (drive/marks.c).
 */
#ifndef FERRY_DRIVE_H
#define FERRY_DRIVE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "activity.h"
#include "bitmap.h"
#include "disk.h"
#include "error.h"
#include "gate.h"
#include "throttle.h"
#include "hook.h"
#include "journal.h"
#include "marks.h"
#include "qcow2.h"
#include "trust.h"
#include "uuid.h"

/* Who serves the disk now.  Changes only by drive_set_mode, with both locks
 * held and both gates shut (or before the first request), so that each of
 * these is enough to rely on it.
 */
enum drive_mode {
  DRIVE_ACTIVE,   /* this side, from its own disk */
  DRIVE_INCOMING, /* a destination; clients are refused */
  DRIVE_PREPARED, /* a destination that has everything and waits for COMMIT */
  DRIVE_LEAVING,  /* let go just now; clients wait at the gates */
  DRIVE_GONE,     /* let go by a process before this one; they are refused */
  DRIVE_FORWARD,  /* moved; requests go on to 'remote' */
};

/* Why a bitmap is not what it was: why it is inconsistent, or what happened to
 * one that is not.
 */
struct reason {
  int64_t time; /* s since 1970 */
  char text[];
};

/* The point in time since which a bitmap records: that of the last backup by
 * it that was completed.  An id of zero: there is none (docs/backup.md).
 */
struct point {
  struct uuid id;
  int64_t time; /* s since 1970 */
};

struct named_bitmap {
  char *name;
  struct bitmap *bits;     /* NULL if inconsistent */
  struct qcow2_bits *slot; /* persistent: where the bits are mapped from */
  unsigned shift;          /* log2 granularity */
  bool recording, persistent, inconsistent, busy;
  bool incoming;           /* belongs to a migration not yet committed */
  char *alias;             /* then: what its source calls it; NULL: the same */
  uint64_t id;             /* of this instance, never used again */
  atomic_uint_fast64_t version; /* + 1 after bits changed without a write */
  struct reason *reason;   /* or NULL; protected by the drive's list lock */
  struct point point;      /* the same */
  /* While a backup runs: what was written since it began, and whose it is. */
  struct bitmap *successor;
  struct write_hook *backup;
};

/* Who wants to hear of each write that has landed, while a migration runs.
 * 'written' is called without any gate, with a reference that it drops, and
 * may wait for as long as the writer should.
 */
struct drive_mirror {
  void (*written) (struct drive_mirror *m, uint64_t offset, uint64_t len);
  atomic_bool on;    /* call it */
  atomic_uint users; /* references; taken inside the gate */
};

/* What persistent bitmaps survive beside a crash of the daemon. */
enum drive_durability {
  DURABILITY_POWER,   /* a loss of power */
  DURABILITY_PROCESS, /* nothing: after a loss of power all is dirty */
};

struct drive {
  /* Read-only after drive_open; but of a destination that nobody uses yet,
   * drive_resize replaces the store and what was found with it.
   */
  struct uuid self; /* of this disk, from its opening on; on no medium */
  char *name;      /* of the export */
  char *path;      /* of the disk, absolute; or an NBD URI */
  char *state_dir; /* absolute */
  char *data_file; /* what bitmaps.qcow2 has for its data file, absolute */
  char *sidecar;   /* path of bitmaps.qcow2 in it */
  struct disk *disk;
  struct trust *trust; /* the times of the last writes; NULL: no bitmaps are
                          kept here */
  enum trust_verdict verdict; /* upon the disk as it was found */
  bool touched;     /* somebody wrote to it, or a write of ours that was under
                       way at a crash ended late: nobody can say which */
  bool taken_over;  /* by this open */
  bool found_clean; /* closed in good order, and nobody wrote since */
  enum drive_durability durability;
  struct activity *activity; /* the activity log; NULL: no bitmaps are kept */

  struct gate writes, reads;
  struct marks *marks;   /* read inside 'writes', replaced while it is shut */
  struct hooks *hooks;   /* the same; NULL: none */
  struct unsure *unsure; /* has its own lock; NULL: the disk loses nothing */
  enum drive_mode mode;  /* read under control, list, or inside a gate */
  uint64_t size;         /* bytes; like 'mode', and changes only in a
                            destination that nobody uses (drive_resize) */
  struct disk *remote;   /* of DRIVE_FORWARD, like 'mode' */
  _Atomic (struct drive_mirror *) mirror; /* or NULL; see drive_set_mirror */
  struct throttle throttle; /* has its own lock */
  atomic_bool used; /* by clients, since it was cleared (drive_was_used) */

  /* What is marked in persistent bitmaps does not reach the sidecar any more,
   * and so writes fail, for good.  Set before the first mark that is lost can
   * have returned, also by a handler of SIGBUS (qcow2_report_lost).
   */
  atomic_bool store_failed;
  _Atomic (char *) store_reason; /* why; set once, after store_failed */
  atomic_bool arming_failed;     /* the last try to write the activity log */
  pthread_mutex_t flush;         /* of a migration that comes in: one flush at
                                    a time, whichever session asks; innermost */
  atomic_uint_fast64_t failed_flushes; /* of those; changes under 'flush' */
  struct keeper *keeper;         /* the owner's: drive_start, drive_shutdown */

  /* Serialises operations on bitmaps, store and journal, however long they
   * take.  Taken before 'list' and before any gate.
   */
  pthread_mutex_t control;
  struct qcow2 *store;     /* protected by control; NULL: read-only, closed */
  struct journal *journal; /* the same */
  struct bitmap *watch;    /* the same: marked before 'ship', or NULL */
  struct bitmap *ship;     /* the same: what a migration has to send, or NULL */
  struct named_bitmap *unheld; /* the same: what its destination does not hold
                                  (ship-map.h), or NULL */
  int clearing_fd;         /* the same: of ship-map.c, or -1 */
  json_t *points;          /* the same: what the file of points says, or NULL */
  uint64_t next_id;        /* the same */

  /* Held for short looks and swaps only, and never across I/O but at the very
   * end (drive_shutdown).  Requests for the disk's data do not take it; those
   * for the extents of a bitmap do, and packets of a migration.  To change
   * what it protects both locks are needed.
   */
  pthread_mutex_t list;
  struct named_bitmap **bitmaps; /* protected by list */
  size_t nr_bitmaps;             /* the same */
  uint64_t list_version;         /* the same: + 1 at each change */
};

#define DRIVE_NBD_TIMEOUT 30

struct drive_options {
  const char *name;      /* required */
  const char *path;      /* required, absolute; or an NBD URI */
  const char *state_dir; /* absolute; NULL: path.ferry; required for a URI */
  unsigned nbd_timeout;  /* s; how long requests wait for a server that is away;
                            0: DRIVE_NBD_TIMEOUT */
  uint64_t create;       /* size of a missing file, or 0 */
  bool readonly;
  const char *import_bitmaps; /* NULL; or "on", or names: see house.c */
  uint64_t import_granularity; /* bytes, 0: the default */
  enum drive_durability durability;
  bool incoming;         /* be a destination, if the journal allows it */
  bool takeover;         /* become active, see takeover.h; 'force': the same */
  bool force;
};

/* Open the disk and its state directory (created if missing).  What the
 * journal says decides the mode.  NULL on error.
 */
struct drive *drive_open (const struct drive_options *opt, struct error *err);

/* Close the store in good order (for a drive that is not active here: leave
 * it as it is) and the disk.  No request may be inside.  drive_shutdown can
 * be called before, from another thread, while requests still come: it turns
 * them away, drains, and closes the store; 0 or -1.
 */
int drive_shutdown (struct drive *d, struct error *err);
void drive_free (struct drive *d);

/* The daemon ends: turn requests away, and have those that are inside end by
 * that time (ns), whatever the server of an NBD disk does.  Before anybody is
 * waited for who may wait for them: who reads the disk, or shuts a gate.
 */
#define DRIVE_HURRY (3 * NS_PER_S)
void drive_hurry (struct drive *d, uint64_t deadline);

/* Start the drive's own thread, which keeps the activity log small; needed
 * once, after the daemon has forked.  drive_shutdown ends it.
 */
int drive_start (struct drive *d, struct error *err);

/* Where a drive says what an administrator must know; nowhere before. */
void drive_set_log (void (*log) (const char *fmt, ...));
void drive_log (const char *fmt, ...) __attribute__ ((format (printf, 1, 2)));

/* The store has failed: see store_failed above.  The first call logs, and
 * records it for the next open.  Any thread, but no signal handler.
 */
void drive_store_failed (struct drive *d, const char *reason);

/* Why writes fail, or NULL if they do not. */
const char *drive_failure (struct drive *d);

/* May a client open it?  0, or -1 with the reason. */
int drive_may_serve (struct drive *d, struct error *err);

const char *drive_mode_name (enum drive_mode mode);

/* The mode, for who has neither lock; it may change at once. */
enum drive_mode drive_get_mode (struct drive *d);

/* Has it been let go of?  Then its bitmaps say nothing.  Control or list held,
 * or inside a gate.
 */
bool drive_is_elsewhere (const struct drive *d);

/* ---- requests (drive/io.c); 0, or -1 with errno ---- */

/* Has there been one since this was asked last?  Any thread. */
bool drive_was_used (struct drive *d);

int drive_pread (struct drive *d, void *buf, size_t count, uint64_t offset);
/* Through the gate for writes, with the regions of that range armed if need
 * be.  The gate's token, or -1.
 */
int drive_enter_armed (struct drive *d, uint64_t offset, uint64_t len);

int drive_pwrite (struct drive *d, const void *buf, size_t count,
                  uint64_t offset, unsigned flags);
int drive_zero (struct drive *d, uint64_t len, uint64_t offset,
                unsigned flags);
int drive_trim (struct drive *d, uint64_t len, uint64_t offset,
                unsigned flags);
int drive_flush (struct drive *d);
int drive_cache (struct drive *d, uint64_t len, uint64_t offset);
int drive_extent (struct drive *d, uint64_t offset, uint64_t end,
                  struct extent *ext);

/* ---- points in time (drive/drive.c) ---- */

/* The one order in which several drives are locked and shut; whoever passes
 * more than one to the functions below sorts them first.
 */
void drives_sort (struct drive **drives, size_t nr);

/* Shut, and open, the gates of some drives at one instant.  'reads' too, if
 * the mode is to change.  drives_open returns the longest time in ns.
 */
void drives_close (struct drive *const *drives, size_t nr, bool reads);
uint64_t drives_open (struct drive *const *drives, size_t nr, bool reads);

/* The control locks of some drives. */
void drives_lock (struct drive *const *drives, size_t nr);
void drives_unlock (struct drive *const *drives, size_t nr);

/* Build the list of what writes must mark from the bitmaps that record, the
 * 'extra' maps (may be NULL), d->ship, and d->unheld.  Control lock held.  NULL
 * and ENOMEM on error.
 */
struct marks *drive_build_marks (struct drive *d, struct bitmap **extra,
                                 size_t nr_extra);
/* Put it in place, and get the old one, to be freed once the gate is open.
 * The write gate is shut.
 */
struct marks *drive_swap_marks (struct drive *d, struct marks *marks);

/* That map, of which nothing in the drive speaks any more, is not marked from
 * here on.  The control lock is held.
 */
void drive_stop_marking (struct drive *d, const struct bitmap *map);

/* Append d->watch, d->ship and d->unheld, which come last; there is room for
 * them.  Then it is complete.
 */
void marks_add_ship (struct marks *m, const struct drive *d);

/* End all hooks, for that reason.  The write gate is shut, the control lock
 * held.
 */
void drive_end_hooks (struct drive *d, const char *why);

/* The same for what one of them has left at its bitmap, once the drive is
 * elsewhere.  Takes control and list.
 */
void drive_forget_hook (struct drive *d, const struct write_hook *h);
/* Make a destination serve that many bytes of its disk, which is a device of
 * at least as many: its store is closed, and opened again as one of that size.
 * Bitmaps that were still coming in are gone, and transient ones become all
 * dirty.  It is for who records that data has come to record the size, too
 * (served_size).  Takes control; nobody uses the drive otherwise, but for
 * looks at it.  On error it is as it was, or (store: NULL) of no use before the
 * next start.
 */
int drive_resize (struct drive *d, uint64_t size, struct error *err);

/* Change who serves the disk; 'remote' (taken over) for DRIVE_FORWARD.  The
 * control lock is held, both gates are shut.
 */
void drive_set_mode (struct drive *d, enum drive_mode mode,
                     struct disk *remote);

/* Have writes mark 'ship', and d->unheld, as well; when it returns, no write is
 * under way that did not know.  And no more: cannot fail, and when it returns,
 * nobody uses it.  Both take control and gate.
 */
int drive_set_ship (struct drive *d, struct bitmap *ship, struct error *err);
void drive_drop_ship (struct drive *d);

/* Have writes be told to it, or to nobody: when that returns, whoever still
 * tells the one before has a reference.  Holds nobody back, and waits for
 * nobody if it was so before.
 */
void drive_set_mirror (struct drive *d, struct drive_mirror *m);
/* The same for a map that says for a while what was written since; it is
 * marked before 'ship', so that who clears a bit of 'ship' and then finds
 * none in 'watch' has not cleared that of a write.
 */
int drive_set_watch (struct drive *d, struct bitmap *watch,
                     struct error *err);
void drive_drop_watch (struct drive *d);

/* Record a new state in the journal, durably.  Control lock held. */
int drive_record (struct drive *d, const struct journal_record *rec,
                  struct error *err);

/* The destination has acknowledged COMMIT.  If that can't be recorded, COMMIT
 * is repeated at the next start, which does no harm.  Takes control.
 */
void drive_record_acknowledged (struct drive *d);

/* ---- bitmaps (drive/bitmaps.c); control lock held ---- */

/* The bitmap with that name, or NULL.  Control or list lock held. */
struct named_bitmap *drive_find_bitmap (struct drive *d, const char *name);

/* A new bitmap, not yet in the list.  NULL on error. */
struct named_bitmap *drive_new_bitmap (struct drive *d, const char *name,
                                       unsigned shift, bool persistent,
                                       bool recording, struct error *err);
/* Frees it; it is in no list, and nobody marks it. */
void drive_free_bitmap (struct drive *d, struct named_bitmap *nb);

/* Make that vector (taken over) the drive's bitmaps; the old vector is freed,
 * what was in it is not.
 */
void drive_set_bitmaps (struct drive *d, struct named_bitmap **bitmaps,
                        size_t nr);

/* Make the persistent ones of these what the sidecar lists, durably.  The
 * names of those that are still coming in are noted in incoming.json first,
 * so that after a crash they can be told from the disk's own.
 */
struct drive_entry {
  struct named_bitmap *nb;
  bool recording; /* what is to be written; nb->recording may be older */
  struct point point; /* the same; for points_write alone */
};
int drive_write_directory (struct drive *d, const struct drive_entry *entries,
                           size_t nr, struct error *err);

/* The same for the list as it stands. */
int drive_write_list (struct drive *d, struct error *err);

/* ---- reasons (drive/reasons.c) ---- */

/* Say of a bitmap why it is not what it was; replaces what was said before.
 * Shown at once; durable when the store is closed.  Takes list.  Want of
 * memory is passed over.
 */
void drive_set_reason (struct drive *d, struct named_bitmap *nb,
                       const char *fmt, ...)
  __attribute__ ((format (printf, 3, 4)));

void drive_forget_reason (struct drive *d, struct named_bitmap *nb);

/* All reasons, for the journal; NULL if there are none.  Control or list held.
 * Bounded: of many bitmaps with long names the names are left out, and what
 * is oldest goes.
 */
json_t *reasons_to_json (struct drive *d);

/* Give the bitmaps of the list what the journal says of them. */
void reasons_from_json (struct drive *d, const json_t *reasons);

#endif /* FERRY_DRIVE_H */
