/* nbdferry - the bitmaps of any qcow2, or of an NBD server, brought in
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * First they are read, all of them, into memory; then they are added to the
 * drive, all of them or none.  Nobody writes to the image meanwhile: it is
 * locked while it is read.
 */
#ifndef FERRY_IMPORT_H
#define FERRY_IMPORT_H

#include "client.h"
#include "drive.h"

struct imported {
  char *name; /* as it will be called here */
  unsigned shift;
  bool recording;
  struct bitmap *bits;
};

struct import {
  struct imported *list;
  size_t nr;
};

struct import_options {
  const char *path;     /* of the image, absolute; or an NBD URI */
  const char *name;     /* only this one; NULL: all */
  const char *new_name; /* for 'name'; NULL: the same */
  uint64_t size;        /* that the image's disk must have, bytes */
  const struct stop *stop; /* gives it up; NULL: never */
  /* Of a server, which does not say how fine its bitmaps are. */
  uint64_t granularity; /* bytes; 0: the default */
  bool (*skip) (void *opaque, const char *name); /* or NULL */
  void *skip_opaque;
};

/* Read them into the empty 'im'.  An inconsistent one is an error; so are none.
 * On error too, import_free is the caller's.
 */
int import_read (struct import *im, const struct import_options *opt,
                 struct error *err);

/* Add them to the drive, persistent, with what is dirty in them, at one
 * instant.  0, or -1 and nothing has changed.
 */
int import_add (const struct import *im, struct drive *d, struct error *err);

/* Both, for what a server offers as qemu:dirty-bitmap:NAME (import-nbd.c).
 * They record here from now on, whether or not they do over there.  Writes to
 * the drive may come meanwhile.  That there are none is an error, unless some
 * may be skipped.
 */
int import_from_server (struct import *im, const struct import_options *opt,
                        struct drive *d, struct error *err);

void import_free (struct import *im);

#endif /* FERRY_IMPORT_H */
