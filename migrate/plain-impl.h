/* nbdferry - a copy to another server, its parts among themselves
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_PLAIN_IMPL_H
#define FERRY_PLAIN_IMPL_H

#include <pthread.h>

#include "brake.h"
#include "client.h"
#include "pacer.h"
#include "plain.h"

#define PLAIN_PIECE (1 << 20) /* bytes of data that are read at once */

/* One drive's. */
struct plain_disk {
  /* Read-only once the threads run. */
  struct drive *drive;
  char *uri; /* of its export over there */
  uint64_t granule;    /* bytes of a chunk */
  struct bitmap *ship; /* what is to be sent; set by writes, cleared under the
                          lock */
  struct disk *target; /* set once by the leading thread, before the others */

  pthread_mutex_t lock; /* protects what follows */
  uint64_t cursor;      /* of this round */
  struct range data;    /* the last run of data that was found on the disk */
};

/* A bitmap as it was at the instant of the copy. */
struct plain_bitmap {
  char *name;
  bool recording;
  struct bitmap *bits;
};

struct plain {
  /* Read-only once the threads run. */
  struct drive **drives; /* sorted, as drives_lock wants them */
  struct plain_disk *disks; /* in the order of the command */
  size_t nr;
  unsigned workers;
  void (*changed) (void *opaque, const struct migrate_info *info);
  void *opaque;
  struct stop stop;
  struct pacer pacer;    /* has its own lock */
  pthread_t thread;
  bool joined;           /* the owner's */

  /* The leading thread's own. */
  char *bitmaps_to;      /* or NULL */
  int bitmaps_fd;        /* or -1 */
  struct plain_bitmap *bitmaps;
  size_t nr_bitmaps;
  struct brake brake;    /* of writers */

  pthread_mutex_t lock;  /* protects what follows */
  pthread_cond_t cond;
  struct migrate_params params;
  struct migrate_info info;
  uint64_t started_ns, ended_ns; /* 0: not yet */
  bool cancelled;
  bool holding;          /* writes wait: the bandwidth is not limited */
  uint64_t hold_until;   /* ns: they wait no longer; 0: they do not */
  bool failed;           /* and 'err' says why */
  struct error err;
  unsigned round, busy;  /* workers of this round that are not done */
  bool end;              /* no more rounds */
  uint64_t bandwidth;    /* bytes a second, as measured; 0: not yet */
};

/* ---- plain-copy.c ---- */

/* What is to be marked, for a disk of that size. */
int plain_disk_init (struct plain_disk *d, struct error *err);

/* A worker's thread: takes part in each round. */
void *plain_worker (void *plain);

/* Send what is dirty, once through all disks; 0 or -1. */
int plain_round (struct plain *p, struct error *err);

/* Bytes that are dirty now. */
uint64_t plain_dirty (const struct plain *p);

/* ---- plain-bitmaps.c ---- */

/* Make the file, which must not exist. */
int plain_bitmaps_open (struct plain *p, struct error *err);

/* Keep the bitmaps as they are now; gates shut, control held. */
int plain_bitmaps_take (struct plain *p, struct error *err);

/* Write them. */
int plain_bitmaps_write (struct plain *p, struct error *err);

/* Forget them, and the file too unless it is 'good'. */
void plain_bitmaps_close (struct plain *p, bool good);

#endif /* FERRY_PLAIN_IMPL_H */
