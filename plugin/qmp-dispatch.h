/* nbdferry - the control socket: from a message to its reply
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * No I/O here, and no nbdkit: text in, text out.  The commands themselves are
 * in qmp-bitmap*.c, qmp-query.c and qmp-migrate.c, each with a table.
 */
#ifndef FERRY_QMP_DISPATCH_H
#define FERRY_QMP_DISPATCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "error.h"

/* What a client is allowed to do; belongs to its thread. */
struct qmp_session {
  bool negotiated; /* qmp_capabilities was accepted */
  bool quit;       /* the last command was a good "quit" */
};

/* ---- arguments ---- */

enum qmp_type {
  QMP_STRING,
  QMP_BOOL,
  QMP_UINT8,
  QMP_UINT32,
  QMP_UINT64, /* read it with qmp_uint64 */
  QMP_ARRAY,
  QMP_OBJECT,
};

/* One member of an object.  A list of them ends with a name of NULL. */
struct qmp_param {
  const char *name;
  enum qmp_type type;
  bool optional;
  /* Look into the value, which is of the right type; may be NULL.  'path' is
   * how errors call it, such as "actions[0].data".
   */
  int (*check) (json_t *value, const char *path, struct error *err);
};

/* Check an object's members, in the order of the list, in QEMU's words; then
 * that there are no others.  'path' is the object's own, "" for the arguments
 * of a command.  After that the values can be taken as they are.
 */
int qmp_check_object (json_t *object, const struct qmp_param *params,
                      const char *path, struct error *err);

/* Check each element of an array by that function. */
int qmp_check_array (json_t *array, const char *path, struct error *err,
                     int (*check) (json_t *value, const char *path,
                                   struct error *err));

/* Is it of that type?  'name' is the last part of 'path'. */
int qmp_check_type (json_t *value, enum qmp_type type, const char *path,
                    const char *name, struct error *err);

/* An integer as QEMU takes it for a uint64: negative ones wrap around.
 * False if it is none.
 */
bool qmp_uint64 (json_t *value, uint64_t *n);

/* ---- commands ---- */

struct qmp_command {
  const char *name;
  const struct qmp_param *params; /* NULL: none */
  /* The value to return (a new reference), or NULL with 'err'. */
  json_t *(*run) (json_t *args, struct error *err);
};

/* Each ends with a name of NULL. */
extern const struct qmp_command qmp_bitmap_commands[];
extern const struct qmp_command qmp_bitmap_extra_commands[];
extern const struct qmp_command qmp_backup_commands[];
extern const struct qmp_command qmp_exports_commands[];
extern const struct qmp_command qmp_sync_commands[];
extern const struct qmp_command qmp_query_commands[];
extern const struct qmp_command qmp_migrate_commands[];
extern const struct qmp_command qmp_migrate_params_commands[];

/* Call 'visit' for each command there is; stops when it returns false. */
void qmp_each_command (bool (*visit) (const struct qmp_command *cmd,
                                      void *opaque), void *opaque);

/* What query-version returns. */
json_t *qmp_version (void);

/* ---- messages; all return a line to be sent, freed by the caller, or NULL
 * if there is no memory ---- */

char *qmp_greeting (void);

/* The answer to one JSON text, as the framer gives it. */
char *qmp_dispatch (struct qmp_session *session, const char *text, size_t len);

char *qmp_error_line (const char *desc);
char *qmp_event_line (const char *name, json_t *data);

/* A JSON string of text that may not be UTF-8: what is not is replaced. */
json_t *qmp_string (const char *text);

#endif /* FERRY_QMP_DISPATCH_H */
