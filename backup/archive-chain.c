/* nbdferry - do archives follow one another?
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Each but the first must build upon the point that the one before leads to.
 * The disk is the same if its lineage is: that survives a migration, at which
 * the generation grows, and so a chain may begin on one host and end on
 * another.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>

#include "archive.h"

/* Why 'h' does not follow the one before it, in words that help. */
static int
does_not_follow (const struct archive_head *const *heads,
                 const char *const *names, size_t i, size_t nr,
                 struct error *err)
{
  const struct archive_head *h = heads[i];
  char parent[UUID_TEXT];

  if (archive_is_full (h))
    return error_set (err, EINVAL, "%s is a full backup and needs nothing "
                      "before it: leave out what you gave before it",
                      names[i]);
  for (size_t j = 0; j < nr; j++) {
    if (!uuid_equal (&heads[j]->point, &h->parent))
      continue;
    if (j > i)
      return error_set (err, EINVAL, "wrong order: %s builds upon %s, which "
                        "comes after it", names[i], names[j]);
    /* The commit of what lies between did not reach the bitmap. */
    return error_set (err, EINVAL, "%s builds upon %s, not upon %s: leave out "
                      "%s%s", names[i], names[j], names[i - 1],
                      j + 2 == i ? names[i - 1] : "all between the two",
                      j + 2 == i ? ", which it replaces" : "");
  }
  uuid_format (&h->parent, parent);
  return error_set (err, EINVAL, "a gap: %s builds upon the point %s, to which "
                    "%s does not lead", names[i], parent, names[i - 1]);
}

int
archive_chain_check (const struct archive_head *const *heads,
                     const char *const *names, size_t nr, struct error *err)
{
  for (size_t i = 1; i < nr; i++) {
    const struct archive_head *h = heads[i], *before = heads[i - 1];

    if (!uuid_equal (&h->lineage, &before->lineage))
      return error_set (err, EINVAL, "%s is of another disk ('%s') than %s "
                        "('%s'): their lineages differ", names[i], h->disk,
                        names[i - 1], before->disk);
    for (size_t j = 0; j < i; j++)
      if (uuid_equal (&h->point, &heads[j]->point))
        return error_set (err, EINVAL, "%s and %s lead to the same point",
                          names[j], names[i]);
    if (!uuid_equal (&h->parent, &before->point))
      return does_not_follow (heads, names, i, nr, err);
    if (h->generation < before->generation)
      return error_set (err, EINVAL, "wrong order: %s is of generation %" PRIu64
                        " of the disk, %s before it of %" PRIu64, names[i],
                        h->generation, names[i - 1], before->generation);
  }
  return 0;
}
