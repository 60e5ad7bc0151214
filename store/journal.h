/* nbdferry - the journal: who a disk is, and who is responsible for it
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A small file beside the sidecar.  Two slots are written in turn, each with
 * magic, version, sequence, length and checksum, so that a torn write never
 * loses the last good record: the valid slot with the higher sequence counts.
 * The record itself is a JSON object (docs/journal.md).  Every write is
 * durable (fsync of the file, and of its directory when it is created) before
 * journal_write returns.
 *
 * Threads: no lock inside; the drive's control lock serialises the calls.
 */
#ifndef FERRY_JOURNAL_H
#define FERRY_JOURNAL_H

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "error.h"
#include "uuid.h"

/* Who may serve the disk.  docs/handover.md draws the transitions. */
enum journal_state {
  JOURNAL_ACTIVE,   /* here, and nowhere else */
  JOURNAL_INCOMING, /* a destination; nothing is promised yet */
  JOURNAL_PREPARED, /* a destination that has it all, and may not serve: if
                       the coordinator's journal is ACTIVE for the same
                       session and attempt, it is active */
  JOURNAL_DOUBT,    /* a source, one of several disks: if the coordinator's
                       journal is GONE for the same session and attempt, it
                       is gone, otherwise still here */
  JOURNAL_GONE,     /* a source that has let go; 'peer' has it */
};

/* What the files were when this was recorded (store/trust.h).  Times are ns
 * since 1970.
 */
struct journal_trust {
  bool known;            /* is there any of it? */
  uint64_t disk_size, disk_inode;
  int64_t disk_mtime;
  uint64_t sidecar_size, sidecar_inode;
  int64_t sidecar_mtime;
};

struct journal_record {
  struct uuid lineage;   /* the disk's, the same on both sides of a move */
  uint64_t generation;   /* + 1 at each handover */
  enum journal_state state;
  bool clean;            /* closed in good order */
  char boot_id[37];      /* of the machine's boot that wrote this */
  struct uuid origin;    /* the session that made it active here, or zero */
  /* About the last handover; zero and NULL if there was none. */
  struct uuid session;
  uint64_t attempt;
  bool acknowledged;     /* a GONE one's: the other side has said that it is
                            active; until then COMMIT must be repeated */
  bool stale;            /* not of an ACTIVE one: somebody wrote to the disk, so
                            what came of the session, or was left behind, is
                            not what is there */
  char *coordinator;     /* path of the journal that decides; NULL: this one */
  struct uuid coordinator_lineage; /* a DOUBT one's: how that journal was */
  uint64_t coordinator_generation; /* the same */
  char *peer;            /* NBD URI of the other side's export; a source's */
  uint64_t together;     /* how many disks were handed over as one; 0: unknown */
  struct uuid taken_from; /* the session that a takeover put an end to; zero:
                             there was none */
  uint64_t served_size;  /* bytes: so much of a larger device is the disk; 0:
                            all of it */
  /* When 'clean': as the files were closed; else as they were opened. */
  struct journal_trust trust;
  /* Why bitmaps are not what they were: objects with "time" (s since 1970),
   * "text" and "bitmaps" (names; none: all).  Never changed once it is here;
   * NULL if there are none.
   */
  json_t *reasons;
};

struct journal;

/* Open 'path', or create it with a new lineage, generation 0, ACTIVE.
 * A journal that is damaged in both slots is refused, and not written to.
 */
struct journal *journal_open (const char *path, bool *created,
                              struct error *err);
void journal_close (struct journal *j);

/* The record as last read or written; owned by 'j'. */
const struct journal_record *journal_get (const struct journal *j);
const char *journal_path (const struct journal *j);

/* Make 'rec' (copied; its boot_id is filled in) the record, durably.  On
 * error the last one still stands.
 */
int journal_write (struct journal *j, const struct journal_record *rec,
                   struct error *err);

/* Is there a file in that folder that begins like one? */
bool journal_is_in (const char *folder);

/* Read somebody's journal without opening it for writing; the caller frees
 * the record's strings with journal_record_free.
 */
int journal_read (const char *path, struct journal_record *rec,
                  struct error *err);
void journal_record_free (struct journal_record *rec);

/* This boot's id (/proc/sys/kernel/random/boot_id), "" if unknown.  Tests
 * play a reboot with another one in the environment, FERRY_TEST_BOOT_ID.
 */
void journal_boot_id (char id[37]);

const char *journal_state_name (enum journal_state state);

#endif /* FERRY_JOURNAL_H */
