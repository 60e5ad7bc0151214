/* nbdferry - fuzzing of what comes from the control socket
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Whatever the bytes are, and however they are cut into pieces: the same
 * messages and errors come out; and what the framer passes as a message is
 * JSON for jansson, but for what the framer says that it does not check.
 */
#include <config.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

/* The library that tests are linked with ends below the plugin. */
#include "qmp-frame.c"

int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

static void
check_message (const char *text, size_t len)
{
  json_error_t e;
  json_t *v = json_loadb (text, len, JSON_DECODE_ANY | JSON_REJECT_DUPLICATES,
                          &e);

  if (v == NULL)
    switch (json_error_code (&e)) {
    case json_error_duplicate_key:
    case json_error_invalid_utf8:
    case json_error_null_character:
    case json_error_null_byte_in_key:
    case json_error_numeric_overflow:
      return;
    default:
      if (strstr (e.text, "invalid Unicode") || strstr (e.text, "escape"))
        return;
      fprintf (stderr, "not JSON: %s: %.*s\n", e.text, (int) len, text);
      abort ();
    }
  free (json_dumps (v, JSON_ENSURE_ASCII | JSON_ENCODE_ANY));
  json_decref (v);
}

/* A sum over all that comes out, in order. */
static uint64_t
sum_up (const char *bytes, size_t len, size_t piece, int check)
{
  struct qmp_frame f;
  enum qmp_frame_event event;
  uint64_t sum = 0;

  qmp_frame_init (&f);
  for (size_t i = 0; i < len; ) {
    size_t most = len - i < piece ? len - i : piece;
    size_t n = qmp_frame_feed (&f, bytes + i, most, &event);
    const char *out = "";

    if (n > most || (event == QMP_FRAME_MORE && n != most))
      abort ();
    i += n;
    if (event == QMP_FRAME_MESSAGE)
      out = f.text.ptr;
    if (event == QMP_FRAME_ERROR)
      out = f.err.msg;
    if (event == QMP_FRAME_MESSAGE && check)
      check_message (f.text.ptr, f.text.len);
    if (event != QMP_FRAME_MORE)
      sum = sum * 31 + event;
    while (*out)
      sum = sum * 31 + (unsigned char) *out++;
  }
  qmp_frame_free (&f);
  return sum;
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  const char *bytes = (const char *) data;
  uint64_t sum = sum_up (bytes, size, size + 1, 1);

  if (sum_up (bytes, size, 1, 0) != sum || sum_up (bytes, size, 7, 0) != sum)
    abort ();
  return 0;
}
