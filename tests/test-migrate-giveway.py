#!/usr/bin/python3
# nbdferry - threads that move data give way to those that serve clients
# SPDX-License-Identifier: BSD-3-Clause
"""While a disk moves, some threads of both daemons have another policy, and
perhaps priority, than the daemons themselves; and no longer once somebody waits
for what they send: with write-blocking, or in the hold."""

from ferrytest import *
from migratetest import *

requires("nbdkit")

MiB = 1 << 20
SIZE = 64 * MiB


def give_way(pid):
    """How many of its threads do."""
    n, usual = 0, os.getpriority(os.PRIO_PROCESS, pid)
    for tid in map(int, os.listdir("/proc/%d/task" % pid)):
        try:
            batch = os.sched_getscheduler(tid) == os.SCHED_BATCH
            nicer = os.getpriority(os.PRIO_PROCESS, tid) > usual
        except ProcessLookupError:
            continue
        n += batch or nicer
    return n


if os.sched_getscheduler(0) != os.SCHED_OTHER:
    print("this process has another scheduling policy")
    sys.exit(77)

pair = Pair({"vda": SIZE}, tcp=True, step=4096)
src, dst = pair.src.process.pid, pair.dst.process.pid
assert give_way(src) == 0 and give_way(dst) == 0
pair.migrate("vda", max_bandwidth=MiB, multifd_channels=2)
pair.wait("active")
wait_for(lambda: give_way(src) == 2 and give_way(dst) > 0,
         "threads that give way")
pair.qmp.command("migrate-set-parameters", copy_mode="write-blocking")
wait_for(lambda: give_way(src) == 0, "threads that don't")
pair.qmp.command("migrate-set-parameters", copy_mode="background")
wait_for(lambda: give_way(src) == 2, "threads that give way again")
pair.qmp.command("migrate-set-parameters", max_bandwidth=0)
pair.wait("completed")
assert give_way(src) == 0, "after the hold"
pair.qmp.close()
pair.stop()
pair.check_disk("vda")
