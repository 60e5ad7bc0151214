/* nbdferry - the journal's record, in memory and as JSON
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * docs/journal.md lists the members.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "journal-record.h"

static const char *const state_names[] = {
  [JOURNAL_ACTIVE] = "active",     [JOURNAL_INCOMING] = "incoming",
  [JOURNAL_PREPARED] = "prepared", [JOURNAL_DOUBT] = "in-doubt",
  [JOURNAL_GONE] = "gone",
};
#define NR_STATES (sizeof state_names / sizeof state_names[0])

const char *
journal_state_name (enum journal_state state)
{
  return (size_t) state < NR_STATES ? state_names[state] : "unknown";
}

void
journal_record_free (struct journal_record *rec)
{
  free (rec->coordinator);
  free (rec->peer);
  rec->coordinator = rec->peer = NULL;
  json_decref (rec->reasons);
  rec->reasons = NULL;
}

int
journal_copy_record (struct journal_record *dst,
                     const struct journal_record *src)
{
  *dst = *src;
  dst->coordinator = src->coordinator ? strdup (src->coordinator) : NULL;
  dst->peer = src->peer ? strdup (src->peer) : NULL;
  json_incref (dst->reasons);
  if ((src->coordinator && !dst->coordinator) || (src->peer && !dst->peer)) {
    journal_record_free (dst);
    errno = ENOMEM;
    return -1;
  }
  return 0;
}

static json_t *
file_to_json (uint64_t size, uint64_t inode, int64_t mtime)
{
  /* An inode number may need all 64 bits: as the signed number they make. */
  return json_pack ("{s:I, s:I, s:I}", "size", (json_int_t) size,
                    "inode", (json_int_t) inode, "mtime", (json_int_t) mtime);
}

static void
add_trust (json_t *root, const struct journal_trust *t)
{
  if (!t->known)
    return;
  json_object_set_new (root, "trust",
    json_pack ("{s:o, s:o}",
               "disk", file_to_json (t->disk_size, t->disk_inode,
                                     t->disk_mtime),
               "sidecar", file_to_json (t->sidecar_size, t->sidecar_inode,
                                        t->sidecar_mtime)));
}

static int
unpack_trust (json_t *root, struct journal_trust *t)
{
  json_int_t n[6];

  if (root == NULL)
    return 0;
  if (json_unpack (root, "{s:{s:I, s:I, s:I}, s:{s:I, s:I, s:I}}",
                   "disk", "size", &n[0], "inode", &n[1], "mtime", &n[2],
                   "sidecar", "size", &n[3], "inode", &n[4],
                   "mtime", &n[5]) == -1)
    return -1;
  *t = (struct journal_trust){ .known = true, .disk_size = n[0],
    .disk_inode = n[1], .disk_mtime = n[2], .sidecar_size = n[3],
    .sidecar_inode = n[4], .sidecar_mtime = n[5] };
  return 0;
}

/* What others rely upon when they look at a record's reasons. */
static bool
are_reasons (const json_t *reasons)
{
  const json_t *r, *names;
  size_t i, k;

  if (!json_is_array (reasons))
    return false;
  json_array_foreach ((json_t *) reasons, i, r) {
    if (!json_is_integer (json_object_get (r, "time"))
        || !json_is_string (json_object_get (r, "text")))
      return false;
    names = json_object_get (r, "bitmaps");
    if (names && !json_is_array (names))
      return false;
    for (k = 0; k < json_array_size (names); ++k)
      if (!json_is_string (json_array_get (names, k)))
        return false;
  }
  return true;
}

char *
journal_record_to_json (const struct journal_record *rec, const char *path,
                struct error *err)
{
  char lineage[UUID_TEXT], session[UUID_TEXT], origin[UUID_TEXT];
  char coordinator[UUID_TEXT], taken_from[UUID_TEXT];
  json_t *root;
  char *text;

  uuid_format (&rec->lineage, lineage);
  uuid_format (&rec->session, session);
  uuid_format (&rec->origin, origin);
  uuid_format (&rec->coordinator_lineage, coordinator);
  root = json_pack ("{s:s, s:I, s:s, s:b, s:s, s:s, s:s, s:I, s:b, s:s?, "
                    "s:s, s:I, s:s?}",
                    "lineage", lineage,
                    "generation", (json_int_t) rec->generation,
                    "state", journal_state_name (rec->state),
                    "clean", (int) rec->clean,
                    "boot-id", rec->boot_id,
                    "origin", origin,
                    "session", session,
                    "attempt", (json_int_t) rec->attempt,
                    "acknowledged", (int) rec->acknowledged,
                    "coordinator", rec->coordinator,
                    "coordinator-lineage", coordinator,
                    "coordinator-generation",
                    (json_int_t) rec->coordinator_generation,
                    "peer", rec->peer);
  if (root == NULL) {
    error_set (err, EILSEQ, "%s: a name in the record is not UTF-8", path);
    return NULL;
  }
  if (rec->stale)
    json_object_set_new (root, "stale", json_true ());
  add_trust (root, &rec->trust);
  if (rec->together)
    json_object_set_new (root, "together", json_integer (rec->together));
  if (rec->served_size)
    json_object_set_new (root, "served-size",
                         json_integer (rec->served_size));
  if (!uuid_is_zero (&rec->taken_from)) {
    uuid_format (&rec->taken_from, taken_from);
    json_object_set_new (root, "taken-from", json_string (taken_from));
  }
  if (rec->reasons)
    json_object_set (root, "reasons", rec->reasons);
  text = json_dumps (root, JSON_INDENT (1) | JSON_PRESERVE_ORDER);
  json_decref (root);
  if (text == NULL)
    error_set (err, ENOMEM, "%s: out of memory", path);
  return text;
}

static int
unpack_strings (json_t *root, struct journal_record *rec)
{
  const char *lineage, *state, *boot_id, *session, *origin = NULL;
  const char *coordinator, *peer, *coordinator_lineage = NULL;
  const char *taken_from = NULL;
  json_int_t generation, attempt, coordinator_generation = 0;
  json_int_t together = 0, served_size = 0;
  json_t *c = NULL, *p = NULL, *trust = NULL, *reasons = NULL;
  int clean, acknowledged = 0;
  size_t s;

  if (json_unpack (root, "{s:s, s:I, s:s, s:b, s:s, s?s, s:s, s:I, s?b, s?o,"
                   " s?s, s?I, s?o, s?o, s?o, s?I, s?I, s?s}",
                   "lineage", &lineage, "generation", &generation,
                   "state", &state, "clean", &clean, "boot-id", &boot_id,
                   "origin", &origin, "session", &session,
                   "attempt", &attempt, "acknowledged", &acknowledged,
                   "coordinator", &c, "coordinator-lineage",
                   &coordinator_lineage, "coordinator-generation",
                   &coordinator_generation, "peer", &p, "trust", &trust,
                   "reasons", &reasons, "together", &together,
                   "served-size", &served_size, "taken-from",
                   &taken_from) == -1)
    return -1;
  coordinator = json_string_value (c);
  peer = json_string_value (p);
  if ((c && !coordinator && !json_is_null (c))
      || (p && !peer && !json_is_null (p)))
    return -1;
  for (s = 0; s < NR_STATES; ++s)
    if (strcmp (state, state_names[s]) == 0)
      break;
  if (s == NR_STATES || generation < 0 || attempt < 0
      || strlen (boot_id) >= sizeof rec->boot_id
      || !uuid_parse (lineage, &rec->lineage)
      || !uuid_parse (session, &rec->session)
      || (origin && !uuid_parse (origin, &rec->origin))
      || (coordinator_lineage
          && !uuid_parse (coordinator_lineage, &rec->coordinator_lineage))
      || together < 0 || served_size < 0 || served_size % 512 != 0
      || (taken_from && !uuid_parse (taken_from, &rec->taken_from))
      || unpack_trust (trust, &rec->trust) == -1
      || (reasons && !are_reasons (reasons)))
    return -1;
  rec->generation = generation;
  rec->state = s;
  rec->clean = clean;
  strcpy (rec->boot_id, boot_id);
  rec->attempt = attempt;
  rec->acknowledged = acknowledged;
  rec->together = together;
  rec->served_size = served_size;
  rec->stale = json_is_true (json_object_get (root, "stale"));
  rec->coordinator_generation = coordinator_generation;
  if (coordinator && (rec->coordinator = strdup (coordinator)) == NULL)
    return -1;
  if (peer && (rec->peer = strdup (peer)) == NULL)
    return -1;
  rec->reasons = json_incref (reasons);
  return 0;
}

int
journal_record_from_json (const char *text, size_t len,
                          struct journal_record *rec)
{
  json_t *root = json_loadb (text, len, JSON_REJECT_DUPLICATES, NULL);
  int r = -1;

  memset (rec, 0, sizeof *rec);
  if (root)
    r = unpack_strings (root, rec);
  if (r == -1)
    journal_record_free (rec);
  json_decref (root);
  return r;
}
