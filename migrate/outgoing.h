/* nbdferry - the source of a migration
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * One struct outgoing is one attempt to move some drives to another daemon.
 * It has its own threads; the caller asks how it goes, may change its
 * parameters, and may cancel it.  All functions may be called from any
 * thread; none waits for the network.
 */
#ifndef FERRY_OUTGOING_H
#define FERRY_OUTGOING_H

#include <jansson.h>

#include "drive.h"
#include "error.h"
#include "mirror.h"

#define MIGRATE_MAX_CHANNELS 64

enum migrate_compression {
  MIGRATE_COMPRESSION_NONE,
  MIGRATE_COMPRESSION_ZLIB,
  MIGRATE_COMPRESSION_ZSTD,
};

/* QEMU's MirrorCopyMode. */
enum migrate_copy_mode {
  MIGRATE_BACKGROUND,     /* a write is sent some time later */
  MIGRATE_WRITE_BLOCKING, /* before it is acknowledged */
};

/* What is not sent although it is allocated. */
enum migrate_hints {
  MIGRATE_HINTS_NONE,
  MIGRATE_HINTS_FS, /* what file systems say is free */
};

struct migrate_params {
  uint64_t max_bandwidth;  /* bytes a second, 0: no limit */
  uint64_t downtime_limit; /* ms */
  unsigned channels;       /* 1 to MIGRATE_MAX_CHANNELS, for all drives; 0:
                              as many as the link asks for */
  enum migrate_compression compression;
  enum migrate_copy_mode copy_mode;
  struct blobs *blobs; /* files that go along, or NULL; an outgoing that could
                          be started has taken them over */
  unsigned zlib_level; /* 0 to 9 */
  unsigned zstd_level; /* 0 to 20 */
  enum migrate_hints hints;
  bool overwrite;          /* the destination's disks, whatever they hold */
  json_t *mapping;         /* block-bitmap-mapping (mapping.h), or NULL; of a
                              migration only what its start is given */
  bool own_mapping;        /* it is of one migration alone */
  bool no_resume;          /* what could be overcome ends it all the same */
};

#define MIGRATE_PARAMS_DEFAULT \
  { .downtime_limit = 30, .zlib_level = 1, .zstd_level = 1 }

/* How many that are on a link without a delay worth speaking of. */
unsigned migrate_near_channels (void);

/* QEMU's MigrationStatus, as far as it is used. */
enum migrate_status {
  MIGRATE_NONE,
  MIGRATE_SETUP,
  MIGRATE_ACTIVE,
  MIGRATE_DEVICE, /* the hold and the handover */
  MIGRATE_PAUSED, /* the connection was lost; it is tried again */
  MIGRATE_CANCELLING,
  MIGRATE_CANCELLED,
  MIGRATE_FAILED,
  MIGRATE_COMPLETED,
};

/* What became of packets with data. */
struct migrate_compressed {
  uint64_t packets, raw_packets; /* compressed; sent as they were */
  uint64_t before, after;        /* bytes of those that were compressed */
};

struct migrate_info {
  enum migrate_status status;
  char error[ERROR_MAX];  /* why it failed, or is paused, or "" */
  uint64_t total_ms;      /* since it began, or until it ended */
  uint64_t setup_ms;
  uint64_t downtime_ms;   /* how long requests were held; once completed */
  uint64_t expected_downtime_ms;
  /* in bytes */
  uint64_t transferred;   /* on the wire */
  uint64_t remaining;     /* dirty data that is still to be sent */
  uint64_t total;         /* the size of all drives */
  uint64_t normal_bytes;  /* block data */
  uint64_t zero_bytes;    /* zeros and holes, sent as extents */
  uint64_t dirty_rate;    /* a second */
  double mbps;            /* megabits a second on the wire, lately */
  unsigned round;         /* dirty-sync-count */
  unsigned pauses;        /* how often it was paused */
  unsigned channels;      /* of the last connection; 0: not known yet */
  bool waits;             /* paused until outgoing_recover */
  bool other_server;      /* failed: the server is none of ours, and could get
                             a copy of the data */
  uint64_t bitmap_bytes;  /* bitmap sections on the wire */
  struct migrate_compressed compressed;
  uint64_t throttle_us;   /* how long a write waits now, since writers are
                             slowed */
  uint64_t throttle_longest_us; /* that one has waited since it began */
  uint64_t throttle_rate;       /* bytes a second that may be written; 0: no
                                   limit */
  uint64_t longest_hold_us; /* of any gate since it began, but the hold */
  uint64_t hold_us;         /* the hold of a handover, the last one */
  uint64_t handover_cost_us; /* of that, whatever the amount that was left;
                                expected until there was one */
  uint64_t round_trip_us;
  struct mirror_stats mirror;
  uint64_t last_flush_us;   /* of the destination, round trip and all */
};

struct outgoing;

/* Begin to move the drives to 'uri'.  If it names an export, there is one
 * drive, and the export is the destination's disk; otherwise each goes to the
 * disk of its own name.  The vector is copied, the drives must outlive it.
 * 'changed' (may be NULL) is called from a thread of the migration after each
 * change of status and round, without a lock.  NULL on error.
 */
struct outgoing *outgoing_start (struct drive *const *drives, size_t nr,
                                 const char *uri,
                                 const struct migrate_params *params,
                                 void (*changed) (void *opaque,
                                                  const struct migrate_info *),
                                 void *opaque, struct error *err);

void outgoing_set_params (struct outgoing *o,
                          const struct migrate_params *params);
void outgoing_info (struct outgoing *o, struct migrate_info *info);

/* What was found out for hints=fs, as a new JSON array, or NULL: nothing was
 * asked for, or it has not been looked at yet.
 */
json_t *outgoing_hints (struct outgoing *o);

/* Ask it to stop; -1 with 'err' once it has let go. */
int outgoing_cancel (struct outgoing *o, struct error *err);

/* It is paused: try again now, over another URI if one is given; -1 with 'err'
 * if it is not paused.
 */
int outgoing_recover (struct outgoing *o, const char *uri, struct error *err);

/* Has it let go of its drives, or is about to?  Then their journals say where
 * they are looked for (departure.h); what waits for that tries again at once.
 */
bool outgoing_has_let_go (struct outgoing *o);
void outgoing_wake (struct outgoing *o);

/* Pause it until outgoing_recover; -1 if it has not begun to send data, or has
 * let go.
 */
int outgoing_ask_pause (struct outgoing *o, struct error *err);

/* The daemon ends: close all channels.  What is under way goes on at the next
 * start: the journal knows, if it has let go, or else the description.
 */
void outgoing_stop (struct outgoing *o);

/* Wait for its threads; and free it.  Only after it ended by itself, or after
 * outgoing_cancel or outgoing_stop.
 */
void outgoing_join (struct outgoing *o);
void outgoing_free (struct outgoing *o);

/* Has it ended (completed, failed, cancelled)? */
bool outgoing_ended (struct outgoing *o);

const char *migrate_status_name (enum migrate_status status);

/* How writers of that drive are slowed, beside what 'info' says of others. */
void migrate_add_throttle (struct migrate_info *info, struct drive *d);
const char *migrate_compression_name (enum migrate_compression c);
int migrate_hints_parse (const char *name, enum migrate_hints *h,
                         struct error *err);
int migrate_compression_parse (const char *name, enum migrate_compression *c);
const char *migrate_copy_mode_name (enum migrate_copy_mode m);
int migrate_copy_mode_parse (const char *name, enum migrate_copy_mode *m);

#endif /* FERRY_OUTGOING_H */
