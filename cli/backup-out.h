/* nbdferry - where a backup goes
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * OUT may be a pattern, so that each disk and each night has its own file:
 * %n is the disk, %t the time, %% a percent sign.  An existing folder stands
 * for a file of that disk and time in it.
 */
#ifndef FERRY_BACKUP_OUT_H
#define FERRY_BACKUP_OUT_H

#include "archive-write.h"
#include "backup-session.h"
#include "partial.h"
#include "target.h"

enum out_format { OUT_AUTO, OUT_ARCHIVE, OUT_RAW };

struct out {
  char *path;            /* or NBD URI, or "-" */
  bool archive;          /* otherwise a disk that is updated in place */
  bool complete;         /* it is durable and has its name */
  struct partial partial; /* of an archive */
  struct archive_writer *writer;
  struct target target;
};

/* The name that OUT means for that disk, which the caller frees.  'several':
 * there are more disks, and each needs a name of its own.
 */
char *out_name (const char *pattern, const char *node, bool several,
                enum out_format format, struct error *err);

/* Decide what it is; an archive's file is made.  On error, out_close. */
int out_prepare (struct out *o, char *path, enum out_format format,
                 bool force, struct error *err);

/* Once the backup has begun: the archive's head, or the target. */
int out_begin (struct out *o, struct backup_session *s,
               const struct backup_disk *d, bool force, unsigned connections,
               struct error *err);

/* Make it durable, and give it its name. */
int out_commit (struct out *o, struct error *err);

/* Remove what has no name yet; all else is closed. */
void out_close (struct out *o);

#endif /* FERRY_BACKUP_OUT_H */
