/* nbdferry - one connection to an NBD server
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Every request is an asynchronous one that is driven here by poll(2) on the
 * connection and on the stop's eventfd, until it is done.  A request that is
 * given up leaves the connection in the middle of a message, so the client is
 * dead from then on.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "cleanup.h"
#include "client-impl.h"
#include "clock.h"

/* ---- stop ---- */

int
stop_init (struct stop *s, struct error *err)
{
  s->fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  return s->fd == -1 ? error_set (err, errno, "eventfd: %m") : 0;
}

void
stop_destroy (struct stop *s)
{
  if (s->fd >= 0)
    close (s->fd);
  s->fd = -1;
}

void
stop_throw (struct stop *s)
{
  uint64_t one = 1;

  /* Nobody reads it, so that it stays thrown; it cannot overflow. */
  if (write (s->fd, &one, sizeof one) == -1)
    return;
}

void
stop_rearm (struct stop *s)
{
  uint64_t n;

  if (read (s->fd, &n, sizeof n) == -1)
    return; /* it was not thrown */
}

bool
stop_wait (const struct stop *s, uint64_t ns)
{
  struct pollfd p = { .fd = s->fd, .events = POLLIN };
  struct timespec ts = { ns / NS_PER_S, ns % NS_PER_S };

  return ppoll (&p, 1, &ts, NULL) == 1;
}

/* ---- waiting ---- */

/* Drive the connection one step.  -1: given up, or libnbd failed. */
static int
step (struct client *c, uint64_t deadline)
{
  unsigned dir = nbd_aio_get_direction (c->nbd);
  struct pollfd p[2] = {
    { .fd = nbd_aio_get_fd (c->nbd) },
    { .fd = c->stop ? c->stop->fd : -1, .events = POLLIN },
  };
  int timeout = -1, r;

  if (p[0].fd == -1)
    return -1;
  if (dir & LIBNBD_AIO_DIRECTION_READ)
    p[0].events |= POLLIN;
  if (dir & LIBNBD_AIO_DIRECTION_WRITE)
    p[0].events |= POLLOUT;
  if (deadline > 0) {
    uint64_t now = now_ns ();

    if (now >= deadline) {
      c->given_up = true;
      errno = ETIMEDOUT;
      return -1;
    }
    timeout = (deadline - now + NS_PER_MS - 1) / NS_PER_MS;
  }
  r = poll (p, 2, timeout);
  if (r == -1)
    return errno == EINTR ? 0 : -1;
  if (p[1].revents) {
    c->given_up = true;
    errno = ECANCELED;
    return -1;
  }
  if (p[0].revents == 0)
    return 0;
  if ((dir & LIBNBD_AIO_DIRECTION_READ) && (p[0].revents & ~POLLOUT))
    return nbd_aio_notify_read (c->nbd);
  return nbd_aio_notify_write (c->nbd);
}

static uint64_t
deadline_in (unsigned ms)
{
  return ms ? now_ns () + ms * NS_PER_MS : 0;
}

/* The errno of libnbd's last error, never 0. */
static int
nbd_errno (void)
{
  int e = nbd_get_errno ();

  return e ? e : EIO;
}

int
client_finish (struct client *c, int64_t cookie)
{
  uint64_t deadline = deadline_in (c->timeout_ms);

  if (c->deadline > 0 && (deadline == 0 || c->deadline < deadline))
    deadline = c->deadline;
  if (cookie == -1) {
    errno = nbd_errno ();
    return -1;
  }
  for (;;) {
    int r = nbd_aio_command_completed (c->nbd, cookie);

    if (r == 1)
      return 0;
    if (r == -1) {
      errno = nbd_errno ();
      return -1;
    }
    if (step (c, deadline) == -1) {
      if (c->given_up)
        return -1;
      /* A connection that just died completes its commands, with an error. */
      if (nbd_aio_is_dead (c->nbd) || nbd_aio_is_closed (c->nbd))
        continue;
      errno = nbd_errno ();
      return -1;
    }
  }
}

/* ---- connecting ---- */

int
client_drive_until (struct client *c, int (*there) (struct nbd_handle *),
                    uint64_t deadline, const char *uri, struct error *err)
{
  while (!there (c->nbd)) {
    if (nbd_aio_is_dead (c->nbd) || nbd_aio_is_closed (c->nbd) ||
        step (c, deadline) == -1) {
      if (c->given_up && errno == ETIMEDOUT)
        return error_set (err, ETIMEDOUT, "connect to %s: no answer in time",
                          uri);
      if (c->given_up)
        return error_set (err, ECANCELED, "connect to %s: given up", uri);
      return error_set (err, nbd_get_errno () ? nbd_get_errno () : ECONNRESET,
                        "connect to %s: %s", uri,
                        nbd_get_error () ? nbd_get_error ()
                                         : "the server hung up");
    }
  }
  return 0;
}

static int
negotiating_or_more (struct nbd_handle *nbd)
{
  return nbd_aio_is_negotiating (nbd) || nbd_aio_is_ready (nbd);
}

static int
prepare_handle (struct client *c, const char *context, struct error *err)
{
  c->nbd = nbd_create ();
  if (c->nbd == NULL ||
      nbd_set_uri_allow_local_file (c->nbd, true) == -1 ||
      nbd_set_opt_mode (c->nbd, true) == -1 ||
      nbd_set_full_info (c->nbd, true) == -1 ||
      (context && nbd_add_meta_context (c->nbd, context) == -1))
    return error_set (err, nbd_errno (), "%s", nbd_get_error ());
  return 0;
}

struct client *
client_start (const char *uri, const char *context, bool simple,
              const struct stop *stop, unsigned timeout_ms, struct error *err)
{
  struct client *c = calloc (1, sizeof *c);

  if (c == NULL) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  c->stop = stop;
  c->connect_deadline = deadline_in (timeout_ms);
  if (prepare_handle (c, context, err) == -1)
    goto fail;
  if (simple)
    nbd_set_request_structured_replies (c->nbd, false);
  if (nbd_aio_connect_uri (c->nbd, uri) == -1) {
    error_set (err, nbd_errno (), "connect to %s: %s", uri,
               nbd_get_error ());
    goto fail;
  }
  return c;

 fail:
  client_close (c);
  return NULL;
}

int
client_greet (struct client *c, const char *uri, const char *export,
              struct error *err)
{
  if (client_drive_until (c, negotiating_or_more, c->connect_deadline, uri,
                          err) == -1)
    return -1;
  if (nbd_aio_is_negotiating (c->nbd) && export &&
      nbd_set_export_name (c->nbd, export) == -1)
    return error_set (err, nbd_errno (), "%s: %s", uri, nbd_get_error ());
  return 0;
}

struct client *
client_negotiate (const char *uri, const char *export, const char *context,
                  const struct stop *stop, unsigned timeout_ms,
                  struct error *err)
{
  struct client *c = client_start (uri, context, false, stop, timeout_ms, err);

  if (c && client_greet (c, uri, export, err) == -1) {
    client_close (c);
    c = NULL;
  }
  return c;
}

int
client_go (struct client *c, const char *uri, struct error *err)
{
  CLEANUP_FREE char *name = NULL;

  if (nbd_aio_is_negotiating (c->nbd)) {
    if (nbd_aio_opt_go (c->nbd, NBD_NULL_COMPLETION) == -1)
      return error_set (err, nbd_errno (), "%s: %s", uri, nbd_get_error ());
    /* A refused export takes the handle back to negotiating. */
    if (client_drive_until (c, negotiating_or_more, c->connect_deadline, uri,
                            err) == -1)
      return -1;
  }
  if (nbd_aio_is_ready (c->nbd))
    return 0;
  name = nbd_get_export_name (c->nbd);
  return error_set (err, ENOENT, "%s: the server does not give the export "
                    "'%s'", uri, name ? name : "");
}

struct client *
client_connect (const char *uri, const char *export, const struct stop *stop,
                unsigned timeout_ms, struct error *err)
{
  struct client *c = client_negotiate (uri, export,
                                       LIBNBD_CONTEXT_BASE_ALLOCATION, stop,
                                       timeout_ms, err);

  if (c && client_go (c, uri, err) == -1) {
    client_close (c);
    c = NULL;
  }
  return c;
}

void
client_close (struct client *c)
{
  if (c == NULL)
    return;
  if (c->nbd) {
    if (!c->given_up && nbd_aio_is_ready (c->nbd) &&
        nbd_aio_disconnect (c->nbd, 0) == 0) {
      /* Let the word go out, but don't wait for an answer. */
      uint64_t deadline = deadline_in (100);

      while (nbd_aio_get_direction (c->nbd) & LIBNBD_AIO_DIRECTION_WRITE &&
             step (c, deadline) == 0)
        ;
    }
    if (c->given_up && c->in_pieces)
      client_hang_up (nbd_aio_get_fd (c->nbd));
    nbd_close (c->nbd);
  }
  free (c->export);
  free (c);
}

bool
client_is_dead (const struct client *c)
{
  return c->given_up || nbd_aio_is_dead (c->nbd) == 1 ||
         nbd_aio_is_closed (c->nbd) == 1;
}

bool
client_has_died (struct client *c)
{
  struct pollfd p = { .fd = nbd_aio_get_fd (c->nbd), .events = POLLIN };

  if (p.fd != -1 && poll (&p, 1, 0) == 1 &&
      (nbd_aio_get_direction (c->nbd) & LIBNBD_AIO_DIRECTION_READ))
    nbd_aio_notify_read (c->nbd);
  return client_is_dead (c);
}

void
client_set_timeout (struct client *c, unsigned timeout_ms)
{
  c->timeout_ms = timeout_ms;
}

void
client_set_stop (struct client *c, const struct stop *stop)
{
  c->stop = stop;
}

void
client_set_deadline (struct client *c, uint64_t deadline)
{
  c->deadline = deadline;
}

char *
client_description (struct client *c)
{
  return nbd_get_export_description (c->nbd);
}

uint64_t
client_size (struct client *c)
{
  int64_t size = nbd_get_size (c->nbd);

  return size < 0 ? 0 : size;
}

bool
client_can_extents (struct client *c)
{
  return nbd_can_meta_context (c->nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) == 1;
}

/* ---- what the server can do ---- */

static uint64_t
block_size (struct client *c, int type)
{
  int64_t n = nbd_get_block_size (c->nbd, type);

  return n > 0 ? n : 0;
}

void
client_get_abilities (struct client *c, struct client_abilities *a)
{
  *a = (struct client_abilities){
    .readonly = nbd_is_read_only (c->nbd) == 1,
    .rotational = nbd_is_rotational (c->nbd) == 1,
    .flush = nbd_can_flush (c->nbd) == 1,
    .fua = nbd_can_fua (c->nbd) == 1,
    .zero = nbd_can_zero (c->nbd) == 1,
    .fast_zero = nbd_can_fast_zero (c->nbd) == 1,
    .trim = nbd_can_trim (c->nbd) == 1,
    .multi_conn = nbd_can_multi_conn (c->nbd) == 1,
    .extents = client_can_extents (c),
    .min_block = block_size (c, LIBNBD_SIZE_MINIMUM),
    .max_block = block_size (c, LIBNBD_SIZE_MAXIMUM),
  };
}

/* ---- requests ---- */

/* The same for a request that is answered in several pieces. */
static int
finish_pieces (struct client *c, int64_t cookie)
{
  int r;

  c->in_pieces = true;
  r = client_finish (c, cookie);
  c->in_pieces = c->given_up;
  return r;
}

int
client_pread (struct client *c, void *buf, size_t count, uint64_t offset)
{
  return finish_pieces (c, nbd_aio_pread (c->nbd, buf, count, offset,
                                          NBD_NULL_COMPLETION, 0));
}

static uint32_t
nbd_flags (unsigned flags)
{
  uint32_t r = 0;

  if (flags & DISK_FUA)
    r |= LIBNBD_CMD_FLAG_FUA;
  return r;
}

int
client_pwrite (struct client *c, const void *buf, size_t count,
               uint64_t offset, unsigned flags)
{
  return client_finish (c, nbd_aio_pwrite (c->nbd, buf, count, offset,
                                           NBD_NULL_COMPLETION,
                                           nbd_flags (flags)));
}

int
client_zero (struct client *c, uint64_t len, uint64_t offset, unsigned flags)
{
  uint32_t f = nbd_flags (flags);

  if (!(flags & DISK_MAY_TRIM))
    f |= LIBNBD_CMD_FLAG_NO_HOLE;
  if (flags & DISK_FAST)
    f |= LIBNBD_CMD_FLAG_FAST_ZERO;
  return client_finish (c, nbd_aio_zero (c->nbd, len, offset,
                                         NBD_NULL_COMPLETION, f));
}

int
client_trim (struct client *c, uint64_t len, uint64_t offset, unsigned flags)
{
  return client_finish (c, nbd_aio_trim (c->nbd, len, offset,
                                         NBD_NULL_COMPLETION,
                                         nbd_flags (flags)));
}

int
client_flush (struct client *c)
{
  return client_finish (c, nbd_aio_flush (c->nbd, NBD_NULL_COMPLETION, 0));
}

int
client_cache (struct client *c, uint64_t len, uint64_t offset)
{
  if (nbd_can_cache (c->nbd) != 1)
    return 0;
  return client_finish (c, nbd_aio_cache (c->nbd, len, offset,
                                          NBD_NULL_COMPLETION, 0));
}

static int
first_extent (void *opaque, const char *context, uint64_t offset,
              uint32_t *entries, size_t nr, int *error)
{
  struct extent *ext = opaque;

  (void) error;
  if (strcmp (context, LIBNBD_CONTEXT_BASE_ALLOCATION) != 0 || nr < 2 ||
      entries[0] == 0)
    return 0;
  if (offset + entries[0] < ext->end)
    ext->end = offset + entries[0];
  if (entries[1] & LIBNBD_STATE_ZERO)
    ext->type = entries[1] & LIBNBD_STATE_HOLE ? EXTENT_HOLE : EXTENT_ZERO;
  return 0;
}

int
client_extent (struct client *c, uint64_t offset, uint64_t end,
               struct extent *ext)
{
  nbd_extent_callback cb = { .callback = first_extent, .user_data = ext };
  uint64_t len = end - offset;

  *ext = (struct extent) { .start = offset, .end = end };
  if (!client_can_extents (c))
    return 0;
  if (len > UINT32_MAX)
    len = UINT32_MAX & ~UINT32_C (511);
  ext->end = offset + len;
  return finish_pieces (c, nbd_aio_block_status (c->nbd, len, offset, cb,
                                                 NBD_NULL_COMPLETION,
                                                 LIBNBD_CMD_FLAG_REQ_ONE));
}

static int
each_extent (void *opaque, const char *context, uint64_t offset,
             uint32_t *entries, size_t nr, int *error)
{
  struct client_question *w = opaque;

  (void) error;
  if (strcmp (context, LIBNBD_CONTEXT_BASE_ALLOCATION) != 0 ||
      offset != w->at)
    return 0;
  for (size_t i = 0; i + 1 < nr && w->at < w->end; i += 2) {
    uint64_t left = w->end - w->at;
    struct extent ext = {
      .start = w->at,
      .end = w->at + (entries[i] < left ? entries[i] : left),
      .type = EXTENT_DATA,
    };

    if (entries[i + 1] & LIBNBD_STATE_ZERO)
      ext.type = entries[i + 1] & LIBNBD_STATE_HOLE ? EXTENT_HOLE
                                                    : EXTENT_ZERO;
    if (ext.end > ext.start)
      w->found (w->opaque, &ext);
    w->at = ext.end;
  }
  return 0;
}

int
client_extents_ask (struct client *c, struct client_question *q,
                    uint64_t offset, uint64_t end, client_found found,
                    void *opaque)
{
  nbd_extent_callback cb = { .callback = each_extent, .user_data = q };
  uint64_t len = end - offset;

  if (len > UINT32_MAX)
    len = UINT32_MAX & ~UINT32_C (511);
  *q = (struct client_question){ .start = offset, .at = offset,
                                 .end = offset + len, .found = found,
                                 .opaque = opaque };
  q->cookie = nbd_aio_block_status (c->nbd, len, offset, cb,
                                    NBD_NULL_COMPLETION, 0);
  if (q->cookie != -1)
    return 0;
  errno = nbd_errno ();
  return -1;
}

int
client_extents_answer (struct client *c, struct client_question *q,
                       uint64_t *next)
{
  if (finish_pieces (c, q->cookie) == -1)
    return -1;
  *next = q->at;
  if (q->at > q->start)
    return 0;
  errno = EPROTO; /* it must say something */
  return -1;
}

int
client_extents (struct client *c, uint64_t offset, uint64_t end,
                client_found found, void *opaque, uint64_t *next)
{
  struct client_question q;

  if (client_extents_ask (c, &q, offset, end, found, opaque) == -1)
    return -1;
  return client_extents_answer (c, &q, next);
}
