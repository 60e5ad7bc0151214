/* nbdferry - what the bitmap costs
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * 64 TiB in granules of 64 KiB are 2^30 bits, 128 MiB of leaves.
 *
 * usage: bench-bitmap [--short]
 */
#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "bitmap.h"
#include "wire.h"

#define SIZE  (UINT64_C (64) << 40)
#define SHIFT 16
#define BITS  (SIZE >> SHIFT)
#define MARKS 2000000

static uint64_t random_state = 20240607;

static uint64_t
rnd (uint64_t n)
{
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (random_state * UINT64_C (0x2545f4914f6cdd1d)) % n;
}

static double
now_ns (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return ts.tv_sec * 1e9 + ts.tv_nsec;
}

static struct bitmap *
new_bitmap (uint64_t size)
{
  struct error err;
  struct bitmap *bm = bitmap_new (size, SHIFT, &err);

  if (bm == NULL) {
    fprintf (stderr, "%s\n", err.msg);
    exit (1);
  }
  return bm;
}

static void
line (const char *what, double value, const char *unit)
{
  printf ("%-44s %12.1f %s\n", what, value, unit);
}

/* 4 KiB writes, as a disk of 'size' sees them. */
static void
bench_marks (uint64_t size, const char *fresh, const char *again)
{
  struct bitmap *bm = new_bitmap (size);
  uint64_t *at = malloc (MARKS * sizeof *at);
  double t;

  if (at == NULL)
    abort ();
  for (unsigned i = 0; i < MARKS; i++)
    at[i] = rnd (size >> 12) << 12;
  /* Touch the memory: page faults are not what is measured. */
  bitmap_set (bm, 0, size);
  bitmap_clear_all (bm);
  t = now_ns ();
  for (unsigned i = 0; i < MARKS; i++)
    bitmap_set (bm, at[i], 4096);
  line (fresh, (now_ns () - t) / MARKS, "ns");
  t = now_ns ();
  for (unsigned i = 0; i < MARKS; i++)
    bitmap_set (bm, at[i], 4096);
  line (again, (now_ns () - t) / MARKS, "ns");
  free (at);
  bitmap_free (bm);
}

static void
bench_one_mark (void)
{
  struct bitmap *bm = new_bitmap (SIZE);
  double t = now_ns ();

  for (unsigned i = 0; i < MARKS; i++)
    bitmap_set (bm, SIZE / 3, 4096);
  line ("mark 4 KiB, the same again", (now_ns () - t) / MARKS, "ns");
  bitmap_free (bm);
}

static void
bench_find (void)
{
  struct bitmap *bm;
  struct range run;
  uint64_t at = 0, n = 0;
  double t = now_ns ();

  bm = new_bitmap (SIZE);
  line ("new, 2^30 bits", (now_ns () - t) / 1e3, "us");
  for (unsigned i = 0; i < 100; i++)
    bitmap_set (bm, (BITS / 100 * i + rnd (BITS / 200)) << SHIFT, 1);
  t = now_ns ();
  for (; bitmap_next_dirty (bm, at, SIZE, &run); at = run.end)
    n++;
  line ("find 100 bits among 2^30", (now_ns () - t) / 1e3, "us");
  if (n != 100)
    abort ();
  bitmap_free (bm);
}

static void
bench_all (void)
{
  struct bitmap *bm = new_bitmap (SIZE);
  struct bitmap *to = new_bitmap (SIZE);
  struct range run;
  double t = now_ns ();

  bitmap_set (bm, 0, SIZE);
  line ("set 2^30 bits, untouched memory", (now_ns () - t) / 1e6, "ms");
  t = now_ns ();
  bitmap_next_dirty (bm, 0, SIZE, &run);
  line ("the run of 2^30 bits", (now_ns () - t) / 1e3, "us");
  if (run.end != SIZE)
    abort ();
  t = now_ns ();
  bitmap_clear_all (bm);
  line ("clear 2^30 bits", (now_ns () - t) / 1e6, "ms");
  t = now_ns ();
  bitmap_set (bm, 0, SIZE);
  line ("set 2^30 bits, again", (now_ns () - t) / 1e6, "ms");
  t = now_ns ();
  bitmap_merge (to, bm);
  line ("merge 2^30 bits", (now_ns () - t) / 1e6, "ms");
  t = now_ns ();
  bitmap_take (to, bm);
  line ("take 2^30 bits", (now_ns () - t) / 1e6, "ms");
  bitmap_free (bm);
  bitmap_free (to);
}

static void
bench_new_over (void)
{
  const uint64_t words = bitmap_words_for (SIZE, SHIFT);
  uint64_t *leaves = malloc (words * 8);
  struct bitmap *bm;
  double t;

  if (leaves == NULL)
    abort ();
  for (uint64_t i = 0; i < words; i++)
    leaves[i] = i % 100 ? 0 : i;
  t = now_ns ();
  bm = bitmap_new_over (leaves, SIZE, SHIFT, NULL);
  line ("new over 128 MiB of leaves, 1 % not zero", (now_ns () - t) / 1e6,
        "ms");
  bitmap_free (bm);
  free (leaves);
}

static void
bench_encode (unsigned percent, size_t cap)
{
  const uint64_t bits = UINT64_C (1) << 28, size = bits << SHIFT;
  struct bitmap *bm = new_bitmap (size), *copy = new_bitmap (size);
  uint8_t *buf = malloc (cap);
  struct bits_writer w;
  char what[80];
  double t;

  if (buf == NULL)
    abort ();
  if (percent == 100)
    bitmap_set (bm, 0, size);
  else
    for (uint64_t i = 0; i < bits / 100 * percent; i++)
      bitmap_set (bm, rnd (bits) << SHIFT, 1);
  for (size_t i = 0; i < cap; i += 4096)
    buf[i] = 1;
  t = now_ns ();
  bits_writer_init (&w, buf, cap, 0);
  if (bits_write (&w, bm, 0, size) != size)
    abort ();
  snprintf (what, sizeof what, "encode 2^28 bits, %u %% (%zu bytes)", percent,
            w.len);
  line (what, (now_ns () - t) / 1e6, "ms");
  t = now_ns ();
  if (bits_apply (copy, buf, w.len, 0, bits, NULL) != 0)
    abort ();
  snprintf (what, sizeof what, "decode the same");
  line (what, (now_ns () - t) / 1e6, "ms");
  if (bitmap_count (copy) != bitmap_count (bm))
    abort ();
  free (buf);
  bitmap_free (bm);
  bitmap_free (copy);
}

int
main (int argc, char *argv[])
{
  bench_one_mark ();
  bench_marks (UINT64_C (1) << 40, "mark 4 KiB, random in 1 TiB, fresh",
               "mark 4 KiB, random in 1 TiB, already set");
  if (argc > 1 && strcmp (argv[1], "--short") == 0)
    return 0;
  bench_marks (SIZE, "mark 4 KiB, random in 64 TiB, fresh",
               "mark 4 KiB, random in 64 TiB, already set");
  bench_find ();
  bench_all ();
  bench_new_over ();
  bench_encode (0, 64);
  bench_encode (1, 32 << 20);
  bench_encode (50, 64 << 20);
  bench_encode (100, 64);
  return 0;
}
