/* nbdferry - what is on a disk
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * libblkid reads from a file descriptor.  So that every kind of disk can be
 * looked at in the same way, it is given a sparse file in memory that has the
 * disk's size, and its first and last bytes: that is where signatures are.
 *
 * All that is found counts.  A disk of which libblkid cannot tell which of
 * two signatures is the right one is as little empty as any other.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <blkid.h>

#include "cleanup.h"
#include "probe.h"

/* Metadata of the larger kinds (VMFS, UDF with large blocks, ZFS) lies within
 * that; what is at the end (GPT, RAID of all makes, ZFS) needs less.
 */
#define HEAD (16 << 20)
#define TAIL (4 << 20)
#define STEP (64 << 10)

#define MAX_FOUND 8 /* more are not told */

/* ---- the copy ---- */

static int
copy_range (struct disk *d, int fd, uint64_t from, uint64_t end,
            struct error *err)
{
  CLEANUP_FREE char *buf = malloc (STEP);

  if (buf == NULL)
    return error_set (err, ENOMEM, "%m");
  while (from < end) {
    size_t n = end - from < STEP ? end - from : STEP;

    if (d->ops->pread (d, buf, n, from) == -1)
      return error_set (err, errno, "read at %" PRIu64 ": %m", from);
    /* What is zero stays a hole. */
    if (!disk_is_zero (buf, n) &&
        pwrite (fd, buf, n, from) != (ssize_t) n)
      return error_set (err, errno ? errno : EIO, "copy to memory: %m");
    from += n;
  }
  return 0;
}

static int
copy_ends (struct disk *d, int fd, struct error *err)
{
  uint64_t head = d->size < HEAD ? d->size : HEAD;
  uint64_t tail = d->size - head < TAIL ? head : d->size - TAIL;

  if (ftruncate (fd, d->size) == -1)
    return error_set (err, errno, "a file of its size in memory: %m");
  if (copy_range (d, fd, 0, head, err) == -1)
    return -1;
  return copy_range (d, fd, tail, d->size, err);
}

/* ---- what libblkid says ---- */

static const char *
value (blkid_probe pr, const char *name)
{
  const char *data;

  return blkid_probe_lookup_value (pr, name, &data, NULL) == 0 ? data : NULL;
}

/* What it is, in words: "an ext4 file system". */
static void
name_type (const char *type, const char *usage, char *text, size_t size)
{
  static const struct {
    const char *type, *text;
  } known[] = {
    { "swap", "swap space" },
    { "crypto_LUKS", "a LUKS encrypted volume" },
    { "LVM2_member", "an LVM physical volume" },
    { "linux_raid_member", "a member of a Linux software RAID" },
    { "zfs_member", "a member of a ZFS pool" },
  };
  const char *an = strchr ("aeioAEIO", type[0]) ? "an" : "a";

  for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
    if (strcmp (type, known[i].type) == 0) {
      snprintf (text, size, "%s", known[i].text);
      return;
    }
  snprintf (text, size, "%s %s %s", an, type,
            usage && strcmp (usage, "filesystem") == 0 ? "file system"
                                                       : "signature");
}

/* A label is anybody's text. */
static void
copy_printable (char *to, size_t size, const char *from)
{
  snprintf (to, size, "%s", from);
  for (; *to; to++)
    if ((unsigned char) *to < ' ' || *to == 0x7f || *to == '\'')
      *to = '?';
}

/* The signature that was found last, in words; NULL if there is no memory. */
static char *
describe (blkid_probe pr)
{
  const char *type = value (pr, "TYPE"), *table = value (pr, "PTTYPE");
  const char *uuid = value (pr, table ? "PTUUID" : "UUID");
  const char *label = table ? NULL : value (pr, "LABEL");
  char what[128] = "a signature", name[128] = "", *text;

  if (table)
    snprintf (what, sizeof what, "a %s partition table", table);
  else if (type)
    name_type (type, value (pr, "USAGE"), what, sizeof what);
  if (label)
    copy_printable (name, sizeof name, label);
  if (asprintf (&text, "%s%s%s%s%s%s%s", what, label ? " '" : "", name,
                label ? "'" : "", uuid ? " (UUID " : "", uuid ?: "",
                uuid ? ")" : "") == -1)
    return NULL;
  return text;
}

/* Add to what is known, once. */
static int
add (char **text, char *one, struct error *err)
{
  char *both = NULL;

  if (one == NULL)
    return error_set (err, ENOMEM, "%m");
  if (*text == NULL) {
    *text = one;
    return 0;
  }
  if (strstr (*text, one) == NULL &&
      asprintf (&both, "%s and %s", *text, one) == -1)
    both = NULL;
  free (one);
  if (both) {
    free (*text);
    *text = both;
  }
  return 0;
}

static int
probe_fd (int fd, uint64_t size, unsigned sector, char **text,
          struct error *err)
{
  blkid_probe pr = blkid_new_probe ();
  int r = 0;

  if (pr == NULL)
    return error_set (err, ENOMEM, "%m");
  if (blkid_probe_set_device (pr, fd, 0, size) == -1 ||
      blkid_probe_set_sectorsize (pr, sector) == -1) {
    r = error_set (err, errno ? errno : EIO, "libblkid cannot look at it");
    goto out;
  }
  blkid_probe_enable_superblocks (pr, 1);
  blkid_probe_set_superblocks_flags (pr, BLKID_SUBLKS_TYPE |
                                     BLKID_SUBLKS_USAGE |
                                     BLKID_SUBLKS_LABEL | BLKID_SUBLKS_UUID |
                                     BLKID_SUBLKS_BADCSUM);
  blkid_probe_enable_partitions (pr, 1);
  /* A GPT also where the MBR does not announce it. */
  blkid_probe_set_partitions_flags (pr, BLKID_PARTS_FORCE_GPT);
  for (unsigned i = 0; r == 0 && i < MAX_FOUND; i++) {
    int found = blkid_do_probe (pr);

    if (found == 1)
      break;
    if (found != 0)
      r = error_set (err, errno ? errno : EIO, "libblkid cannot look at it");
    else
      r = add (text, describe (pr), err);
  }

 out:
  blkid_free_probe (pr);
  return r;
}

int
disk_probe (struct disk *d, char **text, struct error *err)
{
  static const unsigned sectors[] = { 512, 4096 }; /* where a GPT may be */
  CLEANUP_CLOSE int fd = -1;

  *text = NULL;
  if (d->size == 0)
    return 0;
  fd = memfd_create ("probe", MFD_CLOEXEC);
  if (fd == -1)
    return error_set (err, errno, "a file in memory: %m");
  if (copy_ends (d, fd, err) == -1)
    return -1;
  for (size_t i = 0; i < sizeof sectors / sizeof sectors[0]; i++)
    if (probe_fd (fd, d->size, sectors[i], text, err) == -1) {
      free (*text);
      *text = NULL;
      return -1;
    }
  return *text != NULL;
}
