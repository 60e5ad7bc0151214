/* nbdferry - what query-migrate says (QEMU's MigrationInfo), made handy
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_MIGRATION_INFO_H
#define FERRY_MIGRATION_INFO_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Sizes are bytes.  Strings are borrowed from the JSON. */
struct migration {
  const char *status;  /* "" if there is none */
  const char *error;   /* or NULL */
  uint64_t total_ms, downtime_ms;
  uint64_t transferred, remaining, total, zeros, dirty_rate, rounds;
  uint64_t bitmap_bytes, throttle_us;
  uint64_t rate;       /* bytes a second on the wire */
};

void migration_parse (const json_t *info, struct migration *m);

/* Has it ended: completed, failed or cancelled? */
bool migration_ended (const struct migration *m);

/* Seconds until it is done at this rate, or -1 if there is no telling. */
int64_t migration_estimate (const struct migration *m);

/* One line without colours or newline, to be put into 'text'. */
void migration_describe (const struct migration *m, char *text, size_t size);

#endif /* FERRY_MIGRATION_INFO_H */
