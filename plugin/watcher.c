/* nbdferry - the thread that ends the daemon in good order
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * nbdkit, once told to stop, waits for its clients without limit, and an idle
 * one may never leave.  So a thread sleeps in nbdkit_nanosleep, which returns
 * at once at shutdown.  It closes the drives, while clients are still there,
 * and then hangs up on them.
 *
 * nbdkit does not tell which sockets are its clients', but by then no other
 * connected stream socket of this process matters.  Only the reading side is
 * shut: nbdkit takes that for a client that has gone, and can still send the
 * replies that are due (before its commit 9d82aa4f it aborts if it cannot).
 * A client that does not even take its replies is waited for a moment; then
 * the process ends without it.
 */
#include <config.h>

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "cleanup.h"
#include "clock.h"
#include "house.h"
#include "watcher.h"

#define PATIENCE (3 * NS_PER_S)

static pthread_t thread;
static bool started; /* the main thread's */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t left; /* 'joined' became true */
static bool joined;         /* protected by lock: nbdkit has no clients */

static bool
is_connected_stream (int fd)
{
  int type, listening;
  socklen_t len = sizeof type;
  struct sockaddr_storage peer;
  socklen_t peer_len = sizeof peer;

  if (getsockopt (fd, SOL_SOCKET, SO_TYPE, &type, &len) == -1 ||
      type != SOCK_STREAM)
    return false;
  len = sizeof listening;
  if (getsockopt (fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &len) == -1 ||
      listening)
    return false;
  return getpeername (fd, (struct sockaddr *) &peer, &peer_len) == 0;
}

static void
hang_up (void)
{
  DIR *dir = opendir ("/proc/self/fd");
  struct dirent *e;

  if (dir == NULL)
    return; /* idle clients must leave by themselves then */
  while ((e = readdir (dir)) != NULL) {
    int fd = atoi (e->d_name);

    if (e->d_name[0] != '.' && fd > STDERR_FILENO && is_connected_stream (fd))
      shutdown (fd, SHUT_RD);
  }
  closedir (dir);
}

static bool
clients_left (void)
{
  struct timespec until;
  bool r;

  clock_in (&until, PATIENCE);
  pthread_mutex_lock (&lock);
  while (!joined &&
         pthread_cond_timedwait (&left, &lock, &until) != ETIMEDOUT)
    ;
  r = joined;
  pthread_mutex_unlock (&lock);
  return r;
}

static void *
watch (void *arg UNUSED)
{
  while (nbdkit_nanosleep (INT_MAX / 2, 0) == 0)
    ;
  house_shutdown ();
  hang_up ();
  if (!clients_left ()) {
    nbdkit_error ("some client does not take its replies; ending without it");
    _exit (EXIT_SUCCESS);
  }
  return NULL;
}

int
watcher_start (struct error *err)
{
  int r;

  clock_cond_init (&left);
  r = pthread_create (&thread, NULL, watch, NULL);
  if (r != 0)
    return error_set (err, r, "start a thread: %m");
  started = true;
  return 0;
}

void
watcher_join (void)
{
  if (!started)
    return;
  pthread_mutex_lock (&lock);
  joined = true;
  pthread_cond_signal (&left);
  pthread_mutex_unlock (&lock);
  nbdkit_shutdown (); /* with -s or --run nobody may have said so yet */
  pthread_join (thread, NULL);
  started = false;
}
