/* nbdferry - all that one daemon has
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "cleanup.h"
#include "clock.h"
#include "house.h"
#include "import-at-start.h"
#include "log.h"
#include "pool.h"
#include "qmp.h"
#include "qmp-query.h"
#include "revive.h"
#include "views.h"

struct house house = {
  .lock = PTHREAD_MUTEX_INITIALIZER,
  .params = MIGRATE_PARAMS_DEFAULT,
};

struct drive *
house_drive (const char *name)
{
  for (size_t i = 0; i < house.nr_drives; i++)
    if (strcmp (house.drives[i]->name, name) == 0)
      return house.drives[i];
  return NULL;
}

void
house_log (const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  nbdkit_verror (fmt, args);
  va_end (args);
}

void
house_quit (void)
{
  nbdkit_shutdown ();
}

/* ---- starting ---- */

static void
log_line (const char *msg)
{
  nbdkit_error ("%s", msg);
}

/* A start that comes to nothing must leave the disks as it found them, and
 * nbdkit, when it cannot bind its socket, just calls exit.  But so does the
 * process that leaves the daemon to a child of its.  A destructor runs at exit
 * and at dlclose, whichever is first; what is registered with atexit may be
 * called when the plugin is no longer there (it is under ThreadSanitizer).
 */
static bool handed_on; /* to a child, or to the threads */

static void
not_ours (void)
{
  handed_on = true;
}

static void __attribute__ ((destructor))
close_drives (void)
{
  for (size_t i = 0; !handed_on && i < house.nr_drives; i++)
    if (house.drives[i]->store)
      drive_shutdown (house.drives[i], NULL);
}

int
house_open (const struct drive_options *options, size_t nr,
            const char *control, struct error *err)
{
  log_set (log_line);
  if (pthread_atfork (NULL, not_ours, NULL) != 0)
    return error_set (err, ENOMEM, "%m");
  house.drives = calloc (nr, sizeof house.drives[0]);
  house.finishers = calloc (nr, sizeof house.finishers[0]);
  if (house.drives == NULL || house.finishers == NULL)
    return error_set (err, ENOMEM, "%m");
  drive_set_log (house_log);
  for (size_t i = 0; i < nr; i++) {
    house.drives[i] = drive_open (&options[i], err);
    if (house.drives[i] == NULL)
      return -1;
    house.nr_drives++;
    if (import_at_start (house.drives[i], &options[i], err) == -1)
      return -1;
  }
  if (control == NULL)
    return 0;
  house.control_path = strdup (control);
  if (house.control_path == NULL)
    return error_set (err, ENOMEM, "%m");
  return qmp_listen (control, err);
}

static int
start (struct error *err)
{
  for (size_t i = 0; i < house.nr_drives; i++)
    if (drive_start (house.drives[i], err) == -1)
      return -1;
  house.incoming = incoming_new (house.drives, house.nr_drives, err);
  if (house.incoming == NULL)
    return -1;
  for (size_t i = 0; i < house.nr_drives; i++)
    if (house.drives[i]->mode == DRIVE_GONE) {
      house.finishers[i] = finisher_start (house.drives[i], err);
      if (house.finishers[i] == NULL)
        return -1;
    }
  house.outgoing = outgoing_restore (house.drives, house.nr_drives,
                                     &house.params, qmp_migration_changed,
                                     NULL);
  return house.control_path ? qmp_start (err) : 0;
}

int
house_start (struct error *err)
{
  handed_on = true;
  if (start (err) == 0)
    return 0;
  house_shutdown ();
  return -1;
}

/* ---- ending ---- */

/* Its gates are stopped: if it begins to forward later, nobody does. */
static void
stop_forwarding (struct drive *d)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  if (d->remote)
    pool_stop (d->remote);
}

void
house_shutdown (void)
{
  uint64_t deadline = now_ns () + DRIVE_HURRY;
  struct outgoing *o;
  struct plain *p;

  /* Wake all that is held, so that nothing below waits for a client. */
  for (size_t i = 0; i < house.nr_drives; i++) {
    gate_stop (&house.drives[i]->writes);
    gate_stop (&house.drives[i]->reads);
    throttle_stop (&house.drives[i]->throttle);
  }
  pthread_mutex_lock (&house.lock);
  if (house.outgoing)
    outgoing_stop (house.outgoing);
  if (house.plain)
    plain_stop (house.plain);
  pthread_mutex_unlock (&house.lock);
  /* A command, or a migration, may wait for a request to an NBD disk whose
   * server says nothing, or to where the disk has gone.
   */
  for (size_t i = 0; i < house.nr_drives; i++)
    stop_forwarding (house.drives[i]);
  for (size_t i = 0; i < house.nr_drives; i++)
    drive_hurry (house.drives[i], deadline);
  if (house.control_path)
    qmp_stop ();
  /* No command can begin another migration now. */
  pthread_mutex_lock (&house.lock);
  o = house.outgoing;
  house.outgoing = NULL;
  p = house.plain;
  house.plain = NULL;
  pthread_mutex_unlock (&house.lock);
  if (o) {
    outgoing_stop (o);
    outgoing_free (o);
  }
  if (p) {
    plain_stop (p);
    plain_free (p);
  }
  if (house.incoming)
    incoming_stop (house.incoming);
  for (size_t i = 0; i < house.nr_drives; i++) {
    struct drive *d = house.drives[i];
    struct error err;

    if (house.finishers[i])
      finisher_stop (house.finishers[i]);
    house.finishers[i] = NULL;
    stop_forwarding (d);
    if (drive_shutdown (d, &err) == -1)
      nbdkit_error ("closing disk '%s': %s", d->name, err.msg);
  }
}

void
house_free (void)
{
  views_free ();
  incoming_free (house.incoming);
  for (size_t i = 0; i < house.nr_drives; i++) {
    if (house.finishers[i])
      finisher_stop (house.finishers[i]);
    /* A start that failed must leave them as it found them. */
    if (house.drives[i]->store)
      drive_shutdown (house.drives[i], NULL);
    drive_free (house.drives[i]);
  }
  house.nr_drives = 0;
  free (house.drives);
  free (house.finishers);
  free (house.control_path);
}
