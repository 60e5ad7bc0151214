#!/usr/bin/python3
# nbdferry - 200 migrations that are begun and cancelled
# SPDX-License-Identifier: BSD-3-Clause
"""Cancel and restart leak nothing: files, threads and memory of both daemons
are the same after the first 40 as at the end.  A writer goes on all the time,
mirrored now and then; no gate holds it up."""

from ferrytest import *
from migratetest import *

# A sanitizer keeps what was freed.
PRELOAD = os.environ.get("FERRY_PRELOAD")

requires("nbdkit", "qemu-img", "qemu-nbd")

MiB = 1 << 20
SIZE = 8 * MiB
CYCLES, FIRST = 200, 40


def resources(daemon):
    """(threads, files, KiB of memory)"""
    proc = "/proc/%d/" % daemon.process.pid
    with open(proc + "status") as f:
        rss = [int(line.split()[1]) for line in f
               if line.startswith("VmRSS")][0]
    return (len(os.listdir(proc + "task")), len(os.listdir(proc + "fd")), rss)


pair = Pair({"vda": SIZE}, tcp=True)
for granularity in 512, 65536:
    pair.add("vda", "g%d" % granularity, granularity)
writer = LoggingWriter(pair.src.uri("vda"), pair.models["vda"],
                       max_length=16384, pause=0.003)
with open("blob", "wb") as f:
    f.write(bytes(MiB))
blob = [{"name": "blob", "path": os.path.abspath("blob")}]
rng, statuses, before, longest = random.Random(7), {}, None, 0
for i in range(CYCLES):
    pair.qmp.command("migrate-set-parameters",
                     max_bandwidth=rng.choice([2, 8]) * MiB,
                     multifd_channels=rng.randint(1, 4),
                     multifd_compression=rng.choice(["none", "zstd"]),
                     copy_mode=rng.choice(["background", "write-blocking"]))
    pair.qmp.command("migrate", uri=pair.dst.uri("vda"), x_ferry_attach=blob)
    moment = time.monotonic() + rng.choice([0, 0.01, 0.04, 0.1])
    pause_until(lambda: time.monotonic() >= moment)
    info = pair.qmp.command("query-migrate")
    pair.qmp.command("migrate-cancel")
    info = pair.wait("cancelled", timeout=20)
    longest = max(longest, info["x-ferry"]["longest-hold-us"])
    statuses[info["disk"]["dirty-sync-count"]] = 1 + statuses.get(
        info["disk"]["dirty-sync-count"], 0)
    if i == FIRST:
        before = [resources(d) for d in (pair.src, pair.dst)]


def settled():
    """Connections that were closed may be served for a moment yet."""
    now = [resources(d) for d in (pair.src, pair.dst)]
    return all(n[0] <= b[0] + 20 and n[1] <= b[1] + 4 and
               (n[2] < b[2] + 12 * 1024 or PRELOAD) for n, b in zip(now, before)) and now


after = wait_for(settled, "threads and files to go: %s, then %s" % (
    before, [resources(d) for d in (pair.src, pair.dst)]), 10)
print("threads, files, KiB: %s, then %s; rounds: %s; longest hold %d us" % (
    before, after, statuses, longest))
pair.qmp.command("migrate-set-parameters", max_bandwidth=0,
                 copy_mode="background", multifd_compression="none")
pair.qmp.command("migrate", uri=pair.dst.uri("vda"))
pair.wait("completed")
settle(writer, 3)
writer.stop()
assert writer.errors == 0, writer.last_error
pair.qmp.close()
pair.stop()
pair.check_disk("vda")
for granularity in 512, 65536:
    pair.check_bitmap("vda", "g%d" % granularity,
                      granules(writer.touched, granularity, SIZE))
