/* nbdferry - what a bitmap costs on the wire
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * 2^28 bits (16 TiB in granules of 64 KiB), set at random with one density
 * after another, or in clusters: their coded size beside the entropy, and the
 * time to code, to check and to set them.
 *
 * usage: bench-wire [LOG2-OF-BITS | --short]
 */
#include <config.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "bitmap.h"
#include "wire.h"

#define SHIFT 16
#define BITS  (UINT64_C (1) << log2_bits)
#define SIZE  (BITS << SHIFT)
#define CAP   (BITS / 8 + (1 << 20))

static unsigned log2_bits = 28;

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
now_ms (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return ts.tv_sec * 1e3 + ts.tv_nsec / 1e6;
}

/* Each bit with probability p. */
static void
fill_random (uint64_t *words, double p)
{
  const uint64_t limit = p * (UINT64_C (1) << 32);

  for (uint64_t i = 0; i < BITS; i++)
    if (rnd (UINT64_C (1) << 32) < limit)
      words[i / 64] |= UINT64_C (1) << i % 64;
}

/* Runs of 1 to 2000 bits, so many that a hundredth is set. */
static void
fill_clusters (uint64_t *words)
{
  for (uint64_t at = rnd (200000); at < BITS; at += rnd (200000)) {
    uint64_t end = at + 1 + rnd (2000);

    for (; at < end && at < BITS; at++)
      words[at / 64] |= UINT64_C (1) << at % 64;
  }
}

/* Of n bits in BITS, in bytes; clusters have less, which is not shown. */
static double
entropy (uint64_t n)
{
  double p = (double) n / BITS;

  return n == 0 || n == BITS
           ? 0
           : -(p * log2 (p) + (1 - p) * log2 (1 - p)) * BITS / 8;
}

static void
bench (const char *name, double p)
{
  uint64_t *words = aligned_alloc (4096, BITS / 8);
  uint8_t *buf = malloc (CAP);
  struct bitmap *bm, *copy;
  struct bits_writer w;
  double t[4], h;

  if (words == NULL || buf == NULL)
    abort ();
  memset (words, p == 1 ? 0xff : 0, BITS / 8);
  memset (buf, 0, CAP);
  if (p < 0)
    fill_clusters (words);
  else if (p > 0 && p < 1)
    fill_random (words, p);
  bm = bitmap_new_over (words, SIZE, SHIFT, NULL);
  copy = bitmap_new (SIZE, SHIFT, NULL);
  if (bm == NULL || copy == NULL)
    abort ();
  bitmap_set (copy, 0, SIZE); /* page faults are not what is measured */
  bitmap_clear_all (copy);

  t[0] = now_ms ();
  bits_writer_init (&w, buf, CAP, 0);
  if (bits_write (&w, bm, 0, SIZE) != SIZE)
    abort ();
  t[1] = now_ms ();
  if (bits_check (buf, w.len, 0, BITS, BITS, NULL) == -1)
    abort ();
  t[2] = now_ms ();
  bits_apply_checked (copy, buf, w.len, 0, BITS);
  t[3] = now_ms ();
  if (bitmap_count_bits (copy) != bitmap_count_bits (bm))
    abort ();

  h = entropy (bitmap_count_bits (bm));
  printf ("%-14s %10zu bytes  %12.0f  %6.3f  %8.1f %8.1f %8.1f ms\n", name,
          w.len, h, h > 0 ? w.len / h : 0, t[1] - t[0], t[2] - t[1],
          t[3] - t[2]);
  bitmap_free (bm);
  bitmap_free (copy);
  free (words);
  free (buf);
}

int
main (int argc, char *argv[])
{
  if (argc > 1)
    log2_bits = strcmp (argv[1], "--short") == 0 ? 22 : atoi (argv[1]);
  if (log2_bits < 16 || log2_bits > 32) {
    fprintf (stderr, "usage: bench-wire [LOG2-OF-BITS | --short]\n");
    return 1;
  }
  printf ("2^%u bits            coded             H  x H       "
          "encode    check    apply\n", log2_bits);
  bench ("empty", 0);
  bench ("0.01 %", 0.0001);
  bench ("0.1 %", 0.001);
  bench ("1 %", 0.01);
  bench ("1 % clustered", -1);
  bench ("10 %", 0.1);
  bench ("30 %", 0.3);
  bench ("50 %", 0.5);
  bench ("90 %", 0.9);
  bench ("full", 1);
  return 0;
}
