/* nbdferry - the control socket: where one message ends
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Three layers.  The lexer (step) turns bytes into tokens, one byte at a
 * time, with at most one byte of look-ahead.  The splitter (take_token)
 * counts braces and brackets: a message ends with the token that closes the
 * last one, or that closes one too many.  The grammar (check_token) follows
 * along, so that a message that cannot be JSON is answered with QEMU's words;
 * after its first error the rest is only counted, not kept.
 */
#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "qmp-frame.h"

/* The states of the lexer. */
enum {
  LEX_START,
  LEX_STRING,
  LEX_ESCAPE,   /* in a string, after a backslash */
  LEX_SIGN,     /* after '-' */
  LEX_ZERO,     /* after a leading 0 */
  LEX_DIGITS,
  LEX_POINT,    /* after '.', a digit must follow */
  LEX_FRACTION,
  LEX_E,        /* after 'e' */
  LEX_E_SIGN,
  LEX_EXPONENT,
  LEX_WORD,     /* true, false, null */
  LEX_RECOVERY, /* after a stray byte: to where a token may begin again */
  LEX_SKIP,     /* after a limit was exceeded: to the end of the line */
};

/* What a byte leads to. */
enum step {
  STEP_ON,           /* the byte was taken */
  STEP_TOKEN,        /* the same, and completes a token */
  STEP_TOKEN_BEFORE, /* a token ended before this byte, which is not taken */
  STEP_AGAIN,        /* not taken, look again in the new state */
  STEP_STRAY,        /* the byte was taken, and fits nowhere */
};

/* What the grammar wants next. */
enum {
  WANT_VALUE,
  WANT_VALUE_OR_END, /* after '[' */
  WANT_KEY,
  WANT_KEY_OR_END,   /* after '{' */
  WANT_COLON,
  WANT_SEPARATOR,    /* after a value: a comma or the end */
};

static int
buf_add (struct qmp_buf *b, const char *bytes, size_t len)
{
  if (b->alloc - b->len <= len) {
    size_t alloc = (b->len + len + 1) * 2;
    char *ptr = realloc (b->ptr, alloc);

    if (ptr == NULL)
      return -1;
    b->ptr = ptr;
    b->alloc = alloc;
  }
  memcpy (b->ptr + b->len, bytes, len);
  b->len += len;
  b->ptr[b->len] = '\0';
  return 0;
}

/* Empty it; the memory of a large message is not kept for the next one. */
static void
buf_reset (struct qmp_buf *b)
{
  if (b->alloc > 65536) {
    free (b->ptr);
    *b = (struct qmp_buf) { 0 };
  }
  b->len = 0;
  if (b->ptr)
    b->ptr[0] = '\0';
}

/* Begin a new message. */
static void
reset (struct qmp_frame *f)
{
  buf_reset (&f->text);
  f->want = WANT_VALUE;
  f->depth = 0;
  f->braces = f->brackets = 0;
  f->ok = true;
  f->done = false;
}

void
qmp_frame_init (struct qmp_frame *f)
{
  memset (f, 0, sizeof *f);
  f->state = LEX_START;
  reset (f);
}

void
qmp_frame_free (struct qmp_frame *f)
{
  free (f->text.ptr);
  free (f->token.ptr);
  memset (f, 0, sizeof *f);
}

static bool
is_digit (unsigned char c)
{
  return c >= '0' && c <= '9';
}

/* Bytes that JSON text never has: QEMU takes them for garbage everywhere. */
static bool
is_control (unsigned char c)
{
  return c < 0x20 || c >= 0xfe;
}

/* ---- bytes to tokens ---- */

static enum step
go (struct qmp_frame *f, int state)
{
  f->state = state;
  return STEP_ON;
}

static enum step
step_start (struct qmp_frame *f, unsigned char c)
{
  if (strchr ("{}[]:,", c) && c != '\0')
    return STEP_TOKEN;
  if (c == '"' || c == '\'')
    return go (f, LEX_STRING);
  if (c == '-')
    return go (f, LEX_SIGN);
  if (is_digit (c))
    return go (f, c == '0' ? LEX_ZERO : LEX_DIGITS);
  if (c >= 'a' && c <= 'z')
    return go (f, LEX_WORD);
  return STEP_STRAY;
}

static enum step
step_string (struct qmp_frame *f, unsigned char c)
{
  if (is_control (c))
    return STEP_STRAY;
  if (f->state == LEX_ESCAPE)
    return go (f, LEX_STRING);
  if (c == '\\')
    return go (f, LEX_ESCAPE);
  return c == (unsigned char) f->token.ptr[0] ? STEP_TOKEN : STEP_ON;
}

static enum step
step_number (struct qmp_frame *f, unsigned char c)
{
  bool e = c == 'e' || c == 'E';

  switch (f->state) {
  case LEX_SIGN:
    if (!is_digit (c))
      return STEP_STRAY;
    return go (f, c == '0' ? LEX_ZERO : LEX_DIGITS);
  case LEX_ZERO:
    if (is_digit (c))
      return STEP_STRAY;
    return c == '.' ? go (f, LEX_POINT) : STEP_TOKEN_BEFORE;
  case LEX_DIGITS:
    if (c == '.')
      return go (f, LEX_POINT);
    /* fall through */
  case LEX_FRACTION:
    if (e)
      return go (f, LEX_E);
    return is_digit (c) ? STEP_ON : STEP_TOKEN_BEFORE;
  case LEX_POINT:
    return is_digit (c) ? go (f, LEX_FRACTION) : STEP_STRAY;
  case LEX_E:
    if (c == '+' || c == '-')
      return go (f, LEX_E_SIGN);
    /* fall through */
  case LEX_E_SIGN:
    return is_digit (c) ? go (f, LEX_EXPONENT) : STEP_STRAY;
  default: /* LEX_EXPONENT */
    return is_digit (c) ? STEP_ON : STEP_TOKEN_BEFORE;
  }
}

/* After a stray byte: skip to what may begin or separate values.  (QEMU also
 * skips tabs.)
 */
static enum step
step_recovery (struct qmp_frame *f, unsigned char c)
{
  if (c == '\t' || (!is_control (c) && !strchr ("{}[]:,", c)))
    return STEP_ON;
  f->state = LEX_START;
  return STEP_AGAIN;
}

static enum step
step (struct qmp_frame *f, unsigned char c)
{
  switch (f->state) {
  case LEX_START:
    return step_start (f, c);
  case LEX_STRING:
  case LEX_ESCAPE:
    return step_string (f, c);
  case LEX_WORD:
    return c >= 'a' && c <= 'z' ? STEP_ON : STEP_TOKEN_BEFORE;
  case LEX_RECOVERY:
    return step_recovery (f, c);
  case LEX_SKIP:
    if (c == '\n' || c == 0xff)
      f->state = LEX_START;
    return STEP_ON;
  default:
    return step_number (f, c);
  }
}

/* ---- the grammar ---- */

static const char *
bad_keyword (struct qmp_frame *f)
{
  const char *word = f->token.ptr;

  if (!strcmp (word, "true") || !strcmp (word, "false") ||
      !strcmp (word, "null"))
    return NULL;
  error_set (&f->err, EINVAL, "JSON parse error, invalid keyword '%s'", word);
  return f->err.msg;
}

static void
open_level (struct qmp_frame *f, char c)
{
  f->open[f->depth++] = c;
  f->want = c == '{' ? WANT_KEY_OR_END : WANT_VALUE_OR_END;
}

/* Does this token end the level that is open? */
static bool
closes (const struct qmp_frame *f, char c)
{
  return f->depth > 0 && c == (f->open[f->depth - 1] == '{' ? '}' : ']');
}

static const char *
want_value (struct qmp_frame *f, char c)
{
  f->want = WANT_SEPARATOR;
  switch (c) {
  case '{': case '[':
    open_level (f, c);
    return NULL;
  case '}': case ']': case ':': case ',':
    return "expecting value";
  }
  return c >= 'a' && c <= 'z' ? bad_keyword (f) : NULL;
}

static const char *
want_key (struct qmp_frame *f, char c)
{
  f->want = WANT_COLON;
  if (c == '"' || c == '\'')
    return NULL;
  if (strchr ("}]:,", c))
    return "expecting value";
  if (c >= 'a' && c <= 'z' && bad_keyword (f))
    return f->err.msg;
  return "key is not a string in object";
}

/* Follow the grammar by one token, which begins with 'c'.  Returns what is
 * wrong with it, or NULL.
 */
static const char *
check_token (struct qmp_frame *f, char c)
{
  bool list = f->depth > 0 && f->open[f->depth - 1] == '[';

  switch (f->want) {
  case WANT_VALUE_OR_END:
  case WANT_KEY_OR_END:
    if (closes (f, c))
      break;
    return list ? want_value (f, c) : want_key (f, c);
  case WANT_VALUE:
    return want_value (f, c);
  case WANT_KEY:
    return want_key (f, c);
  case WANT_COLON:
    f->want = WANT_VALUE;
    return c == ':' ? NULL : "missing : in object pair";
  default: /* WANT_SEPARATOR */
    if (closes (f, c))
      break;
    f->want = list ? WANT_VALUE : WANT_KEY;
    if (c == ',')
      return NULL;
    return list ? "expected separator in list" : "expected separator in dict";
  }
  f->depth--;
  f->want = WANT_SEPARATOR;
  return NULL;
}

/* ---- tokens to plain JSON ---- */

/* Add a string with double quotes around it, whatever it had. */
static const char *
add_string (struct qmp_frame *f)
{
  const char *p = f->token.ptr + 1;
  const char *end = f->token.ptr + f->token.len - 1;

  if (buf_add (&f->text, "\"", 1) == -1)
    return "out of memory";
  while (p < end) {
    /* As much as needs no change. */
    size_t n = strcspn (p, "\\\"");

    if (n > (size_t) (end - p))
      n = end - p;
    if (buf_add (&f->text, p, n) == -1)
      return "out of memory";
    p += n;
    if (p == end)
      break;
    if (*p == '\\' && !strchr ("\"'\\/bfnrtu", p[1]))
      return "invalid escape sequence in string";
    n = *p == '\\' ? 2 : 1;
    if (n == 1 ? buf_add (&f->text, "\\\"", 2) == -1
        : p[1] == '\'' ? buf_add (&f->text, "'", 1) == -1
        : buf_add (&f->text, p, 2) == -1)
      return "out of memory";
    p += n;
  }
  return buf_add (&f->text, "\"", 1) == -1 ? "out of memory" : NULL;
}

static const char *
add_token (struct qmp_frame *f, char c)
{
  if (c == '"' || c == '\'')
    return add_string (f);
  if (buf_add (&f->text, f->token.ptr, f->token.len) == -1)
    return "out of memory";
  if ((c == '-' || is_digit (c)) && !strpbrk (f->token.ptr, ".eE")) {
    errno = 0;
    (void) strtoll (f->token.ptr, NULL, 10);
    if (errno == ERANGE && buf_add (&f->text, ".0", 2) == -1)
      return "out of memory";
  }
  return NULL;
}

/* ---- the splitter ---- */

static enum qmp_frame_event
fail (struct qmp_frame *f)
{
  f->done = true;
  return QMP_FRAME_ERROR;
}

/* A limit was exceeded. */
static enum qmp_frame_event
skip (struct qmp_frame *f, const char *what)
{
  buf_reset (&f->token);
  f->state = LEX_SKIP;
  error_set (&f->err, E2BIG, "%s", what);
  return fail (f);
}

static enum qmp_frame_event
take_token (struct qmp_frame *f)
{
  char c = f->token.ptr[0];
  const char *wrong = NULL;

  f->state = LEX_START;
  f->braces += (c == '{') - (c == '}');
  f->brackets += (c == '[') - (c == ']');
  if (f->braces + f->brackets > QMP_FRAME_DEPTH)
    return skip (f, "JSON nesting depth limit exceeded");

  if (f->ok) {
    wrong = check_token (f, c);
    if (wrong == NULL)
      wrong = add_token (f, c);
    if (wrong != NULL && wrong != f->err.msg)
      error_set (&f->err, EINVAL, "JSON parse error, %s", wrong);
    if (wrong != NULL) {
      f->ok = false;
      buf_reset (&f->text);
    }
  }
  buf_reset (&f->token);

  if (f->braces >= 0 && f->brackets >= 0 && (f->braces || f->brackets))
    return QMP_FRAME_MORE;
  f->done = true;
  return f->ok ? QMP_FRAME_MESSAGE : QMP_FRAME_ERROR;
}

/* A byte that fits nowhere, which is the last of the token. */
static enum qmp_frame_event
stray (struct qmp_frame *f)
{
  error_set (&f->err, EINVAL, "JSON parse error, stray '%s'", f->token.ptr);
  buf_reset (&f->token);
  f->state = LEX_RECOVERY;
  return fail (f);
}

/* Keep a byte that belongs to a token. */
static int
keep (struct qmp_frame *f, char c)
{
  if (f->text.len + f->token.len >= QMP_FRAME_MAX)
    return -1;
  return buf_add (&f->token, &c, 1);
}

size_t
qmp_frame_feed (struct qmp_frame *f, const char *bytes, size_t len,
                enum qmp_frame_event *event)
{
  size_t i = 0;

  *event = QMP_FRAME_MORE;
  if (f->done)
    reset (f);
  while (i < len && *event == QMP_FRAME_MORE) {
    char c = bytes[i];
    enum step s;

    if (f->state == LEX_START && c != '\0' && strchr (" \t\r\n", c)) {
      i++;
      continue;
    }
    s = step (f, c);
    if (s == STEP_AGAIN)
      continue;
    if (s == STEP_TOKEN_BEFORE) {
      *event = take_token (f);
      continue;
    }
    i++;
    if (s == STEP_ON && (f->state == LEX_RECOVERY || f->state == LEX_SKIP ||
                         f->state == LEX_START))
      continue;
    if (keep (f, c) == -1) {
      *event = skip (f, "JSON token size limit exceeded");
      if (c == '\n')
        f->state = LEX_START;
    }
    else if (s == STEP_TOKEN)
      *event = take_token (f);
    else if (s == STEP_STRAY)
      *event = stray (f);
  }
  return i;
}
