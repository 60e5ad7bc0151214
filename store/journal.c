/* nbdferry - the journal: who a disk is, and who is responsible for it
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The file is two slots of 16 KiB:
 *
 *     0 magic "FERRYJNL"   8 version (1)   12 length of the payload
 *    16 sequence          24 XXH3 of bytes 0 to 23 and of the payload
 *    32 the payload, a JSON object; zeros to the end of the slot
 *
 * all numbers big-endian.  The valid slot with the higher sequence is the
 * record.  A write goes to the other slot, so that nothing that tears it, at
 * any byte, touches the record that still counts; one fsync makes it the
 * record.  A new journal is made beside its name, and renamed once it is
 * durable: under its name there is never half a journal.  (A file of zero
 * bytes is taken for one that was never written.)
 *
 * A write that failed may all the same have reached the disk.  Its slot is
 * wiped then, so that the record that stands in memory stands on disk; if
 * even that fails, the caller is told so by the same error.
 */
#include <config.h>

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <xxhash.h>

#include "cleanup.h"
#include "error.h"
#include "fullio.h"
#include "journal-record.h"

#define MAGIC     "FERRYJNL"
#define VERSION   1
#define SLOT      16384
#define NR_SLOTS  2
#define FILE_SIZE (NR_SLOTS * SLOT)

struct header {
  char magic[8];
  uint32_t version;
  uint32_t length;
  uint64_t sequence;
  uint64_t checksum;
} __attribute__ ((packed));

#define HEADER      sizeof (struct header)
#define MAX_PAYLOAD (SLOT - HEADER)

_Static_assert (sizeof (struct header) == 32, "no padding on disk");

struct journal {
  int fd;
  char *path;
  struct journal_record rec;
  uint64_t sequence;
  unsigned slot; /* that holds 'rec' */
};

void
journal_boot_id (char id[37])
{
  const char *test = getenv ("FERRY_TEST_BOOT_ID");
  FILE *f;

  if (test) {
    snprintf (id, 37, "%s", test);
    return;
  }
  f = fopen ("/proc/sys/kernel/random/boot_id", "re");
  id[0] = '\0';
  if (f == NULL)
    return;
  if (fscanf (f, "%36[0-9a-f-]", id) != 1)
    id[0] = '\0';
  fclose (f);
}

static uint64_t
checksum (const uint8_t *slot, size_t length)
{
  XXH3_state_t *state = XXH3_createState ();
  uint64_t sum;

  if (state == NULL)
    abort (); /* 576 bytes; there is no going on without a checksum */
  XXH3_64bits_reset (state);
  XXH3_64bits_update (state, slot, offsetof (struct header, checksum));
  XXH3_64bits_update (state, slot + HEADER, length);
  sum = XXH3_64bits_digest (state);
  XXH3_freeState (state);
  return sum;
}

enum slot_found { SLOT_BAD, SLOT_VALID, SLOT_UNKNOWN_VERSION };

static enum slot_found
parse_slot (const uint8_t *slot, uint64_t *sequence,
            struct journal_record *rec)
{
  struct header h;

  memcpy (&h, slot, sizeof h);
  h.version = be32toh (h.version);
  h.length = be32toh (h.length);
  if (memcmp (h.magic, MAGIC, sizeof h.magic) != 0 || h.length > MAX_PAYLOAD
      || checksum (slot, h.length) != be64toh (h.checksum))
    return SLOT_BAD;
  *sequence = be64toh (h.sequence);
  if (*sequence == UINT64_MAX) /* there is none after it */
    return SLOT_BAD;
  if (h.version != VERSION)
    return SLOT_UNKNOWN_VERSION;
  if (journal_record_from_json ((const char *) slot + HEADER, h.length,
                                rec) == -1)
    return SLOT_BAD;
  return SLOT_VALID;
}

bool
journal_is_in (const char *folder)
{
  CLEANUP_FREE char *path = NULL;
  CLEANUP_CLOSE int fd = -1;
  char magic[sizeof MAGIC - 1];

  if (asprintf (&path, "%s/journal", folder) == -1) {
    path = NULL;
    return false;
  }
  fd = open (path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  return fd != -1 && read (fd, magic, sizeof magic) == sizeof magic &&
         memcmp (magic, MAGIC, sizeof magic) == 0;
}

/* The record that counts, from 'fd'. */
static int
read_record (int fd, const char *path, struct journal_record *rec,
             uint64_t *sequence, unsigned *which, struct error *err)
{
  CLEANUP_FREE uint8_t *buf = malloc (FILE_SIZE);
  struct journal_record r[NR_SLOTS];
  enum slot_found found[NR_SLOTS];
  uint64_t seq[NR_SLOTS] = { 0 };
  unsigned best;

  if (buf == NULL)
    return error_set (err, ENOMEM, "%s: %m", path);
  if (full_pread_zeros (fd, buf, FILE_SIZE, 0) == -1)
    return error_set (err, errno, "%s: read: %m", path);
  for (unsigned i = 0; i < NR_SLOTS; ++i) {
    memset (&r[i], 0, sizeof r[i]);
    found[i] = parse_slot (buf + i * SLOT, &seq[i], &r[i]);
  }
  best = found[0] == SLOT_BAD || (found[1] != SLOT_BAD && seq[1] > seq[0]);
  journal_record_free (&r[!best]);

  if (found[best] == SLOT_VALID && (found[!best] == SLOT_BAD
                                    || seq[0] != seq[1])) {
    *rec = r[best];
    *sequence = seq[best];
    *which = best;
    return 0;
  }
  journal_record_free (&r[best]);
  if (found[best] == SLOT_UNKNOWN_VERSION)
    return error_set (err, ENOTSUP, "%s: was written by a later version of "
                      "nbdferry; use that one", path);
  return error_set (err, EINVAL, "%s: the journal is damaged: nobody can say "
                    "whether the disk is here or has moved; restore the file, "
                    "or, if you are sure that the disk is here, remove it",
                    path);
}

/* Write the record as number 'sequence' into its slot; durable. */
static int
write_slot (int fd, const char *path, unsigned slot, uint64_t sequence,
            const struct journal_record *rec, struct error *err)
{
  CLEANUP_FREE uint8_t *buf = calloc (1, SLOT);
  CLEANUP_FREE char *text = journal_record_to_json (rec, path, err);
  struct header h = {
    .magic = MAGIC, .version = htobe32 (VERSION),
    .sequence = htobe64 (sequence),
  };
  size_t len;

  if (text == NULL)
    return -1;
  if (buf == NULL)
    return error_set (err, ENOMEM, "%s: %m", path);
  len = strlen (text);
  if (len > MAX_PAYLOAD)
    return error_set (err, E2BIG, "%s: the record of %zu bytes is too long",
                      path, len);
  h.length = htobe32 (len);
  memcpy (buf, &h, sizeof h);
  memcpy (buf + HEADER, text, len);
  h.checksum = htobe64 (checksum (buf, len));
  memcpy (buf, &h, sizeof h);
  if (full_pwrite (fd, buf, SLOT, (off_t) slot * SLOT) == -1)
    error_set (err, errno, "%s: write: %m", path);
  else if (fsync (fd) == -1)
    error_set (err, errno, "%s: fsync: %m", path);
  else
    return 0;

  memset (buf, 0, SLOT);
  if (full_pwrite (fd, buf, SLOT, (off_t) slot * SLOT) == -1
      || fsync (fd) == -1)
    error_prefix (err, "state \"%s\" may or may not be on disk",
                  journal_state_name (rec->state));
  return -1;
}

/* A new journal under 'path', open for writing as j->fd. */
static int
create (struct journal *j, const char *path, struct error *err)
{
  CLEANUP_FREE char *new_path = NULL;

  if (asprintf (&new_path, "%s.new", path) == -1) {
    new_path = NULL;
    return error_set (err, ENOMEM, "%s: %m", path);
  }
  uuid_new (&j->rec.lineage);
  j->rec.state = JOURNAL_ACTIVE;
  journal_boot_id (j->rec.boot_id);
  j->sequence = 1;
  j->slot = 0;
  unlink (new_path); /* the rest of a crash */
  j->fd = open (new_path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (j->fd == -1)
    return error_set (err, errno, "%s: %m", new_path);
  if (ftruncate (j->fd, FILE_SIZE) == -1)
    error_set (err, errno, "%s: %m", new_path);
  else if (write_slot (j->fd, new_path, 0, 1, &j->rec, err) == -1)
    ;
  else if (rename (new_path, path) == -1 || sync_directory_of (path) == -1)
    error_set (err, errno, "%s: cannot put the new journal in place: %m",
               path);
  else
    return 0;
  unlink (new_path);
  return -1;
}

/* Open an existing journal.  1: there is none, or an empty file. */
static int
open_file (const char *path, int flags, int *fd, struct error *err)
{
  struct stat st;

  *fd = open (path, flags | O_CLOEXEC | O_NONBLOCK);
  if (*fd == -1 && errno == ENOENT)
    return 1;
  if (*fd == -1)
    return error_set (err, errno, "%s: open: %m", path);
  if (fstat (*fd, &st) == -1)
    return error_set (err, errno, "%s: %m", path);
  if (!S_ISREG (st.st_mode))
    return error_set (err, EINVAL, "%s: is not a regular file", path);
  /* What was cut off may have been the newer record. */
  if (st.st_size != 0 && st.st_size != FILE_SIZE)
    return error_set (err, EINVAL, "%s: has %jd bytes instead of %d "
                      "(damaged?); restore the file, or remove its directory "
                      "to start without bitmaps", path,
                      (intmax_t) st.st_size, FILE_SIZE);
  return st.st_size == 0;
}

struct journal *
journal_open (const char *path, bool *created, struct error *err)
{
  struct journal *j = calloc (1, sizeof *j);
  int r;

  if (j == NULL) {
    error_set (err, ENOMEM, "%s: %m", path);
    return NULL;
  }
  j->fd = -1;
  j->path = strdup (path);
  if (j->path == NULL) {
    error_set (err, ENOMEM, "%s: %m", path);
    goto failed;
  }
  r = open_file (path, O_RDWR, &j->fd, err);
  if (r == -1)
    goto failed;
  if (r == 1) {
    if (j->fd != -1)
      close (j->fd);
    j->fd = -1;
    if (create (j, path, err) == -1)
      goto failed;
  }
  else if (read_record (j->fd, path, &j->rec, &j->sequence, &j->slot, err)
           == -1)
    goto failed;
  *created = r == 1;
  return j;

 failed:
  journal_close (j);
  return NULL;
}

void
journal_close (struct journal *j)
{
  if (j == NULL)
    return;
  journal_record_free (&j->rec);
  if (j->fd != -1)
    close (j->fd);
  free (j->path);
  free (j);
}

const struct journal_record *
journal_get (const struct journal *j)
{
  return &j->rec;
}

const char *
journal_path (const struct journal *j)
{
  return j->path;
}

int
journal_write (struct journal *j, const struct journal_record *rec,
               struct error *err)
{
  struct journal_record copy;

  if (rec->generation > INT64_MAX || rec->attempt > INT64_MAX
      || (unsigned) rec->state > JOURNAL_GONE)
    return error_set (err, EINVAL, "%s: the record is impossible", j->path);
  if (journal_copy_record (&copy, rec) == -1)
    return error_set (err, errno, "%s: %m", j->path);
  journal_boot_id (copy.boot_id);
  if (write_slot (j->fd, j->path, !j->slot, j->sequence + 1, &copy,
                  err) == -1) {
    journal_record_free (&copy);
    return -1;
  }
  /* 'rec' may be made of our own strings: they are let go last. */
  journal_record_free (&j->rec);
  j->rec = copy;
  j->sequence++;
  j->slot = !j->slot;
  return 0;
}

int
journal_read (const char *path, struct journal_record *rec,
              struct error *err)
{
  CLEANUP_CLOSE int fd = -1;
  uint64_t sequence;
  unsigned slot;
  int r = open_file (path, O_RDONLY, &fd, err);

  if (r == -1)
    return -1;
  if (r == 1)
    return error_set (err, ENOENT, "%s: there is no journal", path);
  if (read_record (fd, path, rec, &sequence, &slot, err) == -1)
    return -1;
  /* The caller acts upon it: it must not be one that a power loss undoes. */
  if (fsync (fd) == -1 && errno != EINVAL && errno != EROFS) {
    journal_record_free (rec);
    return error_set (err, errno, "%s: fsync: %m", path);
  }
  return 0;
}
