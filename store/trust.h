/* nbdferry - was the disk written to behind our back?
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A bitmap says what has changed only as long as nobody changes the disk
 * without it.  What can be known about that are the files' times: those that
 * the journal has from the last clean close, those that the files have now,
 * and, after a crash, those of our own last writes, which are kept in the page
 * of a file, 'lastwrite', that is mapped.  docs/trust.md has the rules.
 *
 * Threads: trust_write_begins and -ended by any; the rest is serialised by
 * the caller (a drive's control lock).
 */
#ifndef FERRY_TRUST_H
#define FERRY_TRUST_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "disk.h"
#include "error.h"
#include "journal.h"
#include "qcow2.h"

/* ---- the page of the last writes ---- */

#define TRUST_SLOTS 32

/* One cache line for each of some threads.  An unclean end leaves what they
 * said last.
 */
struct trust_slot {
  _Alignas (64) atomic_int_fast64_t last; /* ns since 1970 */
  atomic_uint inside;                     /* writes under way */
};

struct trust {
  struct trust_slot *slot; /* TRUST_SLOTS, mapped */
  void *page;
  struct sigbus_range *watch; /* of the page */
  atomic_bool lost;           /* the file was cut: the page is ours alone */
  int fd;
};

/* What a crash left in it. */
struct trust_left {
  bool valid;     /* written in the boot of that id, and whole */
  int64_t first;  /* the earliest of the disk's mtime at open, and of what
                     each thread wrote last */
  int64_t last;   /* the latest of these */
  bool in_flight; /* some had begun, and not ended */
  bool failed;    /* the store had failed */
};

/* Open 'path', or create it; what it held is '*left'.  It is not changed
 * before trust_start.
 */
struct trust *trust_open (const char *path, const char *boot_id,
                          struct trust_left *left, struct error *err);

/* From here on it speaks of writes since 'mtime', in this boot. */
void trust_start (struct trust *t, const char *boot_id, int64_t mtime);

/* The store has failed.  The activity log is told as well, but it may lie on
 * what fails, and the error of an fsync is told only once; this page is in
 * memory, and outlives the process.  NULL is fine.
 */
void trust_note_failure (struct trust *t);

/* Unmap and close; NULL is fine. */
void trust_close (struct trust *t);

static inline int64_t
trust_now (void)
{
  struct timespec ts;

  /* The clock that most file systems stamp with, and the cheapest one. */
  clock_gettime (CLOCK_REALTIME_COARSE, &ts);
  return ts.tv_sec * INT64_C (1000000000) + ts.tv_nsec;
}

/* Around each change of the disk, in the same thread or not; 'shard' is any
 * number, the same for both.  't' may be NULL.  Relaxed: who reads it is
 * another process, after this one is dead.
 */
static inline void
trust_write_begins (struct trust *t, unsigned shard)
{
  struct trust_slot *s;

  if (t == NULL)
    return;
  s = &t->slot[shard % TRUST_SLOTS];
  atomic_fetch_add_explicit (&s->inside, 1, memory_order_relaxed);
  atomic_store_explicit (&s->last, trust_now (), memory_order_relaxed);
}

static inline void
trust_write_ended (struct trust *t, unsigned shard)
{
  struct trust_slot *s;

  if (t == NULL)
    return;
  s = &t->slot[shard % TRUST_SLOTS];
  atomic_store_explicit (&s->last, trust_now (), memory_order_relaxed);
  atomic_fetch_sub_explicit (&s->inside, 1, memory_order_relaxed);
}

/* ---- the judgement ---- */

enum trust_verdict {
  TRUST_KEPT,         /* nobody else wrote, as far as times can tell */
  TRUST_RESIZED,      /* the disk has another size, which explains its times */
  TRUST_UNVERIFIABLE, /* there is nothing to tell it by */
  TRUST_BROKEN,       /* somebody wrote */
};

#define TRUST_WHY_MAX 512

/* What was found, before anything of it was changed. */
struct trust_case {
  const char *disk_path, *state_dir;
  const struct journal_record *was;
  bool no_journal;              /* 'was' is new */
  bool disk_has_times;
  struct disk_times disk;
  bool sidecar_exists;
  struct disk_times sidecar;    /* 'local': on the disk's file system or on a
                                   local one, so that both can be compared */
  int64_t sidecar_born;         /* ns since 1970; 0: unknown */
  struct trust_left left;
  enum qcow2_found found;
  bool no_bitmaps;              /* nothing in the sidecar was ever in use */
};

/* Fill in disk, sidecar and their flags; 0 or -1. */
int trust_look (struct trust_case *c, struct disk *disk, const char *sidecar,
                struct error *err);

/* Is the sidecar, by its time and size, as it was when we closed it? */
bool trust_sidecar_is_as_closed (const struct trust_case *c);

/* Was the sidecar, by these mtimes, written after the disk, as QEMU does it?
 * Also if its time is less exact.
 */
bool trust_sidecar_is_later (int64_t disk, int64_t sidecar);

/* What that means; unless it is KEPT, 'why' says it in words. */
enum trust_verdict trust_judge (const struct trust_case *c,
                                char why[TRUST_WHY_MAX]);

/* ---- the record ---- */

/* Both files as they are now, for the journal.  '!known' if the disk has no
 * times.  'settled': return only when a write from now on would get a later
 * time than what is recorded (a few ms at most).
 */
int trust_record (struct disk *disk, const char *sidecar, bool settled,
                  struct journal_trust *t, struct error *err);

/* A time as people read it: 2026-01-31 12:00:00 UTC. */
#define TRUST_TIME_TEXT 40
const char *trust_time (int64_t ns, char text[TRUST_TIME_TEXT]);

#endif /* FERRY_TRUST_H */
