/* nbdferry - how a migration goes, as query-migrate says it
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include "info-json.h"

#define PAGE_SIZE 4096 /* the unit of QEMU's counts */

/* MigrationStats: what QEMU's schema says must be there is there.  Numbers of
 * pages are data divided by QEMU's page size; dirty-pages-rate is in bytes.
 */
static json_t *
disk_info (const struct migrate_info *i)
{
  json_t *disk;

  disk = json_pack ("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:f}",
                    "transferred", (json_int_t) i->transferred,
                    "remaining", (json_int_t) i->remaining,
                    "total", (json_int_t) i->total,
                    "duplicate", (json_int_t) (i->zero_bytes / PAGE_SIZE),
                    "normal", (json_int_t) (i->normal_bytes / PAGE_SIZE),
                    "normal-bytes", (json_int_t) i->normal_bytes,
                    "dirty-pages-rate", (json_int_t) i->dirty_rate,
                    "dirty-sync-count", (json_int_t) i->round,
                    "mbps", i->mbps);
  json_object_set_new (disk, "page-size", json_integer (PAGE_SIZE));
  json_object_set_new (disk, "pages-per-second",
                       json_integer (i->mbps * 1e6 / 8 / PAGE_SIZE));
  json_object_set_new (disk, "multifd-bytes", json_integer (i->transferred));
  json_object_set_new (disk, "precopy-bytes", json_integer (i->transferred));
  /* What cannot happen here. */
  json_object_set_new (disk, "skipped", json_integer (0));
  json_object_set_new (disk, "postcopy-requests", json_integer (0));
  json_object_set_new (disk, "postcopy-bytes", json_integer (0));
  json_object_set_new (disk, "downtime-bytes", json_integer (0));
  json_object_set_new (disk, "dirty-sync-missed-zero-copy", json_integer (0));
  return disk;
}

/* What was mirrored, and what that cost writers. */
static json_t *
mirror_info (const struct mirror_stats *m)
{
  uint64_t n = m->requests ? m->requests : 1;

  return json_pack ("{s:I, s:I, s:I, s:I, s:I}",
                    "bytes", (json_int_t) m->bytes,
                    "requests", (json_int_t) m->requests,
                    "latency-us", (json_int_t) (m->wait_us / n),
                    "longest-us", (json_int_t) m->longest_us,
                    "given-up", (json_int_t) m->given_up);
}

static json_t *
compression_info (const struct migrate_compressed *c)
{
  return json_pack ("{s:I, s:I, s:I, s:I}",
                    "packets", (json_int_t) c->packets,
                    "raw-packets", (json_int_t) c->raw_packets,
                    "bytes-before", (json_int_t) c->before,
                    "bytes-after", (json_int_t) c->after);
}

static json_t *
ferry_info (const struct migrate_info *i)
{
  return json_pack ("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:i, s:i, "
                    "s:o, s:o}",
                    "bitmap-bytes", (json_int_t) i->bitmap_bytes,
                    "throttle-us", (json_int_t) i->throttle_us,
                    "throttle-longest-us",
                    (json_int_t) i->throttle_longest_us,
                    "throttle-rate", (json_int_t) i->throttle_rate,
                    "longest-hold-us", (json_int_t) i->longest_hold_us,
                    "hold-us", (json_int_t) i->hold_us,
                    "handover-cost-us", (json_int_t) i->handover_cost_us,
                    "round-trip-us", (json_int_t) i->round_trip_us,
                    "last-flush-us", (json_int_t) i->last_flush_us,
                    "pauses", (int) i->pauses,
                    "channels", (int) i->channels,
                    "mirrored", mirror_info (&i->mirror),
                    "compression", compression_info (&i->compressed));
}

json_t *
migrate_info_to_json (const struct migrate_info *i)
{
  bool completed = i->status == MIGRATE_COMPLETED;
  json_t *info;

  info = json_pack ("{s:s, s:I, s:I, s:I, s:o, s:o}",
                    "status", migrate_status_name (i->status),
                    "total-time", (json_int_t) i->total_ms,
                    "setup-time", (json_int_t) i->setup_ms,
                    completed ? "downtime" : "expected-downtime",
                    (json_int_t) (completed ? i->downtime_ms
                                  : i->expected_downtime_ms),
                    "disk", disk_info (i), "x-ferry", ferry_info (i));
  if (i->other_server)
    json_object_set_new (json_object_get (info, "x-ferry"), "other-server",
                         json_true ());
  if (i->status == MIGRATE_PAUSED)
    json_object_set_new (json_object_get (info, "x-ferry"), "waits",
                         json_boolean (i->waits));
  return info;
}
