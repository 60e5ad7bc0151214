/* nbdferry - a drive over the files of crash-model.h, for tests
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * To be included once, after crash-model.h.
 */
#ifndef FERRY_CRASH_DRIVE_H
#define FERRY_CRASH_DRIVE_H

#include "keeper.h"
#include "transaction.h"

#define MIB       (UINT64_C (1) << 20)
#define DISK_SIZE (1024 * MIB)

static char dir[PATH_MAX / 2], state_dir[PATH_MAX - 32];
static struct error err;
static struct drive *live;
static unsigned boot;

/* Another number is another boot of the machine. */
static void
set_boot (unsigned n)
{
  char id[40];

  snprintf (id, sizeof id, "00000000-0000-0000-0000-%012u", n);
  setenv ("FERRY_TEST_BOOT_ID", id, 1);
}

static void
open_live (void)
{
  struct drive_options opt = { .name = "d", .path = disk_path,
                               .state_dir = state_dir };

  live = drive_open (&opt, &err);
  if (live == NULL)
    fail_msg ("%s", err.msg);
}

static void
close_live (void)
{
  if (drive_shutdown (live, &err) == -1)
    fail_msg ("%s", err.msg);
  drive_free (live);
  live = NULL;
}

static int
make_files (void **state)
{
  const char *tmp = getenv ("TMPDIR");

  snprintf (dir, sizeof dir, "%s/ferry-crash.XXXXXX", tmp ? tmp : "/var/tmp");
  if (mkdtemp (dir) == NULL)
    return -1;
  snprintf (disk_path, sizeof disk_path, "%s/disk", dir);
  snprintf (state_dir, sizeof state_dir, "%s/state", dir);
  for (int f = 0; f < NR_FILES; f++)
    snprintf (files[f].path, sizeof files[f].path, "%s/%s", state_dir,
              file_names[f]);
  snprintf (points.path, sizeof points.path, "%s/points.json", state_dir);
  if (truncate (disk_path, 0) == -1) {
    int fd = open (disk_path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

    assert_int_equal (ftruncate (fd, DISK_SIZE), 0);
    close (fd);
  }
  set_boot (++boot);
  open_live ();
  close_live ();
  return 0;
}

static int
remove_files (void **state)
{
  char cmd[PATH_MAX];

  snprintf (cmd, sizeof cmd, "rm -rf '%s'", dir);
  return system (cmd);
}

#endif /* FERRY_CRASH_DRIVE_H */
