/* nbdferry - locks as QEMU's file-posix driver takes them
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * QEMU says what an opener of an image does, and what it lets others do, by
 * OFD read locks on single bytes: byte 100 + p for each permission p that is
 * used, byte 200 + p for each that is not shared.  An opener looks with
 * F_OFD_GETLK whether its wishes meet a lock of somebody else.  So QEMU and
 * we keep each other out without knowing of each other.
 */
#ifndef FERRY_LOCK_H
#define FERRY_LOCK_H

#include <stdbool.h>

#include "error.h"

/* Lock an open file until it is closed: 'writable' uses the permissions to
 * read, write and resize and shares none but reading; otherwise only reading
 * is used, and everything is shared.  'path' is for the message.  A file
 * system without OFD locks is let pass.  0, or -1 with EAGAIN ("… is in use
 * by another process …").
 */
int lock_file (int fd, const char *path, bool writable, struct error *err);

#endif /* FERRY_LOCK_H */
