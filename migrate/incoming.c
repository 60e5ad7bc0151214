/* nbdferry - the destination of migrations: channels and sessions
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A session begins with the first HELLO that names it, and takes its drives
 * from any session that had them before: their source has given up, or it
 * would not begin again.  Data packets run side by side, inside the session's
 * fence; control packets run one at a time.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "giveway.h"
#include "incoming-impl.h"

/* Enough for the list of some thousand bitmaps. */
#define MAX_JSON (1 << 20)

struct incoming *
incoming_new (struct drive *const *drives, size_t nr, struct error *err)
{
  struct incoming *in = calloc (1, sizeof *in);

  if (in == NULL || (in->drives = calloc (nr, sizeof *in->drives)) == NULL) {
    free (in);
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  in->nr = nr;
  for (size_t i = 0; i < nr; i++) {
    in->drives[i].drive = drives[i];
    fence_init (&in->drives[i].forward);
  }
  pthread_mutex_init (&in->control, NULL);
  pthread_mutex_init (&in->lock, NULL);
  return in;
}

void
incoming_free (struct incoming *in)
{
  if (in == NULL)
    return;
  for (size_t i = 0; i < in->nr; i++) {
    session_unref (in, in->drives[i].session);
    fence_destroy (&in->drives[i].forward);
  }
  pthread_mutex_destroy (&in->control);
  pthread_mutex_destroy (&in->lock);
  json_decref (in->mapping);
  free (in->drives);
  free (in);
}

void
incoming_set_mapping (struct incoming *in, json_t *mapping)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&in->lock);

  json_decref (in->mapping);
  in->mapping = json_incref (mapping);
}

void
incoming_stop (struct incoming *in)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&in->control);

  in->stopped = true;
  /* Only control packets change the sessions of drives. */
  for (size_t i = 0; i < in->nr; i++)
    if (in->drives[i].session)
      fence_raise (&in->drives[i].session->fence, SESSION_CLOSED);
}

struct incoming_drive *
incoming_find (struct incoming *in, const char *name)
{
  for (size_t i = 0; i < in->nr; i++)
    if (strcmp (in->drives[i].drive->name, name) == 0)
      return &in->drives[i];
  return NULL;
}

/* The session of that id, if it has a drive.  in->lock held. */
static struct session *
living_session (struct incoming *in, const struct uuid *id)
{
  for (size_t i = 0; i < in->nr; i++) {
    struct session *s = in->drives[i].session;

    if (s && uuid_equal (&s->id, id))
      return s;
  }
  return NULL;
}

struct session *
incoming_session (struct incoming *in, const struct uuid *id)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&in->lock);
  struct session *s = living_session (in, id);

  if (s)
    s->refs++;
  return s;
}

struct session *
session_ref (struct incoming *in, struct session *s)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&in->lock);

  if (s)
    s->refs++;
  return s;
}

void
session_unref (struct incoming *in, struct session *s)
{
  bool last;

  if (s == NULL)
    return;
  pthread_mutex_lock (&in->lock);
  last = --s->refs == 0;
  pthread_mutex_unlock (&in->lock);
  if (!last)
    return;
  fence_destroy (&s->fence);
  incoming_blobs_free (s->blobs);
  pthread_mutex_destroy (&s->begin);
  free (s->disks);
  free (s->drives);
  free (s);
}

/* ---- channels ---- */

struct incoming_channel *
incoming_open (struct incoming *in, struct drive *d)
{
  struct incoming_channel *ch = calloc (1, sizeof *ch);

  if (ch) {
    ch->in = in;
    ch->drive = d;
  }
  return ch;
}

struct session *
channel_join (struct incoming_channel *ch, struct session *s)
{
  struct session *old = ch->session;

  if (old)
    old->channels--;
  if (s)
    s->channels++;
  ch->session = s;
  return old;
}

void
incoming_close (struct incoming_channel *ch)
{
  struct session *s;

  pthread_mutex_lock (&ch->in->lock);
  s = channel_join (ch, NULL);
  pthread_mutex_unlock (&ch->in->lock);
  session_unref (ch->in, s);
  free (ch);
}

/* The channel's session, with a reference, if the packet belongs to it.  A
 * channel that has said no HELLO is opened by the first packet with data: the
 * session is there, and its fence is the same for all.
 */
static struct session *
session_of (struct incoming_channel *ch, const struct packet_header *h,
            struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&ch->in->lock);
  struct session *s = ch->session;

  if (s == NULL && (h->type == PACKET_DATA || h->type == PACKET_BLOB)) {
    s = living_session (ch->in, &h->session);
    if (s)
      s->refs++;
    channel_join (ch, s);
  }
  if (s == NULL || !uuid_equal (&s->id, &h->session)) {
    error_set (err, ESTALE, "packet of a session that this channel did not "
               "open with a handshake");
    return NULL;
  }
  s->refs++;
  return s;
}

/* ---- packets ---- */

/* Inside the session's fence, until fence_leave. */
static int
enter (struct session *s, const struct packet_header *h, struct error *err)
{
  if (!incoming_is_epoch (h->epoch) ||
      fence_enter (&s->fence, h->epoch) == -1)
    return error_set (err, ESTALE, "packet of an older connection (epoch %ju)",
                      (uintmax_t) h->epoch);
  return 0;
}

/* This thread, which is its connection's, is as urgent as what it gets. */
static void
follow (const struct packet_header *h)
{
  static _Thread_local bool giving_way;
  bool yes = h->flags & PACKET_PROGRESS;

  if (yes == giving_way)
    return;
  giving_way = yes;
  thread_give_way (thread_number (), yes);
}

static int
data_packet (struct incoming_channel *ch, const uint8_t *buf,
             const struct packet_header *h, struct error *err)
{
  struct session *s = session_of (ch, h, err);
  int r;

  if (s == NULL)
    return -1;
  follow (h);
  r = enter (s, h, err);
  if (r == 0) {
    r = h->type == PACKET_DATA ? incoming_data (s, buf, h, err)
                               : incoming_blob (s, buf, h, err);
    fence_leave (&s->fence, h->epoch);
  }
  session_unref (ch->in, s);
  return r;
}

static int
in_session (struct incoming_channel *ch, const struct packet_header *h,
            json_t *body, struct error *err)
{
  struct session *s = session_of (ch, h, err);
  int r;

  if (s == NULL)
    return -1;
  /* A control packet is fenced like any other, but it is not inside while it
   * waits for those that are.
   */
  r = enter (s, h, err);
  if (r == 0) {
    fence_leave (&s->fence, h->epoch);
    if (h->type == PACKET_LIST)
      r = incoming_list (ch->in, s, h, body, err);
    else if (h->type == PACKET_PREPARE)
      r = incoming_prepare (s, body, err);
    else
      r = incoming_cancel (s, err);
  }
  session_unref (ch->in, s);
  return r;
}

static int
control_packet (struct incoming_channel *ch, const uint8_t *buf,
                const struct packet_header *h, struct error *err)
{
  json_auto_t *body = NULL;

  /* JSON takes many times its size in memory. */
  if (h->body_size > MAX_JSON)
    return error_set (err, EFBIG, "control packet of %" PRIu32 " bytes, more "
                      "than the %d allowed", h->body_size, MAX_JSON);
  if (h->body_size > 0) {
    body = json_loadb (packet_json (buf), h->body_size, 0, NULL);
    if (!json_is_object (body))
      return error_set (err, EBADMSG, "control packet without a JSON object");
  }
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&ch->in->control);
  if (ch->in->stopped)
    return error_set (err, ESHUTDOWN, "the server is going down");
  switch (h->type) {
  case PACKET_HELLO: return incoming_hello (ch, h, body, err);
  case PACKET_COMMIT: return incoming_commit (ch->in, h, body, err);
  default: return in_session (ch, h, body, err);
  }
}

/* For the status block. */
static void
remember (struct incoming_channel *ch, const struct error *err)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&ch->in->lock);

  ch->errnum = err->errnum;
  memcpy (ch->error, err->msg, sizeof ch->error);
}

int
incoming_packet (struct incoming_channel *ch, const void *buf, size_t len,
                 struct error *err)
{
  struct packet_header h;
  int r = packet_parse (buf, len, &h, err);

  if (r == 0)
    r = h.type == PACKET_DATA || h.type == PACKET_BLOB
          ? data_packet (ch, buf, &h, err)
          : control_packet (ch, buf, &h, err);
  if (r == 0)
    return 0;
  remember (ch, err);
  errno = err->errnum;
  return -1;
}

int
incoming_flush (struct incoming_channel *ch, struct error *err)
{
  struct session *s;
  int r = 0;

  pthread_mutex_lock (&ch->in->lock);
  s = ch->session;
  if (s)
    s->refs++;
  pthread_mutex_unlock (&ch->in->lock);
  for (size_t i = 0; s && r == 0 && i < s->nr; i++)
    r = incoming_sync (s, i, err);
  if (s && r == 0)
    r = incoming_blobs_flush (s->blobs, err);
  session_unref (ch->in, s);
  if (r == -1)
    remember (ch, err);
  return r;
}

/* ---- status ---- */

/* A message as a JSON string.  It may have bytes that are no UTF-8: a name off
 * the wire, or a character that was cut.
 */
static json_t *
message (const char *msg)
{
  json_t *s = json_string (msg);
  char plain[ERROR_MAX];
  size_t n;

  if (s)
    return s;
  for (n = 0; msg[n] && n < sizeof plain - 1; n++)
    plain[n] = msg[n] & 0x80 ? '?' : msg[n];
  plain[n] = '\0';
  return json_string (plain);
}

static void
set_uuid (json_t *o, const char *key, const struct uuid *id)
{
  char text[UUID_TEXT];

  uuid_format (id, text);
  json_object_set_new (o, key, json_string (text));
}

/* What the journal says: a source that has let go must know whom it talks to
 * before it says so.
 */
static json_t *
disk_json (struct drive *d)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);
  const struct journal_record *rec;
  json_t *o;

  if (d->journal == NULL)
    return NULL;
  rec = journal_get (d->journal);
  o = json_pack ("{s:s, s:I}", "state", journal_state_name (rec->state),
                 "attempt", (json_int_t) rec->attempt);
  set_uuid (o, "lineage", &rec->lineage);
  set_uuid (o, "session", &rec->session);
  set_uuid (o, "origin", &rec->origin);
  return o;
}

void
incoming_status (struct incoming_channel *ch, char status[PACKET_STATUS])
{
  json_auto_t *o = json_object ();
  char id[UUID_TEXT] = "";
  size_t n;

  memset (status, 0, PACKET_STATUS);
  json_object_set_new (o, "version", json_integer (PACKET_VERSION));
  json_object_set_new (o, "disk", disk_json (ch->drive));
  pthread_mutex_lock (&ch->in->lock);
  if (ch->session) {
    uuid_format (&ch->session->id, id);
    json_object_set_new (o, "session", json_string (id));
    json_object_set_new (o, "held", incoming_held_json (ch->session));
  }
  if (ch->errnum) {
    json_object_set_new (o, "errno", json_integer (ch->errnum));
    json_object_set_new (o, "error", message (ch->error));
  }
  pthread_mutex_unlock (&ch->in->lock);
  if (json_dumpb (o, NULL, 0, JSON_COMPACT) >= PACKET_STATUS)
    json_object_del (o, "held"); /* some thousand disks */
  n = json_dumpb (o, status, PACKET_STATUS - 1, JSON_COMPACT);
  if (n >= PACKET_STATUS) /* cannot be, with messages as long as they are */
    memset (status, 0, PACKET_STATUS);
}

/* ---- forwarded clients ---- */

struct fence *
incoming_fence (struct incoming *in, struct drive *d)
{
  return &incoming_find (in, d->name)->forward;
}

bool
incoming_is_from (struct drive *d, const struct uuid *session)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);

  /* Also after it has moved on: then this side forwards in turn. */
  return (d->mode == DRIVE_ACTIVE || d->mode == DRIVE_FORWARD) &&
         d->journal && uuid_equal (&journal_get (d->journal)->origin, session);
}

/* Is it coming, with that session?  Then its source may connect already. */
static bool
is_coming (struct incoming *in, struct drive *d, const struct uuid *session)
{
  enum drive_mode mode = drive_get_mode (d);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&in->lock);
  const struct session *s = incoming_find (in, d->name)->session;

  return s && uuid_equal (&s->id, session) &&
         (mode == DRIVE_INCOMING || mode == DRIVE_PREPARED);
}

int
incoming_forward (struct incoming *in, struct drive *d,
                  const struct uuid *session, uint64_t epoch,
                  struct error *err)
{
  if (!incoming_is_from (d, session) && !is_coming (in, d, session))
    return error_set (err, EPERM, "disk '%s' was not handed over by that "
                      "session", d->name);
  if (fence_raise (incoming_fence (in, d), epoch) == -1)
    return error_set (err, ESTALE, "an older connection (epoch %ju)",
                      (uintmax_t) epoch);
  return 0;
}
