/* nbdferry - what must be known of a migration after a restart
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The file migration.json in the state directory of its first disk says all;
 * in those of the others it says where that one is.  Each is replaced as a
 * whole, durably.  A disk's ship map (drive/ship-map.h) belongs to the session
 * that the file beside it names.  docs/handover.md has the format.
 */
#ifndef FERRY_DESCRIPTION_H
#define FERRY_DESCRIPTION_H

#include "outgoing.h"
#include "uuid.h"

#define DESCRIPTION_MAX_DISKS 4096
#define DESCRIPTION_MAX_BYTES (4 << 20)

struct description_disk {
  char *name;      /* of the export here */
  char *state_dir; /* absolute */
  char *target;    /* the disk's name over there */
  struct uuid lineage; /* these two as long as the description means it */
  uint64_t generation;
};

struct description {
  struct uuid session;
  char *first;          /* of one that only points: the first disk's state
                           directory, and nothing else below is set */
  char *uri;            /* of the server, as the user gave it */
  uint64_t epoch;       /* the next connection's is higher than this */
  uint64_t attempt;     /* the next PREPARE's is higher than this */
  bool paused;          /* by an administrator: until migrate-recover */
  struct migrate_params params; /* but for the blobs */
  json_t *attached;     /* names and paths (blobs_describe), or NULL */
  struct description_disk *disks;
  size_t nr;
};

void description_free (struct description *d); /* what is in it */

/* 1: here it is; 0: there is none; -1: there is one that cannot be used. */
int description_read (const char *state_dir, struct description *d,
                      struct error *err);
int description_parse (const char *buf, size_t len, struct description *d,
                       struct error *err);

/* As text, or NULL if it cannot be (a path that is not UTF-8). */
char *description_format (const struct description *d);

/* In that folder, durably. */
int description_write (const char *state_dir, const struct description *d,
                       struct error *err);
int description_remove (const char *state_dir, struct error *err);

#endif /* FERRY_DESCRIPTION_H */
