/* nbdferry - sizes as people write and read them
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_SIZE_H
#define FERRY_SIZE_H

#include <stdint.h>

#define SIZE_TEXT 24 /* with the NUL */

/* Digits, and at most one of the suffixes B K M G T P E (or small letters),
 * powers of 1024.  Nothing else: no sign, no fraction, no blanks.  -1, and
 * '*value' untouched, if it is not that or does not fit.
 */
int size_parse (const char *text, uint64_t *value);

/* Digits only. */
int number_parse (const char *text, uint64_t *value);

/* "512 B", "64 KiB", "1.50 GiB": three digits at most, the fraction left out
 * where there is none.  Returns 'text'.
 */
char *size_format (uint64_t value, char text[SIZE_TEXT]);

/* The same in few columns: "512B", "64K", "1.50G". */
char *size_compact (uint64_t value, char text[SIZE_TEXT]);

#endif /* FERRY_SIZE_H */
