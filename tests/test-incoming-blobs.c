/* nbdferry - test of the destination: files that travel with a migration
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "blobs.h"
#include "incoming-test.h"

static int
send_body (json_t *body, const char *data, struct error *e)
{
  char *json = json_dumps (body, JSON_COMPACT);
  size_t len = strlen (data), body_size = strlen (json);
  struct packet_header h = { .type = PACKET_BLOB,
                             .session = src.session,
                             .epoch = src.epoch,
                             .body_size = body_size,
                             .payload_size = len,
                             .raw_size = len };
  uint8_t *buf = malloc (PACKET_HEADER + body_size + len);
  int r;

  assert_non_null (buf);
  memcpy (buf + PACKET_HEADER, json, body_size);
  memcpy (buf + PACKET_HEADER + body_size, data, len);
  packet_seal (buf, &h, buf + PACKET_HEADER + body_size);
  r = incoming_packet (ch, buf, PACKET_HEADER + body_size + len, e);
  free (buf);
  free (json);
  json_decref (body);
  return r;
}

static int
send_blob (const char *name, uint64_t version, uint64_t size, uint64_t offset,
           const char *data, struct error *e)
{
  return send_body (json_pack ("{s:s, s:I, s:I, s:I}", "name", name,
                               "version", (json_int_t) version, "size",
                               (json_int_t) size, "offset",
                               (json_int_t) offset), data, e);
}

/* PREPARE with one file, or with none. */
static int
prepare (uint64_t attempt, const char *name, uint64_t version, uint64_t size)
{
  json_t *body = prepare_json (&src, attempt);

  if (name)
    json_object_set_new (body, "attached",
                         json_pack ("[{s:s, s:I, s:I}]", "name", name,
                                    "version", (json_int_t) version, "size",
                                    (json_int_t) size));
  return send_json (&src, ch, PACKET_PREPARE, 0, body, &err);
}

/* What a file of the state directory holds, or NULL. */
static const char *
content (const char *name)
{
  static char text[256];
  FILE *f = fopen (drive_file ("vda", name), "r");

  if (f == NULL)
    return NULL;
  text[fread (text, 1, sizeof text - 1, f)] = '\0';
  fclose (f);
  return text;
}

static bool
exists (const char *name)
{
  return access (drive_file ("vda", name), F_OK) == 0;
}

static void
test_arrives (void **state)
{
  hello_ok (&src, ch);
  OK (send_blob ("nvram", 10, 6, 3, "def", &err));
  assert_false (exists ("attached"));
  REFUSED (prepare (1, "nvram", 10, 6), EBADMSG, "did not arrive");
  OK (send_blob ("nvram", 10, 6, 0, "abc", &err));
  /* A newer one, and what is late of the older. */
  OK (send_blob ("nvram", 11, 2, 0, "xy", &err));
  OK (send_blob ("nvram", 10, 6, 3, "def", &err));
  REFUSED (prepare (1, "nvram", 10, 6), EBADMSG, "did not arrive");
  /* One that is not listed does not arrive. */
  OK (send_blob ("other", 12, 1, 0, "z", &err));
  OK (incoming_flush (ch, &err));
  OK (prepare (1, "nvram", 11, 2));
  assert_false (exists ("attached"));
  OK (send_commit (&src, ch, 1, 0, 1, &err));
  assert_string_equal (content ("attached/nvram"), "xy");
  assert_false (exists ("attached/other"));
  assert_false (exists ("attached.incoming"));
  OK (send_commit (&src, ch, 1, 0, 1, &err));
  assert_string_equal (content ("attached/nvram"), "xy");
  /* It is the owner's now. */
  REFUSED (send_blob ("nvram", 12, 1, 0, "?", &err), EPROTO, "is active");
  assert_string_equal (content ("attached/nvram"), "xy");
}

/* After a migration that brought nothing, the journal stays as it is. */
static void
test_too_late (void **state)
{
  hello_ok (&src, ch);
  OK (prepare (1, NULL, 0, 0));
  OK (send_commit (&src, ch, 1, 0, 1, &err));
  REFUSED (send_blob ("nvram", 1, 1, 0, "x", &err), EPROTO, "is active");
  assert_int_equal (journal_get (drives[0]->journal)->state, JOURNAL_ACTIVE);
  assert_false (exists ("attached.incoming"));
}

static void
test_malformed (void **state)
{
  char large[BLOB_MAX_JSON + 1] = "";

  hello_ok (&src, ch);
  REFUSED (send_blob ("", 1, 1, 0, "x", &err), EBADMSG, "name");
  REFUSED (send_blob (".x", 1, 1, 0, "x", &err), EBADMSG, "name");
  REFUSED (send_blob ("..", 1, 1, 0, "x", &err), EBADMSG, "name");
  REFUSED (send_blob ("a/b", 1, 1, 0, "x", &err), EBADMSG, "name");
  REFUSED (send_blob ("a\nb", 1, 1, 0, "x", &err), EBADMSG, "name");
  REFUSED (send_blob ("x", 0, 1, 0, "x", &err), EBADMSG, "malformed");
  REFUSED (send_blob ("x", 1, 1, 1, "x", &err), EBADMSG, "bytes at");
  REFUSED (send_blob ("x", 1, 2, 0, "xyz", &err), EBADMSG, "bytes at");
  REFUSED (send_blob ("x", 1, BLOB_MAX_SIZE + 1, 0, "x", &err), EBADMSG,
           "bytes at");
  REFUSED (send_blob ("x", 1, 1, 0, "", &err), EBADMSG, "bytes at");
  memset (large, ' ', BLOB_MAX_JSON);
  REFUSED (send_body (json_pack ("{s:s, s:i, s:i, s:i, s:s}", "name", "x",
                                 "version", 1, "size", 1, "offset", 0, "more",
                                 large), "x", &err), EBADMSG, "malformed");
  REFUSED (send_body (json_pack ("{s:i}", "name", 1), "x", &err), EBADMSG,
           "malformed");
  OK (send_blob ("x", 1, 2, 0, "x", &err));
  REFUSED (send_blob ("x", 1, 3, 0, "x", &err), EBADMSG, "two sizes");
  assert_false (exists ("attached"));
}

static void
test_too_many (void **state)
{
  char name[16];

  hello_ok (&src, ch);
  for (int i = 0; i < BLOBS_MAX; i++) {
    snprintf (name, sizeof name, "f%d", i);
    OK (send_blob (name, 1, 1, 0, "x", &err));
  }
  REFUSED (send_blob ("one-more", 1, 1, 0, "x", &err), E2BIG, "more than");
}

static void
test_cancelled (void **state)
{
  hello_ok (&src, ch);
  OK (send_blob ("nvram", 1, 1, 0, "x", &err));
  assert_true (exists ("attached.incoming"));
  OK (send_cancel (&src, ch, &err));
  assert_false (exists ("attached.incoming"));
  /* And one that another migration displaces, having been prepared. */
  uuid_new (&src.session);
  hello_ok (&src, ch);
  OK (send_blob ("nvram", 1, 1, 0, "x", &err));
  OK (prepare (1, "nvram", 1, 1));
  uuid_new (&src.session);
  hello_ok (&src, ch);
  assert_false (exists ("attached.incoming"));
  OK (prepare (1, NULL, 0, 0));
  OK (send_commit (&src, ch, 1, 0, 1, &err));
  assert_false (exists ("attached"));
}

/* Killed between two steps of the publication, and COMMIT once more. */
static void
test_publish_again (void **state)
{
  char there[4096], coming[4096];

  hello_ok (&src, ch);
  assert_int_equal (mkdir (drive_file ("vda", "attached"), 0700), 0);
  fclose (fopen (drive_file ("vda", "attached/old"), "w"));
  OK (send_blob ("nvram", 1, 3, 0, "new", &err));
  OK (prepare (1, "nvram", 1, 3));
  /* It was exchanged, and then the daemon died. */
  snprintf (there, sizeof there, "%s", drive_file ("vda", "attached"));
  snprintf (coming, sizeof coming, "%s",
            drive_file ("vda", "attached.incoming"));
  assert_int_equal (renameat2 (AT_FDCWD, coming, AT_FDCWD, there,
                               RENAME_EXCHANGE), 0);
  incoming_close (ch);
  stop (false);
  start (1, 0, true);
  ch = channel ();
  OK (send_commit (&src, ch, 1, 0, 1, &err));
  assert_string_equal (content ("attached/nvram"), "new");
  assert_false (exists ("attached/old"));
  assert_false (exists ("attached.incoming"));
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup_teardown (test_arrives, begin, end),
    cmocka_unit_test_setup_teardown (test_too_late, begin, end),
    cmocka_unit_test_setup_teardown (test_malformed, begin, end),
    cmocka_unit_test_setup_teardown (test_too_many, begin, end),
    cmocka_unit_test_setup_teardown (test_cancelled, begin, end),
    cmocka_unit_test_setup_teardown (test_publish_again, begin, end),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
