#!/usr/bin/python3
# nbdferry - benchmark: moving a disk while a client writes to it
# SPDX-License-Identifier: BSD-3-Clause
"""fio writes 4 KiB at random at a limited rate while the disk moves over TCP on
loopback: our migration in both copy modes, beside QEMU's mirror to nbdkit's
file plugin, in turn.  What the writer sees is told apart by time: before, while
it moves, at the handover (the hold and 50 ms around it), and after it.  Memory
for the copy is touched and given back right before it begins, as a virtual
machine's host would take it away again while the writer is watched at rest.
"""

from ferrybench import *

TOOLS = ["nbdferry", "nbdferry write-blocking", "QEMU mirror",
         "QEMU write-blocking"]
if not QEMU:
    del TOOLS[2:]

a = options(__doc__, rounds=(3, 1), size=(4096, 256), iops=(2000, 2000),
            depth=(8, 8), before=(1.5, 0.5), after=(1.0, 0.3),
            tools=(",".join(TOOLS),) * 2)
need("fio")
size = a.size * MiB


def make_source():
    rng = random.Random(3)
    block = rng.randbytes(MiB)
    with open(path("src.raw"), "wb") as f:
        for i in range(a.size):
            f.write(i.to_bytes(8, "little") + block[8:])
    return path("src.raw")


def writer(uri):
    w = Writer(uri, size, a.iops, a.depth)
    time.sleep(0.5)
    return w


def warm():
    """A new disk of zeros, and memory for its data that is there for sure."""
    with open(path("dst.raw"), "wb") as f:
        f.truncate(size)
    with open(path("ballast"), "wb", buffering=0) as f:
        block = bytes(8 * MiB)
        for _ in range(a.size // 8 + 32):
            f.write(block)
    return path("dst.raw")


def watch():
    """At rest; returns when that ended."""
    time.sleep(a.before)
    t = time.time()
    os.unlink(path("ballast"))
    time.sleep(0.2)
    return t


def latencies(w, rest, began, held, ended):
    """us, by phase."""
    phase = {"before": [], "during": [], "handover": [], "after": []}
    time.sleep(a.after)
    for t, us in w.end():
        if held - 0.05 <= t <= ended + 0.05:
            phase["handover"].append(us)
        elif rest - a.before < t < rest:
            phase["before"].append(us)
        elif began <= t < held:
            phase["during"].append(us)
        elif t > ended:
            phase["after"].append(us)
    return phase


def ferry(mode):
    dst = warm()
    no_sidecars()
    s = Daemon("s", [PLUGIN, "disk=vda=" + src, "control=" + path("s.ctl")])
    d = Daemon("d", [PLUGIN, "disk=vda=" + dst, "incoming=on"], "tcp")
    w = writer(s.uri())
    qmp = QMP(path("s.ctl"))
    qmp.command("migrate-set-parameters", **{"copy-mode": mode})
    rest = watch()
    cpu, began = s.cpu() + d.cpu(), time.time()
    qmp.command("migrate", uri=d.uri("vda"))
    held = None
    while True:
        status = qmp.event("MIGRATION")["status"]
        if status == "device":
            held = time.time()
        if status in ("completed", "failed"):
            break
    ended = time.time()
    cpu = s.cpu() + d.cpu() - cpu
    info = qmp.command("query-migrate")
    if status != "completed":
        raise RuntimeError(info)
    lat = latencies(w, rest, began, held, ended)
    s.stop()
    d.stop()
    return ended - began, cpu, info["x-ferry"]["hold-us"] / 1000, lat


def mirror(mode):
    dst = warm()
    q, d = Qemu("q", src), Daemon("d", ["file", dst], "tcp")
    w = writer(q.uri())
    rest = watch()
    cpu, began = q.cpu() + d.cpu(), time.time()
    q.mirror(d, copy_mode=mode)
    held = time.time()
    q.switch()
    ended = time.time()
    cpu = q.cpu() + d.cpu() - cpu
    lat = latencies(w, rest, began, held, ended)
    q.stop()
    d.stop()
    return ended - began, cpu, (ended - held) * 1000, lat


RUN = {"nbdferry": lambda: ferry("background"),
       "nbdferry write-blocking": lambda: ferry("write-blocking"),
       "QEMU mirror": lambda: mirror("background"),
       "QEMU write-blocking": lambda: mirror("write-blocking")}


src, tools = make_source(), a.tools.split(",")
results = in_turn({t: RUN[t] for t in tools}, a.rounds)
rows, waits, p99s = [], [], {}
for t in tools:
    v = results[t]
    rows.append([t] + [med([r[0] for r in v]), min(r[0] for r in v),
                       max(r[0] for r in v), med([r[1] for r in v]),
                       med([r[2] for r in v]), max(r[2] for r in v)])
    idle = med([percentile(r[3]["before"], 99) for r in v])
    for phase in ("before", "during", "handover", "after"):
        p99 = med([percentile(r[3][phase], 99) for r in v])
        p99s[t, phase] = p99 / idle
        waits.append([t, phase, med([percentile(r[3][phase], 50) for r in v]),
                      p99, p99 / idle, max(max(r[3][phase], default=0)
                                           for r in v)])
table("moving %d MiB, %d writes of 4 KiB a second (%d rounds, medians)"
      % (a.size, a.iops, a.rounds),
      ["tool", "s", "min", "max", "CPU s", "hold ms", "max"], rows)
table("what the writer waited, us (medians of the runs' percentiles)",
      ["tool", "phase", "p50", "p99", "to p99 before", "max"], waits)
for ours, peer in zip(TOOLS[:2], TOOLS[2:]):
    if ours in results and peer in results:
        goal("live", "%s: time / %s" % (ours, peer),
             ratio(results, ours, peer), most=0.7)
for t in set(TOOLS[:2]) & set(results):
    goal("live", t + ": p99 while it moves / idle p99", p99s[t, "during"],
         most=3)
    goal("live", t + ": ms held, the longest", max(r[2] for r in results[t]),
         most=10)
done()
