/* nbdferry - which disk an export is
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Two exports may be one disk: under the names of two servers, through a
 * tunnel, at a host that forwards its clients to where the disk has moved, or
 * at a daemon whose disk is another one's export.  A copy from one to the
 * other would write what it has read over what clients have written since.
 *
 * So each daemon of ours has beside the disk NAME an export NAME@self/N, whose
 * content begins with a line that no other disk has: a UUID made up when the
 * daemon opened the disk.  A disk that is elsewhere is called what it is called
 * there.  Nothing of it is on disk: a copy of a disk is another disk.
 */
#ifndef FERRY_IDENTITY_H
#define FERRY_IDENTITY_H

#include "client.h"
#include "uuid.h"

#define IDENTITY_EXPORT "@self/" /* then N: it may be asked N servers on */
#define IDENTITY_SIZE 4096
#define IDENTITY_HOPS 8
#define IDENTITY_MS 10000 /* for the first to answer; each other has less */

/* The export's content; the rest is zeros. */
void identity_write (const struct uuid *id, char content[IDENTITY_SIZE]);

/* Which disk is the export of that URI, or 'export' at its server, unless NULL?
 * 1: *id; 0: nobody says, and *id is untouched; -1: cancelled, or the server has
 * not answered in time.  To be asked before the export is opened: some servers
 * take one client at a time.
 */
int identity_ask (const char *uri, const char *export, unsigned hops,
                  const struct stop *stop, struct uuid *id,
                  struct error *err);

#endif /* FERRY_IDENTITY_H */
