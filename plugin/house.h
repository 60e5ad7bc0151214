/* nbdferry - all that one daemon has
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_HOUSE_H
#define FERRY_HOUSE_H

#include <pthread.h>

#include "drive.h"
#include "finisher.h"
#include "incoming.h"
#include "outgoing.h"
#include "plain.h"

struct house {
  /* Read-only once the daemon serves. */
  struct drive **drives; /* in the order of the command line; at least one */
  size_t nr_drives;
  char *control_path;    /* of the control socket, absolute; or NULL */
  struct incoming *incoming;
  bool insecure;         /* migrations from other hosts need no TLS */

  pthread_mutex_t lock;           /* protects what follows */
  struct migrate_params params;   /* of the next migration, and of this one */
  struct outgoing *outgoing;      /* the last one, or NULL; never both: */
  struct plain *plain;            /* the last one, to a server not ours */
  struct finisher **finishers;    /* one a drive, or NULL */
};

extern struct house house;

/* The drive with that export name, or NULL. */
struct drive *house_drive (const char *name);

/* Before the fork: open the drives, bind the control socket. */
int house_open (const struct drive_options *options, size_t nr,
                const char *control, struct error *err);

/* After the fork: start the threads. */
int house_start (struct error *err);

/* The daemon ends: turn clients away, give up what is under way, and close
 * the drives in good order.  Does not depend on clients leaving.
 */
void house_shutdown (void);

/* Nobody uses it any more: free everything. */
void house_free (void);

/* Where messages for the administrator go (nbdkit_error). */
void house_log (const char *fmt, ...) __attribute__ ((format (printf, 1, 2)));

/* Begin to end the daemon in good order (nbdkit_shutdown). */
void house_quit (void);

#endif /* FERRY_HOUSE_H */
