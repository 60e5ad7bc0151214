/* nbdferry - paths for others
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "absolute.h"
#include "cleanup.h"

char *
absolute_path (const char *path, struct error *err)
{
  CLEANUP_FREE char *cwd = NULL;
  char *full;

  if (path[0] == '\0') {
    error_set (err, EINVAL, "a path cannot be empty");
    return NULL;
  }
  if (path[0] == '/')
    full = strdup (path);
  else {
    cwd = getcwd (NULL, 0);
    if (cwd == NULL || asprintf (&full, "%s/%s", cwd, path) == -1)
      full = NULL;
  }
  if (full == NULL)
    error_set (err, errno, "%s: %m", path);
  return full;
}
