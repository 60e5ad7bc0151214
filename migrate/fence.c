/* nbdferry - a fence against the late work of dead connections
 * SPDX-License-Identifier: BSD-3-Clause
 */
#include <config.h>

#include <errno.h>

#include "cleanup.h"
#include "fence.h"

void
fence_init (struct fence *f)
{
  pthread_mutex_init (&f->lock, NULL);
  pthread_cond_init (&f->idle, NULL);
  f->epoch = 0;
  f->older = f->current = 0;
}

void
fence_destroy (struct fence *f)
{
  pthread_mutex_destroy (&f->lock);
  pthread_cond_destroy (&f->idle);
}

int
fence_enter (struct fence *f, uint64_t epoch)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&f->lock);

  if (epoch != f->epoch) {
    errno = ESTALE;
    return -1;
  }
  f->current++;
  return 0;
}

void
fence_leave (struct fence *f, uint64_t epoch)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&f->lock);

  if (epoch == f->epoch)
    f->current--;
  else
    f->older--;
  if (f->older == 0 || f->current == 0)
    pthread_cond_broadcast (&f->idle);
}

int
fence_raise (struct fence *f, uint64_t epoch)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&f->lock);

  if (epoch < f->epoch) {
    errno = ESTALE;
    return -1;
  }
  if (epoch > f->epoch) {
    f->epoch = epoch;
    f->older += f->current;
    f->current = 0;
  }
  while (f->older > 0)
    pthread_cond_wait (&f->idle, &f->lock);
  if (epoch < f->epoch) { /* raised again while we waited */
    errno = ESTALE;
    return -1;
  }
  return 0;
}

void
fence_drain (struct fence *f)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&f->lock);

  while (f->older > 0 || f->current > 0)
    pthread_cond_wait (&f->idle, &f->lock);
}

bool
fence_is_at (struct fence *f, uint64_t epoch)
{
  bool r;

  pthread_mutex_lock (&f->lock);
  r = f->epoch == epoch;
  pthread_mutex_unlock (&f->lock);
  return r;
}
