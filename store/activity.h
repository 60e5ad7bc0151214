/* nbdferry - the activity log: where bits may not be durable yet
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The disk is cut into regions.  A region is *armed* while a write in it may
 * have set bits that are in memory (in the page cache) alone.  That is made
 * durable before the first write into a quiet region; after a loss of power
 * everything in armed regions counts as dirty.  A region is disarmed when it
 * has been quiet for a while and its bits are durable (drive/keeper.c).  The
 * file, the order of the writes, and why: docs/activity.md.
 *
 * Threads: activity_is_armed and activity_arm from any number at once, and
 * beside all that follows them; activity_flag, too; the others from one at a
 * time (a drive's control lock).  The lock inside is a leaf.
 */
#ifndef FERRY_ACTIVITY_H
#define FERRY_ACTIVITY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bitmap.h"
#include "error.h"

#define ACTIVITY_MIN_SHIFT   26                    /* 64 MiB */
#define ACTIVITY_MAX_REGIONS (UINT64_C (1) << 18)  /* larger ones, rather */

/* What the file says beside the regions. */
enum activity_flags {
  ACTIVITY_UNLOGGED = 1, /* durability=process: everything is armed */
  ACTIVITY_EVERY = 2,    /* armed regions also concern bitmaps that do not
                            record: one of them may just have been disabled */
  ACTIVITY_CLEARING = 4, /* a clear was under way: bits may be missing even
                            if the machine has not crashed */
  ACTIVITY_FAILED = 8,   /* so they may because the store failed */
  ACTIVITY_UNREADABLE = 16, /* never in the file: there was none, or one that
                               was damaged */
};

/* 64 regions.  On one cache line, because they are looked at together. */
struct activity_word {
  atomic_uint_fast64_t armed;   /* durably, and not being disarmed */
  atomic_uint_fast64_t touched; /* since the last look; a hint, relaxed */
};

struct activity_hot {
  unsigned shift;             /* log2 of a region; read-only */
  struct activity_word *word; /* the pointer is read-only */
};

/* It begins with struct activity_hot. */
struct activity;

/* Read what 'path' says, if it is there and can be read, for a disk of 'size'
 * bytes.  Writes nothing.  A file that is damaged is no error: then
 * everything is armed.  NULL on error.
 */
struct activity *activity_open (const char *path, uint64_t size,
                                struct error *err);
void activity_close (struct activity *a); /* writes nothing; NULL is allowed */

/* The log as it was found, until activity_start: the next range at or after
 * 'from' that was armed, in bytes of the disk; and the flags.  If there was
 * no log, or one that could not be read: everything, and ACTIVITY_EVERY.
 */
bool activity_was_armed (const struct activity *a, uint64_t from,
                         struct range *run);
unsigned activity_was_flags (const struct activity *a);

/* Begin a new log, with nothing armed, durably; with 'flags' UNLOGGED only to
 * say that there is none.  What was armed before must be durable by now.
 */
int activity_start (struct activity *a, unsigned flags, struct error *err);

/* Are all regions that the range touches armed?  What is not was not touched
 * either.  (An unlogged one: always.)  To be relied on it must be called
 * inside the gate that activity_begin_disarm's caller synchronizes with.
 */
bool activity_are_armed (struct activity *a, uint64_t first, uint64_t last);

static inline bool
activity_is_armed (struct activity *a, uint64_t offset, uint64_t len)
{
  const struct activity_hot *hot = (const struct activity_hot *) a;
  const uint64_t first = offset >> hot->shift;
  const uint64_t last = (offset + (len ? len - 1 : 0)) >> hot->shift;
  const uint64_t bit = UINT64_C (1) << first % 64;
  struct activity_word *w = &hot->word[first / 64];

  if (first != last)
    return activity_are_armed (a, first, last);
  if (!(atomic_load (&w->armed) & bit))
    return false;
  if (!(atomic_load_explicit (&w->touched, memory_order_relaxed) & bit))
    atomic_fetch_or_explicit (&w->touched, bit, memory_order_relaxed);
  return true;
}

/* Arm the regions of that range; returns when they are durable.  All who wait
 * share one sync.  -1 with errno: they may or may not be; ESHUTDOWN after
 * activity_finish.
 */
int activity_arm (struct activity *a, uint64_t offset, uint64_t len);

/* Disarming, in three steps.  begin: what was quiet since the last begin is
 * no longer armed for those who look from now on; returns how many regions.
 * Then the caller waits for all who may have looked before, makes the bits
 * durable, and calls end, which takes the regions out of the file (without a
 * sync: one that stays too long does no harm).  Or cancel: they are armed as
 * before.  A region that somebody arms in between stays.
 */
uint64_t activity_begin_disarm (struct activity *a);
int activity_end_disarm (struct activity *a, struct error *err);
void activity_cancel_disarm (struct activity *a);

/* Set and drop flags in the file, durably or not. */
int activity_flag (struct activity *a, unsigned set, unsigned drop,
                   bool durable, struct error *err);

/* In good order: nothing is armed, durably, and nothing will be. */
int activity_finish (struct activity *a, struct error *err);

/* Sleep until something is armed, and then for 'ns' more.  False once
 * activity_wake_up was called (for good).
 */
bool activity_wait (struct activity *a, uint64_t ns);
void activity_wake_up (struct activity *a);

/* How many regions are armed in memory or in the file; how many syncs. */
uint64_t activity_nr_armed (struct activity *a);
uint64_t activity_nr_syncs (struct activity *a);

#endif /* FERRY_ACTIVITY_H */
