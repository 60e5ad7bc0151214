/* nbdferry - threads that give way to others
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cleanup.h"
#include "giveway.h"

/* With that, a thread has a tenth of the time of one that it gives way to,
 * should both want all of a CPU.
 */
#define NICER 10
#define NICEST 19

static pthread_once_t once = PTHREAD_ONCE_INIT;
/* Read-only after 'once'. */
static bool can_take_back; /* that it is nicer */
static bool is_ordinary;   /* no other policy was chosen for the process */

pid_t
thread_number (void)
{
  return syscall (SYS_gettid);
}

/* In Linux a priority is a thread's.  That of the first one is as the process
 * was started.
 */
static int
usual (void)
{
  return getpriority (PRIO_PROCESS, getpid ());
}

/* In a thread of its own, which is nice in vain if it cannot take it back. */
static void *
try_it (void *arg UNUSED)
{
  int was = usual ();

  can_take_back = setpriority (PRIO_PROCESS, 0, was + 1) == 0 &&
                  setpriority (PRIO_PROCESS, 0, was) == 0;
  is_ordinary = sched_getscheduler (getpid ()) == SCHED_OTHER;
  return NULL;
}

static void
find_out (void)
{
  pthread_t thread;

  if (pthread_create (&thread, NULL, try_it, NULL) == 0)
    pthread_join (thread, NULL);
}

void
thread_give_way (pid_t tid, bool yes)
{
  const struct sched_param param = { 0 };
  int saved = errno;

  /* What fails of this leaves it as it was. */
  pthread_once (&once, find_out);
  if (is_ordinary)
    sched_setscheduler (tid, yes ? SCHED_BATCH : SCHED_OTHER, &param);
  if (can_take_back) {
    int nice = usual () + (yes ? NICER : 0);

    setpriority (PRIO_PROCESS, tid, nice < NICEST ? nice : NICEST);
  }
  errno = saved;
}
