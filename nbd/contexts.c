/* nbdferry - what an NBD server says of an export's ranges
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "client-impl.h"
#include "contexts.h"

#define CONNECT_TIMEOUT_MS 10000

/* Each request asks about that much at most. */
#define ASK (UINT64_C (1) << 30)

/* ---- listing ---- */

struct listing {
  const char *prefix;
  int (*found) (void *opaque, const char *context, struct error *err);
  void *opaque;
  struct error *err;
  int r;
};

static int
listed (void *user_data, const char *name)
{
  struct listing *l = user_data;

  /* A server may say more than it was asked for. */
  if (l->r == 0 && strncmp (name, l->prefix, strlen (l->prefix)) == 0)
    l->r = l->found (l->opaque, name, l->err);
  return 0;
}

/* Negotiation goes on: the list has come, or was refused. */
static int
answered (struct nbd_handle *nbd)
{
  return nbd_aio_is_negotiating (nbd) || nbd_aio_is_ready (nbd);
}

int
contexts_list (const char *uri, const char *prefix,
               int (*found) (void *opaque, const char *context,
                             struct error *err),
               void *opaque, const struct stop *stop, struct error *err)
{
  struct listing l = { prefix, found, opaque, err, 0 };
  nbd_context_callback cb = { .callback = listed, .user_data = &l };
  struct client *c = client_negotiate (uri, NULL, prefix, stop,
                                       CONNECT_TIMEOUT_MS, err);
  int r;

  if (c == NULL)
    return -1;
  r = 0;
  if (nbd_aio_is_negotiating (c->nbd)) {
    if (nbd_aio_opt_list_meta_context (c->nbd, cb, NBD_NULL_COMPLETION) == -1)
      r = error_set (err, nbd_get_errno () ? nbd_get_errno () : EIO, "%s: %s",
                     uri, nbd_get_error ());
    else
      r = client_drive_until (c, answered, c->connect_deadline, uri, err);
  }
  client_close (c);
  return r == -1 ? -1 : l.r;
}

/* ---- walking ---- */

struct walk {
  const char *context;
  uint64_t at, end; /* of this request */
  int (*range) (void *opaque, uint64_t start, uint64_t end, uint32_t flags);
  void *opaque;
  int r;
};

static int
status (void *user_data, const char *context, uint64_t offset,
        uint32_t *entries, size_t nr, int *error)
{
  struct walk *w = user_data;

  (void) error;
  if (strcmp (context, w->context) != 0 || offset != w->at)
    return 0;
  for (size_t i = 0; i + 1 < nr && w->at < w->end && w->r == 0; i += 2) {
    /* The last one may reach beyond what was asked for. */
    uint64_t end = w->at + entries[i];

    if (end > w->end)
      end = w->end;
    if (end > w->at)
      w->r = w->range (w->opaque, w->at, end, entries[i + 1]);
    w->at = end;
  }
  return 0;
}

static int
walk (struct client *c, struct walk *w, const char *uri, uint64_t size,
      struct error *err)
{
  nbd_extent_callback cb = { .callback = status, .user_data = w };

  while (w->at < size) {
    uint64_t before = w->at;

    w->end = size - before < ASK ? size : before + ASK;
    if (client_finish (c, nbd_aio_block_status (c->nbd, w->end - before,
                                                before, cb,
                                                NBD_NULL_COMPLETION, 0)) ==
        -1)
      return error_set (err, errno, "%s: %s at %" PRIu64 ": %m", uri,
                        w->context, before);
    if (w->r != 0)
      return -1;
    if (w->at == before)
      return error_set (err, EPROTO, "%s: the server does not say what %s is "
                        "at %" PRIu64, uri, w->context, before);
  }
  return 0;
}

int
contexts_walk (const char *uri, const char *context, uint64_t size,
               int (*range) (void *opaque, uint64_t start, uint64_t end,
                             uint32_t flags),
               void *opaque, const struct stop *stop, struct error *err)
{
  struct walk w = { .context = context, .range = range, .opaque = opaque };
  struct client *c = client_negotiate (uri, NULL, context, stop,
                                       CONNECT_TIMEOUT_MS, err);
  int r = -1;

  if (c == NULL)
    return -1;
  if (client_go (c, uri, err) == -1)
    goto out;
  if (client_size (c) != size)
    error_set (err, EINVAL, "%s: has %" PRIu64 " bytes, but this disk has %"
               PRIu64, uri, client_size (c), size);
  else if (nbd_can_meta_context (c->nbd, context) != 1)
    error_set (err, ENOENT, "%s: the server does not offer %s", uri, context);
  else
    r = walk (c, &w, uri, size, err);
 out:
  client_close (c);
  return r;
}
