#!/usr/bin/python3
# nbdferry - benchmark: what a backup costs those who write
# SPDX-License-Identifier: BSD-3-Clause
"""fio over a Unix socket: to our plugin without a backup, with one that has
just begun (each granule is copied at its first write), and with one whose
granules have all been copied; and to qemu-storage-daemon without and with a
copy-before-write filter that has just been put in.  In turn, each over a disk
that holds data, the scratch file beside it.
"""

import uuid

from ferrybench import *

PATTERNS = [("randwrite", "4k", 16), ("write", "1m", 4)]

a = options(__doc__, rounds=(3, 1), runtime=(1.0, 0.3), size=(512, 64))
need("fio")
size, disk = a.size * MiB, path("disk.raw")


class Ours:
    def __init__(self, kind):
        shutil.rmtree(disk + ".ferry", ignore_errors=True)
        self.daemon = Daemon("ours", [PLUGIN, "disk=d=" + disk,
                                    "control=" + path("ctl")])
        self.uri, self.cpu = self.daemon.uri(), self.daemon.cpu
        qmp = QMP(path("ctl"))
        qmp.command("block-dirty-bitmap-add", node="d", name="b",
                    persistent=True)
        if kind != "no view":
            qmp.command("x-ferry-backup-begin", node="d", bitmap="b",
                        full=True, id=str(uuid.uuid4()))
        if kind == "view, all copied":
            fio(self.uri, "write", "1m", 4, ["--io_size=%d" % size])

    def stop(self):
        self.daemon.stop()


class QemuView:
    def __init__(self, kind):
        self.socket = path("q.sock")
        argv = ["qemu-storage-daemon", "--nbd-server",
                "addr.type=unix,addr.path=" + self.socket,
                "--blockdev", "driver=file,node-name=f,filename=" + disk,
                "--blockdev", "driver=raw,node-name=d,file=f"]
        if kind == "QEMU, cbw":
            target = path("target.raw")
            with open(target, "wb") as f:
                f.truncate(size)
            argv += ["--blockdev",
                     "driver=file,node-name=t,filename=" + target,
                     "--blockdev", "driver=copy-before-write,node-name=c,"
                     "file=d,target=t"]
        argv += ["--export", "type=nbd,id=e,name=,writable=on,node-name="
                 + ("c" if kind == "QEMU, cbw" else "d")]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        keep(self)
        wait_for(lambda: os.path.exists(self.socket), kind)
        self.uri = "nbd+unix:///?socket=" + self.socket

    cpu, stop = Daemon.cpu, Daemon.stop


def fio(uri, rw, bs, depth, more):
    out = timed(["fio", "--name=w", "--ioengine=nbd", "--uri=" + uri,
                 "--rw=" + rw, "--bs=" + bs, "--iodepth=%d" % depth,
                 "--size=%d" % size, "--norandommap", "--thread",
                 "--output-format=json"] + more)[2]
    return json.loads(out[out.index("{"):])["jobs"][0]["write"]


def run(kind, rw, bs, depth):
    """IOPS, mean and 99th percentile in us, CPU us a request."""
    side = (QemuView if kind.startswith("QEMU") else Ours)(kind)
    cpu = side.cpu()
    r = fio(side.uri, rw, bs, depth,
            ["--time_based", "--runtime=%dms" % (a.runtime * 1000)])
    cpu = side.cpu() - cpu
    side.stop()
    for left in path("q.sock"), path("ctl"), path("target.raw"):
        if os.path.exists(left):
            os.unlink(left)
    return (r["iops"], r["clat_ns"]["mean"] / 1e3,
            r["clat_ns"]["percentile"]["99.000000"] / 1e3,
            cpu * 1e6 / max(r["total_ios"], 1))


with open(disk, "wb") as f:
    for _ in range(a.size):
        f.write(os.urandom(MiB))
kinds = ["no view", "view", "view, all copied"]
if QEMU:
    kinds += ["QEMU", "QEMU, cbw"]
results, rows = {}, []
for i in range(a.rounds):
    for p in PATTERNS:
        for kind in kinds if i % 2 == 0 else kinds[::-1]:
            results.setdefault((p, kind), []).append(run(kind, *p))
for p in PATTERNS:
    for kind in kinds:
        v = results[p, kind]
        base = results[p, "QEMU" if kind.startswith("QEMU") else "no view"]
        rows.append(["%s %s depth %d" % p, kind]
                    + [med([x[k] for x in v]) for k in range(4)]
                    + [med([x[0] / y[0] for x, y in zip(v, base)])])
table("what a backup costs writers (%d MiB, %d rounds, medians)"
      % (a.size, a.rounds),
      ["pattern", "server", "IOPS", "mean us", "p99 us", "cpu us/io",
       "ratio to without"], rows)
done()
