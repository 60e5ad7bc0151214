/* nbdferry - files that nothing is written to, whatever the user says
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "claim.h"
#include "cleanup.h"
#include "journal.h"
#include "keep-out.h"
#include "lock.h"

int
keep_out_of_state (const char *path, struct error *err)
{
  CLEANUP_FREE char *real = realpath (path, NULL);

  if (real == NULL)
    return error_set (err, errno, "%s: %m", path);
  if (journal_is_in (dirname (real)))
    return error_set (err, EINVAL, "%s is in the state directory of a disk, "
                      "of which nothing is overwritten", path);
  return 0;
}

/* Where its state directory is by default. */
static int
refuse_disk (const char *path, struct error *err)
{
  CLEANUP_FREE char *real = realpath (path, NULL), *state = NULL;

  if (real == NULL || asprintf (&state, "%s.ferry", real) == -1) {
    state = NULL;
    return error_set (err, errno, "%s: %m", path);
  }
  if (journal_is_in (state))
    return error_set (err, EINVAL, "%s is a disk, whose bitmaps are in %s; it "
                      "is not replaced", path, state);
  return 0;
}

int
keep_out_of_use (const char *path, struct error *err)
{
  int fd, claim = -1;

  if (keep_out_of_state (path, err) == -1 || refuse_disk (path, err) == -1)
    return -1;
  fd = open (path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd == -1)
    return error_set (err, errno, "%s: cannot see whether it is in use: %m",
                      path);
  if (lock_file (fd, path, true, err) == -1 ||
      claim_fd (fd, path, &claim, err) == -1) {
    close (fd);
    return -1;
  }
  claim_release (fd, claim);
  return fd;
}
