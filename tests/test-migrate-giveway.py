#!/usr/bin/python3
# nbdferry - threads that move data give way to those that serve clients
# SPDX-License-Identifier: BSD-3-Clause
"""While a disk moves, some threads of both daemons have another policy, and
perhaps priority, than the daemons themselves; and no longer once somebody waits
for what they send: in the hold, or with write-blocking, where one channel is
kept for what writers wait for if nothing limits the bandwidth."""

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

def limited():
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


def comes_to(pair, n):
    """As many threads give way; or the migration has ended before."""
    src = pair.src.process.pid
    return wait_for(
        lambda: "yes" if give_way(src) == n else "no"
        if pair.qmp.command("query-migrate")["status"] != "active" else "",
        "%d threads that give way" % n) == "yes"


def lane(**params):
    """The lane comes and goes with the mode, and with the limit."""
    Nbdkit.all.clear()
    clear_folder()
    pair = Pair({"vda": SIZE}, tcp=True, step=4096, dst_args=["wdelay=60ms"],
                dst_options=["--filter=delay"])
    model = pair.models["vda"]
    half = SIZE // 2
    writers = [LoggingWriter(pair.src.uri("vda"), model, i * half,
                             (i + 1) * half, seed=i + 1, pause=0.001)
               for i in range(2)]
    for w in writers:
        settle(w, 5)
    pair.migrate("vda", copy_mode="write-blocking", **params)
    pair.wait("active")
    info = pair.qmp.command("query-migrate")["x-ferry"]
    channels, trip = info["channels"], info["round-trip-us"]
    rounds = 0
    while rounds < 5 and comes_to(pair, channels - 1):
        settle(writers[rounds % 2], 2)
        pair.qmp.command("migrate-set-parameters", max_bandwidth=4 * MiB)
        if not comes_to(pair, 0):
            break
        settle(writers[rounds % 2], 2)
        pair.qmp.command("migrate-set-parameters", max_bandwidth=0,
                         copy_mode="background")
        if not comes_to(pair, channels):
            break
        settle(writers[rounds % 2], 2)
        pair.qmp.command("migrate-set-parameters", copy_mode="write-blocking")
        rounds += 1
    # On a busy machine the link may have seemed to be a long one.
    assert rounds > 0 or trip >= 1000, "it was too fast (%d us)" % trip
    for w in writers:           # packets are larger without them
        w.stop()
        assert w.errors == 0, w.last_error
    info = pair.wait("completed")
    assert info["x-ferry"]["mirrored"]["requests"] > 0, info
    pair.qmp.close()
    pair.stop()
    pair.check_disk("vda")
    print("%d channels, %d rounds, %d ms, %s" % (
        channels, rounds, info["total-time"], info["x-ferry"]["mirrored"]))
    return channels


limited()
assert lane(multifd_channels=2) == 2
cpus = os.sysconf("SC_NPROCESSORS_ONLN")
assert lane() in ((3 if cpus <= 2 else 4) + 1, 8, 16, 32)  # by the round trip
