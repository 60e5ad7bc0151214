/* nbdferry - a long link between two network namespaces, for benchmarks
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * usage: wanlink NETNS-A NETNS-B DEVICE DELAY-US BITS-A-SECOND QUEUE-MS
 *
 * Makes a TUN device in each namespace and carries packets between them: each
 * waits for the ones before it at the given rate, and arrives DELAY later; one
 * that would wait longer than QUEUE is dropped.  So real TCP runs over it, with
 * its windows, its slow start and its losses.  Says "ready" once the devices
 * are there, and ends with SIGTERM.
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include <linux/if.h>
#include <linux/if_tun.h>

#define MAX_PACKET 65536
#define RING       16384 /* packets on the way; more are dropped */
#define NS         UINT64_C (1000000000)

struct packet {
  uint64_t due; /* ns */
  size_t len;
  uint8_t *data;
};

struct direction {
  int from, to;
  struct packet ring[RING];
  unsigned first, nr;
  uint64_t free_at; /* ns: when the line has sent all it has */
  uint64_t packets, drops;
};

static uint64_t delay, queue; /* ns */
static double ns_per_byte;
static struct direction directions[2];

static uint64_t
now (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return ts.tv_sec * NS + ts.tv_nsec;
}

static void
fail (const char *what)
{
  fprintf (stderr, "wanlink: %s: %s\n", what, strerror (errno));
  exit (1);
}

static int
open_tun (const char *netns, const char *device)
{
  struct ifreq r = { .ifr_flags = IFF_TUN | IFF_NO_PI };
  char path[256];
  int ns, fd;

  snprintf (path, sizeof path, "/run/netns/%s", netns);
  ns = open (path, O_RDONLY | O_CLOEXEC);
  if (ns == -1 || setns (ns, CLONE_NEWNET) == -1)
    fail (path);
  close (ns);
  fd = open ("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
  snprintf (r.ifr_name, sizeof r.ifr_name, "%s", device);
  if (fd == -1 || ioctl (fd, TUNSETIFF, &r) == -1)
    fail ("/dev/net/tun");
  return fd;
}

static void
deliver (struct direction *d)
{
  uint64_t t = now ();

  while (d->nr > 0 && d->ring[d->first].due <= t) {
    struct packet *p = &d->ring[d->first];

    if (write (d->to, p->data, p->len) == -1 && errno == EAGAIN)
      break;
    d->first = (d->first + 1) % RING;
    d->nr--;
  }
}

/* Take one packet in; false: there is none. */
static bool
take (struct direction *d)
{
  static _Thread_local uint8_t spare[MAX_PACKET];
  struct packet *p = &d->ring[(d->first + d->nr) % RING];
  uint64_t t, begins;
  ssize_t n;

  if (p->data == NULL && (p->data = malloc (MAX_PACKET)) == NULL)
    fail ("malloc");
  n = read (d->from, d->nr < RING ? p->data : spare, MAX_PACKET);
  if (n <= 0)
    return false;
  t = now ();
  begins = d->free_at > t ? d->free_at : t;
  d->packets++;
  if (d->nr == RING || begins - t > queue) {
    d->drops++;
    return true;
  }
  d->free_at = begins + n * ns_per_byte;
  p->due = d->free_at + delay;
  p->len = n;
  d->nr++;
  return true;
}

static void *
carry (void *arg)
{
  struct direction *d = arg;

  for (;;) {
    struct pollfd pfd = { .fd = d->from, .events = POLLIN };
    struct timespec ts = { .tv_sec = 1 };
    unsigned i = 0;

    deliver (d);
    while (i < 32 && take (d))
      i++;
    if (i == 32)
      continue;
    if (d->nr > 0) {
      uint64_t t = now (), due = d->ring[d->first].due;
      uint64_t wait = due > t ? due - t : 0;

      /* Not for every single packet. */
      if (wait < 50000)
        wait = 50000;
      ts = (struct timespec){ wait / NS, wait % NS };
    }
    ppoll (&pfd, 1, &ts, NULL);
  }
  return NULL;
}

int
main (int argc, char **argv)
{
  sigset_t set;
  int a, b, sig;

  if (argc != 7) {
    fprintf (stderr, "usage: wanlink NETNS-A NETNS-B DEVICE DELAY-US "
             "BITS-A-SECOND QUEUE-MS\n");
    return 2;
  }
  a = open_tun (argv[1], argv[3]);
  b = open_tun (argv[2], argv[3]);
  delay = strtoull (argv[4], NULL, 10) * 1000;
  ns_per_byte = 8e9 / strtod (argv[5], NULL);
  queue = strtoull (argv[6], NULL, 10) * 1000000;
  sigemptyset (&set);
  sigaddset (&set, SIGTERM);
  sigaddset (&set, SIGINT);
  pthread_sigmask (SIG_BLOCK, &set, NULL);
  for (int i = 0; i < 2; i++) {
    pthread_t thread;

    directions[i].from = i == 0 ? a : b;
    directions[i].to = i == 0 ? b : a;
    if (pthread_create (&thread, NULL, carry, &directions[i]) != 0)
      fail ("start a thread");
  }
  printf ("ready\n");
  fflush (stdout);
  sigwait (&set, &sig);
  fprintf (stderr, "wanlink: %ju and %ju packets, %ju and %ju dropped\n",
           (uintmax_t) directions[0].packets,
           (uintmax_t) directions[1].packets,
           (uintmax_t) directions[0].drops, (uintmax_t) directions[1].drops);
  return 0;
}
