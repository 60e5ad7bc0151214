#!/usr/bin/python3
# nbdferry - benchmark: a bitmap of many bits on the wire
# SPDX-License-Identifier: BSD-3-Clause
"""A bitmap of 2^28 bits (16 TiB in granules of 64 KiB), empty, 1 % set at random
or full: our coder alone (bench-wire.c) beside the entropy; then a migration of
an empty disk with that bitmap, ours and QEMU's (qemu-system-x86_64 without a
guest, dirty-bitmaps, postcopy), whose bytes a relay counts.  What the same
migration takes without a bitmap is taken off.  In turn.
"""

from ferrybench import *

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../tests"))

import qcow2bits
from linktest import Link

a = options(__doc__, rounds=(3, 1), log2_bits=(28, 22),
            cases=("none,empty,1 %,full",) * 2)
nr, gran = 1 << a.log2_bits, 65536
size = nr * gran
VM = shutil.which("qemu-system-x86_64")


def make_bits(case):
    bits = bytearray(nr // 8) if case != "full" else bytearray(b"\xff"
                                                              * (nr // 8))
    if case == "1 %":
        rng = random.Random(3)
        for g in rng.sample(range(nr), nr // 100):
            bits[g >> 3] |= 1 << (g & 7)
    qcow2bits.make(path(case + ".qcow2"), size, gran, bytes(bits))


def counts(qmp):
    for node in qmp.command("query-named-block-nodes"):
        if node.get("node-name", "vda") in ("vda", "d0"):
            return [b["count"] for b in node.get("dirty-bitmaps", [])]


def equal(x, y):
    if x != y:
        raise RuntimeError("counts %s and %s differ" % (x, y))


def ferry(case):
    """s, CPU s, bytes."""
    for f in "src.raw", "dst.raw":
        sparse_file(f, size)
    no_sidecars()
    s = Daemon("s", [PLUGIN, "disk=vda=" + path("src.raw"),
                     "control=" + path("s.ctl")])
    d = Daemon("d", [PLUGIN, "disk=vda=" + path("dst.raw"), "incoming=on",
                     "control=" + path("d.ctl")], "tcp")
    if case != "none":
        timed([NBDFERRY, "bitmap", "import", path("s.ctl"),
               path(case + ".qcow2")])
    before, link = counts(QMP(path("s.ctl"))), Link(d.port)
    cpu = s.cpu() + d.cpu()
    t, own, _ = timed([NBDFERRY, "migrate", path("s.ctl"), link.uri("vda")])
    cpu = s.cpu() + d.cpu() - cpu + own
    equal(counts(QMP(path("d.ctl"))), before)
    moved = link.bytes()[0]
    link.stop()
    s.stop()
    d.stop()
    return t, cpu, moved


class Machine:
    """A virtual machine that never runs, with a disk of nothing."""

    def __init__(self, name, *more):
        node = {"driver": "null-co", "node-name": "d0", "size": size}
        self.process = subprocess.Popen(
            [VM, "-machine", "q35,accel=tcg", "-m", "4M", "-nodefaults",
             "-display", "none", "-S", "-blockdev", json.dumps(node),
             "-qmp", "unix:%s,server=on,wait=off" % path(name + ".qmp"),
             *more], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        keep(self)
        self.qmp = QMP(path(name + ".qmp"))
        self.qmp.command("migrate-set-capabilities", capabilities=[
            {"capability": c, "state": True}
            for c in ("dirty-bitmaps", "events")])
        self.qmp.command("migrate-set-parameters", **{
            "max-bandwidth": 10 * GiB, "downtime-limit": 1})

    def completed(self):
        while True:
            status = self.qmp.event("MIGRATION")["status"]
            if status == "failed":
                raise RuntimeError("QEMU's migration failed")
            if status == "completed":
                return

    cpu, stop = Daemon.cpu, Daemon.stop


def qemu(case):
    src = Machine("qs")
    port = free_port()
    dst = Machine("qd", "-incoming", "tcp:127.0.0.1:%d" % port)
    link = Link(port)
    if case != "none":
        src.qmp.command("block-dirty-bitmap-add", node="d0", name="b",
                        granularity=gran)
        src.qmp.command("blockdev-add", **{
            "driver": "qcow2", "node-name": "bits", "read-only": True,
            "file": {"driver": "file", "filename": path(case + ".qcow2")}})
        src.qmp.command("block-dirty-bitmap-merge", node="d0", target="b",
                        bitmaps=[{"node": "bits", "name": "b"}])
        src.qmp.command("blockdev-del", **{"node-name": "bits"})
    before = counts(src.qmp)
    cpu, t = src.cpu() + dst.cpu(), time.monotonic()
    src.qmp.command("migrate", uri="tcp:127.0.0.1:%d" % link.port)
    src.qmp.command("migrate-start-postcopy")
    for v in src, dst:
        v.completed()
    t, cpu = time.monotonic() - t, src.cpu() + dst.cpu() - cpu
    equal(counts(dst.qmp), before)
    moved = link.bytes()[0]
    link.stop()
    src.stop()
    dst.stop()
    return t, cpu, moved


def entropy(case):
    return {"1 %": 0.0807931 * nr / 8}.get(case, 0)


def coder():
    out = timed([os.path.join(BUILD, "bench/bench-wire"),
                 str(a.log2_bits)])[2]
    rows = [re.split(r"  +", line.replace(" bytes", "  ").replace(" ms", ""))
            for line in out.splitlines()[1:]]
    return [[r[0], int(r[1])] + [float(x) for x in r[2].split() + r[3:]]
            for r in rows]


rows = coder()
table("2^%d bits coded, alone" % a.log2_bits,
      ["bits", "bytes", "entropy", "x entropy", "encode ms", "check ms",
       "apply ms"], rows)
for r in rows:
    if r[0] in ("empty", "full"):
        goal("bitmap", "bytes, coded, " + r[0], r[1], most=1024)
    if r[0] == "1 %":
        goal("bitmap", "bytes coded / entropy, 1 %", r[3], most=1.2)
    if r[0] in ("empty", "full", "1 %"):
        goal("bitmap", "ms to encode, " + r[0], r[4], most=100)
        goal("bitmap", "ms to check and apply, " + r[0], r[5] + r[6],
             most=100)

cases = a.cases.split(",")
for case in cases:
    if case != "none":
        make_bits(case)
tools = {("nbdferry", c): lambda c=c: ferry(c) for c in cases}
if VM:
    tools.update({("QEMU", c): lambda c=c: qemu(c) for c in cases})
else:
    print("(no rows of QEMU: qemu-system-x86_64 is not installed)")
results, rows = in_turn(tools, a.rounds), []
for (tool, case), v in results.items():
    base = [med([x[i] for x in results[tool, "none"]]) for i in range(3)]
    t = [x[0] for x in v]
    moved = med([x[2] for x in v]) - base[2]
    rows.append([tool, case, med(t), min(t), max(t), med(t) - base[0],
                 med([x[1] for x in v]) - base[1], int(moved),
                 moved / entropy(case) if entropy(case) else "-"])
    if tool == "nbdferry" and case != "none":
        if entropy(case):
            goal("bitmap", "bytes on the wire / entropy, " + case,
                 moved / entropy(case), most=1.2)
        else:
            goal("bitmap", "bytes on the wire, " + case, moved, most=1024)
table("moving an empty disk with a bitmap of 2^%d bits (%d rounds, medians)"
      % (a.log2_bits, a.rounds),
      ["tool", "bits", "s", "min", "max", "s more than none", "CPU s more",
       "bytes more", "x entropy"], rows)
done()
