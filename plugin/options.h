/* nbdferry - the plugin's parameters
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_OPTIONS_H
#define FERRY_OPTIONS_H

#include "drive.h"

struct options {
  struct drive_options *drives;
  size_t nr;
  char *control; /* absolute, or NULL */
  bool incoming;
  bool insecure; /* and from other hosts without TLS */
  enum drive_durability durability;
};

/* One key=value of the command line; 0, or -1, reported. */
int options_set (struct options *o, const char *key, const char *value);

/* All were set: check them as a whole. */
int options_complete (struct options *o);

void options_free (struct options *o);

#endif /* FERRY_OPTIONS_H */
