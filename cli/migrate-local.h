/* nbdferry - a migration in this process, for disks nobody has open
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_MIGRATE_LOCAL_H
#define FERRY_MIGRATE_LOCAL_H

#include "outgoing.h"
#include "progress.h"

struct migrate_local {
  char **disks;            /* [NAME=]PATH or [NAME=]URI */
  size_t nr;
  const char *uri;         /* where they go */
  const char *state;       /* of the only disk, or NULL: the default */
  struct migrate_params params;
  bool data_only;
  const char *bitmaps_to;  /* with data_only; absolute, or NULL */
  void (*before_copy) (const char *uri); /* a server of another kind gets a copy
                              of the data after this; NULL: nothing */
};

/* Is that a disk, and not the control socket of a daemon? */
bool migrate_is_disk (const char *arg);

/* Do it, and stay with it until it ends, as follow_migration does.  Returns an
 * exit status.
 */
int migrate_locally (const struct migrate_local *m, struct progress *p);

#endif /* FERRY_MIGRATE_LOCAL_H */
