/* nbdferry - what there is to copy out of a backup, pack by pack
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The source is asked for its extents through a connection that is used for
 * nothing else, and ahead: it looks for the next ones while the data of the
 * last ones is copied.  One thread at a time.
 */
#ifndef FERRY_COPY_WALK_H
#define FERRY_COPY_WALK_H

#include "archive-pack.h"
#include "client.h"

struct copy_walk {
  /* The owner's to set. */
  struct client *client; /* taken over */
  uint64_t size;         /* of the source, bytes */
  bool full;             /* holes are part of it */

  struct extent *found;  /* of the last answer */
  size_t nr_found, at_found, max_found;
  uint64_t asked;        /* answers go up to here */
  struct client_question question; /* what is asked from there on, */
  bool is_asked;         /* if so */
};

void copy_walk_destroy (struct copy_walk *w);

/* Fill 'p' with the next extents, its data is not there yet; at the end there
 * are none.  0 or -1.
 */
int copy_walk_take (struct copy_walk *w, struct pack *p, struct error *err);

/* Nothing before that offset will be taken any more. */
uint64_t copy_walk_untaken (const struct copy_walk *w);

#endif /* FERRY_COPY_WALK_H */
