/* nbdferry - is a server that is no destination one of another kind?
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_OTHER_SERVER_H
#define FERRY_OTHER_SERVER_H

#include <stdbool.h>

#include "client.h"

/* It has turned a migration of the disk 'name' away ('only': of no other).
 * Does it give the export to which a copy of the data would go, and is none of
 * ours?  Any of ours says who it is (identity.h), whatever its disks are for:
 * nothing is to be copied over the disk of one that is no destination, or not
 * over such a connection.  Takes seconds at the most if nobody answers.
 */
bool is_other_server (const char *uri, const char *name, bool only,
                      const struct stop *stop);

#endif /* FERRY_OTHER_SERVER_H */
