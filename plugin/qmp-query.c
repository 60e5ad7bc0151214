/* nbdferry - the control socket: questions
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The shapes are those of QEMU's schema (qapi/block-core.json).  A disk is a
 * node whose name is that of its export; it is also the device that
 * query-block knows.  Questions about blocks take the list lock only, so they
 * are answered whatever else a drive is busy with.
 */
#include <config.h>

#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "cleanup.h"
#include "house.h"
#include "qmp-dispatch.h"
#include "qmp-query.h"

static json_t *
query_version (json_t *args, struct error *err)
{
  (void) args;
  (void) err;
  return qmp_version ();
}

static bool
add_command (const struct qmp_command *cmd, void *list)
{
  json_array_append_new (list, json_pack ("{s:s}", "name", cmd->name));
  return true;
}

static json_t *
query_commands (json_t *args, struct error *err)
{
  json_t *list = json_array ();

  (void) args;
  (void) err;
  qmp_each_command (add_command, list);
  return list;
}

/* ---- blocks ---- */

static json_t *
bitmap_info (const struct named_bitmap *nb)
{
  json_t *info;

  /* What is still coming in may be looked at, but not touched. */
  info = json_pack ("{s:o, s:b, s:b, s:b, s:I, s:I}",
                    "name", qmp_string (nb->name),
                    "recording", nb->recording && !nb->inconsistent,
                    "persistent", nb->persistent,
                    "busy", nb->busy || nb->incoming,
                    "granularity", (json_int_t) 1 << nb->shift,
                    "count",
                    nb->bits ? (json_int_t) bitmap_count (nb->bits) : 0);
  if (nb->inconsistent)
    json_object_set_new (info, "inconsistent", json_true ());
  return info;
}

/* The newest first, as QEMU lists them. */
static json_t *
bitmap_list (struct drive *d)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);
  json_t *list = json_array ();

  for (size_t i = d->nr_bitmaps; i-- > 0; )
    json_array_append_new (list, bitmap_info (d->bitmaps[i]));
  return list;
}

/* A destination's may change. */
static uint64_t
size_of (struct drive *d)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  return d->size;
}

static json_t *
image_info (struct drive *d)
{
  json_t *image;
  struct stat st;

  image = json_pack ("{s:I, s:o, s:s, s:b}",
                     "virtual-size", (json_int_t) size_of (d),
                     "filename", qmp_string (d->path), "format", "raw",
                     "dirty-flag", 0);
  if (d->path[0] == '/' && stat (d->path, &st) == 0)
    json_object_set_new (image, "actual-size",
                         json_integer ((json_int_t) st.st_blocks * 512));
  return image;
}

/* BlockDeviceInfo; all that is not ours to have is as QEMU has it for a node
 * without any such option.
 */
static json_t *
node_info (struct drive *d)
{
  static const char *const zeros[] = {
    "backing_file_depth", "iops", "iops_rd", "iops_wr", "bps", "bps_rd",
    "bps_wr", "write_threshold",
  };
  json_t *node, *bitmaps = bitmap_list (d);

  node = json_pack ("{s:o, s:s, s:o, s:b, s:b, s:s, s:{s:b, s:b, s:b}, s:o}",
                    "node-name", qmp_string (d->name), "drv", "raw",
                    "file", qmp_string (d->path), "ro", d->disk->readonly,
                    "encrypted", 0, "detect_zeroes", "off", "cache",
                    "writeback", 1, "direct", 0, "no-flush", 0,
                    "image", image_info (d));
  for (size_t i = 0; i < sizeof zeros / sizeof zeros[0]; i++)
    json_object_set_new (node, zeros[i], json_integer (0));
  if (json_array_size (bitmaps) > 0)
    json_object_set (node, "dirty-bitmaps", bitmaps);
  json_decref (bitmaps);
  return node;
}

/* The last one first, as QEMU lists them.  "flat" leaves out backing images,
 * which a disk has none of.
 */
static json_t *
query_nodes (json_t *args, struct error *err)
{
  json_t *list = json_array ();

  (void) args;
  (void) err;
  for (size_t i = house.nr_drives; i-- > 0; )
    json_array_append_new (list, node_info (house.drives[i]));
  return list;
}

static json_t *
query_block (json_t *args, struct error *err)
{
  json_t *list = json_array ();

  (void) args;
  (void) err;
  for (size_t i = 0; i < house.nr_drives; i++) {
    struct drive *d = house.drives[i];

    json_array_append_new (list,
      json_pack ("{s:o, s:s, s:b, s:b, s:o}", "device", qmp_string (d->name),
                 "type", "unknown", "removable", 0, "locked", 0,
                 "inserted", node_info (d)));
  }
  return list;
}

/* ---- nbdferry's own status ---- */

/* Identity, and where the disk went.  The control lock may be held by a long
 * operation; then this waits.
 */
static void
add_journal (json_t *status, struct drive *d)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->control);
  const struct journal_record *rec;
  char lineage[UUID_TEXT];

  if (d->journal == NULL) /* closed already */
    return;
  rec = journal_get (d->journal);
  uuid_format (&rec->lineage, lineage);
  json_object_set_new (status, "lineage", json_string (lineage));
  json_object_set_new (status, "generation", json_integer (rec->generation));
  if (rec->state == JOURNAL_GONE && rec->peer)
    json_object_set_new (status, "peer", qmp_string (rec->peer));
}

enum drive_mode
qmp_drive_mode (struct drive *d)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  return d->mode;
}

static size_t
nr_bitmaps (struct drive *d)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);

  return d->nr_bitmaps;
}

/* Can a change behind our back be noticed? */
static const char *
trust_word (const struct drive *d)
{
  return d->verdict == TRUST_UNVERIFIABLE || d->trust == NULL ? "unverifiable"
                                                              : "verified";
}

/* ISO 8601, as QEMU has no times that are for people. */
static json_t *
time_string (int64_t s)
{
  char text[32];
  time_t t = s;
  struct tm tm;

  if (gmtime_r (&t, &tm) == NULL ||
      strftime (text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &tm) == 0)
    text[0] = '\0';
  return json_string (text);
}

static json_t *
reason_list (struct drive *d)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&d->list);
  json_t *list = json_array ();

  for (size_t i = d->nr_bitmaps; i-- > 0; ) {
    const struct named_bitmap *nb = d->bitmaps[i];
    json_t *b = json_pack ("{s:o}", "name", qmp_string (nb->name));

    if (nb->reason) {
      json_object_set_new (b, "reason", qmp_string (nb->reason->text));
      json_object_set_new (b, "reason-time", time_string (nb->reason->time));
    }
    if (!uuid_is_zero (&nb->point.id)) {
      char id[UUID_TEXT];

      uuid_format (&nb->point.id, id);
      json_object_set_new (b, "point", json_string (id));
      json_object_set_new (b, "point-time", time_string (nb->point.time));
    }
    json_array_append_new (list, b);
  }
  return list;
}

/* What QEMU's queries have no place for.  Only the list lock is taken. */
static json_t *
query_bitmaps (json_t *args, struct error *err)
{
  json_t *list = json_array ();

  (void) args;
  (void) err;
  for (size_t i = 0; i < house.nr_drives; i++) {
    struct drive *d = house.drives[i];

    json_array_append_new (list,
      json_pack ("{s:o, s:s, s:o}", "node", qmp_string (d->name),
                 "trust", trust_word (d), "bitmaps", reason_list (d)));
  }
  return list;
}

static json_t *
drive_status (struct drive *d)
{
  uint64_t hold = gate_longest (&d->writes);
  json_t *status;

  status = json_pack ("{s:o, s:o, s:o, s:I, s:s, s:s, s:s, s:I, s:I}",
                      "name", qmp_string (d->name),
                      "path", qmp_string (d->path),
                      "state-dir", qmp_string (d->state_dir),
                      "size", (json_int_t) size_of (d),
                      "mode", drive_mode_name (qmp_drive_mode (d)),
                      "durability", d->durability == DURABILITY_PROCESS
                                      ? "process" : "power",
                      "trust", trust_word (d),
                      "bitmaps", (json_int_t) nr_bitmaps (d),
                      "longest-hold-us", (json_int_t) (hold / 1000));
  /* Of a larger device, only a part is the disk. */
  if (d->disk->size != size_of (d))
    json_object_set_new (status, "device-size",
                         json_integer (d->disk->size));
  add_journal (status, d);
  return status;
}

static json_t *
query_status (json_t *args, struct error *err)
{
  json_t *disks = json_array ();

  (void) args;
  (void) err;
  for (size_t i = 0; i < house.nr_drives; i++)
    json_array_append_new (disks, drive_status (house.drives[i]));
  return json_pack ("{s:s, s:I, s:o, s:o}", "version", PACKAGE_VERSION,
                    "pid", (json_int_t) getpid (), "disks", disks,
                    "migration", qmp_migration_info ());
}

static const struct qmp_param nodes_params[] = {
  { .name = "flat", .type = QMP_BOOL, .optional = true },
  { .name = NULL },
};

const struct qmp_command qmp_query_commands[] = {
  { "query-version", NULL, query_version },
  { "query-commands", NULL, query_commands },
  { "query-block", NULL, query_block },
  { "query-named-block-nodes", nodes_params, query_nodes },
  { "x-ferry-query-bitmaps", NULL, query_bitmaps },
  { "x-ferry-status", NULL, query_status },
  { .name = NULL },
};
