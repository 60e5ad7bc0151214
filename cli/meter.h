/* nbdferry - how far something long has come
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * One line on standard error that is redrawn in place, if that is a terminal;
 * otherwise nothing.  What is printed for good is not mixed up with it as long
 * as meter_clear comes before.
 */
#ifndef FERRY_METER_H
#define FERRY_METER_H

#include <stdbool.h>
#include <stdint.h>

struct meter {
  bool on, drawn;
  uint64_t start_ns; /* when the first was shown, for the rate */
  uint64_t last_ns;  /* when the last was */
};

void meter_init (struct meter *m);

/* Bytes done of 'total'; at most ten times a second is drawn. */
void meter_show (struct meter *m, const char *what, uint64_t done,
                 uint64_t total);

void meter_clear (struct meter *m);

#endif /* FERRY_METER_H */
