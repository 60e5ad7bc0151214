#!/usr/bin/python3
# nbdferry - benchmark: what tracking costs a client
# SPDX-License-Identifier: BSD-3-Clause
"""fio over a Unix socket to nbdkit's file plugin, to ours with 0, 1 and 8
bitmaps in each durability, and to qemu-storage-daemon with as many bitmaps, in
turn.  Bitmaps are cleared before each run.

usage: bench-tracking.py [--rounds N] [--runtime S] [--size MiB]
                         [--granularity G] [--servers a,b,...]
"""

import argparse
import json
import shutil

from ferrybench import *

PATTERNS = [("randwrite", "4k", 32), ("randread", "4k", 32),
            ("write", "1m", 4), ("read", "1m", 4)]
SERVERS = ["file", "power-0", "power-1", "power-8", "process-8",
           "qemu-0", "qemu-8"]

ap = argparse.ArgumentParser()
ap.add_argument("--rounds", type=int, default=3)
ap.add_argument("--runtime", type=float, default=1.0)
ap.add_argument("--size", type=int, default=256)
ap.add_argument("--granularity", type=int, default=65536)
ap.add_argument("--servers", default=",".join(SERVERS))
a = ap.parse_args()

if not shutil.which("fio"):
    raise SystemExit("fio is not installed")
size = a.size * MiB


def start(name):
    disk = path(name + ".raw")
    with open(disk, "wb") as f:
        for _ in range(a.size):
            f.write(os.urandom(MiB))
    if name == "file":
        return Daemon(name, ["file", disk])
    kind, nr = name.split("-")
    if kind == "qemu":
        q = Qemu(name, disk)
        for i in range(int(nr)):
            q.qmp.command("block-dirty-bitmap-add", node="d0", name="b%d" % i,
                          granularity=a.granularity)
        return q
    control = path(name + ".ctl")
    d = Daemon(name, [PLUGIN, "disk=" + disk, "durability=" + kind,
                      "control=" + control])
    for i in range(int(nr)):
        timed([NBDFERRY, "bitmap", "add", control, "b%d" % i,
               "--granularity", str(a.granularity)])
    return d


def clear(name):
    kind, _, nr = name.partition("-")
    for i in range(int(nr or 0)):
        if kind == "qemu":
            servers[name].qmp.command("block-dirty-bitmap-clear", node="d0",
                                  name="b%d" % i)
        else:
            timed([NBDFERRY, "bitmap", "clear", path(name + ".ctl"),
                   "b%d" % i])


def run(name, rw, bs, depth):
    d = servers[name]
    clear(name)
    cpu = d.cpu()
    out = timed(["fio", "--name=w", "--ioengine=nbd", "--uri=" + d.uri(),
                 "--rw=" + rw, "--bs=" + bs, "--iodepth=%d" % depth,
                 "--size=%d" % size, "--time_based",
                 "--runtime=%g" % a.runtime, "--norandommap", "--thread",
                 "--output-format=json"])[2]
    job = json.loads(out[out.index("{"):])["jobs"][0]
    r = job["read" if "read" in rw else "write"]
    n = max(r["total_ios"], 1)
    return (r["iops"], r["clat_ns"]["percentile"]["99.000000"] / 1e3,
            (d.cpu() - cpu) * 1e6 / n)


servers = {name: start(name) for name in a.servers.split(",")
           if not name.startswith("qemu") or
           shutil.which("qemu-storage-daemon")}
results = {}
for i in range(a.rounds):
    order = list(servers) if i % 2 == 0 else list(servers)[::-1]
    for p in PATTERNS:
        for name in order:
            results.setdefault((p, name), []).append(run(name, *p))
rows = []
for p in PATTERNS:
    for name in servers:
        v, base = results[p, name], results[p, list(servers)[0]]
        rows.append(["%s %s depth %d" % p, name, med([x[0] for x in v]),
                     min(x[0] for x in v), max(x[0] for x in v),
                     med([x[1] for x in v]), med([x[2] for x in v]),
                     med([x[0] / y[0] for x, y in zip(v, base)])])
table("what tracking costs (%d MiB, %d rounds, medians; DURABILITY-BITMAPS)"
      % (a.size, a.rounds),
      ["pattern", "server", "IOPS", "min", "max", "p99 us", "cpu us/io",
       "ratio to " + list(servers)[0]], rows)
