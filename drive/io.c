/* nbdferry - requests to a drive
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A request that changes data goes: gate, arm, hooks, mark, submit, mark
 * again, leave.  What is marked is fixed when the request is inside the gate,
 * since it is replaced only while the gate is shut.
 *
 * The activity log is looked at inside the gate, because a region is disarmed
 * only when all who have seen it armed have left (drive/keeper.c).  It is
 * written outside, so that who shuts the gate does not wait for a sync.
 */
#include <config.h>

#include <errno.h>

#include "drive.h"
#include "unsure.h"

/* Relaxed, as it is nothing but a hint; and mostly no more than a look, so that
 * each CPU keeps the line.
 */
static void
note_use (struct drive *d)
{
  if (!atomic_load_explicit (&d->used, memory_order_relaxed))
    atomic_store_explicit (&d->used, true, memory_order_relaxed);
}

bool
drive_was_used (struct drive *d)
{
  return atomic_load_explicit (&d->used, memory_order_relaxed) &&
         atomic_exchange_explicit (&d->used, false, memory_order_relaxed);
}

/* Make the regions of that range durably armed. */
static int
arm (struct drive *d, uint64_t offset, uint64_t len)
{
  if (activity_arm (d->activity, offset, len) == 0) {
    if (atomic_load (&d->arming_failed) &&
        atomic_exchange (&d->arming_failed, false))
      drive_log ("disk '%s': %s/activity can be written again, and so can the "
                 "disk", d->name, d->state_dir);
    return 0;
  }
  if (errno == ESHUTDOWN)
    return -1;
  if (!atomic_exchange (&d->arming_failed, true))
    drive_log ("disk '%s': writes fail, because they could not be tracked: "
               "write to %s/activity: %m", d->name, d->state_dir);
  errno = EIO;
  return -1;
}

/* Let all who must act before this write do so.  HOOK_GO_ON, or how long to
 * wait outside first.
 */
static int64_t
run_hooks (struct drive *d, uint64_t offset, uint64_t len, uint64_t waited)
{
  const struct hooks *hooks = d->hooks;

  for (size_t i = 0; hooks && i < hooks->nr; i++) {
    struct write_hook *h = hooks->hook[i];
    int64_t wait = h->ops->before (h, offset, len, waited);

    if (wait != HOOK_GO_ON)
      return wait;
  }
  return HOOK_GO_ON;
}

int
drive_enter_armed (struct drive *d, uint64_t offset, uint64_t len)
{
  for (;;) {
    int token = gate_enter (&d->writes);

    if (token == -1 || d->mode != DRIVE_ACTIVE || !d->marks->persistent ||
        activity_is_armed (d->activity, offset, len))
      return token;
    gate_leave (&d->writes, token);
    if (arm (d, offset, len) == -1)
      return -1;
  }
}

/* The same, once the hooks have acted.  Who is to wait does so outside, so that
 * who shuts the gate does not wait as well.
 */
static int
enter_hooked (struct drive *d, uint64_t offset, uint64_t len)
{
  uint64_t waited = 0;

  for (;;) {
    int token = drive_enter_armed (d, offset, len);
    int64_t wait;

    if (token == -1 || d->mode != DRIVE_ACTIVE)
      return token;
    wait = run_hooks (d, offset, len, waited);
    if (wait == HOOK_GO_ON)
      return token;
    gate_leave (&d->writes, token);
    if (wait > 0)
      gate_delay (&d->writes, wait);
    waited += wait;
  }
}

/* What a write costs who must send it: whole chunks; zeros are sent as such,
 * but what they leave is counted like data.
 */
#define COST_UNIT UINT64_C (4096)
#define ZERO_COST (UINT64_C (1) << 20)

static uint64_t
cost_of (uint64_t offset, uint64_t len)
{
  return ((offset + len + COST_UNIT - 1) & ~(COST_UNIT - 1)) -
         (offset & ~(COST_UNIT - 1));
}

static uint64_t
cost_of_zeros (uint64_t offset, uint64_t len)
{
  uint64_t cost = cost_of (offset, len);

  return cost < ZERO_COST ? cost : ZERO_COST;
}

/* The mark before.  Returns the gate's token, or -1 with errno. */
static int
begin_write (struct drive *d, uint64_t offset, uint64_t len, uint64_t cost)
{
  int token;

  note_use (d);
  throttle_wait (&d->throttle, cost);
  token = enter_hooked (d, offset, len);
  if (token == -1)
    return -1;
  if (d->mode == DRIVE_ACTIVE) {
    marks_before (d->marks, offset, len);
    if (d->marks->persistent && atomic_load (&d->store_failed)) {
      gate_leave (&d->writes, token);
      drive_store_failed (d, "the pages of bitmaps.qcow2 cannot be had");
      errno = EIO;
      return -1;
    }
    trust_write_begins (d->trust, token / 2);
  }
  else if (d->mode != DRIVE_FORWARD) {
    gate_leave (&d->writes, token);
    errno = ESHUTDOWN;
    return -1;
  }
  return token;
}

/* Who is to be told of a write that has landed, with a reference; or NULL.  It
 * is inside the gate.
 */
static struct drive_mirror *
get_mirror (struct drive *d)
{
  struct drive_mirror *m = atomic_load (&d->mirror);

  if (m == NULL || !atomic_load (&m->on))
    return NULL;
  atomic_fetch_add (&m->users, 1);
  return m;
}

void
drive_set_mirror (struct drive *d, struct drive_mirror *m)
{
  /* Nobody is waited for without need: who is inside may be waiting for a
   * server, once the disk was handed over.
   */
  if (atomic_exchange (&d->mirror, m) != m)
    gate_synchronize (&d->writes);
}

/* The mark after, whether the write succeeded or not: it may have landed in
 * part.
 */
static int
end_write (struct drive *d, int token, uint64_t offset, uint64_t len, int r)
{
  struct drive_mirror *mirror = NULL;
  int saved = errno;
  bool lost = false;

  if (d->mode == DRIVE_ACTIVE) {
    marks_after (d->marks, offset, len);
    lost = d->marks->persistent && atomic_load (&d->store_failed);
    trust_write_ended (d->trust, token / 2);
    if (r == 0 && len > 0)
      mirror = get_mirror (d);
  }
  gate_leave (&d->writes, token);
  if (mirror)
    mirror->written (mirror, offset, len);
  if (lost) {
    /* It has landed, perhaps, but nobody may rely on its bits. */
    drive_store_failed (d, "the pages of bitmaps.qcow2 cannot be had");
    saved = EIO;
    r = -1;
  }
  unsure_look (d);
  errno = saved;
  return r;
}

static struct disk *
target (struct drive *d)
{
  return d->mode == DRIVE_FORWARD ? d->remote : d->disk;
}

int
drive_pwrite (struct drive *d, const void *buf, size_t count,
              uint64_t offset, unsigned flags)
{
  int token = begin_write (d, offset, count, cost_of (offset, count));
  struct disk *t;
  int r;

  if (token == -1)
    return -1;
  t = target (d);
  r = t->ops->pwrite (t, buf, count, offset, flags);
  return end_write (d, token, offset, count, r);
}

int
drive_zero (struct drive *d, uint64_t len, uint64_t offset, unsigned flags)
{
  int token = begin_write (d, offset, len, cost_of_zeros (offset, len));
  struct disk *t;
  int r;

  if (token == -1)
    return -1;
  t = target (d);
  r = t->ops->zero (t, len, offset, flags);
  return end_write (d, token, offset, len, r);
}

int
drive_trim (struct drive *d, uint64_t len, uint64_t offset, unsigned flags)
{
  int token = begin_write (d, offset, len, cost_of_zeros (offset, len));
  struct disk *t;
  int r;

  if (token == -1)
    return -1;
  t = target (d);
  r = t->ops->trim (t, len, offset, flags);
  return end_write (d, token, offset, len, r);
}

/* Requests that change nothing pass the other gate, which is shut only when
 * the disk is handed over.
 */
static int
begin_read (struct drive *d)
{
  int token = gate_enter (&d->reads);

  if (token >= 0 && d->mode != DRIVE_ACTIVE && d->mode != DRIVE_FORWARD) {
    gate_leave (&d->reads, token);
    errno = ESHUTDOWN;
    return -1;
  }
  return token;
}

static int
end_read (struct drive *d, int token, int r)
{
  int saved = errno;

  gate_leave (&d->reads, token);
  unsure_look (d);
  errno = saved;
  return r;
}

int
drive_pread (struct drive *d, void *buf, size_t count, uint64_t offset)
{
  int token = begin_read (d);
  struct disk *t;

  if (token == -1)
    return -1;
  note_use (d);
  t = target (d);
  return end_read (d, token, t->ops->pread (t, buf, count, offset));
}

int
drive_flush (struct drive *d)
{
  int token = begin_read (d);
  struct disk *t;

  if (token == -1)
    return -1;
  t = target (d);
  return end_read (d, token, t == d->disk && d->unsure ? unsure_flush (d)
                                                       : t->ops->flush (t));
}

int
drive_cache (struct drive *d, uint64_t len, uint64_t offset)
{
  int token = begin_read (d);
  struct disk *t;

  if (token == -1)
    return -1;
  t = target (d);
  return end_read (d, token, t->ops->cache (t, len, offset));
}

int
drive_extent (struct drive *d, uint64_t offset, uint64_t end,
              struct extent *ext)
{
  int token = begin_read (d);
  struct disk *t;

  if (token == -1)
    return -1;
  t = target (d);
  return end_read (d, token, t->ops->extent (t, offset, end, ext));
}
