/* nbdferry - the activity log: its file
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <xxhash.h>

#include "activity-format.h"
#include "activity.h"
#include "cleanup.h"
#include "fullio.h"

size_t
activity_nr_records (uint64_t nr_regions)
{
  const uint64_t each = ACTIVITY_RECORD_WORDS * 64;

  return nr_regions / each + 1;
}

static void
put32 (uint8_t *p, uint32_t v)
{
  v = htobe32 (v);
  memcpy (p, &v, sizeof v);
}

static void
put64 (uint8_t *p, uint64_t v)
{
  v = htobe64 (v);
  memcpy (p, &v, sizeof v);
}

static uint32_t
get32 (const uint8_t *p)
{
  uint32_t v;

  memcpy (&v, p, sizeof v);
  return be32toh (v);
}

static uint64_t
get64 (const uint8_t *p)
{
  uint64_t v;

  memcpy (&v, p, sizeof v);
  return be64toh (v);
}

static void
seal (uint8_t *sector, uint64_t sequence)
{
  put64 (sector + ACTIVITY_AT_SEQUENCE, sequence);
  put64 (sector + ACTIVITY_AT_CHECKSUM,
         XXH3_64bits (sector, ACTIVITY_AT_CHECKSUM));
}

static bool
is_whole (const uint8_t *sector, const char *magic)
{
  return memcmp (sector, magic, 8) == 0 &&
         get64 (sector + ACTIVITY_AT_CHECKSUM) ==
           XXH3_64bits (sector, ACTIVITY_AT_CHECKSUM);
}

void
activity_make_header (uint8_t *sector, const struct activity_geometry *g,
                      unsigned flags, uint64_t sequence)
{
  memset (sector, 0, ACTIVITY_SECTOR);
  memcpy (sector, ACTIVITY_MAGIC, 8);
  put32 (sector + ACTIVITY_AT_VERSION, ACTIVITY_VERSION);
  put32 (sector + ACTIVITY_AT_FLAGS, flags);
  put64 (sector + ACTIVITY_AT_SIZE, g->size);
  put32 (sector + ACTIVITY_AT_SHIFT, g->shift);
  seal (sector, sequence);
}

void
activity_make_record (uint8_t *sector, uint64_t number, uint64_t sequence,
                      const uint64_t *words, size_t nr_words)
{
  memset (sector, 0, ACTIVITY_SECTOR);
  memcpy (sector, ACTIVITY_RECORD_MAGIC, 8);
  put64 (sector + ACTIVITY_AT_NUMBER, number);
  for (size_t i = 0; i < nr_words; i++) {
    const uint64_t w = htole64 (words[i]);

    memcpy (sector + ACTIVITY_AT_WORDS + i * 8, &w, sizeof w);
  }
  seal (sector, sequence);
}

uint64_t
activity_record_word (const uint8_t *sector, size_t i)
{
  uint64_t w;

  memcpy (&w, sector + ACTIVITY_AT_WORDS + i * 8, sizeof w);
  return le64toh (w);
}

/* ---- reading ---- */

static bool
parse_header (const uint8_t *sector, struct activity_geometry *g,
              unsigned *flags)
{
  const unsigned known =
    ACTIVITY_UNLOGGED | ACTIVITY_EVERY | ACTIVITY_CLEARING | ACTIVITY_FAILED;

  if (!is_whole (sector, ACTIVITY_MAGIC) ||
      get32 (sector + ACTIVITY_AT_VERSION) != ACTIVITY_VERSION)
    return false;
  *flags = get32 (sector + ACTIVITY_AT_FLAGS);
  g->size = get64 (sector + ACTIVITY_AT_SIZE);
  g->shift = get32 (sector + ACTIVITY_AT_SHIFT);
  if (*flags & ~known || g->size > INT64_MAX ||
      g->shift < ACTIVITY_MIN_SHIFT || g->shift > 62)
    return false;
  g->nr = bitmap_bits_for (g->size, g->shift);
  return g->nr <= ACTIVITY_MAX_REGIONS;
}

static void
parse_record (const uint8_t *sector, size_t number, uint64_t *words,
              size_t nr_words)
{
  const bool good = is_whole (sector, ACTIVITY_RECORD_MAGIC) &&
                    get64 (sector + ACTIVITY_AT_NUMBER) == number;

  for (size_t i = 0; i < nr_words; i++)
    words[i] = good ? activity_record_word (sector, i) : UINT64_MAX;
}

/* 0 with '*words', or NULL there if it could not be read. */
static int
read_file (int fd, struct activity_geometry *g, unsigned *flags,
           uint64_t **words, struct error *err)
{
  uint8_t header[ACTIVITY_SECTOR];
  CLEANUP_FREE uint8_t *buf = NULL;
  CLEANUP_FREE uint64_t *w = NULL;
  size_t nr;

  if (full_pread_zeros (fd, header, sizeof header, 0) == -1 ||
      !parse_header (header, g, flags))
    return 0;
  nr = activity_nr_records (g->nr);
  buf = malloc (nr * ACTIVITY_SECTOR);
  w = calloc (nr, ACTIVITY_RECORD_WORDS * sizeof w[0]);
  if (buf == NULL || w == NULL)
    return error_set (err, ENOMEM, "%m");
  if (full_pread_zeros (fd, buf, nr * ACTIVITY_SECTOR, ACTIVITY_SECTOR) == -1)
    return 0;
  for (size_t i = 0; i < nr; i++)
    parse_record (buf + i * ACTIVITY_SECTOR, i,
                  w + i * ACTIVITY_RECORD_WORDS, ACTIVITY_RECORD_WORDS);
  *words = take_ptr (&w);
  return 0;
}

int
activity_read (const char *path, struct activity_geometry *g,
               unsigned *flags, uint64_t **words, struct error *err)
{
  CLEANUP_CLOSE int fd = open (path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  struct stat st;

  memset (g, 0, sizeof *g);
  *flags = 0;
  *words = NULL;
  if (fd == -1)
    return errno == ENOENT ? 0
                           : error_set (err, errno, "%s: open: %m", path);
  if (fstat (fd, &st) == -1)
    return error_set (err, errno, "%s: %m", path);
  if (!S_ISREG (st.st_mode))
    return error_set (err, EINVAL, "%s: is not a regular file", path);
  if (read_file (fd, g, flags, words, err) == -1)
    return -1;
  if (*words == NULL)
    *flags = 0;
  return 0;
}

/* ---- writing ---- */

/* The whole file is written, so that no later write needs space. */
static int
fill (int fd, const struct activity_geometry *g, unsigned flags)
{
  const size_t nr = activity_nr_records (g->nr) + 1;
  CLEANUP_FREE uint8_t *buf = malloc (nr * ACTIVITY_SECTOR);

  if (buf == NULL)
    return -1;
  activity_make_header (buf, g, flags, 0);
  for (size_t i = 1; i < nr; i++)
    activity_make_record (buf + i * ACTIVITY_SECTOR, i - 1, 0, NULL, 0);
  if (full_pwrite (fd, buf, nr * ACTIVITY_SECTOR, 0) == -1)
    return -1;
  return fsync (fd);
}

int
activity_create (const char *path, const struct activity_geometry *g,
                 unsigned flags, struct error *err)
{
  CLEANUP_FREE char *new_path = NULL;
  int fd;

  if (asprintf (&new_path, "%s.new", path) == -1) {
    new_path = NULL;
    return error_set (err, ENOMEM, "%s: %m", path);
  }
  unlink (new_path); /* the rest of a crash */
  fd = open (new_path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd == -1)
    return error_set (err, errno, "%s: %m", new_path);
  if (fill (fd, g, flags) == 0 && rename (new_path, path) == 0 &&
      sync_directory_of (path) == 0)
    return fd;
  error_set (err, errno, "%s: cannot put a new activity log in place: %m",
             path);
  close (fd);
  unlink (new_path);
  return -1;
}
