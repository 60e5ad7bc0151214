/* nbdferry - fuzz target: the journal
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The input is a journal's file.  A checksum would keep a fuzzer out, so it
 * is also tried with the checksums of both slots put right.
 */
#include <config.h>

#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <xxhash.h>

#include "journal.h"

#define SLOT 16384

int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

static void
read_it (const uint8_t *data, size_t size)
{
  int fd = memfd_create ("fuzz", MFD_CLOEXEC);
  struct journal_record rec;
  struct journal *j;
  struct error err;
  char path[64];
  bool created;

  if (fd == -1 || write (fd, data, size) != (ssize_t) size)
    abort ();
  snprintf (path, sizeof path, "/proc/self/fd/%d", fd);
  if (journal_read (path, &rec, &err) == 0) {
    journal_record_free (&rec);
    j = journal_open (path, &created, &err);
    /* What can be read can be written, and read again. */
    if (j == NULL || created)
      abort ();
    if (journal_write (j, journal_get (j), &err) == -1
        && err.errnum != E2BIG) /* it may be laid out more widely */
      abort ();
    if (journal_read (path, &rec, &err) == -1)
      abort ();
    journal_record_free (&rec);
    journal_close (j);
  }
  close (fd);
}

static void
put_checksum (uint8_t *slot)
{
  XXH3_state_t *state;
  uint32_t length;
  uint64_t sum;

  memcpy (&length, slot + 12, 4);
  length = be32toh (length);
  if (length > SLOT - 32)
    return;
  state = XXH3_createState ();
  if (state == NULL)
    abort ();
  XXH3_64bits_reset (state);
  XXH3_64bits_update (state, slot, 24);
  XXH3_64bits_update (state, slot + 32, length);
  sum = htobe64 (XXH3_64bits_digest (state));
  XXH3_freeState (state);
  memcpy (slot + 24, &sum, 8);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  static uint8_t file[2 * SLOT];

  read_it (data, size);
  memset (file, 0, sizeof file);
  memcpy (file, data, size < sizeof file ? size : sizeof file);
  put_checksum (file);
  put_checksum (file + SLOT);
  read_it (file, sizeof file);
  return 0;
}
