/* nbdferry - kinds of exports
 * SPDX-License-Identifier: BSD-3-Clause
 *
 *   NAME                          a disk
 *   NAME@incoming                 a channel of a migration to it
 *   NAME@forward/SESSION/EPOCH    the disk, for the source that it came from
 *   NAME@backup/ID                the disk as it was when that backup began
 *   NAME@bitmap/BITMAP            the disk, with a bitmap as what is allocated
 *   NAME@hash/SIZE                the hashes of the disk's blocks
 *   NAME@backup/ID@hash/SIZE      the same of a backup's
 *   EXPORT@self/N                 which disk it is (identity.h)
 *
 * The last five can only be read.  BITMAP is percent-encoded.
 *
 * Each kind has one table of operations, which nbdkit's callbacks call.  They
 * return what nbdkit wants: -1 with errno, and the message given to
 * nbdkit_error.  An operation that is NULL is not offered to clients.
 */
#ifndef FERRY_EXPORT_H
#define FERRY_EXPORT_H

#include <stdint.h>

#include "drive.h"
#include "incoming.h"

struct nbdkit_exports;
struct nbdkit_extents;

/* Each kind of handle begins with this. */
struct export {
  const struct export_ops *ops;
};

/* What an export cannot do is NULL.  So is a question whose answer follows from
 * that (can_write, can_extents), or is no; and flush, if there is nothing to.
 */
struct export_ops {
  int64_t (*size) (struct export *x);
  int (*can_write) (struct export *x);
  int (*is_rotational) (struct export *x);
  int (*can_extents) (struct export *x);
  const char *(*description) (struct export *x); /* interned by nbdkit */
  int (*pread) (struct export *x, void *buf, uint32_t count,
                uint64_t offset);
  int (*pwrite) (struct export *x, const void *buf, uint32_t count,
                 uint64_t offset, unsigned flags); /* as in disk.h */
  int (*flush) (struct export *x);
  int (*trim) (struct export *x, uint32_t count, uint64_t offset,
               unsigned flags);
  int (*zero) (struct export *x, uint32_t count, uint64_t offset,
               unsigned flags);
  int (*cache) (struct export *x, uint32_t count, uint64_t offset);
  int (*extents) (struct export *x, uint32_t count, uint64_t offset,
                  bool one, struct nbdkit_extents *extents);
  void (*close) (struct export *x);
};

/* Open the export of that name; NULL, reported, if there is none. */
struct export *export_open (const char *name, int readonly);

/* export-disk.c; the second for clients that the disk's source forwards:
 * incoming_forward has let them in.
 */
struct export *export_open_disk (struct drive *d, int readonly);
struct export *export_open_forward (struct drive *d, int readonly,
                                    const struct uuid *session,
                                    uint64_t epoch);
/* export-incoming.c; 'hello' is the text after "@incoming/", or NULL */
struct export *export_open_incoming (struct drive *d, const char *hello);
/* export-hash.c; 'block' is the text after "@hash/" */
struct export *export_open_hash (struct drive *d, const char *block);
struct export *export_open_backup_hash (struct drive *d, const char *id,
                                        const char *block);
/* export-self.c */
struct export *export_open_self (struct drive *d, unsigned hops);
/* export-backup.c */
struct export *export_open_backup (struct drive *d, const char *id);
/* export-bitmap.c; 'name' as in the export's */
struct export *export_open_bitmap (struct drive *d, const char *name);

/* Add those of one kind to the list that clients may ask for; 0 or -1. */
int export_list_backups (struct drive *d, struct nbdkit_exports *exports);
int export_list_bitmaps (struct drive *d, struct nbdkit_exports *exports);

/* export-name.c: percent-encoding, all but A-Z a-z 0-9 - . _ ~.  Both are the
 * caller's; NULL: no memory, or what was to be decoded is malformed.
 */
char *export_encode (const char *text);
char *export_decode (const char *text);

/* The same for a path in a URI: slashes stand for themselves, too. */
char *export_encode_path (const char *path);

/* nbdkit's type of an extent. */
uint32_t export_extent_type (enum extent_type type);

#endif /* FERRY_EXPORT_H */
