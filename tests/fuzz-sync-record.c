/* nbdferry - fuzz what is read of a standby's record
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What is accepted must keep to its bounds, and must come out as JSON and in
 * again the same.
 */
#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "sync-record.h"

int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

static void
must (bool ok)
{
  if (!ok)
    abort ();
}

static void
within (const struct sync_samples *s, uint64_t size)
{
  must (s->nr <= SYNC_SAMPLES);
  for (size_t i = 0; i < s->nr; i++)
    must (s->sample[i].len >= 1 && s->sample[i].len <= SYNC_SAMPLE_MAX &&
          s->sample[i].offset <= size &&
          s->sample[i].len <= size - s->sample[i].offset);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  json_t *json = json_loadb ((const char *) data, size, JSON_DECODE_ANY, NULL);
  struct sync_record r, again;
  json_t *out, *twice;

  if (sync_record_parse (json, &r, NULL) == 0) {
    within (&r.at_from, r.size);
    within (&r.at_to, r.size);
    out = sync_record_to_json (&r);
    must (sync_record_parse (out, &again, NULL) == 0);
    twice = sync_record_to_json (&again);
    must (json_equal (out, twice));
    json_decref (twice);
    json_decref (out);
    sync_record_free (&again);
    sync_record_free (&r);
  }
  json_decref (json);
  return 0;
}
