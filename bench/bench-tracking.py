#!/usr/bin/python3
# nbdferry - benchmark: what tracking costs a client
# SPDX-License-Identifier: BSD-3-Clause
"""fio over a Unix socket to nbdkit's file plugin, to ours with 0, 1 and 8
bitmaps in each durability, and to qemu-storage-daemon with as many bitmaps, in
turn.  All serve one file, whose blocks are there; each is started anew for each
run, with new bitmaps.
"""

from ferrybench import *

PATTERNS = {"randwrite-4k-32": "4 KiB random writes, depth 32",
            "randwrite-4k-1": "4 KiB random writes, depth 1",
            "randread-4k-32": "4 KiB random reads, depth 32",
            "randwrite-64k-16": "64 KiB random writes, depth 16",
            "write-1m-4": "1 MiB writes, depth 4"}
BASE = "file"

a = options(__doc__, rounds=(9, 1), runtime=(1.0, 0.4), size=(512, 64),
            granularity=(65536, 65536), patterns=(",".join(PATTERNS),) * 2,
            servers=("file,power-0,power-1,power-8,process-0,process-1,"
                     "process-8,qemu-0,qemu-1,qemu-8",
                     "file,power-8,process-8,qemu-0,qemu-8"))
need("fio")
size, disk = a.size * MiB, path("disk.raw")


def start(name):
    if name == BASE:
        return Daemon("d", ["file", disk])
    kind, nr = name.split("-")
    shutil.rmtree(disk + ".ferry", ignore_errors=True)
    if kind == "qemu":
        d = Qemu("q", disk)
        qmp, node = d.qmp, {"node": "d0"}
    else:
        d = Daemon("d", [PLUGIN, "disk=vda=" + disk, "durability=" + kind,
                         "control=" + path("ctl")])
        qmp, node = QMP(path("ctl")), {"node": "vda", "persistent": True}
    for i in range(int(nr)):
        qmp.command("block-dirty-bitmap-add", name="b%d" % i,
                    granularity=a.granularity, **node)
    return d


def run(name, pattern):
    """IOPS, 99th percentile in us, CPU us a request of the server."""
    rw, bs, depth = pattern.split("-")
    d = start(name)
    cpu = d.cpu()
    out = timed(["fio", "--name=w", "--ioengine=nbd", "--uri=" + d.uri(),
                 "--rw=" + rw, "--bs=" + bs, "--iodepth=" + depth,
                 "--size=%d" % size, "--time_based",
                 "--runtime=%dms" % (a.runtime * 1000),
                 "--norandommap", "--thread", "--output-format=json"])[2]
    cpu = d.cpu() - cpu
    d.stop()
    job = json.loads(out[out.index("{"):])["jobs"][0]
    r = job["read" if "read" in rw else "write"]
    return (r["iops"], r["clat_ns"]["percentile"]["99.000000"] / 1e3,
            cpu * 1e6 / max(r["total_ios"], 1))


with open(disk, "wb") as f:
    for _ in range(a.size):
        f.write(random.randbytes(MiB))
servers = [s for s in a.servers.split(",")
           if QEMU or not s.startswith("qemu")]
for p in a.patterns.split(","):
    results = in_turn({s: lambda s=s: run(s, p) for s in servers}, a.rounds)
    rows = []
    for s, v in results.items():
        io = [x[0] for x in v]
        rows.append([s, med(io), min(io), max(io), med([x[1] for x in v]),
                     med([x[2] for x in v])])
        for column in 0, 2:
            rows[-1].append(ratio(results, s, BASE, column)
                            if BASE in results else "-")
        if p == "randwrite-4k-32" and s in ("power-8", "process-8") and \
                BASE in results:
            goal("tracking", "IOPS of %s / nbdkit file" % s,
                 ratio(results, s, BASE), least=0.98)
    table("%s (%d MiB, %d rounds, medians; DURABILITY-BITMAPS)"
          % (PATTERNS.get(p, p), a.size, a.rounds),
          ["server", "IOPS", "min", "max", "p99 us", "CPU us/request",
           "IOPS to " + BASE, "CPU"], rows)
done()
