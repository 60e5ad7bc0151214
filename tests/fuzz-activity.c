/* nbdferry - fuzz target: the activity log
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The input is a log's file.  A checksum would keep a fuzzer out, so it is
 * also tried with the checksums of all sectors put right.
 */
#include <config.h>

#include <endian.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <xxhash.h>

#include "activity-format.h"
#include "activity.h"

#define SIZE (UINT64_C (1000) << 26)

int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

/* What it says must lie in the disk, in order, and be at an end. */
static void
read_it (const uint8_t *data, size_t size)
{
  int fd = memfd_create ("fuzz", MFD_CLOEXEC);
  struct activity *a;
  struct range run;
  struct error err;
  char path[64];
  uint64_t at = 0;

  if (fd == -1 || write (fd, data, size) != (ssize_t) size)
    abort ();
  snprintf (path, sizeof path, "/proc/self/fd/%d", fd);
  a = activity_open (path, SIZE, &err);
  if (a == NULL)
    abort ();
  while (activity_was_armed (a, at, &run)) {
    if (run.start < at || run.end <= run.start || run.end > SIZE)
      abort ();
    at = run.end;
  }
  activity_close (a);
  close (fd);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  static uint8_t file[32 * ACTIVITY_SECTOR];
  size_t len = size < sizeof file ? size : sizeof file;

  read_it (data, size);
  memcpy (file, data, len);
  for (size_t at = 0; at + ACTIVITY_SECTOR <= len; at += ACTIVITY_SECTOR) {
    const uint64_t sum =
      htobe64 (XXH3_64bits (file + at, ACTIVITY_AT_CHECKSUM));

    memcpy (file + at + ACTIVITY_AT_CHECKSUM, &sum, sizeof sum);
  }
  read_it (file, len);
  return 0;
}
