/* nbdferry - fuzz target: archives
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The input is an archive.  Checksums would keep a fuzzer out, so it is also
 * tried with all of them put right, and then with the numbers of the packets
 * and the totals at the end made to be those of what is there.  What is read to
 * its end without a complaint is merged with itself as a chain of one, and must
 * come out with the same totals.
 */
#include <config.h>

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "archive-merge.h"
#include "archive.h"
#include "packet-test.h"

int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

static void
must (bool ok)
{
  if (!ok)
    abort ();
}

static void
must_explain (const struct error *err)
{
  must (err->errnum != 0 && strncmp (err->msg, "FUZZ", 4) == 0);
}

static int
fresh_fd (const uint8_t *data, size_t size)
{
  static int fd = -1;

  if (fd == -1)
    fd = memfd_create ("archive", MFD_CLOEXEC);
  must (fd != -1 && ftruncate (fd, size) == 0 &&
        pwrite (fd, data, size, 0) == (ssize_t) size &&
        lseek (fd, 0, SEEK_SET) == 0);
  return dup (fd);
}

/* Read as a stream; the totals, if it was right. */
static bool
stream (const uint8_t *data, size_t size, struct archive_totals *t)
{
  struct error err = { 0 };
  struct archive_reader *r = archive_open_fd (fresh_fd (data, size), "FUZZ",
                                              0, &err);
  struct archive_totals peeked;
  bool right = false;
  int fd;

  if (r) {
    right = archive_verify (r, &err) == 0;
    *t = *archive_get_totals (r);
    archive_close (r);
  }
  if (!right)
    must_explain (&err);
  /* A quick look at the end agrees with a long one. */
  fd = fresh_fd (data, size);
  if (archive_peek_totals (fd, "FUZZ", &peeked, &err) == -1)
    must (!right);
  else if (right)
    must (memcmp (&peeked, t, sizeof peeked) == 0);
  close (fd);
  return right;
}

/* Skipping payloads.  Whatever the stream finds, but the last checksum and
 * damage in payloads that are not needed, must be found so, too.
 */
static void
merge (const uint8_t *data, size_t size, bool right,
       const struct archive_totals *t)
{
  struct error err = { 0 };
  struct archive_reader *r = archive_open_fd (fresh_fd (data, size), "FUZZ",
                                              ARCHIVE_LAZY, &err);
  struct archive_merge *m;
  struct merge_piece p;
  uint64_t bytes = 0, at = 0;
  static volatile uint8_t sum; /* so that the data is read */
  int n;

  must (r || !right);
  if (r == NULL) {
    must_explain (&err);
    return;
  }
  m = archive_merge_open (&r, 1, &err);
  must (m != NULL);
  while ((n = archive_merge_next (m, &p, &err)) == 1) {
    must (p.length > 0 && p.offset >= at &&
          p.offset + p.length <= archive_get_head (r)->size);
    at = p.offset + p.length;
    if (p.type == EXTENT_DATA) {
      sum += p.data[0] + p.data[p.length - 1];
      bytes += p.length;
    }
  }
  must (n == 0 || !right);
  if (n == -1)
    must_explain (&err);
  else if (right)
    must (bytes == t->data);
  (void) sum;
  archive_merge_free (m);
  archive_close (r);
}

static void
try (const uint8_t *data, size_t size)
{
  struct archive_totals t;
  bool right = stream (data, size, &t);

  merge (data, size, right, &t);
}

/* The checksums of all packets, as far as they can be told apart; and with
 * 'more', what else makes a stream of them.
 */
static void
put_right (uint8_t *p, size_t size, bool more)
{
  size_t at = 0, len;
  uint64_t number = 0;

  for (; at + PACKET_HEADER <= size; at += len, number++) {
    len = PACKET_HEADER + get_be (p + at + AT_BODY_SIZE, 4) +
          get_be (p + at + AT_PAYLOAD_SIZE, 4);
    len = len < size - at ? len : size - at;
    if (more) {
      put_be (p + at + AT_NUMBER, 8, number);
      memcpy (p + at + AT_SESSION, p + AT_SESSION, 16);
    }
    if (more && get_be (p + at + AT_TYPE, 2) == PACKET_ARCHIVE_END) {
      XXH128_hash_t h = XXH3_128bits (p, at);
      uint8_t *hash = memmem (p + at, len, "\"hash\":\"", 8);
      char text[33];

      snprintf (text, sizeof text, "%016llx%016llx",
                (unsigned long long) h.high64, (unsigned long long) h.low64);
      if (hash && hash + 40 <= p + at + len)
        memcpy (hash + 8, text, 32);
    }
    repair (p + at, len);
  }
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  uint8_t *p;

  try (data, size);
  if (size < PACKET_HEADER)
    return 0;
  p = malloc (size);
  must (p != NULL);
  memcpy (p, data, size);
  put_right (p, size, false);
  try (p, size);
  put_right (p, size, true);
  try (p, size);
  free (p);
  return 0;
}
