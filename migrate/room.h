/* nbdferry - how much should go into a packet
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * One packet is under way on each channel.  While one is being answered the
 * others must keep the link busy; on a short one, a megabyte is enough for that,
 * and less takes no more time.  A system call that moves data often keeps its CPU
 * to its end, and a client may have to wait for it: so packets are smaller while
 * their threads give way and there are clients.
 *
 * Where round trips are long, TCP shares the link among all channels, and the
 * share of one that waits for its answer is not soon given to others.  So
 * packets are several times what would fill it.  How fast it is shows only when
 * TCP has found out: for the first second a fast one is assumed.  The first
 * packets are of different sizes, or all channels would wait for their answers
 * at once; the last ones are small, so that channels end together.  A round that
 * begins with little is shared evenly by all: TCP may let each have only so much
 * under way, and the rest of it then takes another round trip.  Such a round is
 * the one in the hold.
 */
#ifndef FERRY_ROOM_H
#define FERRY_ROOM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The engine's, under its lock. */
struct room {
  unsigned channels, buffers; /* read-only */
  uint64_t rate;     /* of the link, bytes a second; 0: not known.  It falls
                        slowly: packets may have been small, not the link
                        slow */
  uint64_t rtt;      /* ns; 0: not known */
  uint64_t left;     /* bytes that packets are still to be filled with, about */
  uint64_t round;    /* there were when the round began; 0: there is none */
  uint64_t taken;    /* buffers, to be filled */
  uint64_t first_ns; /* when the first one was; 0: not yet */
  bool giving_way;   /* to those that serve clients, for the CPU */
  uint64_t clients_ns; /* when there were any last; 0: never */
};

/* Bytes for the next packet.  'urgent': somebody may have to wait behind it;
 * 'piece': no more than that (pacer.h).
 */
size_t room_choose (struct room *r, bool urgent, size_t piece, uint64_t now);

#endif /* FERRY_ROOM_H */
