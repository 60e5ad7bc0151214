/* nbdferry - the part of a bitmap that is being cleared
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A bitmap that records is cleared block by block (4096 bits) while writes go
 * on, and a bit that one of them has just set may be off for a moment.  If the
 * daemon is killed in that moment nobody would set it again.  So what the block
 * held is written down first, to the file 'clearing' of the state directory,
 * which holds one block at a time; whoever opens the disk next gives the
 * bitmap the bits of that block back.  They were all set before the clear, of
 * which nobody was told that it is done, or by a write.
 *
 * For a kill, not for a loss of power, so nothing of it is synced: after that
 * the activity log says what is dirty.
 *
 * The file, in the host's byte order but for the bits, which are as in the
 * sidecar:
 *
 *     0 magic "FERRYCLB"   8 log2 of the granularity   16 number of the block
 *    24 64 words   536 the bitmap's name, up to a NUL   then XXH3 of all that
 *
 * Whoever holds the control lock of the drive owns it.
 */
#ifndef FERRY_CLEAR_NOTE_H
#define FERRY_CLEAR_NOTE_H

#include "drive.h"

#define CLEAR_NOTE_NAME 1024 /* bytes, with the NUL */

struct clear_note_record {
  char magic[8];
  uint64_t shift, block;
  uint64_t words[64]; /* little-endian */
  char name[CLEAR_NOTE_NAME];
  uint64_t hash;      /* of what is before it */
};

struct clear_note {
  int fd;              /* or -1 */
  bool failed;         /* a block could not be noted, so it was not cleared */
  struct clear_note_record r;
};

/* Make the file, with room for what will be written.  -1: it cannot be. */
int clear_note_open (struct clear_note *n, const struct drive *d);

/* Of that bitmap from now on. */
void clear_note_begin (struct clear_note *n, const struct named_bitmap *nb);

/* For bitmap_retain. */
bool clear_note_block (void *note, uint64_t block, const uint64_t words[64]);

/* All has been cleared. */
void clear_note_close (struct clear_note *n, const struct drive *d);

/* At open, when the bitmaps are there: give back what it says, and remove it. */
void clear_note_mend (struct drive *d);

/* Is that a record?  For clear_note_mend, and for fuzzing. */
bool clear_note_valid (const struct clear_note_record *r);

#endif /* FERRY_CLEAR_NOTE_H */
