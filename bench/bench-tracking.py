#!/usr/bin/python3
# nbdferry - benchmark: what tracking costs a client
# SPDX-License-Identifier: BSD-3-Clause
"""fio over a Unix socket to nbdkit's file plugin and to ours with 0, 1 and 8
bitmaps, in turn.  Bitmaps are cleared before each run.

usage: bench-tracking.py [--rounds N] [--runtime S] [--size MiB]
"""

import argparse
import json
import shutil

from ferrybench import *

PATTERNS = [("randwrite", "4k", 32), ("randread", "4k", 32),
            ("write", "1m", 4), ("read", "1m", 4)]

ap = argparse.ArgumentParser()
ap.add_argument("--rounds", type=int, default=3)
ap.add_argument("--runtime", type=float, default=1.5)
ap.add_argument("--size", type=int, default=512)
ap.add_argument("--granularity", default="64K")
a = ap.parse_args()

if not shutil.which("fio"):
    raise SystemExit("fio is not installed")
size = a.size * MiB
servers = {}
for name in ["file", "ferry-0", "ferry-1", "ferry-8"]:
    disk = path(name + ".raw")
    with open(disk, "wb") as f:
        for _ in range(a.size):
            f.write(os.urandom(MiB))
    if name == "file":
        servers[name] = Daemon(name, ["file", disk])
        continue
    control = path(name + ".ctl")
    servers[name] = Daemon(name, [PLUGIN, "disk=" + disk,
                                  "control=" + control])
    for i in range(int(name[-1])):
        timed([NBDFERRY, "bitmap", "add", control, "b%d" % i,
               "--granularity", a.granularity])


def run(name, rw, bs, depth):
    d = servers[name]
    if name.startswith("ferry"):
        for i in range(int(name[-1])):
            timed([NBDFERRY, "bitmap", "clear", path(name + ".ctl"),
                   "b%d" % i])
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


results = {}
for i in range(a.rounds):
    order = list(servers) if i % 2 == 0 else list(servers)[::-1]
    for p in PATTERNS:
        for name in order:
            results.setdefault((p, name), []).append(run(name, *p))
rows = []
for p in PATTERNS:
    for name in servers:
        v, base = results[p, name], results[p, "file"]
        rows.append(["%s %s depth %d" % p, name, med([x[0] for x in v]),
                     min(x[0] for x in v), max(x[0] for x in v),
                     med([x[1] for x in v]), med([x[2] for x in v]),
                     med([x[0] / y[0] for x, y in zip(v, base)])])
table("what tracking costs (%d MiB, %d rounds, medians)" % (a.size, a.rounds),
      ["pattern", "server", "IOPS", "min", "max", "p99 us", "cpu us/io",
       "ratio to file"], rows)
