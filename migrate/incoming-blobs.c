/* nbdferry - named files that travel with a migration: the destination
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * They come into attached.incoming/ in the first disk's state directory, with
 * a hidden file that names the session once all is there (PREPARE).  COMMIT
 * makes that folder attached/, at one instant, before the disk becomes active:
 *
 *   attached.incoming says this session   rename, or exchange with attached/
 *   it says another                       it was exchanged before: it is old
 *
 * and removes what is left over.  A migration that does not come so far leaves
 * nothing; without attached files an earlier attached/ stays as it is.
 */
#include <config.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "blobs.h"
#include "cleanup.h"
#include "incoming-impl.h"

#define COMING  "attached.incoming"
#define THERE   "attached"
#define SESSION ".session"

struct incoming_blob {
  char *name;
  uint64_t version, size, received; /* bytes */
  int fd;
};

struct incoming_blobs {
  pthread_mutex_t lock; /* protects what follows */
  char *dir;            /* the state directory */
  int fd;               /* of attached.incoming; -1: not made yet */
  struct incoming_blob v[BLOBS_MAX];
  size_t nr;
};

struct incoming_blobs *
incoming_blobs_new (const char *state_dir)
{
  struct incoming_blobs *b = calloc (1, sizeof *b);

  if (b && (b->dir = strdup (state_dir)) == NULL) {
    free (b);
    return NULL;
  }
  if (b) {
    pthread_mutex_init (&b->lock, NULL);
    b->fd = -1;
  }
  return b;
}

void
incoming_blobs_free (struct incoming_blobs *b)
{
  if (b == NULL)
    return;
  for (size_t i = 0; i < b->nr; i++) {
    if (b->v[i].fd >= 0)
      close (b->v[i].fd);
    free (b->v[i].name);
  }
  if (b->fd >= 0)
    close (b->fd);
  pthread_mutex_destroy (&b->lock);
  free (b->dir);
  free (b);
}

/* ---- the folder ---- */

static int
open_dir (int at, const char *name)
{
  return openat (at, name,
                 O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

/* Remove what is in a folder of ours: files, no folders.  'keep' (may be NULL)
 * says what stays.
 */
static int
empty_dir (int fd, bool (*keep) (void *opaque, const char *name),
           void *opaque)
{
  int dup_fd = open_dir (fd, "."), r = 0;
  DIR *dir = dup_fd == -1 ? NULL : fdopendir (dup_fd);
  struct dirent *e;

  if (dir == NULL) {
    if (dup_fd >= 0)
      close (dup_fd);
    return -1;
  }
  while ((e = readdir (dir)) != NULL)
    if (strcmp (e->d_name, ".") != 0 && strcmp (e->d_name, "..") != 0 &&
        !(keep && keep (opaque, e->d_name)) && unlinkat (fd, e->d_name, 0))
      r = -1;
  closedir (dir);
  return r;
}

static int
remove_coming (int state)
{
  int fd = open_dir (state, COMING);
  int r;

  if (fd == -1)
    return errno == ENOENT ? 0 : -1;
  r = empty_dir (fd, NULL, NULL);
  close (fd);
  if (r == 0)
    r = unlinkat (state, COMING, AT_REMOVEDIR);
  return r;
}

int
incoming_blobs_drop (const char *state_dir, struct error *err)
{
  CLEANUP_CLOSE int state = open_dir (AT_FDCWD, state_dir);

  if (state == -1 || remove_coming (state) == -1)
    return error_set (err, errno, "remove %s/" COMING ": %m", state_dir);
  return 0;
}

/* Lock held. */
static int
make_coming (struct incoming_blobs *b, struct error *err)
{
  CLEANUP_CLOSE int state = -1;

  if (b->fd >= 0)
    return 0;
  state = open_dir (AT_FDCWD, b->dir);
  if (state == -1 || remove_coming (state) == -1 ||
      mkdirat (state, COMING, 0700) == -1 ||
      (b->fd = open_dir (state, COMING)) == -1)
    return error_set (err, errno, "%s/" COMING ": %m", b->dir);
  return 0;
}

/* ---- packets ---- */

/* Lock held. */
static struct incoming_blob *
find_blob (struct incoming_blobs *b, const char *name)
{
  for (size_t i = 0; i < b->nr; i++)
    if (strcmp (b->v[i].name, name) == 0)
      return &b->v[i];
  return NULL;
}

/* The blob that the piece belongs to, empty if it is new.  Lock held. */
static struct incoming_blob *
begin_blob (struct incoming_blobs *b, const struct blob_piece *p,
            struct error *err)
{
  struct incoming_blob *blob = find_blob (b, p->name);

  if (blob && blob->version >= p->version)
    return blob;
  if (blob == NULL) {
    if (b->nr == BLOBS_MAX) {
      error_set (err, E2BIG, "more than %d attached files", BLOBS_MAX);
      return NULL;
    }
    blob = &b->v[b->nr];
    *blob = (struct incoming_blob){ .name = strdup (p->name), .fd = -1 };
    if (blob->name == NULL) {
      error_set (err, ENOMEM, "%m");
      return NULL;
    }
    b->nr++;
  }
  if (blob->fd == -1)
    blob->fd = openat (b->fd, p->name,
                       O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
                       0600);
  if (blob->fd == -1 || ftruncate (blob->fd, 0) == -1) {
    error_set (err, errno, "%s/" COMING "/%s: %m", b->dir, p->name);
    return NULL;
  }
  blob->version = p->version;
  blob->size = p->size;
  blob->received = 0;
  return blob;
}

static int
write_all (int fd, const uint8_t *data, size_t len, uint64_t offset)
{
  while (len > 0) {
    ssize_t n = pwrite (fd, data, len, offset);

    if (n == -1)
      return -1;
    data += n;
    len -= n;
    offset += n;
  }
  return 0;
}

/* After the handover the files are the disk's owner's. */
static int
still_comes (struct drive *d, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  return incoming_takes_data (d, err);
}

int
incoming_blob (struct session *s, const uint8_t *buf,
               const struct packet_header *h, struct error *err)
{
  /* JSON takes many times its size in memory. */
  json_auto_t *body = h->body_size > BLOB_MAX_JSON
                        ? NULL
                        : json_loadb (packet_json (buf), h->body_size, 0, NULL);
  struct incoming_blobs *b = s->blobs;
  struct incoming_blob *blob;
  struct blob_piece p;

  if (body == NULL || !json_is_object (body))
    return incoming_malformed ("BLOB", err);
  if (blob_piece_parse (body, h->payload_size, &p, err) == -1 ||
      incoming_begin (s, err) == -1 || still_comes (s->drives[0], err) == -1)
    return -1;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&b->lock);
  if (make_coming (b, err) == -1)
    return -1;
  blob = begin_blob (b, &p, err);
  if (blob == NULL)
    return -1;
  if (blob->version > p.version)
    return 0; /* late: it has changed since */
  if (blob->size != p.size)
    return error_set (err, EBADMSG, "attached file '%s' has two sizes",
                      p.name);
  if (write_all (blob->fd, packet_payload (buf, h), h->payload_size,
                 p.offset) == -1)
    return error_set (err, errno, "write %s/" COMING "/%s: %m", b->dir,
                      p.name);
  blob->received += h->payload_size;
  return 0;
}

/* Lock held. */
static int
sync_blobs (struct incoming_blobs *b, struct error *err)
{
  for (size_t i = 0; i < b->nr; i++)
    if (b->v[i].fd >= 0 && fsync (b->v[i].fd) == -1)
      return error_set (err, errno, "%s/" COMING "/%s: fsync: %m", b->dir,
                        b->v[i].name);
  return 0;
}

int
incoming_blobs_flush (struct incoming_blobs *b, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&b->lock);

  return sync_blobs (b, err);
}

/* ---- PREPARE ---- */

static bool
is_listed (void *opaque, const char *name)
{
  json_t *list = opaque, *o;
  size_t i;

  json_array_foreach (list, i, o)
    if (strcmp (json_string_value (json_object_get (o, "name")), name) == 0)
      return true;
  return false;
}

/* Has all of the list come?  Lock held. */
static int
check_list (struct incoming_blobs *b, json_t *list, struct error *err)
{
  json_t *o;
  size_t i;

  json_array_foreach (list, i, o) {
    struct incoming_blob *blob;
    json_int_t version, size;
    const char *name;

    if (json_unpack (o, "{s:s, s:I, s:I}", "name", &name, "version", &version,
                     "size", &size) == -1)
      return incoming_malformed ("PREPARE", err);
    blob = find_blob (b, name);
    if (blob == NULL || blob->version != (uint64_t) version ||
        blob->size != (uint64_t) size || blob->received != blob->size)
      return error_set (err, EBADMSG, "attached file '%s' did not arrive",
                        name);
  }
  return 0;
}

static int
write_session (int dir, const char *id)
{
  CLEANUP_CLOSE int fd = openat (dir, SESSION,
                                 O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC,
                                 0600);

  return fd == -1 ||
             write (fd, id, strlen (id)) != (ssize_t) strlen (id) ||
             fsync (fd) == -1
           ? -1
           : 0;
}

int
incoming_blobs_prepare (struct incoming_blobs *b, const struct uuid *session,
                        json_t *list, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&b->lock);
  CLEANUP_CLOSE int state = -1;
  char id[UUID_TEXT];

  if (list && !json_is_array (list))
    return incoming_malformed ("PREPARE", err);
  if (check_list (b, list, err) == -1)
    return -1;
  if (json_array_size (list) == 0)
    return incoming_blobs_drop (b->dir, err);
  if (sync_blobs (b, err) == -1)
    return -1;
  uuid_format (session, id);
  state = open_dir (AT_FDCWD, b->dir);
  if (state == -1 || empty_dir (b->fd, is_listed, list) == -1 ||
      write_session (b->fd, id) == -1 || fsync (b->fd) == -1 ||
      fsync (state) == -1)
    return error_set (err, errno, "%s/" COMING ": %m", b->dir);
  return 0;
}

/* ---- COMMIT ---- */

/* Which session has brought the folder?  "" if none says so. */
static void
read_session (int state, char id[UUID_TEXT])
{
  CLEANUP_CLOSE int fd = openat (state, COMING "/" SESSION,
                                 O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
  ssize_t n = fd == -1 ? 0 : read (fd, id, UUID_TEXT - 1);

  id[n > 0 ? n : 0] = '\0';
}

int
incoming_blobs_publish (const char *state_dir, const struct uuid *session,
                        struct error *err)
{
  CLEANUP_CLOSE int state = open_dir (AT_FDCWD, state_dir);
  char id[UUID_TEXT], want[UUID_TEXT];

  if (state == -1)
    return error_set (err, errno, "%s: %m", state_dir);
  read_session (state, id);
  uuid_format (session, want);
  if (strcmp (id, want) == 0) {
    int r = renameat2 (state, COMING, state, THERE, RENAME_EXCHANGE);

    if (r == -1 && errno == ENOENT)
      r = renameat (state, COMING, state, THERE);
    if (r == -1 || fsync (state) == -1)
      return error_set (err, errno, "%s/" THERE ": %m", state_dir);
  }
  /* What is left over does no harm. */
  remove_coming (state);
  return 0;
}
