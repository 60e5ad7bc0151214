/* nbdferry - what query-migrate says (QEMU's MigrationInfo), made handy
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "migration-info.h"
#include "size.h"

static uint64_t
get (const json_t *object, const char *key)
{
  json_int_t v = json_integer_value (json_object_get (object, key));

  return v > 0 ? v : 0;
}

void
migration_parse (const json_t *info, struct migration *m)
{
  const json_t *disk = json_object_get (info, "disk");
  const json_t *ferry = json_object_get (info, "x-ferry");
  const char *status = json_string_value (json_object_get (info, "status"));
  double mbps = json_number_value (json_object_get (disk, "mbps"));
  uint64_t page = get (disk, "page-size");

  *m = (struct migration) {
    .status = status ? status : "",
    .error = json_string_value (json_object_get (info, "error-desc")),
    .total_ms = get (info, "total-time"),
    .downtime_ms = get (info, "downtime"),
    .transferred = get (disk, "transferred"),
    .remaining = get (disk, "remaining"),
    .total = get (disk, "total"),
    .zeros = get (disk, "duplicate") * (page ? page : 4096),
    .dirty_rate = get (disk, "dirty-pages-rate"),
    .rounds = get (disk, "dirty-sync-count"),
    .bitmap_bytes = get (ferry, "bitmap-bytes"),
    .throttle_us = get (ferry, "throttle-us"),
    .rate = mbps > 0 && mbps < 1e12 ? mbps * 1e6 / 8 : 0,
  };
}

bool
migration_ended (const struct migration *m)
{
  return strcmp (m->status, "completed") == 0 ||
         strcmp (m->status, "failed") == 0 ||
         strcmp (m->status, "cancelled") == 0;
}

int64_t
migration_estimate (const struct migration *m)
{
  if (m->remaining == 0)
    return 0;
  /* What the guest dirties meanwhile has to be sent again. */
  if (m->rate <= m->dirty_rate)
    return -1;
  return m->remaining / (m->rate - m->dirty_rate);
}

void
migration_describe (const struct migration *m, char *text, size_t size)
{
  char done[SIZE_TEXT], total[SIZE_TEXT], rate[SIZE_TEXT], left[SIZE_TEXT],
    dirty[SIZE_TEXT];
  uint64_t n = m->total > m->remaining ? m->total - m->remaining : 0;
  int64_t eta = migration_estimate (m);
  size_t len;

  len = snprintf (text, size, "%s", m->status);
  if (m->total > 0 && len < size)
    len += snprintf (text + len, size - len, ": %s of %s (%u%%), "
                     "round %" PRIu64 ", %s left, %s/s, dirty %s/s",
                     size_format (n, done), size_format (m->total, total),
                     (unsigned) ((double) n / m->total * 100), m->rounds,
                     size_format (m->remaining, left),
                     size_format (m->rate, rate),
                     size_format (m->dirty_rate, dirty));
  if (m->throttle_us > 0 && len < size)
    len += snprintf (text + len, size - len,
                     ", writes slowed by %" PRIu64 " us", m->throttle_us);
  if (m->total > 0 && eta > 0 && len < size && !migration_ended (m))
    snprintf (text + len, size - len, ", about %" PRId64 " s", eta);
}
