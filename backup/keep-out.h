/* nbdferry - files that nothing is written to, whatever the user says
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_KEEP_OUT_H
#define FERRY_KEEP_OUT_H

#include "error.h"

/* Is that file, which exists, in the state directory of a disk?  0: no; -1
 * with EINVAL: yes, or it cannot be told.
 */
int keep_out_of_state (const char *path, struct error *err);

/* May that regular file be replaced by another one?  Not if it is used as a
 * disk or an image, by anybody, nor if it is a disk of ours.  Returns a
 * descriptor, with locks that keep others away until it is closed; or -1.
 */
int keep_out_of_use (const char *path, struct error *err);

#endif /* FERRY_KEEP_OUT_H */
