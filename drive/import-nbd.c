/* nbdferry - the bitmaps that an NBD server offers, brought into a drive
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * QEMU shows bitmaps as metadata contexts, qemu:dirty-bitmap:NAME.  Reading
 * one takes a while, and a write to this drive may come after its range has
 * been read.  So a helper, a bitmap that nobody keeps, records from before the
 * first range is read; what is dirty in it is merged into the new ones at the
 * instant when they come to be.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "contexts.h"
#include "import.h"
#include "ship-map.h"
#include "transaction.h"
#include "uuid.h"

#define PREFIX "qemu:dirty-bitmap:"

/* A server may say what it likes. */
#define MAX_CONTEXTS 4096
#define MAX_NAME 1023
#define MAX_BYTES (UINT64_C (2) << 30) /* of all bits in memory */

struct listing {
  struct import *im;
  const struct import_options *opt;
};

static bool
is_wanted (const struct import_options *opt, const char *name)
{
  if (opt->skip && opt->skip (opt->skip_opaque, name))
    return false;
  return opt->name ? strcmp (opt->name, name) == 0 : !ship_map_name (name);
}

static int
found (void *opaque, const char *context, struct error *err)
{
  struct listing *l = opaque;
  struct import *im = l->im;
  const char *name = context + strlen (PREFIX);
  struct imported *p;

  if (!is_wanted (l->opt, name))
    return 0;
  if (name[0] == '\0' || strlen (name) > MAX_NAME || im->nr == MAX_CONTEXTS)
    return error_set (err, EINVAL, "%s: offers bitmaps that are too many, or "
                      "whose names are too long", l->opt->path);
  p = reallocarray (im->list, im->nr + 1, sizeof *p);
  if (p == NULL)
    return error_set (err, ENOMEM, "%m");
  im->list = p;
  p = &im->list[im->nr];
  *p = (struct imported){ .name = strdup (name), .recording = true };
  if (p->name == NULL)
    return error_set (err, ENOMEM, "%m");
  im->nr++;
  return 0;
}

/* QEMU's flag: dirty. */
static int
range (void *opaque, uint64_t start, uint64_t end, uint32_t flags)
{
  if (flags & 1)
    bitmap_set (opaque, start, end - start);
  return 0;
}

static int
read_bitmap (struct imported *b, const struct import_options *opt,
             struct error *err)
{
  CLEANUP_FREE char *context = NULL;

  if (asprintf (&context, PREFIX "%s", b->name) == -1) {
    context = NULL;
    return error_set (err, ENOMEM, "%m");
  }
  b->shift = opt->granularity ? __builtin_ctzll (opt->granularity)
                              : BITMAP_DEFAULT_SHIFT;
  b->bits = bitmap_new (opt->size, b->shift, err);
  if (b->bits == NULL)
    return -1;
  return contexts_walk (opt->path, context, opt->size, range, b->bits,
                        opt->stop, err);
}

static int
rename_one (struct import *im, const struct import_options *opt,
            struct error *err)
{
  char *name;

  if (opt->new_name == NULL || im->nr != 1)
    return 0;
  name = strdup (opt->new_name);
  if (name == NULL)
    return error_set (err, ENOMEM, "%m");
  free (im->list[0].name);
  im->list[0].name = name;
  return 0;
}

static int
read_server (struct import *im, const struct import_options *opt,
             struct error *err)
{
  struct listing l = { im, opt };
  const unsigned shift = opt->granularity
    ? __builtin_ctzll (opt->granularity) : BITMAP_DEFAULT_SHIFT;

  if (contexts_list (opt->path, PREFIX, found, &l, opt->stop, err) == -1)
    return -1;
  if (im->nr == 0 && opt->name)
    return error_set (err, ENOENT, "%s: the server offers no bitmap '%s'",
                      opt->path, opt->name);
  if (im->nr == 0 && opt->skip == NULL)
    return error_set (err, ENOENT, "%s: the server offers no bitmaps",
                      opt->path);
  if (bitmap_words_for (opt->size, shift) > MAX_BYTES / 8 / (im->nr + 1))
    return error_set (err, EFBIG, "%s: its bitmaps are too large to be "
                      "imported at once; name the ones that you want, one at "
                      "a time, or choose a larger granularity", opt->path);
  for (size_t i = 0; i < im->nr; i++)
    if (read_bitmap (&im->list[i], opt, err) == -1)
      return -1;
  return rename_one (im, opt, err);
}

/* ---- into the drive ---- */

static int
one_action (struct drive *d, const char *name, enum bitmap_action_type type,
            uint64_t granularity, struct error *err)
{
  struct bitmap_action a = { .type = type, .target = { d, name },
                             .granularity = granularity, .own = true };

  return bitmap_transaction (&a, 1, err);
}

/* All come to be, with what the helper has, and the helper goes. */
static int
add_with_helper (const struct import *im, struct drive *d,
                 const char *helper, struct error *err)
{
  CLEANUP_FREE struct bitmap_action *a = calloc (2 * im->nr + 1, sizeof *a);
  const struct bitmap_ref source = { d, helper };
  size_t n = 0;

  if (a == NULL)
    return error_set (err, ENOMEM, "%m");
  for (size_t i = 0; i < im->nr; i++) {
    struct bitmap_ref target = { d, im->list[i].name };

    a[n++] = (struct bitmap_action){
      .type = BITMAP_ADD, .target = target, .persistent = true,
      .granularity = UINT64_C (1) << im->list[i].shift,
      .bits = im->list[i].bits,
    };
    a[n++] = (struct bitmap_action){
      .type = BITMAP_MERGE, .target = target, .sources = &source,
      .nr_sources = 1,
    };
  }
  a[n++] = (struct bitmap_action){ .type = BITMAP_REMOVE,
                                   .target = source };
  return bitmap_transaction (a, n, err);
}

int
import_from_server (struct import *im, const struct import_options *opt,
                    struct drive *d, struct error *err)
{
  char helper[64], uuid[UUID_TEXT];
  struct uuid u;
  int r;

  uuid_new (&u);
  uuid_format (&u, uuid);
  snprintf (helper, sizeof helper, "x-ferry-import-%s", uuid);
  if (one_action (d, helper, BITMAP_ADD, opt->granularity, err) == -1)
    return -1;
  r = read_server (im, opt, err);
  if (r == 0)
    r = add_with_helper (im, d, helper, err);
  if (r == -1)
    one_action (d, helper, BITMAP_REMOVE, 0, NULL);
  return r;
}
