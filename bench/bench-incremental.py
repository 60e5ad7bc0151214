#!/usr/bin/python3
# nbdferry - benchmark: an incremental backup
# SPDX-License-Identifier: BSD-3-Clause
"""One granule of a hundred of a large sparse disk is dirty, at random.  Ours:
`nbdferry backup` into a file that is updated in place, into an archive, and to
nbdkit over TCP and Unix sockets; QEMU's blockdev-backup by bitmap to nbdkit
over both; and the limit, one thread that reads and writes the same ranges
without any daemon.  In turn.
"""

from ferrybench import *

a = options(__doc__, rounds=(5, 1), size_gib=(64, 4), percent=(1.0, 1.0),
            granularity_kib=(64, 64), links=("tcp,unix",) * 2, tools=("", ""))
nbd = need_nbd()
size, gran = a.size_gib * GiB, a.granularity_kib << 10
dirty = sorted(random.Random(7).sample(
    range(size // gran), int(size // gran * a.percent / 100)))
block = random.Random(8).randbytes(gran)


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


def check():
    src, dst = [os.open(path(f), os.O_RDONLY) for f in ("src.raw", "dst.raw")]
    for g in dirty:
        if os.pread(src, gran, g * gran) != os.pread(dst, gran, g * gran):
            raise RuntimeError("the copy differs")
    os.close(src)
    os.close(dst)


begun = set()


def backup(name, out, *more, daemon=None):
    """All is written again before each: the last one has cleared the bitmap."""
    def run(*options):
        return timed([NBDFERRY, "backup", path("s.ctl"), out, "--bitmap", name,
                      *more, *options])

    if name not in begun:
        # A first, full one of a disk that is still empty.
        begun.add(name)
        timed([NBDFERRY, "backup", path("s.ctl"), path("full"), "--bitmap",
               name, "--full", "--force", "--granularity", str(gran),
               "--format", "raw"])
        os.unlink(path("full"))
    write_all(ours.uri())
    cpu = ours.cpu() + (daemon.cpu() if daemon else 0)
    t, own, _ = run()
    cpu = ours.cpu() + (daemon.cpu() if daemon else 0) - cpu + own
    return t, cpu


def to_file():
    r = backup("raw", target(), "--format", "raw")
    check()
    return r


def to_archive():
    target()  # for the memory
    os.unlink(path("dst.raw"))
    r = backup("archive", path("next.nbf"), "--compression", "none", "--force")
    os.unlink(path("next.nbf"))
    return r


def to_nbdkit(kind):
    d = Daemon("t", ["file", target()], kind)
    r = backup(kind, d.uri(), daemon=d)
    d.stop()
    check()
    return r


def blockdev_backup(kind):
    d = Daemon("t", ["file", target()], kind)
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
    before, t = own_cpu(), time.monotonic()
    src, dst = [os.open(path(f), os.O_RDWR) for f in ("src.raw", "dst.raw")]
    buf = [bytearray(gran)]
    for g in dirty:
        os.preadv(src, buf, g * gran)
        os.pwritev(dst, buf, g * gran)
    t, cpu = time.monotonic() - t, own_cpu() - before
    os.close(src)
    os.close(dst)
    return t, cpu


sparse_file("src.raw", size)
ours = Daemon("s", [PLUGIN, "disk=vda=" + path("src.raw"),
                    "control=" + path("s.ctl")])
kinds = a.links.split(",")
tools = {"nbdferry, to a file in place": to_file,
         "nbdferry, to an archive": to_archive}
for k in kinds:
    tools["nbdferry, to nbdkit, " + k] = lambda k=k: to_nbdkit(k)
if QEMU:
    qemu = Qemu("q", sparse_file("q.raw", size))
    qemu.qmp.command("block-dirty-bitmap-add", node="d0", name="b",
                     granularity=gran)
    write_all(qemu.uri())
    for k in kinds:
        tools["QEMU backup, " + k] = lambda k=k: blockdev_backup(k)
tools["the limit: pread, pwrite"] = limit
bases = ["QEMU backup, " + k for k in kinds] + ["the limit: pread, pwrite"]
tools = {t: tools[t] for t in tools if any(o in t for o in a.tools.split(","))}
results = in_turn(tools, a.rounds)
table("%g %% of %d GiB, granules of %d KiB: %d MiB (%d rounds, medians)"
      % (a.percent, a.size_gib, a.granularity_kib, len(dirty) * gran // MiB,
         a.rounds),
      ["tool", "s", "min", "max", "CPU s"] + sum(
          [["to " + b.replace("the limit: pread, pwrite", "the limit"), "CPU"]
           for b in bases], []), time_rows(results, *bases))
for name in results:
    if not name.startswith("nbdferry"):
        continue
    for base in bases:
        most = 1.5 if base.startswith("the limit") else 0.5
        # Over a link, the peer is the one that goes over the same.
        if base in results and (most == 1.5 or "nbdkit" not in name or
                                name.endswith(base[-4:].strip())):
            goal("incremental", name[10:] + ": time / "
                 + base.split(":")[0], ratio(results, name, base), most=most)
done()
