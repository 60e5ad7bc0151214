/* nbdferry - a disk's dirty map, to be drawn
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_MAP_H
#define FERRY_MAP_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include <jansson.h>

#include "error.h"

/* What x-ferry-bitmap-map says; strings are borrowed from the JSON. */
struct dirty_map {
  const char *node, *name;
  uint64_t size;        /* of the disk, bytes */
  uint64_t granularity; /* bytes */
  uint64_t granules;    /* of the disk */
  uint64_t count;       /* dirty bytes, as QEMU counts */
  bool recording, persistent, busy;
  uint64_t cell;        /* granules of a cell; the last has what is left */
  const json_t *cells;  /* dirty granules of each */
  uint64_t nr;          /* cells */
};

/* How dirty a cell is, in steps that can be told apart. */
enum map_level {
  MAP_CLEAN,
  MAP_QUARTER, /* at most */
  MAP_HALF,
  MAP_MORE,
  MAP_ALL,
  MAP_LEVELS
};

/* What the levels are called in a legend. */
extern const char *const map_level_names[MAP_LEVELS];

/* 0, or -1 if it makes no sense. */
int map_parse (struct dirty_map *m, const json_t *answer, struct error *err);

enum map_level map_level_of (const struct dirty_map *m, uint64_t cell);

/* How much of the disk is dirty, 0 to 1. */
double map_share (const struct dirty_map *m);

/* "0 %", "0.02 %", "17.3 %": never 0 or 100 unless it is just that. */
#define MAP_SHARE_TEXT 24
char *map_format_share (const struct dirty_map *m, char text[MAP_SHARE_TEXT]);

/* How many cells a line has in that many columns. */
unsigned map_text_columns (unsigned width);

/* In lines of text; ASCII alone, or with shades. */
void map_print_text (const struct dirty_map *m, unsigned width, bool ascii,
                     FILE *out);

/* As an SVG image. */
void map_print_svg (const struct dirty_map *m, FILE *out);

#endif /* FERRY_MAP_H */
