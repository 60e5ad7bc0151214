/* nbdferry - ownership by scope
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A variable declared with one of these is released when its scope ends,
 * on every path.  Use either these or one reverse-order goto in a function,
 * never both.  To keep a pointer that would be freed, hand it on with
 * take_ptr (&p), which leaves NULL behind.
 */
#ifndef FERRY_CLEANUP_H
#define FERRY_CLEANUP_H

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static inline void
cleanup_free (void *pp)
{
  free (*(void **) pp);
}

static inline void
cleanup_close (int *fd)
{
  if (*fd >= 0)
    close (*fd);
}

static inline void
cleanup_unlock (pthread_mutex_t **lock)
{
  pthread_mutex_unlock (*lock);
}

static inline void *
take_ptr_ (void *pp)
{
  void *p = *(void **) pp;

  *(void **) pp = NULL;
  return p;
}

#define take_ptr(pp) ((__typeof__ (*(pp))) take_ptr_ (pp))

/* For a parameter that somebody else's signature demands. */
#define UNUSED __attribute__ ((unused))

#define CLEANUP_FREE  __attribute__ ((cleanup (cleanup_free)))
#define CLEANUP_CLOSE __attribute__ ((cleanup (cleanup_close)))

#define FERRY_CONCAT_(a, b) a##b
#define FERRY_CONCAT(a, b)  FERRY_CONCAT_ (a, b)

/* Hold a mutex from here to the end of the scope. */
#define ACQUIRE_LOCK_FOR_CURRENT_SCOPE(mutex)                              \
  __attribute__ ((cleanup (cleanup_unlock), unused)) pthread_mutex_t       \
    *FERRY_CONCAT (lock_, __COUNTER__) = (mutex);                          \
  pthread_mutex_lock (mutex)

#endif /* FERRY_CLEANUP_H */
