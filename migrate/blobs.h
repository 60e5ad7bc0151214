/* nbdferry - named files that travel with a migration (--attach)
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A blob is opaque: a virtual machine's NVRAM, its definition.  Its file is
 * read by the source, while the migration runs and again whenever it has
 * changed, at last in the hold; what it held then is found in the state
 * directory of the destination's first disk, as attached/NAME, once the disk
 * has been handed over, and only then.
 */
#ifndef FERRY_BLOBS_H
#define FERRY_BLOBS_H

#include <jansson.h>

#include "engine.h"

#define BLOB_MAX_SIZE (UINT64_C (1) << 30) /* bytes of one */
#define BLOBS_MAX     64
#define BLOB_MAX_NAME 255
#define BLOB_MAX_JSON 4096 /* bytes of a packet's */

/* Of one or more bytes of printable ASCII; no slash, not hidden. */
bool blob_name_ok (const char *name);

/* ---- the source; one thread at a time ---- */

struct blobs;

struct blobs *blobs_new (void);
void blobs_free (struct blobs *b); /* NULL is fine */

/* Add one; the file must be there, regular, and not too large. */
int blobs_add (struct blobs *b, const char *name, const char *path,
               struct error *err);

/* Another session, or connection: nothing has been sent. */
void blobs_forget (struct blobs *b);

/* What is sent from now on has a version above that. */
void blobs_raise (struct blobs *b, uint64_t version);

/* The names and paths, for who begins again: an array of objects; to be
 * decref'd.
 */
json_t *blobs_describe (const struct blobs *b);

/* How many bytes would blobs_send send now? */
uint64_t blobs_pending (struct blobs *b);

/* Put those that have changed since they were sent into the engine. */
int blobs_send (struct blobs *b, struct engine *e, struct error *err);

/* For PREPARE: what must be there. */
json_t *blobs_list (const struct blobs *b);

/* ---- a BLOB packet ---- */

struct blob_piece {
  const char *name;        /* in the JSON */
  uint64_t version;        /* a higher one replaces all of a lower one */
  uint64_t size, offset;   /* of the blob; of the payload in it; bytes */
};

/* Is it well formed?  'len' is the payload's size. */
int blob_piece_parse (json_t *body, size_t len, struct blob_piece *p,
                      struct error *err);

#endif /* FERRY_BLOBS_H */
