/* nbdferry - the control socket: from a message to its reply
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The checks come in QEMU's order and have QEMU's words (qapi/qmp-dispatch.c,
 * qapi/qobject-input-visitor.c), because clients show them and some match
 * them.  Only the order in which unexpected members are found may differ:
 * QEMU's depends on a hash.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>

#include "cleanup.h"
#include "qmp-dispatch.h"

/* ---- arguments ---- */

bool
qmp_uint64 (json_t *value, uint64_t *n)
{
  if (json_is_integer (value)) {
    *n = json_integer_value (value);
    return true;
  }
  /* The framer makes reals of integers that jansson cannot hold. */
  if (json_is_real (value) && json_real_value (value) >= 0x1p63 &&
      json_real_value (value) <= 0x1p64) {
    double d = json_real_value (value);

    *n = d == 0x1p64 ? UINT64_MAX : (uint64_t) d;
    return true;
  }
  return false;
}

static int
check_uint (json_t *value, enum qmp_type type, const char *path,
            const char *name, struct error *err)
{
  uint64_t n;

  if (!qmp_uint64 (value, &n))
    return error_set (err, EINVAL, "Parameter '%s' expects uint64", path);
  if (type == QMP_UINT8 && n > UINT8_MAX)
    return error_set (err, EINVAL, "Parameter '%s' expects uint8_t", name);
  if (type == QMP_UINT32 && n > UINT32_MAX)
    return error_set (err, EINVAL, "Parameter '%s' expects uint32_t", name);
  return 0;
}

int
qmp_check_type (json_t *value, enum qmp_type type, const char *path,
                const char *name, struct error *err)
{
  const char *expected;
  bool ok;

  switch (type) {
  case QMP_STRING:
    ok = json_is_string (value);
    expected = "string";
    break;
  case QMP_BOOL:
    ok = json_is_boolean (value);
    expected = "boolean";
    break;
  case QMP_ARRAY:
    ok = json_is_array (value);
    expected = "array";
    break;
  case QMP_OBJECT:
    ok = json_is_object (value);
    expected = "object";
    break;
  default:
    return check_uint (value, type, path, name, err);
  }
  if (ok)
    return 0;
  return error_set (err, EINVAL,
                    "Invalid parameter type for '%s', expected: %s", path,
                    expected);
}

static bool
is_param (const struct qmp_param *params, const char *name)
{
  for (; params->name; params++)
    if (!strcmp (params->name, name))
      return true;
  return false;
}

int
qmp_check_object (json_t *object, const struct qmp_param *params,
                  const char *path, struct error *err)
{
  const char *dot = path[0] ? "." : "";
  const char *key;
  json_t *value;

  for (const struct qmp_param *p = params; p->name; p++) {
    char full[256];

    snprintf (full, sizeof full, "%s%s%s", path, dot, p->name);
    value = json_object_get (object, p->name);
    if (value == NULL && p->optional)
      continue;
    if (value == NULL)
      return error_set (err, EINVAL, "Parameter '%s' is missing", full);
    if (qmp_check_type (value, p->type, full, p->name, err) == -1)
      return -1;
    if (p->check && p->check (value, full, err) == -1)
      return -1;
  }
  json_object_foreach (object, key, value)
    if (!is_param (params, key))
      return error_set (err, EINVAL, "Parameter '%s%s%s' is unexpected", path,
                        dot, key);
  return 0;
}

int
qmp_check_array (json_t *array, const char *path, struct error *err,
                 int (*check) (json_t *value, const char *path,
                               struct error *err))
{
  json_t *value;
  size_t i;

  json_array_foreach (array, i, value) {
    char full[256];

    snprintf (full, sizeof full, "%s[%zu]", path, i);
    if (check (value, full, err) == -1)
      return -1;
  }
  return 0;
}

/* ---- building messages ---- */

json_t *
qmp_string (const char *text)
{
  json_t *s = json_string (text);
  CLEANUP_FREE char *copy = NULL;
  size_t n = 0;

  if (s)
    return s;
  /* Not UTF-8, or cut in the middle of a character. */
  copy = malloc (strlen (text) * 3 + 1);
  if (copy == NULL)
    return NULL;
  while (*text) {
    size_t len = 1;

    /* Take the shortest valid sequence that begins here, if there is one. */
    while (len <= 4 && strnlen (text, len) == len &&
           (s = json_stringn (text, len)) == NULL)
      len++;
    json_decref (s);
    if (s) {
      memcpy (copy + n, text, len);
      n += len;
      text += len;
    }
    else {
      memcpy (copy + n, "\xef\xbf\xbd", 3); /* U+FFFD */
      n += 3;
      text++;
    }
    s = NULL;
  }
  return json_stringn (copy, n);
}

/* One object a line, in ASCII, as QEMU has it.  Takes over 'message'. */
static char *
to_line (json_t *message)
{
  char *text = NULL, *line = NULL;

  if (message)
    text = json_dumps (message, JSON_ENSURE_ASCII);
  json_decref (message);
  if (text == NULL || asprintf (&line, "%s\r\n", text) == -1)
    line = NULL;
  free (text);
  return line;
}

static json_t *
error_object (const char *class, const char *desc)
{
  return json_pack ("{s:{s:s, s:o}}", "error", "class", class, "desc",
                    qmp_string (desc));
}

char *
qmp_error_line (const char *desc)
{
  return to_line (error_object ("GenericError", desc));
}

char *
qmp_event_line (const char *name, json_t *data)
{
  struct timeval tv;
  json_t *event;

  gettimeofday (&tv, NULL);
  event = json_pack ("{s:{s:I, s:I}, s:s}", "timestamp",
                     "seconds", (json_int_t) tv.tv_sec,
                     "microseconds", (json_int_t) tv.tv_usec, "event", name);
  if (data)
    json_object_set (event, "data", data);
  return to_line (event);
}

json_t *
qmp_version (void)
{
  int major = 0, minor = 0, micro = 0;

  sscanf (PACKAGE_VERSION, "%d.%d.%d", &major, &minor, &micro);
  return json_pack ("{s:{s:i, s:i, s:i}, s:s}", "qemu", "micro", micro,
                    "minor", minor, "major", major,
                    "package", "nbdferry " PACKAGE_VERSION);
}

char *
qmp_greeting (void)
{
  return to_line (json_pack ("{s:{s:o, s:[]}}", "QMP", "version",
                             qmp_version (), "capabilities"));
}

/* ---- commands ---- */

static int
check_capability (json_t *value, const char *path, struct error *err)
{
  if (qmp_check_type (value, QMP_STRING, path, path, err) == -1)
    return -1;
  /* QEMU has no name for an element of a list, hence 'null'. */
  if (strcmp (json_string_value (value), "oob"))
    return error_set (err, EINVAL,
                      "Parameter 'null' does not accept value '%s'",
                      json_string_value (value));
  return error_set (err, EINVAL, "Capability oob not available");
}

static int
check_capabilities (json_t *value, const char *path, struct error *err)
{
  return qmp_check_array (value, path, err, check_capability);
}

static const struct qmp_param capabilities_params[] = {
  { .name = "enable", .type = QMP_ARRAY, .optional = true,
    .check = check_capabilities },
  { .name = NULL },
};

/* What it does is in run_command. */
static json_t *
nothing (json_t *args, struct error *err)
{
  (void) args;
  (void) err;
  return json_object ();
}

static const struct qmp_command session_commands[] = {
  { "qmp_capabilities", capabilities_params, nothing },
  { "quit", NULL, nothing },
  { .name = NULL },
};

void
qmp_each_command (bool (*visit) (const struct qmp_command *cmd, void *opaque),
                  void *opaque)
{
  const struct qmp_command *const tables[] = {
    session_commands, qmp_query_commands, qmp_bitmap_commands,
    qmp_bitmap_extra_commands, qmp_backup_commands, qmp_exports_commands,
    qmp_sync_commands,
    qmp_migrate_commands,
    qmp_migrate_params_commands,
  };

  for (size_t i = 0; i < sizeof tables / sizeof tables[0]; i++)
    for (const struct qmp_command *c = tables[i]; c->name; c++)
      if (!visit (c, opaque))
        return;
}

struct lookup {
  const char *name;
  const struct qmp_command *found;
};

static bool
is_command (const struct qmp_command *cmd, void *opaque)
{
  struct lookup *l = opaque;

  if (strcmp (cmd->name, l->name))
    return true;
  l->found = cmd;
  return false;
}

/* Find a command that is allowed now; NULL with the words for it. */
static const struct qmp_command *
find_command (const struct qmp_session *session, const char *name,
              struct error *err)
{
  bool capabilities = !strcmp (name, "qmp_capabilities");
  struct lookup l = { .name = name };

  if (!session->negotiated && !capabilities) {
    error_set (err, EINVAL,
               "Expecting capabilities negotiation with 'qmp_capabilities'");
    return NULL;
  }
  if (session->negotiated && capabilities) {
    error_set (err, EINVAL, "Capabilities negotiation is already complete, "
               "command ignored");
    return NULL;
  }
  qmp_each_command (is_command, &l);
  if (l.found == NULL)
    error_set (err, ENOENT, "The command %s has not been found", name);
  return l.found;
}

/* The envelope: which members a request may have. */
static int
check_request (json_t *request, struct error *err)
{
  const char *key;
  json_t *value;

  json_object_foreach (request, key, value) {
    if (!strcmp (key, "execute")) {
      if (!json_is_string (value))
        return error_set (err, EINVAL,
                          "QMP input member '%s' must be a string", key);
    }
    else if (!strcmp (key, "arguments")) {
      if (!json_is_object (value))
        return error_set (err, EINVAL,
                          "QMP input member 'arguments' must be an object");
    }
    else if (strcmp (key, "id"))
      return error_set (err, EINVAL, "QMP input member '%s' is unexpected",
                        key);
  }
  if (!json_object_get (request, "execute"))
    return error_set (err, EINVAL, "QMP input lacks member 'execute'");
  return 0;
}

/* The command's value, or NULL with 'err' and the error's class. */
static json_t *
run_command (struct qmp_session *session, json_t *request, const char **class,
             struct error *err)
{
  static const struct qmp_param none[] = { { .name = NULL } };
  json_t *args = json_object_get (request, "arguments");
  json_auto_t *empty = json_object ();
  const struct qmp_command *cmd;
  json_t *value;

  if (check_request (request, err) == -1)
    return NULL;
  cmd = find_command (session,
                      json_string_value (json_object_get (request, "execute")),
                      err);
  if (cmd == NULL) {
    *class = "CommandNotFound";
    return NULL;
  }
  if (args == NULL)
    args = empty;
  if (qmp_check_object (args, cmd->params ? cmd->params : none, "", err) == -1)
    return NULL;

  value = cmd->run (args, err);
  if (value == NULL && err->errnum == 0)
    error_set (err, ENOMEM, "Out of memory");
  if (value && cmd == &session_commands[0])
    session->negotiated = true;
  if (value && cmd == &session_commands[1])
    session->quit = true;
  return value;
}

static char *
parse_error (const json_error_t *e)
{
  CLEANUP_FREE char *desc = NULL;
  const char *what = e->text;

  switch (json_error_code (e)) {
  case json_error_duplicate_key:
    what = "duplicate key";
    break;
  case json_error_invalid_utf8:
    what = "invalid UTF-8 sequence in string";
    break;
  case json_error_null_character:
  case json_error_null_byte_in_key:
    what = "\\u0000 is not a valid Unicode character";
    break;
  default:
    break;
  }
  if (asprintf (&desc, "JSON parse error, %s", what) == -1) {
    desc = NULL;
    return NULL;
  }
  return qmp_error_line (desc);
}

char *
qmp_dispatch (struct qmp_session *session, const char *text, size_t len)
{
  struct error err = { 0 };
  const char *class = "GenericError";
  json_error_t e;
  json_auto_t *request = NULL;
  json_t *reply, *value, *id;

  request = json_loadb (text, len, JSON_DECODE_ANY | JSON_REJECT_DUPLICATES,
                        &e);
  if (request == NULL)
    return parse_error (&e);
  if (!json_is_object (request))
    return qmp_error_line ("QMP input must be a JSON object");

  id = json_object_get (request, "id");
  value = run_command (session, request, &class, &err);
  if (value)
    reply = json_pack ("{s:o}", "return", value);
  else
    reply = error_object (class, err.msg);
  if (reply && id)
    json_object_set (reply, "id", id);
  return to_line (reply);
}
