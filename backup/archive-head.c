/* nbdferry - what an archive says of itself, in JSON
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "archive.h"
#include "cleanup.h"

#define MAX_DISK_NAME 4096

/* ---- the head ---- */

char *
archive_head_format (const struct archive_head *h, struct error *err)
{
  char lineage[UUID_TEXT], point[UUID_TEXT], parent[UUID_TEXT];
  json_auto_t *json = NULL;
  char *text = NULL;

  uuid_format (&h->lineage, lineage);
  uuid_format (&h->point, point);
  uuid_format (&h->parent, parent);
  json = json_pack ("{s:s, s:i, s:s, s:I, s:s, s:I, s:s, s:I}",
                    "format", ARCHIVE_FORMAT, "version", ARCHIVE_VERSION,
                    "disk", h->disk, "size", (json_int_t) h->size,
                    "lineage", lineage,
                    "generation", (json_int_t) h->generation,
                    "point", point, "time", (json_int_t) h->time);
  if (json && !archive_is_full (h))
    json_object_set_new (json, "parent", json_string (parent));
  if (json && h->bitmap) {
    json_object_set_new (json, "bitmap", json_string (h->bitmap));
    json_object_set_new (json, "granularity", json_integer (h->granularity));
  }
  if (json && h->tool)
    json_object_set_new (json, "tool", json_string (h->tool));
  if (json)
    text = json_dumps (json, JSON_COMPACT);
  if (text == NULL)
    error_set (err, ENOMEM, "cannot describe the archive of disk '%s'",
               h->disk);
  return text;
}

static int
wrong (const char *member, struct error *err)
{
  return error_set (err, EBADMSG, "the head's '%s' is missing or wrong",
                    member);
}

static bool
get_uuid (const json_t *json, const char *member, struct uuid *u)
{
  const char *text = json_string_value (json_object_get (json, member));

  return text && uuid_parse (text, u) && !uuid_is_zero (u);
}

/* A number that is not negative. */
static bool
get_number (const json_t *json, const char *member, uint64_t *value)
{
  const json_t *n = json_object_get (json, member);

  if (!json_is_integer (n) || json_integer_value (n) < 0)
    return false;
  *value = json_integer_value (n);
  return true;
}

static bool
get_text (const json_t *json, const char *member, size_t max, char **text)
{
  const json_t *s = json_object_get (json, member);

  if (!json_is_string (s) || json_string_length (s) == 0 ||
      json_string_length (s) > max ||
      strlen (json_string_value (s)) != json_string_length (s))
    return false;
  *text = strdup (json_string_value (s));
  return *text != NULL;
}

static int
get_bitmap (const json_t *json, struct archive_head *h, struct error *err)
{
  if (json_object_get (json, "bitmap") == NULL)
    return 0;
  if (!get_text (json, "bitmap", PACKET_MAX_NAME, &h->bitmap))
    return wrong ("bitmap", err);
  if (!get_number (json, "granularity", &h->granularity) ||
      h->granularity < 512 || h->granularity > UINT64_C (1) << 31 ||
      (h->granularity & (h->granularity - 1)) != 0)
    return wrong ("granularity", err);
  return 0;
}

static int
parse_members (const json_t *json, struct archive_head *h, struct error *err)
{
  uint64_t time;

  if (!get_text (json, "disk", MAX_DISK_NAME, &h->disk))
    return wrong ("disk", err);
  if (!get_number (json, "size", &h->size) || h->size % 512 != 0)
    return wrong ("size", err);
  if (!get_uuid (json, "lineage", &h->lineage))
    return wrong ("lineage", err);
  if (!get_number (json, "generation", &h->generation))
    return wrong ("generation", err);
  if (!get_uuid (json, "point", &h->point))
    return wrong ("point", err);
  if (json_object_get (json, "parent") &&
      !get_uuid (json, "parent", &h->parent))
    return wrong ("parent", err);
  if (!get_number (json, "time", &time))
    return wrong ("time", err);
  h->time = time;
  if (json_object_get (json, "tool") &&
      !get_text (json, "tool", 256, &h->tool))
    return wrong ("tool", err);
  return get_bitmap (json, h, err);
}

int
archive_head_parse (const char *text, size_t len, struct archive_head *h,
                    struct error *err)
{
  json_auto_t *json = json_loadb (text, len, JSON_REJECT_DUPLICATES, NULL);
  const char *format = json_string_value (json_object_get (json, "format"));
  uint64_t version;

  *h = (struct archive_head){ 0 };
  if (format == NULL || strcmp (format, ARCHIVE_FORMAT) != 0)
    return wrong ("format", err);
  if (!get_number (json, "version", &version))
    return wrong ("version", err);
  if (version != ARCHIVE_VERSION)
    return error_set (err, EPROTONOSUPPORT, "an archive of version %" PRIu64
                      "; this nbdferry reads version %d", version,
                      ARCHIVE_VERSION);
  if (parse_members (json, h, err) == -1) {
    archive_head_free (h);
    return -1;
  }
  return 0;
}

int
archive_head_copy (struct archive_head *to, const struct archive_head *from,
                   struct error *err)
{
  *to = *from;
  to->disk = strdup (from->disk);
  to->bitmap = from->bitmap ? strdup (from->bitmap) : NULL;
  to->tool = from->tool ? strdup (from->tool) : NULL;
  if (to->disk && !to->bitmap == !from->bitmap && !to->tool == !from->tool)
    return 0;
  archive_head_free (to);
  return error_set (err, ENOMEM, "%m");
}

void
archive_head_free (struct archive_head *h)
{
  free (h->disk);
  free (h->bitmap);
  free (h->tool);
  *h = (struct archive_head){ 0 };
}

/* ---- the end ---- */

char *
archive_totals_format (const struct archive_totals *t, struct error *err)
{
  char *text, hash[33];

  snprintf (hash, sizeof hash, "%016" PRIx64 "%016" PRIx64, t->hash.high,
            t->hash.low);
  if (asprintf (&text, "{\"packets\":%" PRIu64 ",\"extents\":%" PRIu64
                ",\"data\":%" PRIu64 ",\"zeros\":%" PRIu64 ",\"holes\":%"
                PRIu64 ",\"stored\":%" PRIu64 ",\"bytes\":%" PRIu64
                ",\"hash\":\"%s\"}",
                t->packets, t->extents, t->data, t->zeros, t->holes,
                t->stored, t->bytes, hash) == -1) {
    error_set (err, ENOMEM, "%m");
    return NULL;
  }
  return text;
}

static bool
parse_hash (const char *text, struct archive_hash *h)
{
  char half[17] = { 0 };

  if (text == NULL || strlen (text) != 32 ||
      strspn (text, "0123456789abcdef") != 32)
    return false;
  memcpy (half, text, 16);
  h->high = strtoull (half, NULL, 16);
  h->low = strtoull (text + 16, NULL, 16);
  return true;
}

int
archive_totals_parse (const char *text, size_t len, struct archive_totals *t,
                      struct error *err)
{
  json_auto_t *json = json_loadb (text, len, JSON_REJECT_DUPLICATES, NULL);

  if (get_number (json, "packets", &t->packets) &&
      get_number (json, "extents", &t->extents) &&
      get_number (json, "data", &t->data) &&
      get_number (json, "zeros", &t->zeros) &&
      get_number (json, "holes", &t->holes) &&
      get_number (json, "stored", &t->stored) &&
      get_number (json, "bytes", &t->bytes) &&
      parse_hash (json_string_value (json_object_get (json, "hash")),
                  &t->hash))
    return 0;
  return error_set (err, EBADMSG, "its end has no totals");
}
