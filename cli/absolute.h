/* nbdferry - paths for others
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_ABSOLUTE_H
#define FERRY_ABSOLUTE_H

#include "error.h"

/* The path seen from everywhere, as nbdkit makes it of a parameter: links and
 * dots stay.  The caller frees it; NULL on error.
 */
char *absolute_path (const char *path, struct error *err);

#endif /* FERRY_ABSOLUTE_H */
