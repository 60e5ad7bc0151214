/* nbdferry - the backups that are under way
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The list of a daemon's views.  A view is in it from before its transaction
 * begins, so that no id is used twice, and out of it when it has ended; one
 * that has failed stays until it is ended, to be asked why.
 *
 * To begin or end some, at one instant and together with other operations on
 * bitmaps: views_begin or views_end for each, which fill an action; then
 * bitmap_transaction over all actions; then views_settle for each.
 *
 * Threads: any.
 */
#ifndef FERRY_VIEWS_H
#define FERRY_VIEWS_H

#include "transaction.h"
#include "view.h"

/* Fill 'a' so that it begins a view.  It, to be handed to views_settle, or NULL
 * on error.
 */
struct view *views_begin (const struct view_options *opt,
                          struct bitmap_action *a, struct error *err);

/* The same for its end.  One that has failed can only end without success. */
struct view *views_end (struct drive *d, const struct uuid *id, bool success,
                        struct bitmap_action *a, struct error *err);

/* The transaction has taken place, or not: the view knows. */
void views_settle (struct view *v);

/* Its bitmap has no point any more, unless it ends with success. */
int views_forget (struct drive *d, const struct uuid *id, struct error *err);

/* End one without success, alone, even if its disk was handed over. */
int views_give_up (struct drive *d, const struct uuid *id,
                   struct error *err);

/* That client has gone: give up all that were begun to end with it. */
void views_client_gone (uint64_t client);

/* One that has begun, counted for the caller; NULL if there is none. */
struct view *views_find (const struct drive *d, const struct uuid *id);

/* All that have begun, counted for the caller, who frees the array too; in the
 * order in which they began.  NULL, and *nr 0, if there is no memory.
 */
struct view **views_all (size_t *nr);

/* Forget them all; no transaction runs.  For the end of the daemon. */
void views_free (void);

#endif /* FERRY_VIEWS_H */
