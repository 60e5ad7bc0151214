/* nbdferry - the part of a bitmap that is being cleared
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <endian.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <xxhash.h>

#include "cleanup.h"
#include "clear-note.h"

static const char magic[8] = "FERRYCLB";

static char *
note_path (const struct drive *d)
{
  char *path;

  return asprintf (&path, "%s/clearing", d->state_dir) == -1 ? NULL : path;
}

static uint64_t
hash (const struct clear_note_record *r)
{
  return XXH3_64bits (r, offsetof (struct clear_note_record, hash));
}

int
clear_note_open (struct clear_note *n, const struct drive *d)
{
  CLEANUP_FREE char *path = note_path (d);

  memset (n, 0, sizeof *n);
  n->fd = path ? open (path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600)
               : -1;
  if (n->fd == -1)
    return -1;
  if (pwrite (n->fd, &n->r, sizeof n->r, 0) == sizeof n->r)
    return 0;
  clear_note_close (n, d);
  return -1;
}

void
clear_note_begin (struct clear_note *n, const struct named_bitmap *nb)
{
  memcpy (n->r.magic, magic, sizeof magic);
  n->r.shift = nb->shift;
  memset (n->r.name, 0, sizeof n->r.name);
  snprintf (n->r.name, sizeof n->r.name, "%s", nb->name);
}

bool
clear_note_block (void *note, uint64_t block, const uint64_t words[64])
{
  struct clear_note *n = note;

  n->r.block = block;
  for (unsigned j = 0; j < 64; j++)
    n->r.words[j] = htole64 (words[j]);
  n->r.hash = hash (&n->r);
  if (pwrite (n->fd, &n->r, sizeof n->r, 0) == sizeof n->r)
    return true;
  n->failed = true;
  return false;
}

void
clear_note_close (struct clear_note *n, const struct drive *d)
{
  CLEANUP_FREE char *path = note_path (d);

  if (n->fd == -1)
    return;
  close (n->fd);
  n->fd = -1;
  if (path)
    unlink (path);
}

bool
clear_note_valid (const struct clear_note_record *r)
{
  return memcmp (r->magic, magic, sizeof magic) == 0 && r->hash == hash (r) &&
         memchr (r->name, 0, sizeof r->name) != NULL;
}

/* A record that is not whole was being written: nothing of its block had been
 * cleared.
 */
void
clear_note_mend (struct drive *d)
{
  CLEANUP_FREE char *path = note_path (d);
  CLEANUP_CLOSE int fd = path ? open (path, O_RDONLY | O_CLOEXEC) : -1;
  struct clear_note_record r;
  struct named_bitmap *nb;

  if (fd == -1)
    return;
  if (pread (fd, &r, sizeof r, 0) == sizeof r && clear_note_valid (&r)) {
    nb = drive_find_bitmap (d, r.name);
    for (unsigned j = 0; j < 64; j++)
      r.words[j] = le64toh (r.words[j]);
    if (nb && nb->bits && nb->shift == r.shift)
      bitmap_restore_block (nb->bits, r.block, r.words);
  }
  unlink (path);
}
