/* nbdferry - the source: what the destination says of itself
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Its words are in the status block, which is read when a connection is new,
 * and when a packet was refused.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "cleanup.h"
#include "clock.h"
#include "engine.h"

/* The status block, the caller's; NULL if there is none. */
static json_t *
read_status (struct client *c)
{
  CLEANUP_FREE char *status = malloc (PACKET_STATUS + 1);

  if (status == NULL || client_size (c) < PACKET_STATUS ||
      client_pread (c, status, PACKET_STATUS, 0) == -1)
    return NULL;
  status[PACKET_STATUS] = '\0';
  return json_loads (status, 0, NULL);
}

static int
check_version (json_int_t version, struct error *err)
{
  if (version != PACKET_VERSION)
    return error_set (err, EPROTONOSUPPORT,
                      "the destination speaks version %ju of the protocol, "
                      "this side version %d; use the same release on both "
                      "sides", (uintmax_t) version, PACKET_VERSION);
  return 0;
}

struct client *
connect_destination (const char *uri, const char *disk,
                     const struct stop *stop, unsigned connect_ms,
                     unsigned answer_ms, struct error *err)
{
  CLEANUP_FREE char *export = NULL;
  struct client *c;

  if (asprintf (&export, "%s@incoming", disk) == -1) {
    export = NULL;
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  c = client_connect (uri, export, stop, connect_ms, err);
  if (c)
    client_set_timeout (c, answer_ms);
  return c;
}

int
check_destination (struct client *c, struct error *err)
{
  CLEANUP_FREE char *text = client_description (c);
  json_auto_t *o = NULL;
  json_t *version;
  uint64_t n;

  /* That has come with the export: no round trip for it. */
  if (text && sscanf (text, PACKET_DESCRIPTION "%" SCNu64 ":", &n) == 1 &&
      client_size (c) == PACKET_MAX)
    return check_version (n, err) == -1 ? -1 : 1;
  o = read_status (c);
  version = json_object_get (o, "version");
  if (o == NULL && client_is_dead (c))
    return error_set (err, ENOTCONN, "the connection to the destination was "
                      "lost");
  if (!json_is_integer (version))
    return error_set (err, EPROTO, "the server is not an nbdferry "
                      "destination (its export does not have a status block); "
                      "a server of another kind gets a copy of the data with "
                      "--data-only (x-ferry-data-only)");
  return check_version (json_integer_value (version), err);
}

int
check_session (struct client *c, const struct uuid *session,
               struct error *err)
{
  json_auto_t *o = read_status (c);
  const char *text = json_string_value (json_object_get (o, "session"));
  struct uuid there;

  if (text && uuid_parse (text, &there) && uuid_equal (&there, session))
    return 0;
  return error_set (err, EPROTO, "the server acknowledged the handshake, but "
                    "its status block does not name the session: it is not "
                    "an nbdferry destination");
}

static bool
is_uuid (json_t *o, const char *key, const struct uuid *id)
{
  const char *text = json_string_value (json_object_get (o, key));
  struct uuid there;

  return text && uuid_parse (text, &there) && uuid_equal (&there, id);
}

int
check_prepared (struct client *c, const struct uuid *session,
                uint64_t attempt, const struct uuid *lineage,
                struct error *err)
{
  json_auto_t *o = read_status (c);
  json_t *disk = json_object_get (o, "disk");
  const char *state = json_string_value (json_object_get (disk, "state"));
  json_int_t n = json_integer_value (json_object_get (disk, "attempt"));

  if (!is_uuid (disk, "lineage", lineage))
    return error_set (err, EPROTO, "what is there is not the disk that was "
                      "handed over");
  if (is_uuid (disk, "origin", session)) /* made active, perhaps moved on */
    return 0;
  if (state && strcmp (state, "prepared") == 0 &&
      is_uuid (disk, "session", session) && n >= 0 && (uint64_t) n == attempt)
    return 0;
  return error_set (err, EPROTO, "the disk that is there was not prepared for "
                    "this handover");
}

int
check_held (struct client *c, size_t disk, bool *held, struct error *err)
{
  json_auto_t *o = read_status (c);

  *held = false;
  if (o == NULL)
    return error_set (err, EIO, "the destination's status block cannot be "
                      "read");
  *held = json_is_true (json_array_get (json_object_get (o, "held"), disk));
  return 0;
}

/* The destination's own words, if it has any, and its own number: NBD has only
 * a few.
 */
static int
refused (struct client *c, int errnum, struct error *err)
{
  json_auto_t *o = NULL;
  const char *msg;
  json_int_t n;

  if (client_is_dead (c))
    return error_set (err, errnum, "the connection to the destination was "
                      "lost: %s", strerror (errnum));
  o = read_status (c);
  msg = json_string_value (json_object_get (o, "error"));
  n = json_integer_value (json_object_get (o, "errno"));
  if (n > 0 && n < 4096)
    errnum = n;
  return error_set (err, errnum, "the destination refused: %s",
                    msg ? msg : strerror (errnum));
}

int
send_flush (struct client *c, struct error *err)
{
  if (client_flush (c) == 0)
    return 0;
  refused (c, errno, err);
  return error_prefix (err, "flush the destination");
}

int
send_packet (struct client *c, uint8_t *packet, const struct packet_header *h,
             const uint8_t *payload, struct error *err)
{
  size_t len = PACKET_HEADER + (size_t) h->body_size + h->payload_size;

  packet_seal (packet, h, payload);
  if (client_pwrite (c, packet, len, 0, 0) == 0)
    return 0;
  return refused (c, errno, err);
}

int64_t
engine_round_trip (struct client *c)
{
  uint64_t began = now_ns ();
  char byte;

  if (client_pread (c, &byte, 1, PACKET_STATUS) == -1)
    return -1;
  return now_ns () - began;
}
