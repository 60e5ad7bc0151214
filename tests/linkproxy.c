/* nbdferry - a link, as slow, narrow and unreliable as a test wants it
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * usage: linkproxy [OPTION]... PORT
 *
 * Relays TCP connections to that port of 127.0.0.1.  Prints the port that it
 * listens on.  Both directions are alike:
 *
 *   --delay MS      how long a byte is on its way, one way
 *   --rate BYTES    a second, of all connections together
 *   --window BYTES  of a connection may be on their way or not yet
 *                   acknowledged (a round trip), as in TCP
 *   --jitter MS     each connection's bytes take up to so much longer now and
 *                   then, so that what one carries overtakes another's
 *
 * Commands on standard input, a line each; each is answered by a line "ok",
 * or what it asks for:
 *
 *   stall, go       nothing moves; all moves again
 *   cut, mend       all connections are reset, and new ones; no more
 *   bytes           how many have been taken in towards the port, and from it
 *
 * It ends with standard input.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONNS 256
#define PIECE     (32 << 10) /* bytes that are taken in at a time */
#define RING      4096       /* pieces that are under way, at most */
#define QUEUE_NS  (5 * UINT64_C (1000000)) /* of the link, if it has a rate */
#define NS_PER_S  UINT64_C (1000000000)

struct piece {
  uint8_t *data;
  size_t len, done;
  uint64_t deliver, acked; /* ns: when it arrives; when that is known */
};

/* One direction of a connection. */
struct way {
  int from, to;
  unsigned link;           /* 0: towards the port */
  struct piece ring[RING];
  unsigned first, nr;      /* [first, first + nr) are to be delivered */
  unsigned acks;           /* and so many before them to be acknowledged */
  size_t in_flight;        /* bytes of both */
  uint64_t last;           /* ns: when the last one is delivered */
  bool ended, shut;
};

struct conn {
  struct way way[2];
  int fd[2];
};

static uint64_t delay_ns, jitter_ns, rate, free_at[2], bytes[2];
static size_t window = SIZE_MAX;
static bool stalled, cutting;
static struct conn *conns[MAX_CONNS];
static unsigned nr_conns;
static int listener, target;

static uint64_t
now_ns (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return ts.tv_sec * NS_PER_S + ts.tv_nsec;
}

static void
die (const char *what)
{
  perror (what);
  exit (1);
}

/* ---- connections ---- */

static void
drop (unsigned i, bool reset)
{
  struct linger linger = { .l_onoff = 1 };
  struct conn *c = conns[i];

  for (int k = 0; k < 2; k++) {
    struct way *w = &c->way[k];

    for (unsigned n = 0; n < w->nr; n++)
      free (w->ring[(w->first + n) % RING].data);
    if (reset)
      setsockopt (c->fd[k], SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    close (c->fd[k]);
  }
  free (c);
  conns[i] = conns[--nr_conns];
}

static void
make_ready (int fd)
{
  int one = 1;

  fcntl (fd, F_SETFL, O_NONBLOCK);
  setsockopt (fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static void
add_connection (void)
{
  struct sockaddr_in a = { .sin_family = AF_INET,
                           .sin_port = htons (target),
                           .sin_addr.s_addr = htonl (INADDR_LOOPBACK) };
  struct linger linger = { .l_onoff = 1 };
  int one = accept (listener, NULL, NULL), other;
  struct conn *c;

  if (one == -1)
    return;
  other = socket (AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (cutting || nr_conns == MAX_CONNS ||
      connect (other, (struct sockaddr *) &a, sizeof a) == -1) {
    setsockopt (one, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    close (one);
    close (other);
    return;
  }
  make_ready (one);
  make_ready (other);
  c = calloc (1, sizeof *c);
  if (c == NULL)
    die ("calloc");
  c->fd[0] = one;
  c->fd[1] = other;
  c->way[0] = (struct way){ .from = one, .to = other, .link = 0 };
  c->way[1] = (struct way){ .from = other, .to = one, .link = 1 };
  conns[nr_conns++] = c;
}

/* ---- one direction ---- */

/* Forget what the sender knows by now to have arrived. */
static void
acknowledge (struct way *w, uint64_t now)
{
  while (w->acks > 0) {
    struct piece *p = &w->ring[(w->first + RING - w->acks) % RING];

    if (p->acked > now)
      break;
    w->in_flight -= p->len;
    w->acks--;
  }
}

static bool
may_take (const struct way *w, uint64_t now)
{
  return !w->ended && !stalled && w->nr + w->acks < RING &&
         w->in_flight < window &&
         (rate == 0 || free_at[w->link] < now + QUEUE_NS);
}

/* -1: the connection is gone. */
static int
take (struct way *w, uint64_t now)
{
  size_t max = PIECE;
  struct piece *p = &w->ring[(w->first + w->nr) % RING];
  uint64_t sent = now;
  ssize_t n;

  if (max > window - w->in_flight)
    max = window - w->in_flight;
  p->data = malloc (max);
  if (p->data == NULL)
    die ("malloc");
  n = recv (w->from, p->data, max, 0);
  if (n <= 0) {
    free (p->data);
    if (n == -1)
      return errno == EAGAIN ? 0 : -1;
    w->ended = true;
    return 0;
  }
  bytes[w->link] += n;
  if (rate > 0) {
    if (free_at[w->link] < now)
      free_at[w->link] = now;
    free_at[w->link] += (double) n * NS_PER_S / rate;
    sent = free_at[w->link];
  }
  p->len = n;
  p->done = 0;
  p->deliver = sent + delay_ns;
  if (jitter_ns > 0 && random () % 16 == 0)
    p->deliver += random () % jitter_ns;
  if (p->deliver < w->last) /* within a connection nothing overtakes */
    p->deliver = w->last;
  w->last = p->deliver;
  w->in_flight += n;
  w->nr++;
  return 0;
}

static int
deliver (struct way *w, uint64_t now)
{
  while (w->nr > 0) {
    struct piece *p = &w->ring[w->first];
    ssize_t n;

    if (p->deliver > now)
      return 0;
    n = send (w->to, p->data + p->done, p->len - p->done, MSG_NOSIGNAL);
    if (n == -1)
      return errno == EAGAIN ? 0 : -1;
    p->done += n;
    if (p->done < p->len)
      return 0;
    free (p->data);
    p->acked = now + delay_ns;
    w->first = (w->first + 1) % RING;
    w->nr--;
    w->acks++;
  }
  if (w->ended && !w->shut) {
    shutdown (w->to, SHUT_WR);
    w->shut = true;
  }
  return 0;
}

/* When something is to be done next, though no socket says so. */
static uint64_t
next_time (const struct way *w, uint64_t now)
{
  uint64_t t = UINT64_MAX;

  if (w->nr > 0 && w->ring[w->first].deliver > now)
    t = w->ring[w->first].deliver;
  if (w->acks > 0 && w->in_flight >= window) {
    uint64_t acked = w->ring[(w->first + RING - w->acks) % RING].acked;

    if (acked < t)
      t = acked;
  }
  if (rate > 0 && !w->ended && free_at[w->link] >= now + QUEUE_NS &&
      free_at[w->link] - QUEUE_NS < t)
    t = free_at[w->link] - QUEUE_NS + 1;
  return t;
}

/* ---- all of it ---- */

static void
run_command (const char *line)
{
  if (strcmp (line, "stall") == 0)
    stalled = true;
  else if (strcmp (line, "go") == 0)
    stalled = false;
  else if (strcmp (line, "cut") == 0) {
    cutting = true;
    while (nr_conns > 0)
      drop (0, true);
  }
  else if (strcmp (line, "mend") == 0)
    cutting = false;
  else if (strcmp (line, "bytes") == 0) {
    printf ("%ju %ju\n", (uintmax_t) bytes[0], (uintmax_t) bytes[1]);
    return;
  }
  else {
    printf ("unknown\n");
    return;
  }
  printf ("ok\n");
}

static void
read_commands (void)
{
  static char line[64];
  static size_t len;
  char c;

  while (read (0, &c, 1) == 1) {
    if (c != '\n') {
      if (len < sizeof line - 1)
        line[len++] = c;
      continue;
    }
    line[len] = '\0';
    len = 0;
    run_command (line);
    return; /* poll says whether there is more */
  }
  exit (0);
}

/* What each socket is waited for, two for each connection, behind the first
 * two.  Returns until when, ns.
 */
static uint64_t
prepare (struct pollfd *p, uint64_t now)
{
  uint64_t until = UINT64_MAX;

  for (unsigned i = 0; i < nr_conns; i++)
    for (int k = 0; k < 2; k++)
      p[2 * i + k] = (struct pollfd){ .fd = conns[i]->fd[k] };
  for (unsigned i = 0; i < nr_conns; i++)
    for (int k = 0; k < 2; k++) {
      struct way *w = &conns[i]->way[k];

      if (stalled)
        continue;
      acknowledge (w, now);
      if (may_take (w, now))
        p[2 * i + k].events |= POLLIN;
      if (w->nr > 0 && w->ring[w->first].deliver <= now)
        p[2 * i + !k].events |= POLLOUT;
      if (next_time (w, now) < until)
        until = next_time (w, now);
    }
  for (unsigned i = 0; i < nr_conns; i++)
    for (int k = 0; k < 2; k++)
      if (p[2 * i + k].events == 0) /* not for POLLHUP again and again */
        p[2 * i + k].fd = -1;
  return until;
}

static void
step (struct pollfd *p, uint64_t now)
{
  static unsigned turn;

  turn++;
  for (unsigned n = nr_conns; n > 0; n--) {
    /* Another one is the first each time: they share the link. */
    unsigned i = (n - 1 + turn) % nr_conns;
    struct conn *c = conns[i];

    for (int k = 0; k < 2; k++) {
      struct way *w = &c->way[k];

      if (stalled)
        continue;
      if ((p[2 * i + k].revents && may_take (w, now) && take (w, now) == -1) ||
          deliver (w, now) == -1)
        w->shut = c->way[!k].shut = true;
    }
  }
  for (unsigned i = nr_conns; i-- > 0;)
    if (conns[i]->way[0].shut && conns[i]->way[1].shut)
      drop (i, false);
}

static void
start_listening (void)
{
  struct sockaddr_in a = { .sin_family = AF_INET,
                           .sin_addr.s_addr = htonl (INADDR_LOOPBACK) };
  socklen_t len = sizeof a;

  listener = socket (AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (listener == -1 || bind (listener, (struct sockaddr *) &a, len) == -1 ||
      listen (listener, 128) == -1 ||
      getsockname (listener, (struct sockaddr *) &a, &len) == -1)
    die ("listen");
  printf ("%d\n", ntohs (a.sin_port));
}

int
main (int argc, char **argv)
{
  static const struct option options[] = {
    { "delay", required_argument, NULL, 'd' },
    { "rate", required_argument, NULL, 'r' },
    { "window", required_argument, NULL, 'w' },
    { "jitter", required_argument, NULL, 'j' },
    { 0 },
  };
  static struct pollfd p[2 + 2 * MAX_CONNS];
  int c;

  while ((c = getopt_long (argc, argv, "", options, NULL)) != -1)
    switch (c) {
    case 'd': delay_ns = atof (optarg) * 1e6; break;
    case 'r': rate = atof (optarg); break;
    case 'w': window = atof (optarg); break;
    case 'j': jitter_ns = atof (optarg) * 1e6; break;
    default: return 2;
    }
  if (optind != argc - 1)
    return 2;
  target = atoi (argv[optind]);
  setlinebuf (stdout);
  start_listening ();
  for (;;) {
    uint64_t now = now_ns (), until = prepare (p + 2, now);
    struct timespec ts = { (until - now) / NS_PER_S, (until - now) % NS_PER_S };

    p[0] = (struct pollfd){ .fd = 0, .events = POLLIN };
    p[1] = (struct pollfd){ .fd = listener, .events = stalled ? 0 : POLLIN };
    if (until < now)
      ts = (struct timespec){ 0 };
    if (ppoll (p, 2 + 2 * nr_conns, until == UINT64_MAX ? NULL : &ts, NULL) ==
        -1)
      die ("ppoll");
    /* Connections first: commands and new ones change what 'p' stands for. */
    step (p + 2, now_ns ());
    if (p[0].revents)
      read_commands ();
    if (p[1].revents)
      add_connection ();
  }
}
