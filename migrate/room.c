/* nbdferry - how much should go into a packet
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include "clock.h"
#include "engine.h"
#include "room.h"

/* A packet holds at least one chunk. */
#define MIN_ROOM 4096

/* Urgent packets should wait about that long behind others; but these are not
 * smaller than that.
 */
#define URGENT_WAIT (10 * NS_PER_MS)
#define SMALL_ROOM  (64 << 10)

/* Where little is left, channels share it; each has some on its way already. */
#define SHARE (256 << 10)

/* All buffers together hold no more than that. */
#define BUFFERS_MAX (40 << 20)

/* Round trips of that length are long: so many times what fills the link is
 * under way, once it is known, after so long; until then what fills one of
 * ASSUMED bytes a second so many times, which is FAR_TIMES a gigabit.  But no
 * more than FAR_MAX bytes.
 */
#define FAR          (5 * NS_PER_MS)
#define FAR_TIMES    2.7
#define FAR_LEARNING NS_PER_S
#define FAR_ASSUMED  400e6
#define FAR_MAX      (32 << 20)
#define FAR_LEAST    (512 << 10) /* at first */

/* A round trip of less is no reason for larger packets: it is work, not way. */
#define NOTHING (NS_PER_MS / 2)

/* So long after its last request a client counts. */
#define CLIENTS NS_PER_S

static size_t
near_room (const struct room *r, bool urgent, uint64_t now)
{
  unsigned others = r->channels > 1 ? r->channels - 1 : 1;
  double fills = r->rtt < NOTHING
                   ? 0
                   : (double) r->rate * r->rtt / NS_PER_S * 3 / 2 / others;
  bool small = r->giving_way && r->clients_ns > 0 &&
               now - r->clients_ns < CLIENTS;
  size_t room = small ? ENGINE_PAYLOAD_WAY : ENGINE_PAYLOAD;

  if (r->rate > 0 && urgent) {
    room = (double) r->rate * (r->rtt + URGENT_WAIT) / NS_PER_S / others;
    if (room > ENGINE_PAYLOAD)
      room = ENGINE_PAYLOAD;
    if (room < SMALL_ROOM)
      room = SMALL_ROOM;
  }
  return fills > room ? fills : room;
}

static size_t
far_room (const struct room *r, uint64_t now)
{
  bool known = r->rate > 0 && now - r->first_ns > FAR_LEARNING;
  double total =
    (known ? FAR_TIMES * r->rate : FAR_ASSUMED) * r->rtt / NS_PER_S;
  size_t room, least = known ? SMALL_ROOM : FAR_LEAST;

  if (total > FAR_MAX)
    total = FAR_MAX;
  room = total / r->channels;
  if (room < least)
    room = least;
  if (r->taken < r->channels)
    room = room / 2 + room * r->taken / r->channels;
  return room;
}

/* The part of a channel, of what is left. */
static size_t
part (const struct room *r, bool urgent)
{
  if (r->rtt >= FAR && !urgent && r->round > 0 &&
      r->round / r->channels < SHARE)
    return r->round / r->channels + MIN_ROOM;
  return r->left / r->channels + SHARE;
}

static size_t
smaller (size_t a, size_t b)
{
  return a < b ? a : b;
}

size_t
room_choose (struct room *r, bool urgent, size_t piece, uint64_t now)
{
  size_t room;

  if (r->first_ns == 0)
    r->first_ns = now;
  room = r->rtt >= FAR && !urgent ? far_room (r, now) : near_room (r, urgent, now);
  r->taken++;
  room = smaller (room, part (r, urgent));
  room = smaller (room, BUFFERS_MAX / r->buffers);
  room = smaller (room, ENGINE_PAYLOAD_MAX);
  room = smaller (room, piece);
  return room < MIN_ROOM ? MIN_ROOM : room & ~(size_t) (MIN_ROOM - 1);
}
