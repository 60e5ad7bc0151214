/* nbdferry - storage errors under a mapped file
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The handler may run in any thread, whatever locks that thread has, and so
 * it takes none, and makes system calls only.  It looks through all ranges
 * there ever were: blocks of them are added in front of a list, used again,
 * and never freed.
 *
 * A range that is being changed has an odd 'version'.  The handler passes over
 * those, and over those that change while it looks: they cannot be what it
 * looks for, because a range is watched before it is touched first, and until
 * it is touched last.
 */
#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cleanup.h"
#include "sigbus.h"

struct sigbus_range {
  atomic_uint version; /* odd: being changed; all are seq_cst */
  atomic_uintptr_t start, end; /* equal: unused */
  _Atomic (atomic_bool *) failed;
};

#define BLOCK_RANGES 64

struct block {
  struct block *next; /* read-only once it is in the list */
  struct sigbus_range range[BLOCK_RANGES];
};

static struct block *_Atomic blocks;

/* Set before the handler is installed, read-only from then on. */
static uintptr_t page_size;
static struct sigaction previous;

/* Protects 'installed', and who changes ranges. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool installed;

/* ---- in the handler ---- */

/* The flag of the range that holds 'addr', or NULL. */
static atomic_bool *
find_flag (uintptr_t addr)
{
  for (struct block *b = atomic_load (&blocks); b; b = b->next)
    for (size_t i = 0; i < BLOCK_RANGES; i++) {
      struct sigbus_range *r = &b->range[i];
      unsigned version = atomic_load (&r->version);
      uintptr_t start = atomic_load (&r->start);
      uintptr_t end = atomic_load (&r->end);
      atomic_bool *failed = atomic_load (&r->failed);

      if (version % 2 == 0 && addr >= start && addr < end &&
          atomic_load (&r->version) == version)
        return failed;
    }
  return NULL;
}

/* libc's mmap may be somebody's wrapper that takes locks. */
static void *
new_page (void)
{
#ifdef SYS_mmap2
  long nr = SYS_mmap2;
#else
  long nr = SYS_mmap;
#endif

  return (void *) syscall (nr, NULL, page_size, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

/* Put a page of ones there, in one step: another thread sees the fault, and
 * comes here too, or the ones.  The page is this thread's alone until then; but
 * ThreadSanitizer does not see our system calls, and takes a page that the
 * kernel gives out again, at the address of one that was moved away, for the
 * old one.  So it must not look.
 */
__attribute__ ((no_sanitize ("thread"))) static bool
replace_page (uintptr_t addr)
{
  void *page = new_page ();

  if (page == MAP_FAILED)
    return false;
  for (size_t i = 0; i < page_size / sizeof (uint64_t); i++)
    ((volatile uint64_t *) page)[i] = UINT64_MAX;
  if (syscall (SYS_mremap, page, page_size, page_size,
               MREMAP_MAYMOVE | MREMAP_FIXED, addr & ~(page_size - 1)) != -1)
    return true;
  syscall (SYS_munmap, page, page_size);
  return false;
}

/* Not ours. */
static void
pass_on (int sig, siginfo_t *info, void *context)
{
  bool sent = info->si_code <= 0; /* by kill, and not by a fault */

  if (previous.sa_flags & SA_SIGINFO)
    previous.sa_sigaction (sig, info, context);
  else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN)
    previous.sa_handler (sig);
  else if (previous.sa_handler == SIG_DFL || !sent) {
    /* It comes again as soon as we have returned, and kills. */
    struct sigaction dfl = { .sa_handler = SIG_DFL };

    sigaction (sig, &dfl, NULL);
    if (sent)
      raise (sig);
  }
}

static void
on_sigbus (int sig, siginfo_t *info, void *context)
{
  int saved = errno;
  uintptr_t addr = (uintptr_t) info->si_addr;
  atomic_bool *failed = NULL;

  if (info->si_code == BUS_ADRERR || info->si_code == BUS_OBJERR
#ifdef BUS_MCEERR_AR
      || info->si_code == BUS_MCEERR_AR
#endif
      )
    failed = find_flag (addr);
  if (failed)
    atomic_store (failed, true);
  if (failed == NULL || !replace_page (addr))
    pass_on (sig, info, context);
  errno = saved;
}

/* ---- outside; with the lock held ---- */

/* Once and for all: whoever comes after us may call us. */
static int
install (void)
{
  struct sigaction sa = { .sa_sigaction = on_sigbus,
                          .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART };

  if (installed)
    return 0;
  page_size = sysconf (_SC_PAGESIZE);
  sigemptyset (&sa.sa_mask);
  if (sigaction (SIGBUS, NULL, &previous) == -1 ||
      sigaction (SIGBUS, &sa, NULL) == -1)
    return -1;
  installed = true;
  return 0;
}

static struct sigbus_range *
unused_range (void)
{
  struct block *b;

  for (b = atomic_load (&blocks); b; b = b->next)
    for (size_t i = 0; i < BLOCK_RANGES; i++)
      if (atomic_load (&b->range[i].end) == 0)
        return &b->range[i];
  b = calloc (1, sizeof *b);
  if (b == NULL)
    return NULL;
  b->next = atomic_load (&blocks);
  atomic_store (&blocks, b);
  return &b->range[0];
}

static void
change (struct sigbus_range *r, void *addr, size_t len, atomic_bool *failed)
{
  atomic_fetch_add (&r->version, 1);
  atomic_store (&r->start, (uintptr_t) addr);
  atomic_store (&r->end, (uintptr_t) addr + len);
  atomic_store (&r->failed, failed);
  atomic_fetch_add (&r->version, 1);
}

struct sigbus_range *
sigbus_watch (void *addr, size_t len, atomic_bool *failed, struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  struct sigbus_range *r = unused_range ();

  if (r == NULL || install () == -1) {
    error_set (err, errno, "cannot watch for storage errors: %m");
    return NULL;
  }
  change (r, addr, len, failed);
  return r;
}

void
sigbus_report_to (struct sigbus_range *r, atomic_bool *failed)
{
  atomic_bool *old = atomic_exchange (&r->failed, failed);

  if (atomic_load (old))
    atomic_store (failed, true);
}

void
sigbus_unwatch (struct sigbus_range *r)
{
  if (r == NULL)
    return;
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&lock);
  change (r, NULL, 0, NULL);
}
