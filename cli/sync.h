/* nbdferry - a run of nbdferry sync
 * SPDX-License-Identifier: BSD-3-Clause
 *
 *   sync_begin   looks at bitmap, record and standby, decides how to go on,
 *                begins a backup and opens its view
 *   sync_run     copies, records, and ends the backup
 *   sync_close   gives up what is still under way
 */
#ifndef FERRY_SYNC_H
#define FERRY_SYNC_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "bitmap.h"
#include "client.h"
#include "control.h"
#include "disk.h"
#include "meter.h"
#include "sync-copy.h"
#include "sync-record.h"
#include "uuid.h"

enum sync_mode { SYNC_FULL, SYNC_INCREMENTAL, SYNC_COMPARE };

struct sync_options {
  const char *control;   /* path of the socket */
  const char *standby;   /* as it was given */
  const char *bitmap;    /* NULL: none, only with 'compare' */
  const char *node;      /* NULL: the only one */
  const char *uri;       /* of the daemon; NULL: ask it */
  bool compare, full, adopt;
  uint64_t scratch_limit; /* bytes; 0: the daemon's choice */
  bool slow;              /* at that limit, writers down first */
  unsigned connections, patience_ms;
  const struct stop *stop;
};

struct sync_job {
  const struct sync_options *opt;
  struct control *control;
  char *node;
  uint64_t size, granularity;  /* of the disk; of the bitmap */
  enum sync_mode mode;
  bool create, remove;         /* the bitmap, before we begin */
  bool blind;                  /* adopted without a record */

  char *standby;               /* absolute */
  bool is_uri;
  bool made;               /* the standby: a file that was not there */
  struct disk *target;
  struct uuid identity;    /* of the standby; zeros: nobody says */

  struct uuid parent, point;   /* of this run; zeros: none */
  bool begun;                  /* the daemon has our backup */
  bool recorded;               /* the standby is on its way to our point */
  char *view_uri;              /* with its export */
  struct disk *view;
  uint64_t needed;             /* bytes in the backup, if incremental */
  uint64_t released;           /* nothing before that is read again */

  bool on_the_way;             /* the standby is between two points */
  struct sync_samples known;   /* what it must have */
  struct sync_record record;   /* what is to be recorded */

  struct meter meter;
  const char *doing;           /* for the meter */
  uint64_t total;              /* the same, bytes */

  /* How it went. */
  uint64_t compared, differing; /* bytes */
  struct sync_copied copied;
};

/* 0, or -1.  sync_close is needed after either. */
int sync_begin (struct sync_job *s, const struct sync_options *opt,
                struct error *err);
int sync_run (struct sync_job *s, struct error *err);
void sync_close (struct sync_job *s);

/* Put the daemon's reason into 'err' if it has given the backup up. */
void sync_explain (struct sync_job *s, struct error *err);

/* Is that place in what this run copies, so that it may be either as it was
 * or as it will be?  (A callback for samples; an error counts as true.)
 */
bool sync_is_needed (void *job, uint64_t offset, uint64_t len);

/* Have the daemon keep the record. */
int sync_keep_record (struct sync_job *s, struct error *err);

/* Is the standby what the samples say? */
int sync_check_standby (struct sync_job *s, bool on_the_way,
                        struct error *err);

#endif /* FERRY_SYNC_H */
