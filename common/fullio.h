/* nbdferry - files: whole reads and writes, and what makes them durable
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * All of them go on after a signal, return -1 with errno set on error, and may
 * be called by any thread.
 */
#ifndef FERRY_FULLIO_H
#define FERRY_FULLIO_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* As many bytes as there are: fewer than 'len' only at the end of the file. */
ssize_t full_pread (int fd, void *buf, size_t len, uint64_t offset);

/* The same, and what is missing at the end of the file reads as zeros. */
int full_pread_zeros (int fd, void *buf, size_t len, uint64_t offset);

/* All of it: 0, or -1. */
int full_pwrite (int fd, const void *buf, size_t len, uint64_t offset);

/* Make durable what was created, renamed or removed in the folder of 'path'.
 */
int sync_directory_of (const char *path);

#endif /* FERRY_FULLIO_H */
