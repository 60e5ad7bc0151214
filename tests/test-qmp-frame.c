/* nbdferry - test of the framer of the control socket
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The expected answers are those of qemu-storage-daemon 7.2 to the same
 * bytes.
 */
#include <config.h>

/* cmocka passes every test a state that most do not want. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The library that tests are linked with ends below the plugin.  It comes
 * before cmocka.h, which makes macros of plain words.
 */
#include "qmp-frame.c"

#include <cmocka.h>

#define MAX_OUT 65536

/* Feed bytes in pieces of 'piece'; what comes out is one line each, errors
 * with a '!' before them.
 */
static void
feed (const char *bytes, size_t len, size_t piece, char *out)
{
  struct qmp_frame f;
  enum qmp_frame_event event;
  size_t n = 0;

  qmp_frame_init (&f);
  out[0] = '\0';
  for (size_t i = 0; i < len; ) {
    size_t most = len - i < piece ? len - i : piece;

    i += qmp_frame_feed (&f, bytes + i, most, &event);
    if (event == QMP_FRAME_MESSAGE) {
      assert_int_equal (strlen (f.text.ptr), f.text.len);
      n += snprintf (out + n, MAX_OUT - n, "%s\n", f.text.ptr);
    }
    if (event == QMP_FRAME_ERROR)
      n += snprintf (out + n, MAX_OUT - n, "!%s\n", f.err.msg);
    assert_true (n < MAX_OUT);
  }
  qmp_frame_free (&f);
}

static void
expect_bytes (const char *bytes, size_t len, const char *expected)
{
  static char out[MAX_OUT];

  for (size_t piece = 1; piece <= len + 1; piece += 1 + piece / 3) {
    feed (bytes, len, piece, out);
    assert_string_equal (out, expected);
  }
}

static void
expect (const char *bytes, const char *expected)
{
  expect_bytes (bytes, strlen (bytes), expected);
}

#define STRAY(x) "!JSON parse error, stray '" x "'\n"
#define NO_VALUE "!JSON parse error, expecting value\n"

static void
test_values (void **state)
{
  expect ("", "");
  expect (" \t\r\n", "");
  expect ("{}", "{}\n");
  expect ("{}[]{}", "{}\n[]\n{}\n");
  expect ("{ \"a\" : [ 1 , -2.5e+3 , true,false,null , \"x\" ] }",
          "{\"a\":[1,-2.5e+3,true,false,null,\"x\"]}\n");
  expect ("{\n  \"a\": {\r\n\t\"b\": []\n  }\n}\n", "{\"a\":{\"b\":[]}}\n");
  expect ("\"x\"\"y\"", "\"x\"\n\"y\"\n");
}

/* A number or word at the top ends with what comes after it. */
static void
test_look_ahead (void **state)
{
  expect ("1", "");
  expect ("1 ", "1\n");
  expect ("12[", "12\n");
  expect ("1 2 3\n", "1\n2\n3\n");
  expect ("true null\n", "true\nnull\n");
  expect ("1,2\n", "1\n" NO_VALUE "2\n");
  expect ("-0 0 1e5 1E+5 1.5e-7\n", "-0\n0\n1e5\n1E+5\n1.5e-7\n");
}

static void
test_quotes (void **state)
{
  expect ("{'a':'b'}", "{\"a\":\"b\"}\n");
  expect ("'a\"b\\'c\\\"d'", "\"a\\\"b'c\\\"d\"\n");
  expect ("\"a'b\\'c\"", "\"a'b'c\"\n");
  expect ("'{[' \"]}\\\\\"", "\"{[\"\n\"]}\\\\\"\n");
  expect ("\"\xc3\xa9\xf0\x9f\x98\x80\"", "\"\xc3\xa9\xf0\x9f\x98\x80\"\n");
  expect ("\"\\u00e9\\/\\b\\f\\n\\r\\t\"", "\"\\u00e9\\/\\b\\f\\n\\r\\t\"\n");
  expect ("\"\\x\"{}",
          "!JSON parse error, invalid escape sequence in string\n{}\n");
}

static void
test_large_integers (void **state)
{
  expect ("9223372036854775807 ", "9223372036854775807\n");
  expect ("-9223372036854775808 ", "-9223372036854775808\n");
  expect ("9223372036854775808 ", "9223372036854775808.0\n");
  expect ("[-99999999999999999999]", "[-99999999999999999999.0]\n");
}

static void
test_grammar (void **state)
{
  expect ("{,}", NO_VALUE);
  expect ("{\"a\":}", NO_VALUE);
  expect ("{\"a\":1,}", NO_VALUE);
  expect ("[1,]", NO_VALUE);
  expect ("[}", NO_VALUE);
  expect ("}", NO_VALUE);
  expect ("]{}", NO_VALUE "{}\n");
  expect (":", NO_VALUE);
  expect ("{\"a\" \"b\"}", "!JSON parse error, missing : in object pair\n");
  expect ("{\"a\":1 \"b\":2}",
          "!JSON parse error, expected separator in dict\n");
  expect ("{\"a\":1]", "!JSON parse error, expected separator in dict\n");
  expect ("[1 2]", "!JSON parse error, expected separator in list\n");
  expect ("{1:2}", "!JSON parse error, key is not a string in object\n");
  expect ("{\"a\":1,2}", "!JSON parse error, key is not a string in object\n");
  expect ("xyz ", "!JSON parse error, invalid keyword 'xyz'\n");
  expect ("{'a':tru}", "!JSON parse error, invalid keyword 'tru'\n");
  /* One error a message, and the next message is whole. */
  expect ("{,,[,],}{}", NO_VALUE "{}\n");
}

static void
test_stray (void **state)
{
  expect ("%d\n{}", STRAY ("%") "{}\n");
  expect ("%\t1 2\n3 ", STRAY ("%") "3\n");
  expect ("//x\n{}", STRAY ("/") "{}\n");
  expect ("01 {}", STRAY ("01") "{}\n");
  expect ("1.\n{}", STRAY ("1.\n") "{}\n");
  expect ("1ex {}", STRAY ("1ex") "{}\n");
  expect ("-\n\n+1\n", STRAY ("-\n") STRAY ("+"));
  expect ("'abc\n{}", STRAY ("'abc\n") "{}\n");
  expect ("\x01{}", STRAY ("\x01") "{}\n");
  expect ("\xff\xff{}", STRAY ("\xff") STRAY ("\xff") "{}\n");
  expect_bytes ("\0{}", 3, STRAY ("") "{}\n");
  /* The rest of a message that was torn apart is looked at token by token. */
  expect ("{\"id\":\"\t\",\"x\":1}\n{}",
          STRAY ("\"\t") NO_VALUE "\"x\"\n" NO_VALUE "1\n" NO_VALUE "{}\n");
}

/* n times 'open', n times 'close', and something after it. */
static char *
nested (unsigned n, char open, char close, const char *after)
{
  char *s = malloc (2 * n + strlen (after) + 1);

  assert_non_null (s);
  memset (s, open, n);
  memset (s + n, close, n);
  strcpy (s + 2 * n, after);
  return s;
}

static void
test_depth (void **state)
{
  static char out[MAX_OUT];
  char *s = nested (QMP_FRAME_DEPTH, '[', ']', "");

  feed (s, strlen (s), 7, out);
  assert_int_equal (strlen (out), strlen (s) + 1);
  assert_memory_equal (out, s, strlen (s));
  free (s);

  /* What is too deep is one error, and ends with its line. */
  s = nested (QMP_FRAME_DEPTH + 1, '[', ']', "]]}{\n{}");
  feed (s, strlen (s), 7, out);
  assert_string_equal (out, "!JSON nesting depth limit exceeded\n{}\n");
  free (s);

  /* In a message that is wrong already, too. */
  s = nested (5000, '[', ',', "\n{}");
  s[0] = '{';
  feed (s, strlen (s), 7, out);
  assert_string_equal (out, "!JSON nesting depth limit exceeded\n{}\n");
  free (s);
}

/* A message of 'size' bytes; then a small one. */
static void
large (size_t size, const char *open, const char *unit, const char *close,
       bool fits)
{
  static char out[MAX_OUT];
  size_t step = strlen (unit), n = strlen (open);
  char *s = malloc (size + 100);
  struct qmp_frame f;
  enum qmp_frame_event event;

  assert_non_null (s);
  strcpy (s, open);
  for (; n + step + strlen (close) <= size; n += step)
    memcpy (s + n, unit, step);
  strcpy (s + n, close);
  if (fits) {
    qmp_frame_init (&f);
    assert_int_equal (qmp_frame_feed (&f, s, strlen (s), &event), strlen (s));
    assert_int_equal (event, QMP_FRAME_MESSAGE);
    assert_int_equal (f.text.len, strlen (s));
    qmp_frame_free (&f);
  }
  else {
    strcat (s, "\n{}");
    feed (s, strlen (s), 4096, out);
    assert_string_equal (out, "!JSON token size limit exceeded\n{}\n");
  }
  free (s);
}

static void
test_size (void **state)
{
  large (QMP_FRAME_MAX, "\"", "x", "\"", true);
  large (QMP_FRAME_MAX + 1, "\"", "x", "\"", false);
  large (QMP_FRAME_MAX, "[", "1,", "12]", true);
  large (QMP_FRAME_MAX + 2, "[", "1,", "12]", false);
  large (3 * QMP_FRAME_MAX, "[", "\"x\",", "1]", false);
  large (3 * QMP_FRAME_MAX, "\"", "x", "\"", false);
  large (3 * QMP_FRAME_MAX, "1", "1", " ", false);
}

/* White space is no part of a message. */
static void
test_white_space (void **state)
{
  static char out[MAX_OUT];
  size_t n = 3 * QMP_FRAME_MAX;
  char *s = malloc (n + 1);

  assert_non_null (s);
  memset (s, ' ', n);
  s[1] = '[';
  s[n / 2] = '1';
  s[n - 1] = ']';
  feed (s, n, 4096, out);
  assert_string_equal (out, "[1]\n");
  free (s);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_values),
    cmocka_unit_test (test_look_ahead),
    cmocka_unit_test (test_quotes),
    cmocka_unit_test (test_large_integers),
    cmocka_unit_test (test_grammar),
    cmocka_unit_test (test_stray),
    cmocka_unit_test (test_depth),
    cmocka_unit_test (test_size),
    cmocka_unit_test (test_white_space),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
