/* nbdferry - a disk that was let go of
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * COMMIT is repeated until the destination acknowledges it, then clients are
 * forwarded.  Where the disk went stands in its journal ('peer'), and may be
 * changed there at any time (departure_redirect): a destination may come back
 * at another address.
 *
 * Who answers there must prove to be the destination, before COMMIT or any
 * request is sent over a connection to an address to which COMMIT was not
 * acknowledged yet: its status block must say that this disk, of this lineage,
 * was prepared by this session and attempt, or was made active by the session.
 * That COMMIT is sent once more to each new address does no harm: it is
 * acknowledged again, for ever.
 */
#ifndef FERRY_DEPARTURE_H
#define FERRY_DEPARTURE_H

#include "client.h"
#include "drive.h"

struct departure {
  struct drive *drive;     /* read-only, as the next */
  const struct stop *quit; /* the daemon ends */
  struct stop again;       /* thrown after 'quit', or when there is reason to
                              try at once; any thread */
  /* Of the thread that brings it to an end. */
  char *at;   /* the URI where COMMIT was acknowledged, or NULL */
  char *next; /* where it is sent */
};

/* 'd' is going to be let go of, or was; 'quit' outlives it.  -1: too few file
 * descriptors.
 */
int departure_init (struct departure *p, struct drive *d,
                    const struct stop *quit, struct error *err);
void departure_destroy (struct departure *p);

/* Whatever waits there tries again now, or ends if 'quit' was thrown. */
void departure_wake (struct departure *p);

/* COMMIT for some that were let go of together, until it is acknowledged; -1
 * once 'quit' is thrown.  The first try is over 'control', unless it is NULL:
 * the connection over which they were prepared, to 'at' of each.
 */
int departure_commit (struct departure *v, size_t nr, struct client *control);

/* Then a connection to where that was, or to where the disk is by now.  NULL
 * once 'quit' is thrown.
 */
struct disk *departure_forward (struct departure *p);

/* The same connection, made while it is not let go of yet: to where it is going
 * to be, by that session.  It serves once COMMIT was acknowledged there.  NULL:
 * it cannot be made now, or 'stop' was thrown.
 */
struct disk *departure_ahead (struct departure *p, const char *uri,
                              const struct uuid *session,
                              const struct stop *stop);

/* Make the drive one that forwards to 'remote', unless the journal names
 * another address by now: then false, and 'remote' is closed.  Control held,
 * both gates shut.
 */
bool departure_serve (struct departure *p, struct disk *remote);

/* For a drive that forwards: wait until the journal names another address, have
 * COMMIT acknowledged there, and go on forwarding to it.  Returns when 'quit'
 * is thrown.
 */
void departure_follow (struct departure *p);

/* Was that drive let go of?  Then 'session' is by whom, and 'name' (to be
 * freed) what it is called over there.  Takes control.
 */
bool departure_find (struct drive *d, struct uuid *session, char **name);

/* From now on it is looked for over there; durable.  The URI has an export.
 * Takes control.  Whoever finishes it is to be woken.
 */
int departure_redirect (struct drive *d, const char *uri, struct error *err);

/* ---- trying until it succeeds ---- */

#define BACKOFF_MIN (50 * NS_PER_MS)
#define BACKOFF_MAX (5 * NS_PER_S)

/* Say what is wrong, unless that was said. */
void say_once (struct error *said, const struct error *now,
               const char *what);
uint64_t longer (uint64_t wait);

#endif /* FERRY_DEPARTURE_H */
