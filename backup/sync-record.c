/* nbdferry - what is known of a standby: its record and its samples
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <xxhash.h>

#include "cleanup.h"
#include "sync-record.h"

/* ---- the record ---- */

void
sync_record_free (struct sync_record *r)
{
  free (r->standby);
  *r = (struct sync_record){ 0 };
}

static json_t *
point_to_json (const struct uuid *u)
{
  char text[UUID_TEXT];

  if (uuid_is_zero (u))
    return json_null ();
  uuid_format (u, text);
  return json_string (text);
}

static json_t *
samples_to_json (const struct sync_samples *s)
{
  json_t *list = json_array ();
  char hash[17];

  for (size_t i = 0; i < s->nr; i++) {
    snprintf (hash, sizeof hash, "%016" PRIx64, s->sample[i].hash);
    json_array_append_new (list,
      json_pack ("[I, I, s]", (json_int_t) s->sample[i].offset,
                 (json_int_t) s->sample[i].len, hash));
  }
  return list;
}

json_t *
sync_record_to_json (const struct sync_record *r)
{
  return json_pack ("{s:s, s:I, s:o, s:o, s:o, s:o}", "standby", r->standby,
                    "size", (json_int_t) r->size, "from",
                    point_to_json (&r->from), "to", point_to_json (&r->to),
                    "from-samples", samples_to_json (&r->at_from),
                    "to-samples", samples_to_json (&r->at_to));
}

static bool
parse_point (const json_t *json, struct uuid *u)
{
  *u = (struct uuid){ { 0 } };
  return json_is_null (json) || (json_is_string (json) &&
                                 uuid_parse (json_string_value (json), u));
}

static bool
parse_hash (const char *text, uint64_t *hash)
{
  *hash = 0;
  if (text == NULL || strlen (text) != 16 ||
      strspn (text, "0123456789abcdef") != 16)
    return false;
  return sscanf (text, "%" SCNx64, hash) == 1;
}

static bool
parse_sample (const json_t *json, uint64_t size, struct sync_sample *s)
{
  json_int_t offset = json_integer_value (json_array_get (json, 0));
  json_int_t len = json_integer_value (json_array_get (json, 1));

  if (json_array_size (json) != 3 || offset < 0 || len < 1 ||
      len > SYNC_SAMPLE_MAX || (uint64_t) offset > size ||
      (uint64_t) len > size - offset)
    return false;
  s->offset = offset;
  s->len = len;
  return parse_hash (json_string_value (json_array_get (json, 2)), &s->hash);
}

static bool
parse_samples (const json_t *json, uint64_t size, struct sync_samples *s)
{
  const json_t *item;
  size_t i;

  s->nr = json_array_size (json);
  if (!json_is_array (json) || s->nr > SYNC_SAMPLES)
    return false;
  json_array_foreach ((json_t *) json, i, item)
    if (!parse_sample (item, size, &s->sample[i]))
      return false;
  return true;
}

int
sync_record_parse (const json_t *json, struct sync_record *r,
                   struct error *err)
{
  const char *standby = json_string_value (json_object_get (json, "standby"));
  json_int_t size = json_integer_value (json_object_get (json, "size"));

  *r = (struct sync_record){ .size = size };
  if (standby == NULL || size < 0 ||
      !parse_point (json_object_get (json, "from"), &r->from) ||
      !parse_point (json_object_get (json, "to"), &r->to) ||
      !parse_samples (json_object_get (json, "from-samples"), size,
                      &r->at_from) ||
      !parse_samples (json_object_get (json, "to-samples"), size, &r->at_to))
    return error_set (err, EINVAL, "what is recorded of the standby makes no "
                      "sense");
  r->standby = strdup (standby);
  return r->standby ? 0 : error_set (err, ENOMEM, "%m");
}

/* ---- samples ---- */

uint64_t
sync_sample_hash (const void *buf, size_t len)
{
  return XXH3_64bits (buf, len);
}

void
sync_sampler_init (struct sync_sampler *s)
{
  struct uuid u;

  uuid_new (&u);
  *s = (struct sync_sampler){ 0 };
  memcpy (&s->random, u.b, sizeof s->random);
  s->random |= 1;
}

static uint64_t
random_below (struct sync_sampler *s, uint64_t n)
{
  s->random ^= s->random >> 12;
  s->random ^= s->random << 25;
  s->random ^= s->random >> 27;
  return s->random * UINT64_C (0x2545f4914f6cdd1d) % n;
}

static const char zeros[SYNC_SAMPLE_MAX];

/* So many places of zeros are kept beside any number of others. */
#define FEW_ZEROS (SYNC_FRESH / 8)

/* Where in there is something that is not zero?  The first sector of that kind
 * from 'from' on, or from the beginning; 'len' if there is none.
 */
static uint64_t
find_data (const char *buf, uint64_t len, uint64_t from)
{
  for (uint64_t k = 0; buf && k < len; k += 512) {
    uint64_t at = (from + k) % ((len + 511) / 512 * 512);

    if (!disk_is_zero (buf + at, len - at < 512 ? len - at : 512))
      return at;
  }
  return len;
}

/* The slot for one more place of that kind, or SYNC_FRESH: it is not kept.  Of
 * the n-th place of a kind, keep it with the chance k / n, instead of one of
 * the k that are there.  (A place that comes twice, because it had to be sent
 * again, is only more likely to be kept.)  Zeros tell little: an empty disk has
 * them as well.  So they make room for data, but for a few.
 */
static size_t
choose_slot (struct sync_sampler *s, bool zero)
{
  uint64_t seen = ++s->seen[zero];
  size_t kept = 0, n;

  for (size_t i = 0; i < s->picked.nr; i++)
    kept += s->zero[i] == zero;
  if (s->picked.nr < SYNC_FRESH)
    return s->picked.nr++;
  if (!zero && s->picked.nr - kept > FEW_ZEROS) {
    zero = true;
    n = random_below (s, s->picked.nr - kept);
  }
  else {
    n = random_below (s, seen);
    if (n >= kept)
      return SYNC_FRESH;
  }
  for (size_t i = 0; i < SYNC_FRESH; i++)
    if (s->zero[i] == zero && n-- == 0)
      return i;
  return SYNC_FRESH;
}

void
sync_sampler_add (struct sync_sampler *s, const void *buf, uint64_t len,
                  uint64_t offset)
{
  size_t n = len < SYNC_SAMPLE_MAX ? len : SYNC_SAMPLE_MAX;
  uint64_t last = (len - n) / 512 * 512, at = 0, data;
  size_t slot;

  if (len > n)
    at = random_below (s, last / 512 + 1) * 512;
  data = find_data (buf, len, at);
  slot = choose_slot (s, data == len);
  if (slot == SYNC_FRESH)
    return;
  if (data < len)
    at = data < last ? data : last;
  s->zero[slot] = data == len;
  s->picked.sample[slot] = (struct sync_sample){
    .offset = offset + at, .len = n,
    .hash = sync_sample_hash (buf ? (const char *) buf + at : zeros, n),
  };
}

void
sync_samples_merge (struct sync_samples *to, const struct sync_samples *old,
                    bool (*written) (void *opaque, uint64_t offset,
                                     uint64_t len),
                    void *opaque, const struct sync_sampler *fresh)
{
  const struct sync_sample *s;

  *to = fresh->picked;
  /* The newest of the old ones come first. */
  for (s = old->sample; s < old->sample + old->nr; s++)
    if (to->nr < SYNC_SAMPLES && !written (opaque, s->offset, s->len))
      to->sample[to->nr++] = *s;
}

int
sync_samples_check (const struct sync_samples *s, struct disk *d,
                    bool (*skip) (void *opaque, uint64_t offset,
                                  uint64_t len),
                    void *opaque, uint64_t *offset)
{
  CLEANUP_FREE char *buf = malloc (SYNC_SAMPLE_MAX);

  if (buf == NULL)
    return -1;
  for (size_t i = 0; i < s->nr; i++) {
    const struct sync_sample *a = &s->sample[i];

    if (skip && skip (opaque, a->offset, a->len))
      continue;
    *offset = a->offset;
    if (d->ops->pread (d, buf, a->len, a->offset) == -1)
      return -1;
    if (sync_sample_hash (buf, a->len) != a->hash)
      return 0;
  }
  return 1;
}
