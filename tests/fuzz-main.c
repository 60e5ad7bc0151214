/* nbdferry - run a fuzz target without a fuzzer
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * So that fuzz targets are built and run wherever the tests are, this feeds
 * LLVMFuzzerTestOneInput with every file of the folders (or with the files)
 * that are named, and then with random mutations of them: FUZZ_RUNS of them
 * (20000), from a fixed seed, but for no longer than FUZZ_MS (5000 ms).
 *
 * The input is kept in a mapped file, so that it can be looked at whatever
 * has happened; the file goes when all went well.
 */
#include <config.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define INPUT_MAX  (1 << 20)
#define CORPUS_MAX 4096

int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

struct input {
  uint8_t *data;
  size_t size;
};

static struct input corpus[CORPUS_MAX];
static size_t n_corpus;
static uint8_t *kept; /* the mapped copy of the input, INPUT_MAX bytes */
static int kept_fd = -1;

static uint64_t random_state = 0x9e3779b97f4a7c15;

/* xorshift64*; 'n' must not be 0. */
static uint64_t
random_below (uint64_t n)
{
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (random_state * 0x2545f4914f6cdd1d) % n;
}

static void __attribute__ ((format (printf, 1, 2)))
die (const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  vfprintf (stderr, fmt, args);
  va_end (args);
  fputc ('\n', stderr);
  exit (1);
}

static void
load_file (const char *path)
{
  FILE *f = fopen (path, "r");
  struct input *in = &corpus[n_corpus];

  if (n_corpus == CORPUS_MAX)
    die ("more than %d inputs", CORPUS_MAX);
  if (f == NULL)
    die ("%s: %m", path);
  in->data = malloc (INPUT_MAX);
  if (in->data == NULL)
    die ("%m");
  in->size = fread (in->data, 1, INPUT_MAX, f);
  if (!feof (f))
    die ("%s: too large, or not to be read", path);
  fclose (f);
  n_corpus++;
}

static int
not_hidden (const struct dirent *d)
{
  return d->d_name[0] != '.';
}

static void
load (const char *path)
{
  struct dirent **names;
  struct stat st;
  char name[4096];
  int n;

  if (stat (path, &st) == -1) {
    if (errno != ENOENT)
      die ("%s: %m", path);
    fprintf (stderr, "%s: no corpus\n", path);
    return;
  }
  if (!S_ISDIR (st.st_mode)) {
    load_file (path);
    return;
  }
  n = scandir (path, &names, not_hidden, alphasort);
  if (n == -1)
    die ("%s: %m", path);
  for (int i = 0; i < n; i++) {
    snprintf (name, sizeof name, "%s/%s", path, names[i]->d_name);
    load_file (name);
    free (names[i]);
  }
  free (names);
}

static void
put_be (uint8_t *p, unsigned bytes, uint64_t v)
{
  while (bytes-- > 0) {
    p[bytes] = v;
    v >>= 8;
  }
}

/* Change 'in' (which has room for INPUT_MAX bytes) in one place. */
static void
mutate (struct input *in)
{
  static const uint64_t edges[] = { 0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x10000,
                                    0x7fffffff, 0x80000000, 0xffffffff,
                                    INT64_MAX, UINT64_MAX };
  const struct input *other;
  size_t at, n;

  if (in->size == 0) {
    in->size = 1 + random_below (64);
    for (size_t i = 0; i < in->size; i++)
      in->data[i] = random_below (256);
    return;
  }
  at = random_below (in->size);
  switch (random_below (7)) {
  case 0: /* flip a bit */
    in->data[at] ^= 1 << random_below (8);
    break;
  case 1: /* another byte */
    in->data[at] = random_below (256);
    break;
  case 2: /* a number at the edge of something */
    n = 1 << random_below (4);
    if (at + n <= in->size)
      put_be (in->data + at, n,
              edges[random_below (sizeof edges / sizeof edges[0])]);
    break;
  case 3: /* cut the end off */
    in->size = at;
    break;
  case 4: /* take some out */
    n = 1 + random_below (in->size - at < 64 ? in->size - at : 64);
    memmove (in->data + at, in->data + at + n, in->size - at - n);
    in->size -= n;
    break;
  case 5: /* double some */
    n = 1 + random_below (in->size - at < 64 ? in->size - at : 64);
    if (in->size + n > INPUT_MAX)
      break;
    memmove (in->data + at + n, in->data + at, in->size - at);
    in->size += n;
    break;
  case 6: /* a piece of another input, in the same place */
    other = &corpus[random_below (n_corpus)];
    if (at >= other->size)
      break;
    n = 1 + random_below (other->size - at);
    if (n > in->size - at)
      in->size = at + n;
    memcpy (in->data + at, other->data + at, n);
    break;
  }
}

static void
run (const struct input *in)
{
  static size_t length;
  uint8_t *exact;

  if (length != in->size && ftruncate (kept_fd, in->size) == 0)
    length = in->size;
  if (length == in->size)
    memcpy (kept, in->data, in->size);
  /* Memory of just this size, so that sanitizers see reads beyond it. */
  exact = malloc (in->size);
  if (exact == NULL && in->size > 0)
    die ("%m");
  if (in->size > 0)
    memcpy (exact, in->data, in->size);
  LLVMFuzzerTestOneInput (exact, in->size);
  free (exact);
}

static unsigned long
number_from_env (const char *name, unsigned long value)
{
  const char *s = getenv (name);

  return s ? strtoul (s, NULL, 0) : value;
}

static uint64_t
now_ms (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return ts.tv_sec * UINT64_C (1000) + ts.tv_nsec / 1000000;
}

int
main (int argc, char *argv[])
{
  unsigned long runs = number_from_env ("FUZZ_RUNS", 20000), i;
  uint64_t end = now_ms () + number_from_env ("FUZZ_MS", 5000);
  struct input in = { .data = malloc (INPUT_MAX) };
  char path[4096];

  snprintf (path, sizeof path, "%s.input", argv[0]);
  kept_fd = open (path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (kept_fd == -1)
    die ("%s: %m", path);
  kept = mmap (NULL, INPUT_MAX, PROT_READ | PROT_WRITE, MAP_SHARED, kept_fd,
               0);
  if (kept == MAP_FAILED || in.data == NULL)
    die ("%m");
  printf ("if this fails, its input is in %s\n", path);
  fflush (stdout);

  for (int a = 1; a < argc; a++)
    load (argv[a]);
  if (n_corpus == 0) {
    corpus[0].data = malloc (1);
    n_corpus = 1;
  }
  for (size_t c = 0; c < n_corpus; c++)
    run (&corpus[c]);
  for (i = 0; i < runs && now_ms () < end; i++) {
    const struct input *from = &corpus[random_below (n_corpus)];

    in.size = from->size;
    memcpy (in.data, from->data, from->size);
    for (uint64_t n = 1 + random_below (4); n > 0; n--)
      mutate (&in);
    run (&in);
  }
  printf ("%zu inputs, %lu mutations\n", n_corpus, i);

  unlink (path);
  for (size_t c = 0; c < n_corpus; c++)
    free (corpus[c].data);
  free (in.data);
  return 0;
}
