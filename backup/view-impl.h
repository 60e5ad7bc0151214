/* nbdferry - the parts of a view, among themselves
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_VIEW_IMPL_H
#define FERRY_VIEW_IMPL_H

#include <pthread.h>
#include <stdatomic.h>

#include "direct.h"
#include "scratch.h"
#include "view.h"

#define VIEW_SHARDS 64

/* Where the old content of a granule is: on the disk still, or ... */
#define PLACE_DISK 0
#define PLACE_ZERO 1 /* nowhere: it was zeros */
#define PLACE_LOST 2 /* nowhere: overwritten, and nobody needed it */
#define PLACE_SLOT 3 /* + the slot in the scratch file */

/* A granule that is being copied aside; on the stack of who does it. */
struct copying {
  uint64_t granule;
  struct copying *next;
};

struct view_shard {
  _Alignas (64) pthread_mutex_t lock; /* protects what follows; a leaf */
  pthread_cond_t done;                /* one was taken out of the list */
  struct copying *copying;
};

struct view {
  struct write_hook hook; /* first, so that one is the other */
  atomic_uint refs;

  /* Read-only once it has begun. */
  struct view_options opt;      /* its strings are ours */
  uint64_t size;                /* of the disk */
  unsigned shift;               /* log2 of a granule that is copied */
  uint64_t nr;                  /* of granules */
  struct scratch *scratch;      /* NULL: the disk cannot be written */
  struct bitmap *bits;          /* the frozen bitmap, still recording; may be
                                   used until the hook has ended; or NULL */
  struct bitmap *frozen;        /* what was dirty in it at the instant; NULL:
                                   everything is in the backup */
  struct bitmap *fresh;         /* what became dirty in it before 'frozen' was
                                   made */
  struct view_info about;       /* what never changes of it */

  struct direct_head *map;      /* what 'settled' has its leaves in; NULL: it
                                   has its own */
  size_t map_len;
  int map_fd;

  atomic_bool ready;            /* 'frozen' is there */
  atomic_bool ended;            /* it is no hook any more */
  atomic_bool over;             /* failed, or ended: nothing is kept any more */

  /* Where each granule is; changes once, from PLACE_DISK, and then at most to
   * PLACE_LOST.  'settled' has the granules that have changed: set after.
   * 'released' has those that nobody will read again: they count as
   * PLACE_LOST.  Theirs is set before 'settled', and most places of a large
   * disk need never be touched.
   */
  _Atomic (uint32_t) *place;
  struct bitmap *settled;
  struct bitmap *released;
  struct view_shard shard[VIEW_SHARDS];

  pthread_mutex_t lock; /* protects what follows; a leaf */
  bool failed;
  char error[ERROR_MAX];
  struct extent known; /* data of the disk, the last that was found */
};

/* view-copy.c: the hook's 'before'. */
int64_t view_before (struct write_hook *h, uint64_t offset, uint64_t len,
                     uint64_t waited);

/* view-direct.c: 'settled', in memory that can be given away. */
int view_make_settled (struct view *v, struct error *err);
void view_free_settled (struct view *v);

/* From now on nothing is kept. */
void view_set_over (struct view *v);

/* Bytes of a granule: the last one may be short. */
static inline uint64_t
granule_len (const struct view *v, uint64_t granule)
{
  uint64_t start = granule << v->shift, len = UINT64_C (1) << v->shift;

  return v->size - start < len ? v->size - start : len;
}

static inline bool
is_released (const struct view *v, uint64_t granule)
{
  return bitmap_test (v->released, granule << v->shift);
}

/* Where a reader finds it. */
static inline uint32_t
place_of (const struct view *v, uint64_t granule)
{
  uint32_t place = atomic_load (&v->place[granule]);

  return place == PLACE_DISK && is_released (v, granule) ? PLACE_LOST : place;
}

#endif /* FERRY_VIEW_IMPL_H */
