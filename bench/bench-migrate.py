#!/usr/bin/python3
# nbdferry - benchmark: moving a whole disk
# SPDX-License-Identifier: BSD-3-Clause
"""A whole disk from one daemon to another over TCP and Unix sockets: nbdferry,
nbdcopy between two nbdkits and from the file itself, QEMU's mirror to nbdkit,
and the limit: sendfile, recv and pwrite of the data alone, one thread a side.
In turn.  First a disk of which half is random data, a quarter written zeros
and a quarter holes, to a new file; then one full of random data, over a file
whose blocks are there.
"""

from ferrybench import *

a = options(__doc__, rounds=(7, 1), size=(2048, 256), links=("tcp,unix",) * 2,
            disks=("half,full",) * 2, tools=("", ""))
size = a.size * MiB
checked = set()


def fresh():
    return warm_file("dst.raw", size)


def in_place():
    """Its blocks are there, and stay."""
    dst = path("dst.raw")
    if not os.path.exists(dst) or os.stat(dst).st_blocks * 512 < size:
        with open(dst, "wb") as f:
            for _ in range(a.size):
                f.write(b"\1" * MiB)
    return dst


def check(tool, kind):
    """Once for each: comparing takes longer than moving."""
    if (tool, kind, src) not in checked:
        checked.add((tool, kind, src))
        same(src, path("dst.raw"))


def ferry(kind):
    dst = target()
    no_sidecars()
    s = Daemon("s", [PLUGIN, "disk=vda=" + src, "control=" + path("s.ctl")],
               kind)
    d = Daemon("d", [PLUGIN, "disk=vda=" + dst, "incoming=on"], kind)
    cpu = s.cpu() + d.cpu()
    t, own, _ = timed([NBDFERRY, "migrate", path("s.ctl"), d.uri("vda"),
                       "--overwrite"])
    cpu = s.cpu() + d.cpu() - cpu + own
    s.stop()
    d.stop()
    check("ferry", kind)
    return t, cpu


def nbdcopy(kind):
    s = Daemon("s", ["file", src], kind)
    d = Daemon("d", ["file", target()], kind)
    cpu = s.cpu() + d.cpu()
    t, own, _ = timed(["nbdcopy", s.uri(), d.uri()])
    cpu = s.cpu() + d.cpu() - cpu + own
    s.stop()
    d.stop()
    return t, cpu


def nbdcopy_file(kind):
    d = Daemon("d", ["file", target()], kind)
    cpu = d.cpu()
    t, own, _ = timed(["nbdcopy", src, d.uri()])
    cpu = d.cpu() - cpu + own
    d.stop()
    return t, cpu


def mirror(kind):
    d = Daemon("d", ["file", target()], kind)
    q = Qemu("q", src)
    cpu, t = q.cpu() + d.cpu(), time.monotonic()
    q.mirror(d, discard="unmap")
    q.switch()
    t = time.monotonic() - t
    cpu = q.cpu() + d.cpu() - cpu
    q.stop()
    d.stop()
    check("mirror", kind)
    return t, cpu


def send(sock):
    fd = os.open(src, os.O_RDONLY)
    for offset, n in runs:
        while n:
            sent = os.sendfile(sock.fileno(), fd, offset, n)
            offset, n = offset + sent, n - sent


def limit(kind):
    """Where the data is, both sides know."""
    dst, buf = os.open(target(), os.O_WRONLY), memoryview(bytearray(MiB))
    listener = socket.create_server(("127.0.0.1", 0))
    before, t = own_cpu(), time.monotonic()
    if kind == "unix":
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MiB)
    else:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    pid = os.fork()
    if pid == 0:
        try:
            send(theirs)
        finally:
            os._exit(0)
    theirs.close()
    for offset, n in runs:
        while n:
            got = ours.recv_into(buf, min(n, MiB))
            if not got:
                raise EOFError
            os.pwrite(dst, buf[:got], offset)
            offset, n = offset + got, n - got
    t = time.monotonic() - t
    os.waitpid(pid, 0)
    cpu = own_cpu() - before
    os.close(dst)
    ours.close()
    listener.close()
    check("limit", kind)
    return t, cpu


OURS, COPY, FILE, MIRROR, LIMIT = TOOLS = [
    "nbdferry", "nbdcopy between nbdkits", "nbdcopy from the file",
    "QEMU mirror to nbdkit", "the limit"]
RUN = dict(zip(TOOLS, [ferry, nbdcopy, nbdcopy_file, mirror, limit]))
if not QEMU:
    del RUN[MIRROR]
only = [t for t in RUN if any(o in t for o in a.tools.split(","))]

for disk in a.disks.split(","):
    rows, heads = [], ["link", "tool", "s", "min", "max", "CPU s"]
    if disk == "half":
        src, runs = random_runs("src.raw", size)
        target, bases, title = fresh, [COPY, MIRROR], "half random data"
    else:
        src, runs = random_runs("src.raw", size, 100, 0)
        target, bases, title = in_place, [LIMIT, FILE], "all random, in place"
    for base in bases:
        heads += ["to " + base, "CPU"]
    for kind in a.links.split(","):
        results = in_turn({t: lambda t=t: RUN[t](kind) for t in only},
                          a.rounds)
        rows += [[kind] + r for r in time_rows(results, *bases)]
        if OURS not in results:
            continue
        for base, column, most in (
                [(COPY, 0, 0.6), (COPY, 1, 0.7), (MIRROR, 0, 0.8),
                 (FILE, 0, 1)] if disk == "half" else [(LIMIT, 0, 1.15)]):
            if base in results:
                goal("copy, %s, %s" % (disk, kind), "%s / %s"
                     % (("time", "CPU")[column], base),
                     ratio(results, OURS, base, column), most=most)
    table("moving %d MiB, %s (%d rounds, medians)" % (a.size, title, a.rounds),
          heads, rows)
done()
