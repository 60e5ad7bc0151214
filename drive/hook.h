/* nbdferry - who must act before a write
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A hook is asked before each write, zero and trim of a drive, inside the
 * write gate, before anything is marked or submitted.  Hooks are published as
 * an immutable vector (struct hooks) that is replaced only while the write
 * gate is shut, as what is marked is.  They begin and end in a transaction
 * (transaction.h), each at the instant of it.
 */
#ifndef FERRY_HOOK_H
#define FERRY_HOOK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

struct bitmap;
struct drive;
struct named_bitmap;
struct point;
struct write_hook;

/* Go on with the write. */
#define HOOK_GO_ON -1

struct hook_ops {
  /* The transaction that it begins in is being prepared: get all that is
   * needed; 0 or -1, and then it does not begin.  'nb' is the bitmap whose
   * bits are frozen, and 'parent' the point since which it records; NULL if
   * there is none.  The bitmap and its bits stay until the hook has ended.
   * Control lock held.
   */
  int (*prepare) (struct write_hook *h, const struct named_bitmap *nb,
                  const struct point *parent, struct error *err);
  /* A write to that range is about to come.  HOOK_GO_ON, or for how many ns
   * the writer is to wait outside of the gate, before it asks again; 'waited'
   * is how long that was so far (ns).  Must not wait for long itself.
   */
  int64_t (*before) (struct write_hook *h, uint64_t offset, uint64_t len,
                     uint64_t waited);
  /* The instant is over, and so is all that the transaction did to the
   * bitmap.  Control lock held.
   */
  void (*begun) (struct write_hook *h);
  /* It is not asked any more.  'why': what has happened to the disk; NULL:
   * this is the instant of the transaction that ends it.  The write gate is
   * shut and nobody inside.  Must not wait.
   */
  void (*ended) (struct write_hook *h, const char *why);
};

struct write_hook {
  const struct hook_ops *ops;
};

struct hooks {
  size_t nr;
  struct write_hook *hook[];
};

#endif /* FERRY_HOOK_H */
