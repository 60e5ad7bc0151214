/* nbdferry - the source of a migration: opening the channels
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A handshake takes many round trips, so all channels are opened at once.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>

#include "cleanup.h"
#include "outgoing-impl.h"

struct opening {
  struct outgoing *o;
  channel_open open;
  uint32_t number;
  pthread_t thread;
  struct client *client;
  struct error err;
};

static void *
opening_thread (void *arg)
{
  struct opening *p = arg;

  p->client = p->open (p->o, p->number, &p->err);
  return NULL;
}

int
outgoing_open_channels (struct outgoing *o, channel_open open,
                        struct client **clients, unsigned nr,
                        struct error *err)
{
  CLEANUP_FREE struct opening *v = calloc (nr, sizeof v[0]);
  unsigned begun = 0;
  int r = 0, e = 0;

  if (v == NULL)
    return error_set (err, ENOMEM, "%m");
  while (begun < nr && e == 0) {
    v[begun] = (struct opening){ .o = o, .open = open, .number = begun + 1 };
    e = pthread_create (&v[begun].thread, NULL, opening_thread, &v[begun]);
    begun += e == 0;
  }
  if (e != 0)
    r = error_set (err, e, "start a thread: %m");
  for (unsigned i = 0; i < begun; i++) {
    pthread_join (v[i].thread, NULL);
    clients[i] = v[i].client;
    if (v[i].client == NULL && r == 0) {
      *err = v[i].err;
      r = error_prefix (err, "channel %u", i + 1);
    }
  }
  return r;
}
