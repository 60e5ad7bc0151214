/* nbdferry - another NBD server's export as a disk
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cleanup.h"
#include "log.h"
#include "pool.h"
#include "remote.h"

#define CONNECT_TIMEOUT_MS 10000

/* Of data, unless the server says less; and of what has none. */
#define MAX_DATA  (UINT64_C (32) << 20)
#define MAX_RANGE (UINT64_C (1) << 30)

/* Zeros that must be written out. */
#define ZEROS (64 * 1024)

struct remote {
  struct disk disk;
  struct disk *pool;
  struct client_abilities can;
  uint64_t block;    /* offsets and lengths are multiples of it; 1: any */
  uint64_t max_data; /* of one request */
  /* A write of part of a block reads the rest of it: it is held exclusively
   * then, and shared by other writes.  Not used if block is 1.
   */
  pthread_rwlock_t blocks;
};

static inline uint64_t
down (const struct remote *r, uint64_t n)
{
  return n & ~(r->block - 1);
}

/* The end of the block, or of a disk that ends in the middle of one. */
static inline uint64_t
up (const struct remote *r, uint64_t n)
{
  uint64_t end = down (r, n + r->block - 1);

  return end < r->disk.size ? end : r->disk.size;
}

static inline bool
is_aligned (const struct remote *r, uint64_t offset, uint64_t len)
{
  return down (r, offset) == offset && up (r, offset + len) == offset + len;
}

/* ---- reading ---- */

static int
read_blocks (struct remote *r, void *buf, uint64_t len, uint64_t offset)
{
  while (len > 0) {
    size_t n = len < r->max_data ? len : r->max_data;

    if (r->pool->ops->pread (r->pool, buf, n, offset) == -1)
      return -1;
    buf = (char *) buf + n;
    offset += n;
    len -= n;
  }
  return 0;
}

static int
remote_pread (struct disk *d, void *buf, size_t count, uint64_t offset)
{
  struct remote *r = (struct remote *) d;
  uint64_t start = down (r, offset), end = up (r, offset + count);
  CLEANUP_FREE char *bounce = NULL;

  if (is_aligned (r, offset, count))
    return read_blocks (r, buf, count, offset);
  bounce = malloc (end - start);
  if (bounce == NULL || read_blocks (r, bounce, end - start, start) == -1)
    return -1;
  memcpy (buf, bounce + (offset - start), count);
  return 0;
}

/* ---- writing ---- */

static int
remote_flush (struct disk *d)
{
  struct remote *r = (struct remote *) d;

  /* Nothing can be asked of it; that was said at the start. */
  return r->can.flush ? r->pool->ops->flush (r->pool) : 0;
}

/* What is to be sent of FUA, and what is to be done for it afterwards. */
static unsigned
send_flags (const struct remote *r, unsigned flags)
{
  return r->can.fua ? flags : flags & ~DISK_FUA;
}

static int
finish (struct remote *r, unsigned flags)
{
  return (flags & DISK_FUA) && !r->can.fua ? remote_flush (&r->disk) : 0;
}

static int
write_blocks (struct remote *r, const void *buf, uint64_t len,
              uint64_t offset, unsigned flags)
{
  while (len > 0) {
    size_t n = len < r->max_data ? len : r->max_data;

    if (r->pool->ops->pwrite (r->pool, buf, n, offset, flags) == -1)
      return -1;
    buf = (const char *) buf + n;
    offset += n;
    len -= n;
  }
  return 0;
}

/* Less than whole blocks: read them, change them, write them.  'buf' is NULL
 * for zeros.
 */
static int
write_part (struct remote *r, const void *buf, uint64_t len, uint64_t offset,
            unsigned flags)
{
  uint64_t start = down (r, offset), end = up (r, offset + len);
  CLEANUP_FREE char *bounce = malloc (end - start);
  int ret;

  if (bounce == NULL)
    return -1;
  pthread_rwlock_wrlock (&r->blocks);
  ret = read_blocks (r, bounce, end - start, start);
  if (ret == 0) {
    if (buf)
      memcpy (bounce + (offset - start), buf, len);
    else
      memset (bounce + (offset - start), 0, len);
    ret = write_blocks (r, bounce, end - start, start, flags);
  }
  pthread_rwlock_unlock (&r->blocks);
  return ret;
}

static void
lock_whole (struct remote *r)
{
  if (r->block > 1)
    pthread_rwlock_rdlock (&r->blocks);
}

static void
unlock_whole (struct remote *r)
{
  if (r->block > 1)
    pthread_rwlock_unlock (&r->blocks);
}

static int
remote_pwrite (struct disk *d, const void *buf, size_t count,
               uint64_t offset, unsigned flags)
{
  struct remote *r = (struct remote *) d;
  unsigned f = send_flags (r, flags);
  int ret;

  if (is_aligned (r, offset, count)) {
    lock_whole (r);
    ret = write_blocks (r, buf, count, offset, f);
    unlock_whole (r);
  }
  else
    ret = write_part (r, buf, count, offset, f);
  return ret == -1 ? -1 : finish (r, flags);
}

/* A range of whole blocks, in pieces that every server takes. */
static int
in_pieces (struct remote *r, int (*request) (struct disk *, uint64_t, uint64_t,
                                             unsigned),
           uint64_t len, uint64_t offset, unsigned flags)
{
  while (len > 0) {
    uint64_t n = len < MAX_RANGE ? len : MAX_RANGE;

    if (request (r->pool, n, offset, flags) == -1)
      return -1;
    offset += n;
    len -= n;
  }
  return 0;
}

static int
write_zeros (struct remote *r, uint64_t len, uint64_t offset, unsigned flags)
{
  static const char zeros[ZEROS];

  while (len > 0) {
    uint64_t n = len < ZEROS ? len : ZEROS;

    if (write_blocks (r, zeros, n, offset, flags) == -1)
      return -1;
    offset += n;
    len -= n;
  }
  return 0;
}

static int
zero_blocks (struct remote *r, uint64_t len, uint64_t offset, unsigned flags)
{
  int ret;

  lock_whole (r);
  ret = r->can.zero ? in_pieces (r, r->pool->ops->zero, len, offset, flags)
                    : write_zeros (r, len, offset, flags);
  unlock_whole (r);
  return ret;
}

static int
remote_zero (struct disk *d, uint64_t len, uint64_t offset, unsigned flags)
{
  struct remote *r = (struct remote *) d;
  unsigned f = send_flags (r, flags);
  uint64_t end = offset + len, first = down (r, offset + r->block - 1),
    last = end == d->size ? end : down (r, end);

  if ((flags & DISK_FAST) && (!r->can.fast_zero || !r->can.zero)) {
    errno = EOPNOTSUPP;
    return -1;
  }
  if (first >= last) {
    if (len > 0 && write_part (r, NULL, len, offset, f) == -1)
      return -1;
    return finish (r, flags);
  }
  /* The middle first: with DISK_FAST it may be refused, and then nothing has
   * been done.
   */
  if (zero_blocks (r, last - first, first, f) == -1 ||
      (offset < first &&
       write_part (r, NULL, first - offset, offset, f) == -1) ||
      (last < end && write_part (r, NULL, end - last, last, f) == -1))
    return -1;
  return finish (r, flags);
}

static int
remote_trim (struct disk *d, uint64_t len, uint64_t offset, unsigned flags)
{
  struct remote *r = (struct remote *) d;
  uint64_t end = offset + len, first = down (r, offset + r->block - 1),
    last = end == d->size ? end : down (r, end);
  int ret = 0;

  /* Advice: what cannot be trimmed is left. */
  if (r->can.trim && first < last) {
    lock_whole (r);
    ret = in_pieces (r, r->pool->ops->trim, last - first, first,
                     send_flags (r, flags));
    unlock_whole (r);
  }
  return ret == -1 ? -1 : finish (r, flags);
}

/* ---- the rest ---- */

static int
remote_cache (struct disk *d, uint64_t len, uint64_t offset)
{
  struct remote *r = (struct remote *) d;
  uint64_t start = down (r, offset), end = up (r, offset + len);

  if (end - start > MAX_RANGE)
    end = start + MAX_RANGE;
  return r->pool->ops->cache (r->pool, end - start, start);
}

static int
remote_extent (struct disk *d, uint64_t offset, uint64_t end,
               struct extent *ext)
{
  struct remote *r = (struct remote *) d;

  if (r->pool->ops->extent (r->pool, down (r, offset), up (r, end), ext) ==
      -1)
    return -1;
  ext->start = offset;
  if (ext->end > end)
    ext->end = end;
  if (ext->end <= offset) { /* a server that does not keep to its blocks */
    errno = EPROTO;
    return -1;
  }
  return 0;
}

static void
remote_hurry (struct disk *d, uint64_t deadline)
{
  pool_hurry (((struct remote *) d)->pool, deadline);
}

static unsigned
remote_losses (struct disk *d)
{
  return pool_losses (((struct remote *) d)->pool);
}

static void
remote_close (struct disk *d)
{
  struct remote *r = (struct remote *) d;

  pthread_rwlock_destroy (&r->blocks);
  r->pool->ops->close (r->pool);
  free (r);
}

static const struct disk_ops remote_ops = {
  .pread = remote_pread,
  .pwrite = remote_pwrite,
  .zero = remote_zero,
  .trim = remote_trim,
  .flush = remote_flush,
  .cache = remote_cache,
  .extent = remote_extent,
  .hurry = remote_hurry,
  .losses = remote_losses,
  .close = remote_close,
};

const struct client_abilities *
remote_abilities (const struct disk *d)
{
  return &((const struct remote *) d)->can;
}

void
remote_limit (struct disk *d, unsigned timeout_ms)
{
  pool_limit (((struct remote *) d)->pool, timeout_ms);
}

void
remote_stop (struct disk *d)
{
  pool_stop (((struct remote *) d)->pool);
}

/* ---- opening ---- */

/* What the server said of its blocks, checked. */
static int
set_blocks (struct remote *r, const char *uri, struct error *err)
{
  const uint64_t min = r->can.min_block ? r->can.min_block : 1;
  const uint64_t max = r->can.max_block ? r->can.max_block : MAX_DATA;

  if ((min & (min - 1)) != 0 || min > 64 * 1024 || max < min)
    return error_set (err, EPROTO, "%s: the server wants requests of %" PRIu64
                      " to %" PRIu64 " bytes, which no disk has", uri, min,
                      max);
  r->block = min;
  r->max_data = down (r, max < MAX_DATA ? max : MAX_DATA);
  return 0;
}

struct disk *
remote_open (const char *uri, const struct remote_options *opt,
             struct error *err)
{
  struct remote *r = calloc (1, sizeof *r);

  if (r == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  pthread_rwlock_init (&r->blocks, NULL);
  r->pool = pool_open_foreign (uri, opt->connections, opt->patience_ms,
                               opt->stop, CONNECT_TIMEOUT_MS, err);
  if (r->pool == NULL) {
    pthread_rwlock_destroy (&r->blocks);
    free (r);
    return NULL;
  }
  r->disk = *r->pool;
  r->disk.ops = &remote_ops;
  r->disk.fixed_size = true;
  r->can = *pool_abilities (r->pool);
  if (r->disk.size % 512 != 0)
    error_set (err, EINVAL, "%s: its size, %" PRIu64 " bytes, is not a "
               "multiple of 512", uri, r->disk.size);
  else if (set_blocks (r, uri, err) == 0) {
    if (!r->can.flush && !r->can.readonly)
      log_message ("%s: the server cannot flush; what it has acknowledged is "
                   "taken to be durable", uri);
    return &r->disk;
  }
  remote_close (&r->disk);
  return NULL;
}

/* ---- URIs ---- */

bool
remote_is_uri (const char *s)
{
  if (strncmp (s, "nbd", 3) != 0)
    return false;
  s += 3;
  s += *s == 's';
  if (*s == '+')
    s += 1 + strspn (s + 1, "abcdefghijklmnopqrstuvwxyz");
  return strncmp (s, "://", 3) == 0;
}

static char *
append_path (char *to, const char *path)
{
  for (; *path; path++) {
    if (strchr ("?#&%+;", *path) || (unsigned char) *path <= ' ')
      to += sprintf (to, "%%%02X", (unsigned char) *path);
    else
      *to++ = *path;
  }
  return to;
}

/* Does a value that names a file begin at 'p'?  If so, how long is its key? */
static size_t
file_key (const char *p)
{
  static const char *const keys[] = {
    "socket=", "tls-certificates=", "tls-psk-file=",
  };

  for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++)
    if (strncmp (p, keys[i], strlen (keys[i])) == 0)
      return strlen (keys[i]);
  return 0;
}

char *
remote_absolute_uri (const char *uri, struct error *err)
{
  CLEANUP_FREE char *cwd = getcwd (NULL, 0);
  const char *query = strchr (uri, '?');
  char *r, *to;

  if (cwd == NULL) {
    error_set (err, errno, "find the current folder: %m");
    return NULL;
  }
  /* Each key stands once, or libnbd refuses it. */
  r = to = malloc (strlen (uri) + 1 + 3 * (3 * strlen (cwd) + 1));
  if (r == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  if (query == NULL)
    return strcpy (r, uri);
  to = mempcpy (to, uri, query - uri);
  for (int files = 0; *query; ) {
    size_t n;

    *to++ = *query++; /* ?, & or ; */
    n = file_key (query);
    to = mempcpy (to, query, n);
    query += n;
    if (n > 0 && *query != '/' && strncasecmp (query, "%2f", 3) != 0 &&
        files++ < 3) {
      to = append_path (to, cwd);
      *to++ = '/';
    }
    n = strcspn (query, "&;");
    to = mempcpy (to, query, n);
    query += n;
  }
  *to = '\0';
  return r;
}
