/* nbdferry - test of the destination: HELLO, LIST, what it records, its status
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>

#include <cmocka.h>

#include "hello-name.h"
#include "incoming-test.h"
#include "shipment.h"

#define K    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
#define MUCH K K K K K K K K K K K K K K K K

/* Nothing has been written or listed. */
static void
untouched (void)
{
  assert_int_equal (tap_calls (TAP_WRITE) + tap_calls (TAP_ZERO), 0);
  assert_int_equal (drives[0]->nr_bitmaps, 0);
  assert_int_equal (drives[0]->mode, DRIVE_INCOMING);
}

/* ---- HELLO ---- */

static void
test_sizes (void **state)
{
  src.disks[0].size = DISK_SIZE + 512;
  REFUSED (send_hello (&src, ch, &err), ENOSPC, "'vda' is too small");
  src.disks[0].size = DISK_SIZE - 512;
  REFUSED (send_hello (&src, ch, &err), EINVAL, "'vda' has");
  src.disks[0].size = -1;
  REFUSED (send_hello (&src, ch, &err), ENOSPC, "too small");
  src.disks[0].size = DISK_SIZE;
  /* No session was begun: the journal speaks of none. */
  assert_true (uuid_is_zero (&journal_get (drives[0]->journal)->session));
  REFUSED (send_data (&src, ch, 0, 0, "", 1, &err), ESTALE, "");
  untouched ();
}

static void
test_names (void **state)
{
  struct source two = src;

  src.disks[0].name = "vdx";
  REFUSED (send_hello (&src, ch, &err), ENOENT, "no disk 'vdx'");
  src.disks[0].name = "";
  REFUSED (send_hello (&src, ch, &err), ENOENT, "no disk ''");
  two.nr = 2;
  two.disks[1] = two.disks[0];
  REFUSED (send_hello (&two, ch, &err), EINVAL, "2 disks are to come");
  two.nr = 0;
  REFUSED (send_hello (&two, ch, &err), EINVAL, "0 disks are to come");
  untouched ();
}

static void
test_malformed_hello (void **state)
{
  static const char *const bodies[] = {
    "",
    "[]",
    "{\"disks\":",
    "{}",
    "{\"disks\":{}}",
    "{\"disks\":[{\"name\":\"vda\"}]}",
    "{\"disks\":[{\"name\":\"vda\",\"size\":\"1\",\"lineage\":\"\","
    "\"generation\":0}]}",
    "{\"disks\":[{\"name\":\"vda\",\"size\":1,\"lineage\":\"no-uuid\","
    "\"generation\":0}]}",
    "{\"disks\":[{\"name\":\"v\\u0000a\",\"size\":1}]}",
  };

  for (size_t i = 0; i < sizeof bodies / sizeof bodies[0]; i++) {
    struct parcel p = { .h = { .type = PACKET_HELLO }, .json = bodies[i] };

    REFUSED (send_parcel (&src, ch, &p, &err), EBADMSG, "");
  }
  untouched ();
}

static void
test_active_drive (void **state)
{
  OK (send_hello (&src, ch, &err));
  OK (send_prepare (&src, ch, 1, &err));
  OK (send_commit (&src, ch, 1, 0, 1, &err));
  REFUSED (send_data (&src, ch, 0, 0, "x", 1, &err), EPROTO,
           "'vda' is active; it takes no data");
  REFUSED (send_prepare (&src, ch, 2, &err), EPROTO, "cannot be prepared");
  uuid_new (&src.session);
  REFUSED (send_hello (&src, ch, &err), EBUSY, "'vda' is active");
  assert_non_null (strstr (err.msg, "incoming=on"));
}

/* Nothing can be written while that holds.  (No assertion may be made then:
 * they print to a file.)
 */
static void
disk_full (bool full)
{
  static struct rlimit was;
  struct rlimit none;

  if (full) {
    signal (SIGXFSZ, SIG_IGN);
    getrlimit (RLIMIT_FSIZE, &was);
    none = was;
    none.rlim_cur = 0;
    setrlimit (RLIMIT_FSIZE, &none);
  }
  else
    setrlimit (RLIMIT_FSIZE, &was);
}

/* A second session cannot take the drive: it is none, and the same handshake
 * later begins it anew.
 */
static void
test_session_not_recorded (void **state)
{
  struct source_bitmap *b = source_add (&src, 0, "b", 16, true, true);
  struct source second;
  int r;

  bitmap_set (b->bits, 0, 1);
  hello_ok (&src, ch);
  OK (send_bits (&src, ch, 0, "b", b->bits, 0, &err));
  OK (send_prepare (&src, ch, 1, &err));
  second = src;
  uuid_new (&second.session);

  disk_full (true);
  r = send_hello (&second, ch, &err);
  disk_full (false);
  REFUSED (r, EFBIG, "journal");
  assert_int_equal (drives[0]->mode, DRIVE_PREPARED);
  assert_int_equal (bitmap_count_bits (bits_of (drives[0], "b")), 1);

  bitmap_clear_all (b->bits);
  hello_ok (&second, ch);
  assert_int_equal (bitmap_count_bits (bits_of (drives[0], "b")), 0);
  OK (send_prepare (&second, ch, 1, &err));
  assert_true (uuid_equal (&journal_get (drives[0]->journal)->session,
                           &second.session));
}

/* No data is written before the journal says that some has come.  Until then
 * the disk is what it was.
 */
static void
test_data_not_recorded (void **state)
{
  int r;

  source_add (&src, 0, "b", 16, true, true);
  hello_ok (&src, ch);
  disk_full (true);
  r = send_data (&src, ch, 0, 0, "x", 1, &err);
  disk_full (false);
  REFUSED (r, EFBIG, "journal");
  assert_int_equal (tap_calls (TAP_WRITE), 0);
  assert_true (uuid_is_zero (&journal_get (drives[0]->journal)->session));
  incoming_close (ch);
  stop (false);
  start (1, 0, false);
  assert_int_equal (drives[0]->mode, DRIVE_ACTIVE);
  assert_int_equal (drives[0]->nr_bitmaps, 0);
  stop (true);

  start (1, 0, true);
  ch = channel ();
  hello_ok (&src, ch);
  OK (send_data (&src, ch, 0, 0, "x", 1, &err));
  assert_int_equal (journal_get (drives[0]->journal)->state,
                    JOURNAL_INCOMING);
  assert_true (uuid_equal (&journal_get (drives[0]->journal)->session,
                           &src.session));
}

/* ---- LIST ---- */

/* The drive's own bitmap "own"; the drive must become active for that. */
static void
add_own (bool recording)
{
  incoming_close (ch);
  stop (true);
  start (1, 0, false);
  add_bitmap (drives[0], "own", 4096, true, !recording);
  bitmap_set (bits_of (drives[0], "own"), 0, 1);
  stop (true);
  start (1, 0, true);
  assert_int_equal (drives[0]->mode, DRIVE_INCOMING);
  ch = channel ();
  tap_reset (NULL);
}

static void
test_exists (void **state)
{
  add_own (true);
  source_add (&src, 0, "new", 16, true, true);
  source_add (&src, 0, "own", 16, true, true);
  OK (send_hello (&src, ch, &err));
  REFUSED (send_list (&src, ch, 0, &err), EEXIST,
           "Bitmap already exists: own");
  assert_int_equal (tap_calls (TAP_WRITE), 0);
  assert_int_equal (drives[0]->nr_bitmaps, 1);
  assert_int_equal (bitmap_count_bits (bits_of (drives[0], "own")), 1);
}

/* A new session drops what the old one brought, and keeps the drive's own. */
static void
test_new_session (void **state)
{
  add_own (false);
  source_add (&src, 0, "a", 16, true, true);
  source_add (&src, 0, "b", 9, false, false);
  hello_ok (&src, ch);
  assert_int_equal (drives[0]->nr_bitmaps, 3);
  uuid_new (&src.session);
  OK (send_hello (&src, ch, &err));
  assert_int_equal (drives[0]->nr_bitmaps, 1);
  assert_int_equal (bitmap_count_bits (bits_of (drives[0], "own")), 1);

  /* So does opening it again. */
  OK (send_list (&src, ch, 0, &err));
  assert_int_equal (drives[0]->nr_bitmaps, 3);
  incoming_close (ch);
  stop (false);
  start (1, 0, true);
  ch = channel ();
  assert_int_equal (drives[0]->nr_bitmaps, 1);
  assert_int_equal (bitmap_count_bits (bits_of (drives[0], "own")), 1);
}

/* Each list says all; what stays keeps its bits. */
static void
test_lists (void **state)
{
  struct source_disk *d = &src.disks[0];
  struct source_bitmap *a = source_add (&src, 0, "a", 16, true, true);
  struct source_bitmap *b = source_add (&src, 0, "b", 9, false, true), other;

  bitmap_set (a->bits, 0, 1);
  bitmap_set (b->bits, 0, 1);
  hello_ok (&src, ch);
  OK (send_bits (&src, ch, 0, "a", a->bits, 0, &err));
  OK (send_bits (&src, ch, 0, "b", b->bits, 0, &err));
  a->recording = false;
  OK (send_list (&src, ch, 0, &err));
  assert_false (find_ok (drives[0], "a")->recording);
  assert_int_equal (bitmap_count_bits (bits_of (drives[0], "a")), 1);
  /* b goes. */
  other = d->bitmaps[1];
  d->nr = 1;
  OK (send_list (&src, ch, 0, &err));
  assert_null (drive_find_bitmap (drives[0], "b"));
  REFUSED (send_bits (&src, ch, 0, "b", other.bits, 0, &err), EBADMSG,
           "'b', which was not announced");
  /* a is another one now: of another granularity, and empty. */
  bitmap_free (a->bits);
  a->bits = bitmap_new (d->size, 12, &err);
  OK (send_list (&src, ch, 0, &err));
  assert_int_equal (bitmap_count_bits (bits_of (drives[0], "a")), 0);
  assert_int_equal (find_ok (drives[0], "a")->shift, 12);
  bitmap_free (other.bits);
}

static void
test_malformed_list (void **state)
{
#define ITEM(name, granularity)                                         \
  "{\"name\":" name ",\"granularity\":" granularity                     \
  ",\"recording\":true,\"persistent\":true}"
  static const char *const bodies[] = {
    "",
    "{}",
    "{\"bitmaps\":{}}",
    "{\"bitmaps\":[1]}",
    "{\"bitmaps\":[{\"name\":\"a\"}]}",
    "{\"bitmaps\":[" ITEM ("\"\"", "512") "]}",
    "{\"bitmaps\":[" ITEM ("7", "512") "]}",
    "{\"bitmaps\":[" ITEM ("\"a\\u0000\"", "512") "]}",
    "{\"bitmaps\":[" ITEM ("\"a\"", "256") "]}",
    "{\"bitmaps\":[" ITEM ("\"a\"", "0") "]}",
    "{\"bitmaps\":[" ITEM ("\"a\"", "-512") "]}",
    "{\"bitmaps\":[" ITEM ("\"a\"", "768") "]}",
    "{\"bitmaps\":[" ITEM ("\"a\"", "4294967296") "]}",
    "{\"bitmaps\":[" ITEM ("\"a\"", "512") "," ITEM ("\"a\"", "512") "]}",
    "{\"bitmaps\":[" ITEM ("\"\xff\"", "512") "]}",
    "{\"bitmaps\":[{\"name\":\"b\",\"granularity\":512,\"recording\":true,"
    "\"persistent\":true,\"point\":\"first\"}]}",
    "{\"bitmaps\":[{\"name\":\"b\",\"granularity\":512,\"recording\":true,"
    "\"persistent\":true,\"point\":1}]}",
  };
  struct parcel p = { .h = { .type = PACKET_LIST } };
  char name[1024 + 1] = "", *huge;
  json_t *list;

  OK (send_hello (&src, ch, &err));
  for (size_t i = 0; i < sizeof bodies / sizeof bodies[0]; i++) {
    p.json = bodies[i];
    REFUSED (send_parcel (&src, ch, &p, &err), EBADMSG, "");
    untouched ();
  }
  REFUSED (send_json (&src, ch, PACKET_LIST, 1,
                      json_pack ("{s:[]}", "bitmaps"), &err),
           EBADMSG, "malformed LIST");
  /* JSON takes many times its size in memory. */
  p.json = huge = malloc ((1 << 20) + 2);
  memset (huge, ' ', (1 << 20) + 1);
  huge[(1 << 20) + 1] = '\0';
  REFUSED (send_parcel (&src, ch, &p, &err), EFBIG, "more than");
  free (huge);
  /* The longest name, and one byte more. */
  memset (name, 'n', 1024);
  for (int i = 0; i < 2; i++) {
    list = json_pack ("{s:[{s:s, s:i, s:b, s:b}]}", "bitmaps", "name", name,
                      "granularity", 512, "recording", 1, "persistent", 1);
    assert_int_equal (send_json (&src, ch, PACKET_LIST, 0, list, &err),
                      i == 0 ? -1 : 0);
    name[1023] = '\0';
  }
}

/* The lists may come with HELLO; a refusal is LIST's. */
static void
test_hello_lists (void **state)
{
  struct source_bitmap *a = source_add (&src, 0, "a", 16, true, true);

  bitmap_set (a->bits, 0, 1);
  OK (send_hello_lists (&src, ch, &err));
  OK (send_bits (&src, ch, 0, "a", a->bits, 0, &err));
  assert_int_equal (bitmap_count_bits (bits_of (drives[0], "a")), 1);
  /* Another channel says the same: the bitmap keeps its bits. */
  OK (send_hello_lists (&src, ch, &err));
  assert_int_equal (bitmap_count_bits (bits_of (drives[0], "a")), 1);
}

static void
test_hello_lists_refused (void **state)
{
  add_own (true);
  source_add (&src, 0, "own", 16, true, true);
  REFUSED (send_hello_lists (&src, ch, &err), EEXIST,
           "Bitmap already exists: own");
  assert_int_equal (tap_calls (TAP_WRITE), 0);
  assert_int_equal (drives[0]->nr_bitmaps, 1);
}

/* A packet as an export's name has it. */
static char *
name_of (enum packet_type type, json_t *body)
{
  struct packet_header h = { .session = src.session, .epoch = src.epoch };
  uint8_t *packet = make_control (&h, type, body, &err);
  char *name;

  assert_non_null (packet);
  packet_seal (packet, &h, packet + PACKET_HEADER + h.body_size);
  name = hello_name ("v@d/a", packet, PACKET_HEADER + h.body_size);
  free (packet);
  json_decref (body);
  return name;
}

static void
test_hello_name (void **state)
{
  const char *prefix = "v@d/a@incoming/";
  struct source_bitmap *a;
  char *name, *text;

  /* Of all lengths modulo 3. */
  for (unsigned i = 0; i < 3; i++) {
    json_t *body = hello_json (&src, true);

    json_object_set_new (body, "more", json_stringn ("xyz", i));
    name = name_of (PACKET_HELLO, body);
    assert_memory_equal (name, prefix, strlen (prefix));
    OK (hello_name_open (ch, name + strlen (prefix), &err));
    free (name);
  }
  /* Any letter that is changed is found. */
  a = source_add (&src, 0, "a", 16, true, true);
  uuid_new (&src.session);
  name = name_of (PACKET_HELLO, hello_json (&src, true));
  text = name + strlen (prefix);
  for (size_t i = 0; i + 1 < strlen (text); i++) {
    char c = text[i];

    text[i] = c == 'A' ? 'B' : 'A';
    assert_int_equal (hello_name_open (ch, text, &err), -1);
    text[i] = "%/=+@\n\xff "[i % 8];
    REFUSED (hello_name_open (ch, text, &err), EBADMSG, "malformed name");
    text[i] = c;
  }
  assert_null (drive_find_bitmap (drives[0], "a"));
  OK (hello_name_open (ch, text, &err));
  OK (send_bits (&src, ch, 0, "a", a->bits, 0, &err));
  text[strlen (text) - 1] = '\0';
  REFUSED (hello_name_open (ch, text, &err), EBADMSG, "");
  REFUSED (hello_name_open (ch, "", &err), EBADMSG, "");
  free (name);
  name = name_of (PACKET_LIST, json_pack ("{s:[]}", "bitmaps"));
  REFUSED (hello_name_open (ch, name + strlen (prefix), &err), EBADMSG,
           "not HELLO");
  free (name);
  /* What is too long for a name must be written. */
  for (unsigned i = 0; i < 7; i++)
    source_add (&src, 0, "a bitmap with a name", 16, true, true);
  name = name_of (PACKET_HELLO, hello_json (&src, true));
  assert_non_null (name);
  assert_in_range (strlen (name), 1, 4096);
  free (name);
  {
    json_t *body = hello_json (&src, true);

    json_object_set_new (body, "more", json_pack ("[s]", MUCH MUCH MUCH));
    assert_null (name_of (PACKET_HELLO, body));
  }
}

/* ---- the status block ---- */

static void
test_status (void **state)
{
  struct bitmap *bm = bitmap_new (DISK_SIZE, 16, &err);
  struct parcel p = { .h = { .type = PACKET_DATA } };
  char session[UUID_TEXT], odd[512];
  json_t *status = status_of (ch);

  assert_int_equal (json_integer_value (json_object_get (status, "version")),
                    PACKET_VERSION);
  assert_null (json_object_get (status, "session"));
  assert_null (json_object_get (status, "error"));
  json_decref (status);
  OK (send_hello (&src, ch, &err));
  status = status_of (ch);
  uuid_format (&src.session, session);
  assert_string_equal (
    json_string_value (json_object_get (status, "session")), session);
  json_decref (status);

  /* Names that JSON has to escape, or cannot have at all. */
  for (int byte = 0; byte < 256; byte += 15) {
    memset (odd, byte ? byte : '"', sizeof odd - 1);
    odd[sizeof odd - 1] = '\0';
    REFUSED (send_bits (&src, ch, 0, odd, bm, 0, &err), EBADMSG,
             "not announced");
    status = status_of (ch);
    assert_non_null (strstr (
      json_string_value (json_object_get (status, "error")),
      "not announced"));
    json_decref (status);
  }
  /* What is no packet at all. */
  assert_int_equal (incoming_packet (ch, "hello", 5, &err), -1);
  assert_int_equal (err.errnum, EBADMSG);
  p.h.type = 77;
  p.json = "";
  REFUSED (send_parcel (&src, ch, &p, &err), EBADMSG, "unknown type");
  bitmap_free (bm);
}

int
main (void)
{
#define TEST(f) cmocka_unit_test_setup_teardown (f, begin, end)
  static const struct CMUnitTest tests[] = {
    TEST (test_sizes),
    TEST (test_names),
    TEST (test_malformed_hello),
    TEST (test_active_drive),
    TEST (test_session_not_recorded),
    TEST (test_data_not_recorded),
    TEST (test_exists),
    TEST (test_new_session),
    TEST (test_lists),
    TEST (test_malformed_list),
    TEST (test_hello_lists),
    TEST (test_hello_lists_refused),
    TEST (test_hello_name),
    TEST (test_status),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
