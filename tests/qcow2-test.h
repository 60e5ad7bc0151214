/* nbdferry - what the tests of the sidecar share
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A folder of the test's own, commands with a time limit, and QEMU as the
 * judge.  To be included once in a test's .c after cmocka.h.
 */
#ifndef FERRY_QCOW2_TEST_H
#define FERRY_QCOW2_TEST_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <jansson.h>

#include "error.h"
#include "qcow2-format.h"
#include "qcow2.h"

static char dir[PATH_MAX - 64], disk[PATH_MAX], sidecar[PATH_MAX];
static struct error err;

static uint64_t random_state = UINT64_C (88172645463325252);

static inline uint64_t
rnd (uint64_t n)
{
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state % n;
}

static inline int
make_dir (void **state)
{
  const char *tmp = getenv ("TMPDIR");

  (void) state;
  snprintf (dir, sizeof dir, "%s/ferry-qcow2.XXXXXX", tmp ? tmp : "/var/tmp");
  if (mkdtemp (dir) == NULL)
    return -1;
  snprintf (disk, sizeof disk, "%s/disk.raw", dir);
  snprintf (sidecar, sizeof sidecar, "%s/bitmaps.qcow2", dir);
  return 0;
}

static inline int
remove_dir (void **state)
{
  DIR *d = opendir (dir);
  struct dirent *e;
  char path[PATH_MAX * 2];

  (void) state;
  while (d && (e = readdir (d)) != NULL) {
    snprintf (path, sizeof path, "%s/%s", dir, e->d_name);
    unlink (path);
  }
  if (d)
    closedir (d);
  return rmdir (dir);
}

/* Run a command, NULL-terminated, for at most 60 s.  Its output is freed by
 * the caller, its status is in *status.
 */
static inline char *
run (int *status, ...)
{
  const char *argv[32] = { "timeout", "60" };
  char *out = calloc (1, 1), buf[4096];
  size_t len = 0, n = 2;
  int fds[2];
  va_list args;
  ssize_t r;
  pid_t pid;

  va_start (args, status);
  while ((argv[n] = va_arg (args, const char *)) != NULL)
    n++;
  va_end (args);
  if (pipe2 (fds, O_CLOEXEC) == -1)
    abort ();
  pid = fork ();
  if (pid == 0) {
    dup2 (fds[1], 1);
    dup2 (fds[1], 2);
    execvp (argv[0], (char **) argv);
    _exit (127);
  }
  close (fds[1]);
  while ((r = read (fds[0], buf, sizeof buf)) > 0) {
    out = realloc (out, len + r + 1);
    memcpy (out + len, buf, r);
    len += r;
    out[len] = '\0';
  }
  close (fds[0]);
  waitpid (pid, status, 0);
  *status = WIFEXITED (*status) ? WEXITSTATUS (*status) : 255;
  return out;
}

#define RUN_OK(...)                                                     \
  do {                                                                  \
    int status_;                                                        \
    char *out_ = run (&status_, __VA_ARGS__, NULL);                     \
                                                                        \
    if (status_ != 0)                                                   \
      print_error ("%s\n", out_);                                       \
    free (out_);                                                        \
    assert_int_equal (status_, 0);                                      \
  } while (0)

static inline bool
have (const char *program)
{
  int status;

  free (run (&status, "which", program, NULL));
  return status == 0;
}

static inline void
make_disk (uint64_t size)
{
  int fd = open (disk, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

  assert_true (fd >= 0);
  assert_int_equal (ftruncate (fd, 0), 0);
  assert_int_equal (ftruncate (fd, size), 0);
  close (fd);
}

static inline struct qcow2 *
open_ok (uint64_t size, enum qcow2_found want)
{
  enum qcow2_found found;
  struct qcow2 *q = qcow2_open (sidecar, disk, size, false, &found, &err);

  if (q == NULL)
    print_error ("%s\n", err.msg);
  assert_non_null (q);
  assert_int_equal (found, want);
  return q;
}

static inline void
close_ok (struct qcow2 *q)
{
  if (qcow2_close (q, &err) == -1)
    fail_msg ("%s", err.msg);
}

static inline struct qcow2_entry
new_entry (struct qcow2 *q, const char *name, unsigned shift, bool autoflag)
{
  struct qcow2_entry e = { .name = (char *) name, .shift = shift,
                           .autoflag = autoflag };

  e.bits = qcow2_alloc (q, shift, &err);
  if (e.bits == NULL)
    fail_msg ("%s", err.msg);
  return e;
}

static inline void
write_ok (struct qcow2 *q, const struct qcow2_entry *e, size_t nr)
{
  if (qcow2_write_directory (q, e, nr, &err) == -1)
    fail_msg ("%s", err.msg);
}

/* A new sidecar with one bitmap, '*e'. */
static inline struct qcow2 *
create_with (uint64_t size, struct qcow2_entry *e, const char *name,
             unsigned shift, bool autoflag)
{
  struct qcow2 *q = open_ok (size, QCOW2_CREATED);

  *e = new_entry (q, name, shift, autoflag);
  write_ok (q, e, 1);
  return q;
}

static inline bool
test_bit (const uint64_t *words, uint64_t i)
{
  return words[i / 64] >> i % 64 & 1;
}

static inline void
set_bit (uint64_t *words, uint64_t i)
{
  words[i / 64] |= UINT64_C (1) << i % 64;
}

/* Neither errors nor leaks. */
static inline void
check_clean (void)
{
  RUN_OK ("qemu-img", "check", "-q", "-f", "qcow2", sidecar);
}

/* A new disk, and QEMU's own sidecar for it. */
static inline void
create_by_qemu (const char *cluster_size, uint64_t size)
{
  char options[PATH_MAX + 128], text[32];

  unlink (sidecar);
  make_disk (size);
  snprintf (options, sizeof options,
            "data_file=%s,data_file_raw=on,cluster_size=%s", disk,
            cluster_size);
  snprintf (text, sizeof text, "%llu", (unsigned long long) size);
  RUN_OK ("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, sidecar,
          text);
}

/* The dirty bits that QEMU sees, compared with 'words'. */
static inline void
compare_with_qemu (const char *name, unsigned shift, uint64_t size,
                   const uint64_t *words)
{
  char *context;
  int status;
  char *out;
  json_t *map, *extent;
  size_t i;
  uint64_t bit = 0;

  assert_true (asprintf (&context, "--map=qemu:dirty-bitmap:%s", name) > 0);
  out = run (&status, "nbdinfo", "--json", context, "--", "[", "qemu-nbd",
             "-r", "-f", "qcow2", "-B", name, sidecar, "]", NULL);
  free (context);
  if (status != 0)
    print_error ("%s\n", out);
  assert_int_equal (status, 0);
  map = json_loads (out, 0, NULL);
  free (out);
  assert_non_null (map);
  json_array_foreach (map, i, extent) {
    uint64_t offset = json_integer_value (json_object_get (extent, "offset"));
    uint64_t len = json_integer_value (json_object_get (extent, "length"));
    bool dirty = json_integer_value (json_object_get (extent, "type"));

    for (; bit < qcow2_nr_bits (offset + len, shift); ++bit)
      if (test_bit (words, bit) != dirty)
        fail_msg ("%s: bit %llu is %d for QEMU", name,
                  (unsigned long long) bit, dirty);
  }
  assert_int_equal (bit, qcow2_nr_bits (size, shift));
  json_decref (map);
}

/* qemu-img info's "bitmaps", to be decref'd; NULL if there are none. */
static inline json_t *
list_by_qemu (void)
{
  int status;
  char *out = run (&status, "qemu-img", "info", "--output=json", "-f",
                   "qcow2", sidecar, NULL);
  json_t *info = json_loads (out, 0, NULL), *list;

  if (status != 0)
    print_error ("%s\n", out);
  free (out);
  assert_int_equal (status, 0);
  assert_non_null (info);
  list = json_object_get (json_object_get (json_object_get
    (info, "format-specific"), "data"), "bitmaps");
  list = json_deep_copy (list);
  json_decref (info);
  return list;
}

/* Is this bitmap listed so by QEMU? */
static inline bool
is_listed (const json_t *list, size_t i, const char *name, unsigned shift,
           bool autoflag, bool in_use)
{
  const json_t *b = json_array_get (list, i), *flag;
  const char *n = json_string_value (json_object_get (b, "name"));
  bool is_auto = false, is_in_use = false;
  size_t j;

  json_array_foreach (json_object_get (b, "flags"), j, flag) {
    is_auto |= strcmp (json_string_value (flag), "auto") == 0;
    is_in_use |= strcmp (json_string_value (flag), "in-use") == 0;
  }
  return n && strcmp (n, name) == 0 && is_auto == autoflag
    && is_in_use == in_use
    && json_integer_value (json_object_get (b, "granularity"))
       == (json_int_t) 1 << shift;
}

/* Patch the sidecar. */
static inline void
patch (uint64_t offset, const void *p, size_t len)
{
  int fd = open (sidecar, O_RDWR | O_CLOEXEC);

  assert_true (fd >= 0);
  assert_int_equal (pwrite (fd, p, len, offset), len);
  close (fd);
}

static inline void
peek (uint64_t offset, void *p, size_t len)
{
  int fd = open (sidecar, O_RDONLY | O_CLOEXEC);

  assert_true (fd >= 0);
  assert_int_equal (pread (fd, p, len, offset), len);
  close (fd);
}

static inline uint64_t
peek64 (uint64_t offset)
{
  uint64_t v;

  peek (offset, &v, 8);
  return be64toh (v);
}

static inline void
patch64 (uint64_t offset, uint64_t v)
{
  v = htobe64 (v);
  patch (offset, &v, 8);
}

/* All of it, to be freed. */
static inline uint8_t *
load_sidecar (size_t *len)
{
  int fd = open (sidecar, O_RDONLY | O_CLOEXEC);
  struct stat st;
  uint8_t *p;

  assert_int_equal (fstat (fd, &st), 0);
  *len = st.st_size;
  p = malloc (*len);
  assert_int_equal (pread (fd, p, *len, 0), *len);
  close (fd);
  return p;
}

/* A new file; what is zeros is a hole.  'len' is a multiple of 4096. */
static inline void
store_sidecar (const uint8_t *image, size_t len)
{
  static const uint8_t zeros[4096];
  int fd = open (sidecar, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

  assert_true (fd >= 0);
  assert_int_equal (ftruncate (fd, len), 0);
  for (uint64_t at = 0; at < len; at += 4096)
    if (memcmp (image + at, zeros, 4096) != 0)
      assert_int_equal (pwrite (fd, image + at, 4096, at), 4096);
  close (fd);
}

#define AUTOCLEAR 88 /* where the header has it */

#endif /* FERRY_QCOW2_TEST_H */
