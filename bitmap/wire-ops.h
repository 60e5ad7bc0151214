/* nbdferry - a bitmap's bits as bytes: what writer and reader share
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Private to bitmap/.
 */
#ifndef FERRY_BITMAP_WIRE_OPS_H
#define FERRY_BITMAP_WIRE_OPS_H

/* The kinds of operations, the lowest two bits of their first number. */
enum { OP_SKIP = 0, OP_SET = 1, OP_WORDS = 2, OP_RUNS = 3 };

#define VARINT_MAX 10 /* bytes of 7 bits that hold 64 */

#endif /* FERRY_BITMAP_WIRE_OPS_H */
