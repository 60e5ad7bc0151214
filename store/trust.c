/* nbdferry - was the disk written to behind our back?
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Which rule is used depends on who had the files last:
 *
 *   we, closed in good order    size, inode and mtime are those of the record
 *   QEMU, in good order; or we, the disk's mtime is no later than the
 *   but without a record        sidecar's, which is written last
 *   we, crashed in this boot    the disk's mtime is no later than our last
 *                               write, and no earlier than when we began
 *   we, crashed in another one  the disk's mtime is not of this boot
 *
 * What is never looked at: ctime (chown, chmod, rename, labels, links), the
 * device number (which differs from boot to boot for many file systems), and
 * the sidecar's inode where another one is no fault: a state directory may be
 * copied.
 *
 * How exact times are.  The kernel stamps a file with its coarse clock, which
 * goes on once a tick (1 to 10 ms).  Kernels with multigrain timestamps (6.13
 * and later) stamp with the fine one if somebody has asked for the time since
 * the last stamp: up to a tick ahead of CLOCK_REALTIME_COARSE, which they
 * leave as it was.  So SLACK is two ticks of the slowest kernel.  It is all
 * that is needed when nothing was under way at the crash, because the end of
 * a write is noted as well.  If something was, the kernel may have gone on
 * with it after the process was as good as dead, behind a lock, a freeze, or
 * a slow disk: IN_FLIGHT is allowed then.
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"
#include "sigbus.h"
#include "trust.h"

#define NS        INT64_C (1000000000)
#define SLACK     (20 * NS / 1000)
#define IN_FLIGHT (30 * NS)

/* ---- the page ---- */

#define MAGIC     "FERRYLWR1"
#define PAGE      4096
#define SLOTS_AT  (PAGE - TRUST_SLOTS * sizeof (struct trust_slot))

/* What the page begins with. */
struct page_head {
  char magic[16];
  char boot_id[40];
  int64_t mtime; /* of the disk, when it was opened */
  uint32_t failed; /* the store has failed; see trust_note_failure */
};

#define NOT_WRITTEN INT64_MIN

_Static_assert (sizeof (struct trust_slot) == 64, "a cache line");
_Static_assert (SLOTS_AT >= sizeof (struct page_head), "they fit");

static void
read_left (const struct trust *t, const char *boot_id,
           struct trust_left *left)
{
  const struct page_head *h = t->page;

  memset (left, 0, sizeof *left);
  if (strncmp (h->magic, MAGIC, sizeof h->magic) != 0 || boot_id[0] == '\0' ||
      strncmp (h->boot_id, boot_id, sizeof h->boot_id) != 0)
    return;
  left->valid = true;
  left->failed = h->failed != 0;
  left->first = left->last = h->mtime;
  for (size_t i = 0; i < TRUST_SLOTS; i++) {
    int64_t last = atomic_load (&t->slot[i].last);

    if (last != NOT_WRITTEN && last > left->last)
      left->last = last;
    if (last != NOT_WRITTEN && last < left->first)
      left->first = last;
    left->in_flight |= atomic_load (&t->slot[i].inside) != 0;
  }
}

struct trust *
trust_open (const char *path, const char *boot_id, struct trust_left *left,
            struct error *err)
{
  struct trust *t = calloc (1, sizeof *t);
  struct stat st;

  if (t == NULL) {
    error_set (err, ENOMEM, "%s: %m", path);
    return NULL;
  }
  t->fd = open (path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK,
                0600);
  if (t->fd == -1 || fstat (t->fd, &st) == -1) {
    error_set (err, errno, "%s: open: %m", path);
    goto fail;
  }
  if (!S_ISREG (st.st_mode)) {
    error_set (err, EINVAL, "%s: is not a regular file", path);
    goto fail;
  }
  /* Allocated for real, so that no store into it can fail. */
  errno = st.st_size == PAGE ? 0 : ftruncate (t->fd, PAGE) == -1 ? errno : 0;
  if (errno == 0)
    errno = posix_fallocate (t->fd, 0, PAGE);
  if (errno != 0) {
    error_set (err, errno, "%s: cannot allocate it: %m", path);
    goto fail;
  }
  t->page = mmap (NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, t->fd, 0);
  if (t->page == MAP_FAILED) {
    t->page = NULL;
    error_set (err, errno, "%s: mmap: %m", path);
    goto fail;
  }
  /* Should somebody cut the file, writes go on; the next open finds that it
   * says nothing.
   */
  t->watch = sigbus_watch (t->page, PAGE, &t->lost, err);
  if (t->watch == NULL)
    goto fail;
  /* Once it is there it stays, so it cannot fail to be read again. */
  mlock (t->page, PAGE);
  t->slot = (struct trust_slot *) ((char *) t->page + SLOTS_AT);
  read_left (t, boot_id, left);
  return t;

 fail:
  trust_close (t);
  return NULL;
}

void
trust_start (struct trust *t, const char *boot_id, int64_t mtime)
{
  struct page_head *h = t->page;

  /* Killed between any two of these, it is of no boot, or says the same as
   * before, or all of it.
   */
  memset (h->boot_id, 0, sizeof h->boot_id);
  atomic_thread_fence (memory_order_seq_cst);
  for (size_t i = 0; i < TRUST_SLOTS; i++) {
    atomic_store (&t->slot[i].last, NOT_WRITTEN);
    atomic_store (&t->slot[i].inside, 0);
  }
  h->mtime = mtime;
  h->failed = 0;
  strncpy (h->magic, MAGIC, sizeof h->magic);
  atomic_thread_fence (memory_order_seq_cst);
  memcpy (h->boot_id, boot_id, strnlen (boot_id, sizeof h->boot_id - 1));
}

void
trust_note_failure (struct trust *t)
{
  if (t)
    ((struct page_head *) t->page)->failed = 1;
}

void
trust_close (struct trust *t)
{
  if (t == NULL)
    return;
  sigbus_unwatch (t->watch);
  if (t->page)
    munmap (t->page, PAGE);
  if (t->fd != -1)
    close (t->fd);
  free (t);
}

/* ---- looking ---- */

const char *
trust_time (int64_t ns, char text[TRUST_TIME_TEXT])
{
  time_t s = ns / NS;
  struct tm tm;

  if (gmtime_r (&s, &tm) == NULL
      || strftime (text, TRUST_TIME_TEXT, "%Y-%m-%d %H:%M:%S UTC", &tm) == 0)
    snprintf (text, TRUST_TIME_TEXT, "an unknown time");
  return text;
}

/* When the file was made, ns since 1970; 0: not every file system knows. */
static int64_t
birth_time (int fd)
{
  struct statx st;

  if (statx (fd, "", AT_EMPTY_PATH, STATX_BTIME, &st) == -1
      || !(st.stx_mask & STATX_BTIME))
    return 0;
  return st.stx_btime.tv_sec * NS + st.stx_btime.tv_nsec;
}

static int
look_at_sidecar (const char *path, const struct disk_times *disk,
                 struct disk_times *t, int64_t *born)
{
  CLEANUP_CLOSE int fd = open (path, O_PATH | O_CLOEXEC);
  struct stat st;

  if (fd == -1 || fstat (fd, &st) == -1)
    return -1;
  t->size = st.st_size;
  t->inode = st.st_ino;
  t->device = st.st_dev;
  t->mtime = st.st_mtim.tv_sec * NS + st.st_mtim.tv_nsec;
  t->local = t->device == disk->device
             || (disk->local && disk_has_local_times (fd));
  *born = birth_time (fd);
  return 0;
}

int
trust_look (struct trust_case *c, struct disk *disk, const char *sidecar,
            struct error *err)
{
  int r = disk->ops->times ? disk->ops->times (disk, &c->disk) : 1;

  if (r == -1)
    return error_set (err, errno, "stat %s: %m", c->disk_path);
  c->disk_has_times = r == 0;
  c->sidecar_exists = look_at_sidecar (sidecar, &c->disk, &c->sidecar,
                                       &c->sidecar_born) == 0;
  if (!c->sidecar_exists && errno != ENOENT)
    return error_set (err, errno, "stat %s: %m", sidecar);
  return 0;
}

int
trust_record (struct disk *disk, const char *sidecar, bool settled,
              struct journal_trust *t, struct error *err)
{
  struct disk_times d, s;
  int64_t last, born;
  int r = disk->ops->times ? disk->ops->times (disk, &d) : 1;

  memset (t, 0, sizeof *t);
  if (r == -1)
    return error_set (err, errno, "stat the disk: %m");
  if (r == 1)
    return 0;
  if (look_at_sidecar (sidecar, &d, &s, &born) == -1)
    return error_set (err, errno, "stat %s: %m", sidecar);
  /* A write in the same tick could get the same time.  A clock that was set
   * back would have us wait for long: then it must do without.
   */
  last = d.mtime > s.mtime ? d.mtime : s.mtime;
  for (int i = 0; settled && i < 20 && trust_now () <= last; i++)
    nanosleep (&(struct timespec){ .tv_nsec = NS / 1000 }, NULL);
  *t = (struct journal_trust){
    .known = true,
    .disk_size = d.size, .disk_inode = d.inode, .disk_mtime = d.mtime,
    .sidecar_size = s.size, .sidecar_inode = s.inode,
    .sidecar_mtime = s.mtime,
  };
  return 0;
}

/* ---- judging ---- */

/* Where the text goes; returns TRUST_BROKEN. */
static enum trust_verdict __attribute__ ((format (printf, 2, 3)))
broken (char *why, const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  vsnprintf (why, TRUST_WHY_MAX, fmt, args);
  va_end (args);
  return TRUST_BROKEN;
}

/* The end of a long path says more than its beginning. */
static const char *
short_path (const char *path)
{
  size_t n = strlen (path);

  if (n <= 300)
    return path;
  path += n - 300;
  while ((*path & 0xc0) == 0x80) /* not in the middle of a character */
    path++;
  return path;
}

static enum trust_verdict
judge_resized (const struct trust_case *c, char *why)
{
  uint64_t was = c->was->trust.disk_size, is = c->disk.size;

  broken (why, "%s was %s from %" PRIu64 " to %" PRIu64 " bytes while no "
          "daemon had it open%s; whether it was also written to cannot be "
          "told", short_path (c->disk_path), is > was ? "extended" : "cut",
          was, is, is > was ? "; what was added is dirty" : "");
  return TRUST_RESIZED;
}

bool
trust_sidecar_is_as_closed (const struct trust_case *c)
{
  const struct journal_trust *t = &c->was->trust;

  return c->was->clean && t->known && c->sidecar_exists &&
         c->sidecar.mtime == t->sidecar_mtime &&
         c->sidecar.size == t->sidecar_size;
}

bool
trust_sidecar_is_later (int64_t disk, int64_t sidecar)
{
  /* Some file systems know whole seconds only. */
  return disk <= sidecar + SLACK + (sidecar % NS == 0 ? 2 * NS : 0);
}

/* We closed it, and know how it was. */
static enum trust_verdict
judge_clean (const struct trust_case *c, char *why)
{
  const struct journal_trust *t = &c->was->trust;
  char at[TRUST_TIME_TEXT], was[TRUST_TIME_TEXT];

  if (c->disk.mtime != t->disk_mtime) {
    trust_time (c->disk.mtime, at);
    if (c->disk.mtime > t->disk_mtime)
      return broken (why, "%s was modified at %s while no daemon had it open",
                     short_path (c->disk_path), at);
    return broken (why, "%s was put back to an older state, of %s, while no "
                   "daemon had it open", short_path (c->disk_path), at);
  }
  /* An older one, or one that was overwritten: bits of another time.  A copy
   * has another inode, and the same time or a later one; some programs that
   * copy keep whole seconds only.  If what it was made of is gone it may have
   * got that inode's number, but it was made after we closed that.
   */
  if (c->found == QCOW2_CLEAN
      && (c->sidecar.mtime / NS + 2 < t->sidecar_mtime / NS
          || (c->sidecar.inode == t->sidecar_inode
              && c->sidecar.mtime != t->sidecar_mtime
              && c->sidecar_born <= t->sidecar_mtime)))
    return broken (why, "%s/bitmaps.qcow2 is of %s, and not of %s, when it "
                   "was closed", short_path (c->state_dir),
                   trust_time (c->sidecar.mtime, at),
                   trust_time (t->sidecar_mtime, was));
  return TRUST_KEPT;
}

/* Whoever had it last wrote the sidecar after the disk. */
static enum trust_verdict
judge_by_sidecar (const struct trust_case *c, char *why)
{
  const struct journal_trust *t = &c->was->trust;
  char at[TRUST_TIME_TEXT];

  /* As we left it, even if its time is in the future. */
  if (t->known && c->was->clean && c->disk.mtime == t->disk_mtime)
    return TRUST_KEPT;
  if (trust_sidecar_is_later (c->disk.mtime, c->sidecar.mtime))
    return TRUST_KEPT;
  if (!c->sidecar.local)
    return TRUST_UNVERIFIABLE;
  return broken (why, "%s was modified at %s, after %s had closed "
                 "bitmaps.qcow2", short_path (c->disk_path),
                 trust_time (c->disk.mtime, at),
                 c->found == QCOW2_FOREIGN ? "another program (QEMU)"
                                           : "nbdferry");
}

/* When this boot began, by the clock as it is now. */
static int64_t
boot_time (void)
{
  const char *test = getenv ("FERRY_TEST_BOOT_TIME");
  struct timespec now, up;

  if (test)
    return strtoll (test, NULL, 10) * NS;
  clock_gettime (CLOCK_REALTIME, &now);
  if (getenv ("FERRY_TEST_BOOT_ID")) /* a reboot is played: just now */
    up = (struct timespec){ 0 };
  else
    clock_gettime (CLOCK_BOOTTIME, &up);
  return (now.tv_sec - up.tv_sec) * NS + now.tv_nsec - up.tv_nsec;
}

static enum trust_verdict
judge_other_boot (const struct trust_case *c, char *why)
{
  int64_t boot = boot_time (), now = trust_now ();
  char at[TRUST_TIME_TEXT];

  /* A time in the future says that the clock is wrong, and no more. */
  if (c->disk.mtime <= boot || c->disk.mtime > now + NS)
    return TRUST_KEPT;
  return broken (why, "%s was modified at %s, after the machine had been "
                 "started again, while no daemon had it open",
                 short_path (c->disk_path), trust_time (c->disk.mtime, at));
}

/* We died.  When the clock was set back meanwhile, our last write may be
 * earlier than the open.
 */
static enum trust_verdict
judge_crash (const struct trust_case *c, char *why)
{
  const struct journal_trust *t = &c->was->trust;
  int64_t slack = c->left.in_flight ? IN_FLIGHT : SLACK, first;
  char at[TRUST_TIME_TEXT], last[TRUST_TIME_TEXT], boot[37];

  journal_boot_id (boot);
  if (boot[0] == '\0' || strcmp (boot, c->was->boot_id) != 0)
    return judge_other_boot (c, why);
  if (!c->left.valid)
    return broken (why, "%s/lastwrite is missing or damaged: nobody can say "
                   "whether %s was written to after a daemon had died",
                   c->state_dir, short_path (c->disk_path));
  trust_time (c->disk.mtime, at);
  trust_time (c->left.last, last);
  if (c->disk.mtime > c->left.last + slack)
    return broken (why, "%s was modified at %s, after a daemon had died "
                   "whose last write was at %s", short_path (c->disk_path),
                   at, last);
  first = t->known && t->disk_mtime < c->left.first ? t->disk_mtime
                                                    : c->left.first;
  if (c->disk.mtime < first - SLACK)
    return broken (why, "%s was put back to an older state, of %s, after a "
                   "daemon had died whose last write was at %s",
                   short_path (c->disk_path), at, last);
  return TRUST_KEPT;
}

enum trust_verdict
trust_judge (const struct trust_case *c, char why[TRUST_WHY_MAX])
{
  const struct journal_trust *t = &c->was->trust;
  bool crashed = c->found == QCOW2_UNCLEAN || c->found == QCOW2_LOST;

  why[0] = '\0';
  if (c->found == QCOW2_CREATED || !c->sidecar_exists)
    return c->disk_has_times ? TRUST_KEPT : TRUST_UNVERIFIABLE;
  if (c->no_journal && crashed)
    return broken (why, "%s/journal is missing, and bitmaps.qcow2 was not "
                   "closed in good order", short_path (c->state_dir));
  if (!c->disk_has_times)
    return TRUST_UNVERIFIABLE;
  if (t->known && t->disk_inode != c->disk.inode)
    return broken (why, "%s was replaced by another file (inode %" PRIu64
                   " instead of %" PRIu64 ") while no daemon had it open",
                   short_path (c->disk_path), c->disk.inode, t->disk_inode);
  if (t->known && t->disk_size != c->disk.size)
    return judge_resized (c, why);
  if (c->found == QCOW2_FOREIGN)
    return judge_by_sidecar (c, why);
  /* A sidecar that QEMU had is made anew, with its time, before the journal
   * says so: then we were killed in between.
   */
  if (c->was->clean && t->known && crashed
      && c->disk.mtime != t->disk_mtime
      && c->sidecar.inode != t->sidecar_inode)
    return judge_by_sidecar (c, why);
  if (c->was->clean && t->known)
    return judge_clean (c, why);
  if (!crashed && !c->no_bitmaps)
    return judge_by_sidecar (c, why);
  return c->disk.local ? judge_crash (c, why) : TRUST_UNVERIFIABLE;
}
