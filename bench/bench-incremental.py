#!/usr/bin/python3
# nbdferry - benchmark: an incremental backup
# SPDX-License-Identifier: BSD-3-Clause
"""One granule of a hundred of a large sparse disk is dirty, at random.  Ours:
`nbdferry backup` into an image in place, and into an archive; QEMU's
blockdev-backup by bitmap to an NBD server; and the limit, one thread that reads
and writes the same ranges.  In turn.

usage: bench-incremental.py [--rounds N] [--size GiB] [--percent P]
                            [--granularity KiB] [--link tcp|unix]
"""

import argparse
import random
import shutil

import nbd

from ferrybench import *

ap = argparse.ArgumentParser()
ap.add_argument("--rounds", type=int, default=3)
ap.add_argument("--size", type=int, default=16)
ap.add_argument("--percent", type=float, default=1)
ap.add_argument("--granularity", type=int, default=64)
ap.add_argument("--link", choices=("tcp", "unix"), default="tcp")
a = ap.parse_args()
size, gran = a.size << 30, a.granularity << 10
dirty = sorted(random.Random(7).sample(
    range(size // gran), int(size // gran * a.percent / 100)))
block = random.Random(8).randbytes(gran)


def sparse(name):
    with open(path(name), "wb") as f:
        f.truncate(size)
    return path(name)


def write_all(uri):
    """Each dirty granule once, so that it is dirty in all bitmaps."""
    h = nbd.NBD()
    h.connect_uri(uri)
    buf = nbd.Buffer.from_bytearray(bytearray(block))
    for g in dirty:
        while h.aio_in_flight() > 15:
            h.poll(-1)
        h.aio_pwrite(buf, g * gran, completion=lambda e: 1)
    while h.aio_in_flight():
        h.poll(-1)
    h.shutdown()


def target():
    """Memory of as much as will be written is touched."""
    warm_file("dst.raw", len(dirty) * gran + 64 * MiB)
    os.truncate(path("dst.raw"), 0)
    os.truncate(path("dst.raw"), size)
    return path("dst.raw")


ours = Daemon("s", [PLUGIN, "disk=vda=" + sparse("src.raw"),
                    "control=" + path("s.ctl")])
qemu = Qemu("q", sparse("q.raw"))
first = {}


def command(*argv):
    cpu = ours.cpu()
    t, own, _ = timed([NBDFERRY, *argv])
    return t, ours.cpu() - cpu + own


def backup(name, *more):
    """All is written again before each: the last one has cleared the bitmap."""
    if name not in first:
        # A first, full one of an empty disk, then all is written once.
        target()
        first[name] = True
        command("backup", path("s.ctl"), *more, "--bitmap", name, "--full",
                "--force", "--granularity", str(gran))
    write_all(ours.uri())
    if name == "archive":
        more = [path("next.nbf"), *more[1:]]
        if os.path.exists(more[0]):
            os.unlink(more[0])
    return command("backup", path("s.ctl"), *more, "--bitmap", name)


def blockdev_backup():
    d = Daemon("t", ["file", target()], a.link)
    cpu, t = qemu.cpu() + d.cpu(), time.monotonic()
    qemu.qmp.command("blockdev-add", **{
        "driver": "raw", "node-name": "t",
        "file": {"driver": "nbd", "server": server_address(d)}})
    qemu.qmp.command("blockdev-backup", **{
        "job-id": "j", "device": "d0", "target": "t", "sync": "bitmap",
        "bitmap": "b", "bitmap-mode": "never"})
    e = qemu.qmp.event("BLOCK_JOB_COMPLETED")
    t = time.monotonic() - t
    if "error" in e:
        raise RuntimeError(e)
    cpu = qemu.cpu() + d.cpu() - cpu
    qemu.qmp.command("blockdev-del", **{"node-name": "t"})
    d.stop()
    return t, cpu


def limit():
    target()
    before, t = os.times(), time.monotonic()
    src, dst = os.open(path("src.raw"), os.O_RDONLY), os.open(
        path("dst.raw"), os.O_WRONLY)
    for g in dirty:
        os.pwrite(dst, os.pread(src, gran, g * gran), g * gran)
    os.close(src)
    os.close(dst)
    after = os.times()
    return time.monotonic() - t, (after.user + after.system - before.user
                                  - before.system)


qemu.qmp.command("block-dirty-bitmap-add", node="d0", name="b",
                 granularity=gran)
write_all(qemu.uri())
write_all(ours.uri())
TOOLS = [("nbdferry backup --format raw", lambda: backup(
             "raw", path("dst.raw"), "--format", "raw")),
         ("nbdferry backup, archive", lambda: backup(
             "archive", path("full.nbf"), "--compression", "none")),
         ("QEMU blockdev-backup, " + a.link, blockdev_backup),
         ("the limit: pread, pwrite", limit)]
results = {name: [] for name, _ in TOOLS}
for i in range(a.rounds):
    for name, run in TOOLS if i % 2 == 0 else TOOLS[::-1]:
        results[name].append(run())
rows, base = [], results["QEMU blockdev-backup, " + a.link]
for name, _ in TOOLS:
    v = results[name]
    rows.append([name, med([x[0] for x in v]), min(x[0] for x in v),
                 max(x[0] for x in v), med([x[1] for x in v]),
                 med([x[0] / y[0] for x, y in zip(v, base)]),
                 med([x[1] / y[1] for x, y in zip(v, base)])])
table("%g %% of %d GiB, granules of %d KiB: %d MiB (%d rounds)"
      % (a.percent, a.size, a.granularity, len(dirty) * gran // MiB,
         a.rounds),
      ["tool", "s", "min", "max", "cpu s", "to QEMU", "cpu to QEMU"], rows)
