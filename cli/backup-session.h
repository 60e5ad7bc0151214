/* nbdferry - the daemon's part of a backup
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A backup of one or more disks at one instant: begun in one transaction, and
 * ended in one.  It is tied to the connection: if we die, the daemon takes it
 * for failed, and the bitmap keeps every bit.
 */
#ifndef FERRY_BACKUP_SESSION_H
#define FERRY_BACKUP_SESSION_H

#include <stdbool.h>
#include <stdint.h>

#include "archive.h"
#include "control.h"
#include "direct.h"

enum backup_kind { BACKUP_AUTO, BACKUP_FULL, BACKUP_INCREMENTAL };

struct backup_options {
  const char *bitmap;        /* or NULL: a full one, of which nothing follows */
  enum backup_kind kind;
  uint64_t granularity;      /* of a new bitmap; 0: the default */
  bool has_scratch_limit;
  uint64_t scratch_limit;
  const char *on_limit;      /* or NULL */
  const char *uri;           /* where the daemon is reached; NULL: it says so */
};

struct backup_disk {
  char *node;
  bool create;               /* the bitmap is made by this backup */
  bool full;
  bool has_point;            /* of an earlier backup, to build upon */
  /* Once it has begun. */
  struct archive_head head;  /* its id is a new one */
  char *export;
  uint64_t needed;           /* bytes of the disk in the backup, about */
  bool forgotten;            /* the bitmap has lost the earlier point */
  uint64_t released;         /* up to here the daemon keeps nothing any more */
};

struct backup_session {
  struct control *control;   /* the caller's */
  const struct backup_options *opt;
  struct uuid id;
  struct backup_disk *disks;
  size_t nr;
  bool begun;                /* and not ended */
  json_t *uris;              /* session_uris; NULL: not asked yet */
};

/* Find the disks (those named; nr 0: the only one there is), and whether it
 * will be a full backup of each.
 */
int session_choose (struct backup_session *s, struct control *control,
                    const struct backup_options *opt,
                    const char *const *nodes, size_t nr, struct error *err);

/* Begin; on error nothing has changed in the daemon. */
int session_begin (struct backup_session *s, struct error *err);

/* Where the daemon can be reached: an array of strings, owned by 's'; NULL on
 * error.
 */
const json_t *session_uris (struct backup_session *s, struct error *err);

/* Read that disk without the daemon: both descriptors of backup/direct.h, or
 * NULL if that cannot be (a daemon elsewhere, or an old one, or its disk is no
 * file).
 */
struct direct *session_direct (struct backup_session *s,
                               const struct backup_disk *d);

/* OUT is overwritten from here on, from its beginning: should that fail, it is
 * at no point any more, so nothing may build upon the earlier one.  The bitmap
 * has none from here on, durably, until it has that of this backup.
 */
int session_forget (struct backup_session *s, struct backup_disk *d,
                    struct error *err);

/* Does the daemon still run the backups?  What was read without it counts only
 * then.  -1 with the reason.
 */
int session_check (struct backup_session *s, struct error *err);

/* That disk has been read up to there, and will not be read there again: what
 * the daemon keeps of it can go.  Errors do not matter.
 */
void session_release (struct backup_session *s, struct backup_disk *d,
                      uint64_t up_to);

/* All is durable: advance the bitmaps.  -1 with *unknown if the daemon did not
 * even answer; if it refused, the backup is still to be given up.
 */
int session_commit (struct backup_session *s, bool *unknown,
                    struct error *err);

/* It has failed: the bitmaps keep all their bits, and those that were made for
 * it are removed.
 */
void session_give_up (struct backup_session *s);

/* If the daemon has given the backup up by itself, why: put before 'err'. */
void session_explain (struct backup_session *s, struct error *err);

void session_free (struct backup_session *s);

#endif /* FERRY_BACKUP_SESSION_H */
