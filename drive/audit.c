/* nbdferry - is a bitmap right?
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Why a writer raises no false alarm.  A write marks its granules before its
 * data is submitted, so data that we have read and that it has changed was
 * marked before we read it.  We look at the bit after we have read, so we see
 * the mark, unless somebody has cleared it in between.  Nobody can: the
 * bitmap is busy, and operations on it are refused.  But a clear that came
 * before may have taken the mark of a write which was under way then; that
 * write marks again at its end.  So once the bitmap has become busy, all writes
 * that are inside the gate are waited for.
 *
 * What is not seen is a write without a mark that is later overwritten with
 * what the reference has, or that gets its bit from a later write.
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "audit.h"
#include "cleanup.h"

#define BUFFER       (1 << 20)
#define MIN_UNIT     4096
#define UNITS        256 /* in a granule, at most, if they are larger */
#define TIMEOUT_MS   30000

struct reference {
  struct disk *file;  /* one of these */
  struct client *nbd;
  uint64_t size;
};

struct auditor {
  struct drive *d;
  const struct bitmap *bits; /* stays, because it is busy */
  struct reference ref;
  struct audit *result;
  char *ours, *theirs;       /* BUFFER bytes each */
  bool differs;              /* the granule that we are in, so far */
  bool nomem;
};

/* ---- the bitmap ---- */

/* The bitmap, made busy.  NULL on error. */
static struct named_bitmap *
take_bitmap (struct drive *d, const char *name, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);
  struct named_bitmap *nb = drive_find_bitmap (d, name);

  if (d->mode != DRIVE_ACTIVE)
    error_set (err, EPERM, "disk '%s' is not active here, so its bitmaps say "
               "nothing", d->name);
  else if (nb == NULL)
    error_set (err, ENOENT, "Dirty bitmap '%s' not found", name);
  else if (nb->busy || nb->incoming)
    error_set (err, EBUSY, "Bitmap '%s' is currently in use by another "
               "operation and cannot be used", name);
  else if (nb->inconsistent || nb->bits == NULL)
    error_set (err, EINVAL, "Bitmap '%s' is inconsistent and cannot be used",
               name);
  else if (nb->persistent && drive_failure (d))
    error_set (err, EIO, "Bitmap '%s' cannot be used: %s has failed (%s)",
               name, d->sidecar, drive_failure (d));
  else {
    pthread_mutex_lock (&d->list);
    nb->busy = true;
    pthread_mutex_unlock (&d->list);
    return nb;
  }
  return NULL;
}

static void
give_back (struct drive *d, struct named_bitmap *nb)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);

  pthread_mutex_lock (&d->list);
  nb->busy = false;
  pthread_mutex_unlock (&d->list);
}

/* ---- the reference ---- */

static bool
is_uri (const char *s)
{
  return strncmp (s, "nbd", 3) == 0 && strstr (s, "://");
}

/* What it must not be; that it cannot be opened is told later. */
static int
check_file (const char *path, const char *disk, struct error *err)
{
  CLEANUP_CLOSE int fd = open (path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  struct stat a, b;
  char magic[4];

  if (fd == -1 || fstat (fd, &a) == -1)
    return 0;
  if (stat (disk, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino)
    return error_set (err, EINVAL, "%s: is the disk itself", path);
  /* Others, such as a FIFO, may keep who opens them waiting for ever. */
  if (!S_ISREG (a.st_mode) && !S_ISBLK (a.st_mode))
    return error_set (err, EINVAL, "%s: is neither a regular file nor a block "
                      "device", path);
  if (pread (fd, magic, sizeof magic, 0) == sizeof magic &&
      memcmp (magic, "QFI\xfb", sizeof magic) == 0)
    return error_set (err, EINVAL, "%s: is a qcow2 image; have \"qemu-nbd -r\" "
                      "serve it, and give the URI of that", path);
  return 0;
}

static int
open_reference (struct reference *ref, const char *where, const char *disk,
                const struct stop *stop, struct error *err)
{
  if (is_uri (where)) {
    ref->nbd = client_connect (where, NULL, stop, TIMEOUT_MS, err);
    if (ref->nbd == NULL)
      return -1;
    client_set_timeout (ref->nbd, TIMEOUT_MS);
    ref->size = client_size (ref->nbd);
    return 0;
  }
  if (where[0] != '/')
    return error_set (err, EINVAL, "%s: must be an absolute path or an NBD "
                      "URI", where);
  if (check_file (where, disk, err) == -1)
    return -1;
  ref->file = disk_open_file (where, 0, true, err);
  if (ref->file == NULL)
    return -1;
  ref->size = ref->file->size;
  return 0;
}

static void
close_reference (struct reference *ref)
{
  if (ref->file)
    ref->file->ops->close (ref->file);
  if (ref->nbd)
    client_close (ref->nbd);
}

/* Is there a hole, or are there zeros, at 'at'?  'end' is cut to its end. */
static bool
reference_is_zero (struct reference *ref, uint64_t at, uint64_t *end)
{
  struct extent ext = { .type = EXTENT_DATA };
  int r;

  if (ref->nbd)
    r = client_can_extents (ref->nbd)
      ? client_extent (ref->nbd, at, *end, &ext) : -1;
  else
    r = ref->file->ops->extent (ref->file, at, *end, &ext);
  /* If that fails, reading will tell. */
  if (r == -1 || ext.type == EXTENT_DATA)
    return false;
  *end = ext.end;
  return true;
}

static int
reference_read (struct reference *ref, void *buf, size_t len, uint64_t at)
{
  return ref->nbd ? client_pread (ref->nbd, buf, len, at)
                  : ref->file->ops->pread (ref->file, buf, len, at);
}

/* ---- comparing ---- */

static void
add_missed (struct auditor *a, uint64_t start, uint64_t end)
{
  struct audit *res = a->result;
  struct range *last = res->nr ? &res->ranges[res->nr - 1] : NULL;

  res->missed += end - start;
  if (last && last->end == start) {
    last->end = end;
    return;
  }
  if ((res->nr & (res->nr - 1)) == 0) { /* 0, or a power of two: full */
    size_t room = res->nr ? res->nr * 2 : 1;

    last = reallocarray (res->ranges, room, sizeof *last);
    if (last == NULL) {
      a->nomem = true;
      return;
    }
    res->ranges = last;
  }
  res->ranges[res->nr++] = (struct range){ start, end };
}

/* Nothing differs in [start, end), nor did yet in the granule of 'start':
 * where something is marked, or the beginning of the last granule.
 */
static uint64_t
skip_clean (struct auditor *a, uint64_t start, uint64_t end)
{
  uint64_t last = end == a->result->size ? end
                                         : end & -a->result->granularity;
  struct range run;

  if (start % a->result->granularity != 0 || last <= start)
    return start;
  return bitmap_next_dirty (a->bits, start, last, &run) ? run.start : last;
}

/* What is known of [start, end), in ascending order.  It has been read. */
static void
account (struct auditor *a, uint64_t start, uint64_t end, bool differs)
{
  struct audit *res = a->result;
  const uint64_t g = res->granularity;

  if (differs)
    res->differing += end - start;
  while (start < end) {
    uint64_t granule, granule_end, stop;

    if (!differs && (start = skip_clean (a, start, end)) == end)
      break;
    granule = start & -g;
    granule_end = res->size - granule > g ? granule + g : res->size;
    stop = end < granule_end ? end : granule_end;
    if (differs) {
      a->differs = true;
      if (!bitmap_test (a->bits, start))
        add_missed (a, start, stop);
    }
    if (stop == granule_end) {
      if (bitmap_test (a->bits, granule)) {
        res->dirty += granule_end - granule;
        if (!a->differs)
          res->over_marked += granule_end - granule;
      }
      a->differs = false;
    }
    start = stop;
  }
}

/* 'len' bytes at 'at' are in both buffers. */
static void
compare (struct auditor *a, uint64_t at, size_t len)
{
  const size_t unit = a->result->unit;
  size_t from = 0;
  bool before = false;

  for (size_t i = 0; i < len; i += unit) {
    size_t n = len - i < unit ? len - i : unit;
    bool differs = memcmp (a->ours + i, a->theirs + i, n) != 0;

    if (differs != before) {
      account (a, at + from, at + i, before);
      from = i;
      before = differs;
    }
  }
  account (a, at + from, at + len, before);
}

static int
read_both (struct auditor *a, uint64_t at, size_t len,
           const char *reference, struct error *err)
{
  uint64_t size = a->ref.size;
  size_t n = at >= size ? 0 : size - at < len ? size - at : len;
  bool active;

  if (n > 0 && reference_read (&a->ref, a->theirs, n, at) == -1)
    return error_set (err, errno, "%s: reading %zu bytes at %" PRIu64 ": %m",
                      reference, n, at);
  if (drive_pread (a->d, a->ours, len, at) == -1)
    return error_set (err, errno, "%s: reading %zu bytes at %" PRIu64 ": %m",
                      a->d->path, len, at);
  /* What the reference does not have differs. */
  for (size_t i = n; i < len; i++)
    a->theirs[i] = ~a->ours[i];
  /* A write that another server has got bears no mark here. */
  pthread_mutex_lock (&a->d->list);
  active = a->d->mode == DRIVE_ACTIVE;
  pthread_mutex_unlock (&a->d->list);
  return active ? 0 : error_set (err, ESHUTDOWN, "disk '%s' was handed over "
                                 "to another server meanwhile", a->d->name);
}

/* [at, end) as far as it is zeros on both sides, in whole units (of which none
 * lies in two granules): its end, or 'at'.
 */
static uint64_t
skip_zeros (struct auditor *a, uint64_t at, uint64_t end)
{
  struct extent ext;

  if (at >= a->ref.size)
    return at;
  if (end > a->ref.size)
    end = a->ref.size;
  if (!reference_is_zero (&a->ref, at, &end) ||
      drive_extent (a->d, at, end, &ext) == -1 || ext.type == EXTENT_DATA)
    return at;
  end = ext.end == a->result->size ? ext.end : ext.end & -a->result->unit;
  return end > at ? end : at;
}

static int
audit (struct auditor *a, const struct audit_options *opt, uint64_t end,
       struct error *err)
{
  struct audit *res = a->result;
  uint64_t at = opt->offset;

  while (at < end) {
    size_t most = BUFFER - at % BUFFER;
    size_t len = end - at < most ? end - at : most;
    uint64_t zeros = skip_zeros (a, at, end);

    if (stop_wait (opt->stop, 0))
      return error_set (err, ECANCELED, "given up: the client has gone, or the daemon "
                        "is ending");
    if (zeros > at) {
      /* Not read, but looked at just the same. */
      account (a, at, zeros, false);
      at = zeros;
    }
    else {
      if (read_both (a, at, len, opt->reference, err) == -1)
        return -1;
      compare (a, at, len);
      at += len;
    }
    if (a->nomem)
      return error_set (err, ENOMEM, "%m");
    if (res->nr >= AUDIT_MAX_RANGES && at % res->granularity == 0)
      break;
  }
  res->next = at;
  return 0;
}

/* What has to be compared: its end, on a granule's boundary. */
static int
choose_range (const struct audit_options *opt, struct audit *res,
              uint64_t *end, struct error *err)
{
  uint64_t left;

  if (opt->offset % res->granularity != 0 || opt->offset > res->size)
    return error_set (err, EINVAL, "'offset' must be a multiple of the "
                      "bitmap's granularity, %" PRIu64 ", within the disk",
                      res->granularity);
  left = res->size - opt->offset;
  *end = res->size;
  if (opt->length < left) {
    left = opt->length + (-opt->length & (res->granularity - 1));
    if (left < res->size - opt->offset)
      *end = opt->offset + left;
  }
  return 0;
}

static void
describe (struct audit *res, const struct named_bitmap *nb, uint64_t size)
{
  uint64_t g = bitmap_granularity (nb->bits);

  *res = (struct audit){ .size = size, .granularity = g,
                         .recording = nb->recording };
  res->unit = g / UNITS > MIN_UNIT ? g / UNITS : g < MIN_UNIT ? g : MIN_UNIT;
  if (res->unit > BUFFER)
    res->unit = BUFFER;
}

int
drive_audit (struct drive *d, const struct audit_options *opt,
             struct audit *result, struct error *err)
{
  struct auditor a = { .d = d, .result = result };
  struct named_bitmap *nb = take_bitmap (d, opt->bitmap, err);
  uint64_t end = 0;
  int r = -1;

  *result = (struct audit){ 0 };
  if (nb == NULL)
    return -1;
  /* Every write that began before is marked for good now. */
  gate_synchronize (&d->writes);

  a.bits = nb->bits;
  describe (result, nb, d->size);
  a.ours = malloc (BUFFER);
  a.theirs = malloc (BUFFER);
  if (a.ours == NULL || a.theirs == NULL)
    error_set (err, ENOMEM, "%m");
  else if (choose_range (opt, result, &end, err) == 0 &&
           open_reference (&a.ref, opt->reference, d->path, opt->stop,
                           err) == 0) {
    result->reference_size = a.ref.size;
    r = audit (&a, opt, end, err);
  }
  close_reference (&a.ref);
  give_back (d, nb);
  free (a.ours);
  free (a.theirs);
  return r;
}
