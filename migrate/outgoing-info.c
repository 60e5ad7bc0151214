/* nbdferry - the source of a migration: how it goes
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <string.h>

#include "cleanup.h"
#include "clock.h"
#include "outgoing-impl.h"

/* The rate that is shown is that of so long a time. */
#define SAMPLE (500 * NS_PER_MS)

/* The rate on the wire, of the last moment, or of all once it has ended.
 * Lock held.
 */
static void
measure_rate (struct outgoing *o, uint64_t now)
{
  if (o->ended_ns) {
    o->sample_ns = o->started_ns;
    o->sample_bytes = 0;
  }
  else if (now - o->sample_ns < SAMPLE)
    return;
  o->info.mbps =
    (double) (o->wire_bytes - o->sample_bytes) * 8e3 / (now - o->sample_ns);
  o->sample_ns = now;
  o->sample_bytes = o->wire_bytes;
}

void
outgoing_count_compression (struct outgoing *o, const struct packet_header *h)
{
  struct migrate_compressed *c = &o->compressed;

  if (h->flags & (PACKET_ZLIB | PACKET_ZSTD)) {
    c->packets++;
    c->before += h->raw_size;
    c->after += h->payload_size;
  }
  else if (h->payload_size > 0)
    c->raw_packets++;
}

void
migrate_add_throttle (struct migrate_info *info, struct drive *d)
{
  uint64_t delay = throttle_delay (&d->throttle) / 1000;
  uint64_t longest = throttle_longest (&d->throttle) / 1000;

  if (delay > info->throttle_us)
    info->throttle_us = delay;
  if (longest > info->throttle_longest_us)
    info->throttle_longest_us = longest;
  info->throttle_rate += atomic_load (&d->throttle.rate);
}

/* Whatever the lock protects, as the world sees it.  Lock held. */
static void
fill_info (struct outgoing *o, struct migrate_info *info)
{
  uint64_t end = o->ended_ns ? o->ended_ns : now_ns (), cost;

  measure_rate (o, end);
  *info = o->info;
  info->total_ms = (end - o->started_ns) / NS_PER_MS;
  info->transferred = o->wire_bytes;
  info->normal_bytes = o->normal_bytes;
  info->zero_bytes = o->zero_bytes;
  info->bitmap_bytes = o->bitmap_bytes;
  info->compressed = o->compressed;
  info->round = o->round;
  info->remaining = 0;
  info->throttle_us = info->throttle_longest_us = info->throttle_rate = 0;
  info->waits = info->status == MIGRATE_PAUSED && o->pause_asked;
  for (size_t i = 0; i < o->nr; i++) {
    struct drive *d = o->shipments[i].drive;
    uint64_t held = gate_longest (&d->writes) / 1000, left;

    /* Chunks at the disk's end, and what is sent again, count as more. */
    left = shipment_dirty (&o->shipments[i]) +
           shipment_in_flight (&o->shipments[i]);
    if (info->status != MIGRATE_COMPLETED)
      info->remaining += left < d->size ? left : d->size;
    migrate_add_throttle (info, d);
    if (held > info->longest_hold_us)
      info->longest_hold_us = held;
  }
  cost = hold_fixed_cost (o, info->remaining > 0);
  if (o->info.status == MIGRATE_ACTIVE || o->info.status == MIGRATE_DEVICE)
    info->expected_downtime_ms =
      (double) info->remaining * 1000 / hold_rate (o) + cost / NS_PER_MS;
  info->handover_cost_us = cost / 1000;
  mirror_stats (o->mirror, &info->mirror);
  info->round_trip_us = o->cost.rtt / 1000;
  info->last_flush_us = o->cost.flush / 1000;
}

void
outgoing_info (struct outgoing *o, struct migrate_info *info)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&o->lock);

  fill_info (o, info);
}

void
outgoing_tell (struct outgoing *o)
{
  struct migrate_info info;

  if (o->changed == NULL)
    return;
  outgoing_info (o, &info);
  o->changed (o->opaque, &info);
}

void
outgoing_set_status (struct outgoing *o, enum migrate_status status)
{
  pthread_mutex_lock (&o->lock);
  /* One that was cancelled only ends. */
  if (o->info.status != MIGRATE_CANCELLING || status == MIGRATE_CANCELLED)
    o->info.status = status;
  pthread_mutex_unlock (&o->lock);
  outgoing_tell (o);
}

const char *
migrate_status_name (enum migrate_status status)
{
  static const char *const names[] = {
    [MIGRATE_NONE] = "none",
    [MIGRATE_SETUP] = "setup",
    [MIGRATE_ACTIVE] = "active",
    [MIGRATE_DEVICE] = "device",
    [MIGRATE_PAUSED] = "postcopy-paused",
    [MIGRATE_CANCELLING] = "cancelling",
    [MIGRATE_CANCELLED] = "cancelled",
    [MIGRATE_FAILED] = "failed",
    [MIGRATE_COMPLETED] = "completed",
  };

  return names[status];
}

static const char *const compression_names[] = {
  [MIGRATE_COMPRESSION_NONE] = "none",
  [MIGRATE_COMPRESSION_ZLIB] = "zlib",
  [MIGRATE_COMPRESSION_ZSTD] = "zstd",
};

const char *
migrate_compression_name (enum migrate_compression c)
{
  return compression_names[c];
}

static const char *const copy_mode_names[] = {
  [MIGRATE_BACKGROUND] = "background",
  [MIGRATE_WRITE_BLOCKING] = "write-blocking",
};

const char *
migrate_copy_mode_name (enum migrate_copy_mode m)
{
  return copy_mode_names[m];
}

int
migrate_copy_mode_parse (const char *name, enum migrate_copy_mode *m)
{
  for (size_t i = 0; i < 2; i++)
    if (strcmp (name, copy_mode_names[i]) == 0) {
      *m = i;
      return 0;
    }
  errno = EINVAL;
  return -1;
}

int
migrate_compression_parse (const char *name, enum migrate_compression *c)
{
  for (size_t i = 0;
       i < sizeof compression_names / sizeof compression_names[0]; i++)
    if (strcmp (name, compression_names[i]) == 0) {
      *c = i;
      return 0;
    }
  errno = EINVAL;
  return -1;
}
