/* nbdferry - fuzz target: points.json
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "points.h"

int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  json_t *points = points_parse ((const char *) data, size), *again;
  char *text;

  if (points == NULL)
    return 0;
  /* What can be read can be written, and read again. */
  text = json_dumps (points, JSON_INDENT (1) | JSON_SORT_KEYS);
  if (text == NULL)
    abort ();
  again = points_parse (text, strlen (text));
  if (again == NULL || !json_equal (points, again))
    abort ();
  free (text);
  json_decref (again);
  json_decref (points);
  return 0;
}
