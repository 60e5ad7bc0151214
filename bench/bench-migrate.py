#!/usr/bin/python3
# nbdferry - benchmark: moving a whole disk
# SPDX-License-Identifier: BSD-3-Clause
"""A disk of which half is random data, a quarter written zeros and a quarter
holes, from one daemon to another: nbdferry beside nbdcopy between two nbdkits
and nbdcopy from the file itself, over TCP and Unix sockets, in turn.

usage: bench-migrate.py [--rounds N] [--size MiB]
"""

import argparse
import filecmp
import random

from ferrybench import *

ap = argparse.ArgumentParser()
ap.add_argument("--rounds", type=int, default=3)
ap.add_argument("--size", type=int, default=1024)
a = ap.parse_args()
size = a.size * MiB


def make_source():
    rng, offset = random.Random(1), 0
    with open(path("src.raw"), "wb") as f:
        f.truncate(size)
        while offset < size:
            n = min(rng.randrange(8, 25) * 65536, size - offset)
            kind = rng.random()
            if kind < 0.75:
                f.seek(offset)
                f.write(rng.randbytes(n) if kind < 0.5 else bytes(n))
            offset += n
    return path("src.raw")


src = make_source()


def ferry(kind):
    dst = warm_file("dst.raw", size)
    for f in ("src.raw.ferry", "dst.raw.ferry"):
        subprocess.run(["rm", "-rf", path(f)], check=True)
    s = Daemon("s", [PLUGIN, "disk=vda=" + src, "control=" + path("s.ctl")],
               kind)
    d = Daemon("d", [PLUGIN, "disk=vda=" + dst, "incoming=on"], kind)
    cpu = s.cpu() + d.cpu()
    t, own, _ = timed([NBDFERRY, "migrate", path("s.ctl"), d.uri("vda")])
    cpu = s.cpu() + d.cpu() - cpu + own
    s.stop()
    d.stop()
    if not filecmp.cmp(src, dst, shallow=False):
        raise RuntimeError("the copy differs")
    return t, cpu


def nbdcopy(kind):
    dst = warm_file("dst.raw", size)
    s, d = Daemon("s", ["file", src], kind), Daemon("d", ["file", dst], kind)
    cpu = s.cpu() + d.cpu()
    t, own, _ = timed(["nbdcopy", s.uri(), d.uri()])
    cpu = s.cpu() + d.cpu() - cpu + own
    s.stop()
    d.stop()
    return t, cpu


def nbdcopy_file(kind):
    dst = warm_file("dst.raw", size)
    d = Daemon("d", ["file", dst], kind)
    cpu = d.cpu()
    t, own, _ = timed(["nbdcopy", src, d.uri()])
    cpu = d.cpu() - cpu + own
    d.stop()
    return t, cpu


TOOLS = [("nbdferry", ferry), ("nbdcopy between nbdkits", nbdcopy),
         ("nbdcopy from the file", nbdcopy_file)]
rows = []
for kind in ("tcp", "unix"):
    results = {name: [] for name, _ in TOOLS}
    for i in range(a.rounds):
        for name, run in TOOLS if i % 2 == 0 else TOOLS[::-1]:
            results[name].append(run(kind))
    for name, _ in TOOLS:
        t, base = results[name], results["nbdcopy between nbdkits"]
        rows.append([kind, name, med([x[0] for x in t]),
                     min(x[0] for x in t), max(x[0] for x in t),
                     med([x[1] for x in t]),
                     med([x[0] / y[0] for x, y in zip(t, base)]),
                     med([x[1] / y[1] for x, y in zip(t, base)])])
table("moving %d MiB (%d rounds, medians)" % (a.size, a.rounds),
      ["link", "tool", "s", "min", "max", "cpu s", "time ratio",
       "cpu ratio"], rows)
