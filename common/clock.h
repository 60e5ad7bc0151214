/* nbdferry - time
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef FERRY_CLOCK_H
#define FERRY_CLOCK_H

#include <pthread.h>
#include <stdint.h>
#include <time.h>

#define NS_PER_S  UINT64_C (1000000000)
#define NS_PER_MS UINT64_C (1000000)

/* Nanoseconds of CLOCK_MONOTONIC. */
static inline uint64_t
now_ns (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return ts.tv_sec * NS_PER_S + ts.tv_nsec;
}

/* Nanoseconds since 1970, as the system's clock has it. */
static inline uint64_t
real_ns (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_REALTIME, &ts);
  return ts.tv_sec * NS_PER_S + ts.tv_nsec;
}

/* The CLOCK_MONOTONIC time 'ns' from now, for pthread_cond_timedwait. */
static inline void
clock_in (struct timespec *ts, uint64_t ns)
{
  uint64_t t = now_ns () + ns;

  ts->tv_sec = t / NS_PER_S;
  ts->tv_nsec = t % NS_PER_S;
}

/* A condition variable whose timed waits are of CLOCK_MONOTONIC. */
static inline void
clock_cond_init (pthread_cond_t *cond)
{
  pthread_condattr_t attr;

  pthread_condattr_init (&attr);
  pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
  pthread_cond_init (cond, &attr);
  pthread_condattr_destroy (&attr);
}

#endif /* FERRY_CLOCK_H */
