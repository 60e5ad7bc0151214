/* nbdferry - fuzz target: the sidecar
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The input is read twice.  As it is, by the general reader.  And as the
 * first 512 bytes of each cluster of 2 MiB, which is all that our own layout
 * has anything in, as a sidecar to be opened for a disk of 64 MiB: whatever
 * is not refused must be closed in good order and open again.
 */
#include <config.h>

#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "qcow2.h"

#define SECTOR  512
#define CLUSTER (2 << 20)
#define SIZE    (UINT64_C (64) << 20)

int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

static char dir[64], path[96], new_path[104];

static void
remove_dir (void)
{
  unlink (path);
  unlink (new_path);
  rmdir (dir);
}

static void
make_dir (void)
{
  /* In memory if possible: there are many syncs. */
  strcpy (dir, "/dev/shm/ferry-fuzz.XXXXXX");
  if (mkdtemp (dir) == NULL) {
    strcpy (dir, "/var/tmp/ferry-fuzz.XXXXXX");
    if (mkdtemp (dir) == NULL)
      abort ();
  }
  snprintf (path, sizeof path, "%s/q", dir);
  snprintf (new_path, sizeof new_path, "%s.new", path);
  atexit (remove_dir);
}

static int
found (void *opaque, const struct qcow2_entry *entry, uint64_t size,
       struct error *err)
{
  (void) err;
  *(uint64_t *) opaque = size >> entry->shift;
  return strlen (entry->name) > 0 ? 0 : -1;
}

static int
words (void *opaque, uint64_t first_bit, const uint64_t *w, size_t nr,
       struct error *err)
{
  static volatile uint64_t sum;

  (void) err;
  if (first_bit % 64 != 0 || first_bit > *(uint64_t *) opaque)
    abort ();
  for (size_t i = 0; i < nr; ++i)
    sum = sum ^ w[i];
  return 0;
}

static void
read_it (const uint8_t *data, size_t size)
{
  static const struct qcow2_reader reader = { found, words };
  int fd = memfd_create ("fuzz", MFD_CLOEXEC);
  struct error err;
  uint64_t bits;

  if (fd == -1 || write (fd, data, size) != (ssize_t) size)
    abort ();
  qcow2_read_bitmaps (fd, "fuzz", &reader, &bits, &err);
  close (fd);
}

static void
open_it (const uint8_t *data, size_t size)
{
  enum qcow2_found what;
  struct error err;
  struct qcow2 *q;
  size_t nr = (size + SECTOR - 1) / SECTOR;
  int fd = open (path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

  if (fd == -1 || ftruncate (fd, (off_t) nr * CLUSTER) == -1)
    abort ();
  for (size_t i = 0; i < nr; ++i) {
    size_t n = size - i * SECTOR < SECTOR ? size - i * SECTOR : SECTOR;

    if (pwrite (fd, data + i * SECTOR, n, (off_t) i * CLUSTER) != (ssize_t) n)
      abort ();
  }
  close (fd);
  q = qcow2_open (path, "/disk.raw", SIZE, false, &what, &err);
  if (q == NULL)
    return;
  if (qcow2_close (q, &err) == -1)
    abort ();
  q = qcow2_open (path, "/disk.raw", SIZE, false, &what, &err);
  if (q == NULL || what != QCOW2_CLEAN)
    abort ();
  qcow2_abandon (q);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  if (dir[0] == '\0')
    make_dir ();
  read_it (data, size);
  if (size <= 64 * SECTOR)
    open_it (data, size);
  return 0;
}
