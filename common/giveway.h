/* nbdferry - threads that give way to others
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * A thread that moves a lot of data would take its share of the CPUs from the
 * threads that serve clients, who then wait for milliseconds where a request
 * takes 50 us.  So it gives way to them: when it is woken up it takes no CPU
 * from a thread that runs (SCHED_BATCH), and it is nicer, but not by so much
 * that it starves where all CPUs are busy.
 *
 * It is not made nicer where this could not be taken back: for that a process
 * needs CAP_SYS_NICE, or a limit RLIMIT_NICE that allows it.
 */
#ifndef FERRY_GIVEWAY_H
#define FERRY_GIVEWAY_H

#include <stdbool.h>
#include <sys/types.h>

/* A thread of this process, not its first one, gives way from here on, or no
 * longer.  Any thread may call it.
 */
void thread_give_way (pid_t tid, bool yes);

/* The calling thread's number. */
pid_t thread_number (void);

#endif /* FERRY_GIVEWAY_H */
