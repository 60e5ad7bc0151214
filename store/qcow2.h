/* nbdferry - the sidecar: persistent bitmaps in a valid qcow2
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The sidecar is a qcow2 v3 image whose external raw data file is the disk,
 * with the bitmaps in the standard bitmaps extension (the qcow2
 * specification, docs/interop/qcow2.txt in QEMU).  In our own layout the
 * clusters are 2 MiB, the L2 tables are the identity, and the clusters of
 * each bitmap lie together, allocated for real, so that they are mapped as
 * one piece and *are* the leaf words.  docs/sidecar.md has the picture, and
 * the order of the writes.
 *
 * Threads: no lock inside.  The caller serialises all calls on one struct
 * qcow2 (a drive's control lock); the mapped words are free to all.
 */
#ifndef FERRY_QCOW2_H
#define FERRY_QCOW2_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

struct qcow2;
struct qcow2_bits; /* the clusters of one bitmap, mapped */

/* A bitmap as the directory lists it. */
struct qcow2_entry {
  char *name;              /* 1-1023 bytes, UTF-8 */
  unsigned shift;          /* log2 granularity */
  bool autoflag;           /* recording */
  bool in_use;             /* as it was found; not looked at when written */
  bool inconsistent;       /* in_use where nobody can vouch for the bits */
  struct qcow2_bits *bits; /* NULL if inconsistent and unusable */
};

/* What was found when the sidecar was opened. */
enum qcow2_found {
  QCOW2_CREATED, /* there was none */
  QCOW2_CLEAN,   /* ours, closed in good order */
  QCOW2_UNCLEAN, /* ours, not closed (a crash of ours); bits as of the map */
  QCOW2_LOST,    /* as UNCLEAN, but the file system says that it has lost
                    writes since: bits may be missing */
  QCOW2_FOREIGN, /* somebody else (QEMU) had it open for writing since, and
                    closed it in good order; brought into our layout */
};

/* Open 'path', or create it, for the disk 'data_file' (absolute) of 'size'
 * bytes.  Another layout is rebuilt beside it and renamed into place.  Every
 * bitmap is marked in_use, durably, before this returns.  The file is locked
 * as QEMU would lock it.  On error NULL, and the file is as it was.
 *
 * 'as_closed': the file's time is that of our last close, and its tables need
 * not be compared (4 MiB for a TiB of disk).
 */
struct qcow2 *qcow2_open (const char *path, const char *data_file,
                          uint64_t size, bool as_closed,
                          enum qcow2_found *found, struct error *err);

/* If somebody else (QEMU) has had the sidecar open for writing since we had:
 * a descriptor of it, the size that the disk has there, and that of a cluster
 * there.  'writable': locked, so that nobody has it open until it is closed.
 * -1 in all other cases, whatever they are: qcow2_open has the words for them.
 */
int qcow2_open_foreign (const char *path, bool writable, uint64_t *size,
                        uint64_t *cluster);

/* The bitmaps that were in it, in order; owned by 'q', which forgets them at
 * the first qcow2_write_directory (the bits stay).
 */
const struct qcow2_entry *qcow2_entries (struct qcow2 *q, size_t *nr);

/* Clusters for a new bitmap of this disk: allocated, zeroed, mapped, counted
 * in the refcounts, not yet in the directory.  More than 2^32 bits is refused
 * in QEMU's words.
 */
struct qcow2_bits *qcow2_alloc (struct qcow2 *q, unsigned shift,
                                struct error *err);
/* Give them back; they must no longer be in the directory. */
void qcow2_free (struct qcow2 *q, struct qcow2_bits *bits);

/* The leaf words; valid until qcow2_free or qcow2_close. */
uint64_t *qcow2_words (struct qcow2_bits *bits);

/* Make these, and only these, the bitmaps of the sidecar, in one atomic and
 * durable step.
 */
int qcow2_write_directory (struct qcow2 *q, const struct qcow2_entry *entries,
                           size_t nr, struct error *err);

/* Have '*lost' (which outlives 'q') set to true as soon as a page of the map
 * cannot be had: marks that went there are lost to the file (sigbus.h), and
 * it will be left in use at close.  True at once if that has happened already.
 * Nobody touches the words meanwhile.  Until this is called 'q' keeps it to
 * itself.
 */
void qcow2_report_lost (struct qcow2 *q, atomic_bool *lost);

/* All bits durable.  After a failure here, or of an fsync in
 * qcow2_write_directory, the file is left in use at close, and the caller
 * should keep in mind that bits may be lost.
 */
int qcow2_sync (struct qcow2 *q, struct error *err);

/* Has one of these failed, or a page of the map been lost? */
bool qcow2_failed (const struct qcow2 *q);

/* Close in good order: bits durable, in_use dropped (but not from those that
 * the directory has as inconsistent), durable.  Frees 'q' and all its bits
 * whatever happens.
 */
int qcow2_close (struct qcow2 *q, struct error *err);
/* Leave everything as it is, in_use and all: for a disk that was given away,
 * and for tests that play a crash.
 */
void qcow2_abandon (struct qcow2 *q);

/* Read any qcow2 (any cluster size, entries in any place): for each bitmap
 * 'found' is called once with its description, then 'words' for each piece
 * of up to 64 KiB of its bits that is not all zeros ('first_bit' a multiple
 * of 64, little-endian words, tail bits as stored).  Nothing is written.
 */
struct qcow2_reader {
  int (*found) (void *opaque, const struct qcow2_entry *entry, uint64_t size,
                struct error *err);
  int (*words) (void *opaque, uint64_t first_bit, const uint64_t *words,
                size_t nr, struct error *err);
};
int qcow2_read_bitmaps (int fd, const char *path,
                        const struct qcow2_reader *reader, void *opaque,
                        struct error *err);

#endif /* FERRY_QCOW2_H */
