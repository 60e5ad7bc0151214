/* nbdferry - a file that is there whole, or not at all
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * What is written goes to PATH.partial, which gets its name when it is
 * complete and durable.  If PATH is a pipe or a device there is nothing to
 * rename, and it is written as it is.
 */
#ifndef FERRY_PARTIAL_H
#define FERRY_PARTIAL_H

#include <stdbool.h>

#include "error.h"

struct partial {
  int fd;     /* to write to */
  char *path; /* NULL: standard output */
  char *tmp;  /* PATH.partial; NULL: written directly */
  bool replace;
  int replaced; /* what exists, locked; or -1 */
};

/* Nothing is open. */
#define PARTIAL_NONE { .fd = -1, .replaced = -1 }

/* "-" is standard output.  Refuses what exists already unless 'replace', what
 * is in use as a disk even then (keep-out.h), and what another process is
 * writing.  What a process that was killed has left in PATH.partial is lost.
 * On error '*p' can be dropped, too.
 */
int partial_open (struct partial *p, const char *path, bool replace,
                  struct error *err);

/* Make it durable, and give it its name. */
int partial_commit (struct partial *p, struct error *err);

/* Free it; without a commit, the file is removed. */
void partial_drop (struct partial *p);

/* Make the entry of 'path' in its folder durable. */
int sync_folder_of (const char *path, struct error *err);

#endif /* FERRY_PARTIAL_H */
