/* nbdferry - the engine: buffers go round, channels empty them
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A producer asks for an empty buffer, fills it with a packet, and hands it
 * over; a channel's thread sends it, waits for the acknowledgement, and the
 * buffer is empty again.  There are as many buffers as producers and channels
 * together, so memory is bounded and nobody copies.  A channel has one packet
 * in flight and knows nothing of what it sends.  The first error wins, names
 * its channel, and stops all.
 *
 *           get              put             send, acknowledged
 *   empty ------> producer ------> full ------> channel ------> empty
 *
 * The producer of the bulk has no thread of its own: while engine_run () runs,
 * a channel that finds nothing to send takes an empty buffer and has it filled
 * by the producer's fill () before it goes on as always.  So reading a disk
 * (or compressing it) is as parallel as sending is, nobody is woken up to take
 * what another thread has read, and the data is still in the cache of the CPU
 * that sends it.  That is worth a fifth of the time (docs/performance.md).
 *
 * A packet for which somebody waits (a mirrored write) is urgent: it goes
 * before the others, but not two of them before one of those (which is filled
 * for that), so that the others get on as well, whatever comes.  Where round
 * trips are short and nothing limits the bandwidth it has a lane of its own
 * while writes are mirrored: the last channel, which alone does not give way to
 * clients.  (On a long link one packet at a time would be too few.)
 *
 * How much a producer should put into a packet depends on the limit of the
 * bandwidth (pacer.h) and on the link: one packet is under way on each
 * channel, so they must be large where round trips are long.
 */
#ifndef FERRY_ENGINE_H
#define FERRY_ENGINE_H

#include "client.h"
#include "outgoing.h"
#include "packet.h"

#define ENGINE_PAYLOAD     (1 << 20) /* bytes of block data in a packet */
#define ENGINE_PAYLOAD_WAY (1 << 17) /* while it gives way to clients */
#define ENGINE_PAYLOAD_MAX (8 << 20) /* where round trips are long */

struct range_list {
  struct range *v;
  size_t nr, max;
};

/* A packet on its way.  Whoever holds it owns it.  The payload lies at a fixed
 * place, and the header and body are put right before it when they are known.
 */
struct buffer {
  uint8_t *mem;
  size_t head;            /* bytes before the payload */
  uint8_t *payload;       /* mem + head; ENGINE_PAYLOAD_MAX bytes */
  size_t room;            /* how many of them should be used now */
  struct packet_header h; /* the channel adds its number, and seals */
  void *cargo;            /* the producer's: what it has to do with */
  struct range_list covers; /* the producer's: of the disk */
  uint64_t zero_bytes;    /* sent as extents */
  uint64_t sequence;      /* the producer's: when it was filled */
  bool urgent;            /* the engine's */
  uint64_t section_bytes;
};

struct engine;

/* Fill a buffer: 1; 0: nothing is left; -1 with 'err', which the engine then
 * fails with.  'worker' is the number of the thread, below the number of
 * channels: it may have things of its own.
 */
typedef int (*engine_fill) (void *opaque, unsigned worker, struct buffer *b,
                            struct error *err);

struct engine_options {
  unsigned producers, channels; /* those that use engine_get, and all */
  size_t sections;     /* room for bitmap sections in a buffer */
  struct uuid session;
  uint64_t epoch;
  struct stop *stop;   /* thrown at the first error; heeded by all */
  engine_fill fill;    /* from channel threads, as the next */
  void (*acked) (void *opaque, struct buffer *b);
  void *opaque;
};

/* 'clients' are connected, with their handshake done; on success the engine
 * owns them.
 */
struct engine *engine_start (const struct engine_options *opt,
                             struct client **clients, struct error *err);

/* Ends the threads (what is in flight is given up if the stop was thrown, or
 * else awaited), closes the channels, frees all.
 */
void engine_free (struct engine *e);

/* An empty buffer, or NULL once it has failed.  An urgent one is put in front
 * of the others.
 */
struct buffer *engine_get (struct engine *e);

struct buffer *engine_get_urgent (struct engine *e);

/* So many channels take urgent packets, just now. */
unsigned engine_urgent_ways (struct engine *e);

/* So many bytes are left for ordinary packets, about. */
void engine_expect (struct engine *e, uint64_t left);
void engine_put (struct engine *e, struct buffer *b);    /* to be sent */
void engine_return (struct engine *e, struct buffer *b); /* was not filled */

/* Have buffers filled, and send them, until fill () has said that nothing is
 * left; it is not called any more then.  'left' is what there is now, as for
 * engine_expect.  One thread at a time.
 */
int engine_run (struct engine *e, uint64_t left, struct error *err);

/* Wait until all that was put is acknowledged, or all but what is urgent: 0,
 * or -1 with the error.
 */
int engine_drain (struct engine *e, struct error *err);
int engine_drain_ordinary (struct engine *e, struct error *err);

/* Is nothing but what is urgent under way? */
bool engine_is_idle (struct engine *e);

/* Record an error (the first counts) and stop everything. */
void engine_fail (struct engine *e, const struct error *why);
bool engine_failed (struct engine *e, struct error *err);

/* Packets sent from now on must be acknowledged by then (ns, 0: whenever), or
 * all has failed.  While nothing is in flight.
 */
void engine_set_deadline (struct engine *e, uint64_t deadline);

/* Nobody waits for what is sent, unless it is urgent: here and at the
 * destination the threads that do it give way to those that serve clients
 * (giveway.h); or they do no longer.  'mirrors': there are urgent packets, so
 * that they do it only if those have a lane.
 */
void engine_give_way (struct engine *e, bool yes, bool mirrors);

/* There are such clients just now. */
void engine_note_clients (struct engine *e);

/* Bytes a second, 0: no limit.  At once. */
void engine_set_bandwidth (struct engine *e, uint64_t bytes_s);

/* So many bytes go without waiting for their turn. */
void engine_lend (struct engine *e, uint64_t bytes);

/* What has been acknowledged so far: bytes on the wire, for how long anything
 * was under way (ns; waiting for a turn does not count), and how often that
 * began.
 */
struct engine_work {
  uint64_t bytes, busy_ns, periods;
};

void engine_work (struct engine *e, struct engine_work *work);

/* The link's round trip, ns. */
void engine_set_round_trip (struct engine *e, uint64_t rtt);

/* How long a round trip takes that does nothing, in ns; -1 with errno. */
int64_t engine_round_trip (struct client *c);

/* Is that a destination of ours, and of our version?  To be asked once of each
 * new connection, before the first packet: another server might take any
 * write, and so acknowledge what it does not understand.  1: its description
 * says so, which takes no time; 0: its status block, which is to be asked about
 * the session as well, once there is one; -1: no.
 */
int check_destination (struct client *c, struct error *err);

/* Connect to the export to which that disk would come; it may be no
 * destination of ours.  Later calls wait for at most 'answer_ms'.
 */
struct client *connect_destination (const char *uri, const char *disk,
                                    const struct stop *stop,
                                    unsigned connect_ms, unsigned answer_ms,
                                    struct error *err);

/* After HELLO was acknowledged: does the destination say so itself? */
int check_session (struct client *c, const struct uuid *session,
                   struct error *err);

/* For a disk that was let go of, in place of a HELLO: does it say that this
 * channel's disk is that one, prepared in this attempt, or active by it?
 */
int check_prepared (struct client *c, const struct uuid *session,
                    uint64_t attempt, const struct uuid *lineage,
                    struct error *err);

/* Then: does it say that it still holds what that disk of the session got and
 * flushed before?
 */
int check_held (struct client *c, size_t disk, bool *held, struct error *err);

/* A flush; turns a refusal into the other side's words. */
int send_flush (struct client *c, struct error *err);

/* Send one packet that is complete but for its seal, and turn a refusal into
 * the words of the other side's status block.
 */
int send_packet (struct client *c, uint8_t *packet,
                 const struct packet_header *h, const uint8_t *payload,
                 struct error *err);

#endif /* FERRY_ENGINE_H */
