/* nbdferry - what ext2, ext3 and ext4 say is free
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * libext2fs opens the file system, which checks the superblock, the features
 * and the group descriptors; the block bitmaps are then read group by group,
 * so that memory does not depend on what they hold.  Whatever does not add up
 * is a reason not to believe any of it.
 *
 * libext2fs reads through a "manager" of our own, which has no other way to be
 * told of the disk than a thread's variable.
 */
#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "hints.h"

#ifdef HAVE_EXT2FS

#include <ext2fs/ext2_fs.h>
#include <ext2fs/ext2fs.h>

#include <pthread.h>

/* 64 bytes of memory each; a file system of 128 TiB has as many. */
#define MAX_GROUPS (1 << 20)

/* The place of a file system, for the manager. */
struct place {
  struct disk *disk;
  uint64_t offset, size; /* bytes */
};

static __thread const struct place *place;

/* ---- libext2fs's view of the disk ---- */

static errcode_t
place_open (const char *name, int flags UNUSED, io_channel *channel);

static errcode_t
place_close (io_channel c)
{
  if (--c->refcount > 0)
    return 0;
  free (c->name);
  free (c);
  return 0;
}

static errcode_t
place_set_blksize (io_channel c, int size)
{
  c->block_size = size;
  return 0;
}

static errcode_t
place_read (io_channel c, unsigned long long block, int count, void *data)
{
  const struct place *p = c->private_data;
  const uint64_t unit = c->block_size;
  uint64_t len = count < 0 ? (uint64_t) -(int64_t) count : count * unit;
  uint64_t from;

  if (block > UINT64_MAX / unit)
    return EXT2_ET_SHORT_READ;
  from = block * unit;
  if (from > p->size || len > p->size - from)
    return EXT2_ET_SHORT_READ;
  if (p->disk->ops->pread (p->disk, data, len, p->offset + from) == -1)
    return errno;
  return 0;
}

static errcode_t
place_read_old (io_channel c, unsigned long block, int count, void *data)
{
  return place_read (c, block, count, data);
}

static errcode_t
place_write (io_channel c UNUSED, unsigned long long block UNUSED,
             int count UNUSED, const void *data UNUSED)
{
  return EROFS;
}

static errcode_t
place_write_old (io_channel c UNUSED, unsigned long block UNUSED,
                 int count UNUSED, const void *data UNUSED)
{
  return EROFS;
}

static errcode_t
place_flush (io_channel c UNUSED)
{
  return 0;
}

static struct struct_io_manager place_manager = {
  .magic = EXT2_ET_MAGIC_IO_MANAGER,
  .name = "ferry",
  .open = place_open,
  .close = place_close,
  .set_blksize = place_set_blksize,
  .read_blk = place_read_old,
  .write_blk = place_write_old,
  .flush = place_flush,
  .read_blk64 = place_read,
  .write_blk64 = place_write,
};

static errcode_t
place_open (const char *name, int flags UNUSED, io_channel *channel)
{
  io_channel c = calloc (1, sizeof *c);

  if (c == NULL)
    return EXT2_ET_NO_MEMORY;
  c->name = strdup (name);
  if (c->name == NULL) {
    free (c);
    return EXT2_ET_NO_MEMORY;
  }
  c->magic = EXT2_ET_MAGIC_IO_CHANNEL;
  c->manager = &place_manager;
  c->block_size = 1024;
  c->refcount = 1;
  c->private_data = (void *) place;
  *channel = c;
  return 0;
}

/* ---- may it be believed? ---- */

static int __attribute__ ((format (printf, 2, 3)))
refuse (struct hints_fs *fs, const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  vsnprintf (fs->reason, sizeof fs->reason, fmt, args);
  va_end (args);
  return 0;
}

/* Before libext2fs takes memory for it: does it fit where it is? */
static int
check_super (const struct ext2_super_block *sb, struct hints_fs *fs)
{
  const unsigned log = ext2fs_le32_to_cpu (sb->s_log_block_size);
  const uint32_t per_group = ext2fs_le32_to_cpu (sb->s_blocks_per_group);
  uint64_t blocks = ext2fs_le32_to_cpu (sb->s_blocks_count);

  if (ext2fs_le16_to_cpu (sb->s_magic) != EXT2_SUPER_MAGIC)
    return refuse (fs, "it has no valid superblock");
  if (ext2fs_le32_to_cpu (sb->s_feature_incompat) &
      EXT4_FEATURE_INCOMPAT_64BIT)
    blocks |= (uint64_t) ext2fs_le32_to_cpu (sb->s_blocks_count_hi) << 32;
  if (log > EXT2_MAX_BLOCK_LOG_SIZE - EXT2_MIN_BLOCK_LOG_SIZE ||
      per_group == 0 || blocks == 0)
    return refuse (fs, "it has no valid superblock");
  if (blocks > fs->size >> (EXT2_MIN_BLOCK_LOG_SIZE + log))
    return refuse (fs, "it is larger than the place where it is");
  if ((blocks + per_group - 1) / per_group > MAX_GROUPS)
    return refuse (fs, "it has too many block groups");
  return 1;
}

static bool
mmp_is_clean (ext2_filsys e2)
{
  CLEANUP_FREE char *buf = malloc (e2->blocksize);
  const struct mmp_struct *mmp = (const void *) buf;

  return buf != NULL &&
         io_channel_read_blk64 (e2->io, e2->super->s_mmp_block, 1, buf) == 0 &&
         ext2fs_le32_to_cpu (mmp->mmp_magic) == EXT4_MMP_MAGIC &&
         ext2fs_le32_to_cpu (mmp->mmp_seq) == EXT4_MMP_SEQ_CLEAN;
}

/* ext4 with a journal sets needs_recovery when it is mounted for writing, and
 * clears it when it is unmounted or frozen; without one it clears the flag of
 * a valid file system.  Times say nothing: one mounted for reading has old
 * ones, and a clock can be wrong.
 */
static int
check_state (ext2_filsys e2, struct hints_fs *fs)
{
  struct ext2_super_block *sb = e2->super;

  if (ext2fs_has_feature_journal_needs_recovery (sb))
    return refuse (fs, "it is mounted, or was not unmounted cleanly (its "
                   "journal needs recovery)");
  if (sb->s_state & EXT2_ERROR_FS)
    return refuse (fs, "it has errors: run e2fsck");
  if (!(sb->s_state & EXT2_VALID_FS))
    return refuse (fs, "it is mounted, or was not unmounted cleanly");
  if (sb->s_last_orphan != 0 || ext2fs_has_feature_orphan_present (sb))
    return refuse (fs, "it was not unmounted cleanly (it has orphans)");
  if (ext2fs_has_feature_mmp (sb) && !mmp_is_clean (e2))
    return refuse (fs, "it is in use (by its protection against being "
                   "mounted twice)");
  return 1;
}

/* ---- the maps ---- */

/* Walking through the groups. */
struct walk {
  ext2_filsys e2;
  struct hints_fs *fs;
  struct bitmap *vacant;
  uint64_t start, end; /* blocks: the free run that is being gathered */
};

/* In bytes of the disk. */
static uint64_t
place_of (const struct walk *w, uint64_t block)
{
  return w->fs->offset + block * w->e2->blocksize;
}

/* Whole granules of the run are free. */
static void
end_run (struct walk *w)
{
  const uint64_t g = bitmap_granularity (w->vacant);
  const uint64_t from = (place_of (w, w->start) + g - 1) & ~(g - 1);
  const uint64_t to = place_of (w, w->end) & ~(g - 1);

  if (w->start < w->end && from < to)
    bitmap_set (w->vacant, from, to - from);
  w->start = w->end = 0;
}

static void
add_run (struct walk *w, uint64_t start, uint64_t end)
{
  if (start != w->end) {
    end_run (w);
    w->start = start;
  }
  w->end = end;
}

/* In whole clusters. */
static void
not_free (struct walk *w, uint64_t block, uint64_t nr)
{
  const uint64_t ratio = UINT64_C (1) << w->e2->cluster_ratio_bits;
  const uint64_t from = block & ~(ratio - 1);
  const uint64_t to = (block + nr + ratio - 1) & ~(ratio - 1);

  bitmap_clear (w->vacant, place_of (w, from), (to - from) * w->e2->blocksize);
}

static bool
bit_is_set (const uint8_t *bits, uint64_t i)
{
  return bits[i / 8] >> i % 8 & 1;
}

/* The free runs of one group's bitmap; returns how many clusters are free. */
static uint64_t
add_group (struct walk *w, const uint8_t *bits, uint64_t first, uint64_t last)
{
  const unsigned ratio = w->e2->cluster_ratio_bits;
  const uint64_t nr = (last - first + (UINT64_C (1) << ratio)) >> ratio;
  uint64_t n = 0;

  for (uint64_t i = 0; i < nr;) {
    uint64_t from = i, start, end;

    if (i % 8 == 0 && bits[i / 8] == 0xff) {
      i += 8;
      continue;
    }
    if (bit_is_set (bits, i)) {
      i++;
      continue;
    }
    while (i < nr && !bit_is_set (bits, i))
      i += i % 8 == 0 && bits[i / 8] == 0 && i + 8 <= nr ? 8 : 1;
    n += i - from;
    start = first + (from << ratio);
    end = first + (i << ratio);
    add_run (w, start, end <= last ? end : last + 1);
  }
  return n;
}

static int
read_group (struct walk *w, dgrp_t g, uint8_t *bits)
{
  ext2_filsys e2 = w->e2;
  const uint64_t first = ext2fs_group_first_block2 (e2, g);
  const uint64_t last = ext2fs_group_last_block2 (e2, g);
  const uint64_t at = ext2fs_block_bitmap_loc (e2, g);
  uint64_t nr;
  errcode_t r;

  if (!ext2fs_group_desc_csum_verify (e2, g))
    return refuse (w->fs, "the descriptor of its group %u is damaged", g);
  if (ext2fs_has_group_desc_csum (e2) &&
      ext2fs_bg_flags_test (e2, g, EXT2_BG_BLOCK_UNINIT)) {
    /* Nothing but metadata, which is taken out again at the end. */
    add_run (w, first, last + 1);
    return 1;
  }
  if (at < e2->super->s_first_data_block ||
      at >= ext2fs_blocks_count (e2->super))
    return refuse (w->fs, "the block bitmap of its group %u is out of place",
                   g);
  r = io_channel_read_blk64 (e2->io, at, 1, bits);
  if (r != 0)
    return refuse (w->fs, "the block bitmap of its group %u cannot be read: "
                   "%s", g, error_message (r));
  if (!ext2fs_block_bitmap_csum_verify (e2, g, (char *) bits,
                                        e2->super->s_clusters_per_group / 8))
    return refuse (w->fs, "the block bitmap of its group %u is damaged", g);
  nr = add_group (w, bits, first, last);
  if (nr != ext2fs_bg_free_blocks_count (e2, g))
    return refuse (w->fs, "the block bitmap of its group %u has %" PRIu64
                   " free, and not %u as it should: run e2fsck", g, nr,
                   ext2fs_bg_free_blocks_count (e2, g));
  return 1;
}

/* A file system's own blocks are never free, whatever its maps say. */
static void
keep_metadata (struct walk *w, dgrp_t g)
{
  ext2_filsys e2 = w->e2;
  const uint64_t blocks = ext2fs_blocks_count (e2->super);
  blk64_t super, old_desc, new_desc;
  const uint64_t at[] = { ext2fs_block_bitmap_loc (e2, g),
                          ext2fs_inode_bitmap_loc (e2, g) };
  const uint64_t table = ext2fs_inode_table_loc (e2, g);
  const uint64_t old_blocks =
    ext2fs_has_feature_meta_bg (e2->super)
      ? e2->super->s_first_meta_bg
      : e2->desc_blocks + e2->super->s_reserved_gdt_blocks;

  for (unsigned i = 0; i < 2; i++)
    if (at[i] < blocks)
      not_free (w, at[i], 1);
  if (table < blocks)
    not_free (w, table,
              e2->inode_blocks_per_group < blocks - table
                ? e2->inode_blocks_per_group
                : blocks - table);
  ext2fs_super_and_bgd_loc2 (e2, g, &super, &old_desc, &new_desc, NULL);
  if (super != 0 || g == 0)
    not_free (w, super, 1);
  if (old_desc != 0)
    not_free (w, old_desc, old_blocks);
  if (new_desc != 0)
    not_free (w, new_desc, 1);
}

static int
read_maps (struct walk *w, bool (*stop) (void *opaque), void *opaque)
{
  CLEANUP_FREE uint8_t *bits = malloc (w->e2->blocksize);

  if (bits == NULL)
    return refuse (w->fs, "there is no memory");
  /* Bits beyond what a group has are never looked at, if it has as many as fit
   * in its bitmap's block.
   */
  if (w->e2->super->s_clusters_per_group > w->e2->blocksize * 8 ||
      w->e2->super->s_clusters_per_group % 8 != 0)
    return refuse (w->fs, "it has no valid superblock");
  for (dgrp_t g = 0; g < w->e2->group_desc_count; g++) {
    if (stop && stop (opaque))
      return -1;
    if (!read_group (w, g, bits))
      return 0;
  }
  end_run (w);
  for (dgrp_t g = 0; g < w->e2->group_desc_count; g++)
    keep_metadata (w, g);
  return 1;
}

static void
name_errors (void)
{
  initialize_ext2_error_table ();
}

/* The superblock, as libext2fs will see it, checked before. */
static int
look_at_super (struct disk *d, struct hints_fs *fs)
{
  struct ext2_super_block sb;

  if (fs->size < SUPERBLOCK_OFFSET + sizeof sb)
    return refuse (fs, "it has no valid superblock");
  if (d->ops->pread (d, &sb, sizeof sb, fs->offset + SUPERBLOCK_OFFSET) == -1)
    return refuse (fs, "its superblock cannot be read: %s", strerror (errno));
  return check_super (&sb, fs);
}

int
hints_ext (struct disk *d, struct bitmap *vacant, struct hints_fs *fs,
           bool (*stop) (void *opaque), void *opaque)
{
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  const struct place here = { d, fs->offset, fs->size };
  struct walk w = { .fs = fs, .vacant = vacant };
  ext2_filsys e2 = NULL;
  errcode_t e;
  int r;

  pthread_once (&once, name_errors);
  if (!look_at_super (d, fs))
    return 0;
  place = &here;
  e = ext2fs_open2 ("disk", NULL, EXT2_FLAG_64BITS, 0, 0, &place_manager, &e2);
  place = NULL;
  if (e != 0)
    return refuse (fs, "%s", error_message (e));
  w.e2 = e2;
  /* It may have changed meanwhile. */
  r = ext2fs_blocks_count (e2->super) > fs->size / e2->blocksize ||
          e2->group_desc_count > MAX_GROUPS
        ? refuse (fs, "it is larger than the place where it is")
        : check_state (e2, fs);
  if (r == 1)
    r = read_maps (&w, stop, opaque);
  if (r != 1)
    bitmap_clear (vacant, fs->offset, fs->size);
  ext2fs_close_free (&e2);
  return r;
}

bool
hints_supported (void)
{
  return true;
}

#else /* !HAVE_EXT2FS */

int
hints_ext (struct disk *d UNUSED, struct bitmap *vacant UNUSED,
           struct hints_fs *fs, bool (*stop) (void *opaque) UNUSED,
           void *opaque UNUSED)
{
  snprintf (fs->reason, sizeof fs->reason, "this was built without libext2fs");
  return 0;
}

bool
hints_supported (void)
{
  return false;
}

#endif
