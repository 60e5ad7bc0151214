#!/usr/bin/python3
# nbdferry - backups of all shapes, seen by others' tools
# SPDX-License-Identifier: BSD-3-Clause
"""Every granularity, disks that are multiples of a sector alone, zeros and
holes, both scopes, names that must be encoded, many at once; what nbdinfo,
nbdcopy, qemu-img and qemu-nbd make of it."""

import json
import os
import subprocess
import urllib.parse

from backuptest import (HOLE, ZERO, apply, backups, begin, bitmap, end,
                        in_backup, ranges, refused)
from ferrytest import (Model, Nbdkit, QMP, make_disk, read_all, requires,
                       status_ranges)

requires("nbdkit", "nbdinfo", "nbdcopy", "qemu-img")
SIZE = (3 << 20) + 7 * 512
NAME = "Müller's daily/№1 %41"

for size, name in (SIZE, "a"), (512, "tiny"):
    make_disk(name + ".raw", size, step=1 << 18)
with open("big.raw", "wb") as f:
    f.truncate((5 << 40) + 512)
daemon = Nbdkit("disk=a=a.raw", "disk=tiny=tiny.raw", "disk=big=big.raw",
                "control=c", name="d")
qmp = QMP("c")
model = Model(SIZE, read_all(daemon.uri("a")))
h = daemon.connect("a")


def resident():
    """Bytes of memory of the daemon."""
    with open("/proc/%d/statm" % daemon.process.pid) as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write(offset, length=512):
    data = os.urandom(length)
    h.pwrite(data, offset)
    model.set(offset, data)


# ---- every granularity: what was written is in it, to the granule
for shift in range(9, 32):
    g = 1 << shift
    qmp.command("block-dirty-bitmap-add", node="a", name="b", granularity=g,
                persistent=True)
    b = begin(qmp, "a", bitmap="b", full=True)
    base = bytearray(read_all(daemon.uri(b["export"])))
    assert base == model.data
    end(qmp, b)
    write(512)
    write((2 << 20) - 512, 1024)
    write(SIZE - 512)
    want = sorted({at // g for at in (512, (2 << 20) - 512, 2 << 20,
                                      SIZE - 512)})
    b = begin(qmp, "a", bitmap="b", scope="needed" if shift % 2 else "disk")
    was = bytes(model.data)
    write(0, 4096)
    write(1 << 20, 512)
    got = []
    for start, stop in in_backup(daemon.uri, b["export"]):
        assert start % g == 0 and (stop % g == 0 or stop == SIZE)
        got += range(start // g, -(-stop // g))
    assert got == want, (shift, got, want)
    assert b["dirty-bytes"] == len(want) * g and b["granularity"] == g
    assert apply(daemon.uri, b["export"], base) == was
    end(qmp, b)
    assert bitmap(qmp, "a", "b")["count"] == g * len(
        {0, 4095 // g, (1 << 20) // g} | set(range(4096 // g)))
    qmp.command("block-dirty-bitmap-remove", node="a", name="b")

# ---- a disk of one sector; one of terabytes, of which little is there
b = begin(qmp, "tiny")
t = daemon.connect("tiny")
was = t.pread(512, 0)
t.pwrite(b"x" * 512, 0)
assert read_all(daemon.uri(b["export"])) == was
# What was put aside is read to the byte.
v = daemon.connect(b["export"])
assert [v.pread(1, at) for at in (0, 511)] == [was[:1], was[511:]]
v.shutdown()
end(qmp, b)
t.shutdown()
t = daemon.connect("big")
qmp.command("block-dirty-bitmap-add", node="big", name="b")
end(qmp, begin(qmp, "big", bitmap="b", full=True))
t.pwrite(b"x" * 512, 5 << 40)
b = begin(qmp, "big", bitmap="b")
t.pwrite(b"y" * 512, 5 << 40)
t.pwrite(b"y" * 512, 4 << 40)
t.zero(1 << 30, 0)
v = daemon.connect(b["export"])
assert status_ranges(v, "base:allocation", lambda f: not f & HOLE) == [
    (5 << 40, (5 << 40) + 512)]
assert v.pread(512, 5 << 40) == b"x" * 512
assert v.pread(512, 4 << 40) == bytes(512)
# To be done with most of it takes no memory for each granule.
before = resident()
t.pwrite(b"z" * 512, 3 << 40)
qmp.command("x-ferry-backup-release", node="big", id=b["id"], offset=0,
            length=5 << 40)
refused("Input/output error", v.pread, 512, 3 << 40)
refused("Input/output error", v.pread, 512, 2 << 40)
assert resident() - before < 200 << 20, (before, resident())
v.shutdown()
end(qmp, b)
t.shutdown()

# ---- zeros, holes and data, incremental and full
qmp.command("block-dirty-bitmap-add", node="a", name=NAME, granularity=65536)
b = begin(qmp, "a", bitmap=NAME, full=True)
assert b["bitmap"] == NAME
zeros = status_ranges(h, "base:allocation", lambda f: f & ZERO)
assert ranges(daemon.uri, b["export"]) == ranges(daemon.uri, "a")
h.trim(65536, 0)
h.zero(65536, 65536 * 16)
write(65536 * 20, 4096)
v = daemon.connect(b["export"])
assert status_ranges(v, "base:allocation", lambda f: f & ZERO) == zeros
v.shutdown()
end(qmp, b)
b = begin(qmp, "a", bitmap=NAME)
want = [(0, 65536, ZERO), (65536, 65536 * 15, HOLE | ZERO),
        (65536 * 16, 65536, ZERO), (65536 * 17, 65536 * 3, HOLE | ZERO),
        (65536 * 20, 65536, 0), (65536 * 21, SIZE - 65536 * 21, HOLE | ZERO)]


def coarse(found):
    """Data and zeros inside of what was written there may be in parts."""
    merged = []
    for offset, length, kind in found:
        if offset // 65536 == 20 and not kind & HOLE:
            kind = 0
        if merged and merged[-1][2] == kind:
            offset, length = merged[-1][0], merged.pop()[1] + length
        merged.append((offset, length, kind))
    return merged


assert coarse(ranges(daemon.uri, b["export"])) == want
now = read_all(daemon.uri("a"))
h.pwrite(bytes(range(256)) * 256, 0)
h.trim(65536, 65536 * 20)
assert coarse(ranges(daemon.uri, b["export"])) == want
assert read_all(daemon.uri(b["export"])) == now
# nbdcopy and qemu-img into new files and over what is there.
for tool in (["nbdcopy"], ["qemu-img", "convert", "-f", "raw", "-O", "raw"]):
    if os.path.exists("out"):
        os.unlink("out")
    subprocess.check_call(tool + [daemon.uri(b["export"]), "out"])
    with open("out", "rb") as f:
        copy = f.read()
    for start, stop in in_backup(daemon.uri, b["export"]):
        assert copy[start:stop] == now[start:stop], tool
# Over what is there they write zeros where nothing is in the backup; who goes
# by the map does not (docs/backup.md).
inside = in_backup(daemon.uri, b["export"])
old = bytes([7]) * SIZE
outside = bytearray(old)
for start, stop in inside:
    outside[start:stop] = now[start:stop]
assert sum(stop - start for start, stop in inside) < SIZE
for tool in (["nbdcopy"], ["qemu-img", "convert", "-n", "-f", "raw", "-O",
                           "raw"]):
    with open("out", "wb") as f:
        f.write(old)
    subprocess.check_call(tool + [daemon.uri(b["export"]), "out"])
    with open("out", "rb") as f:
        copy = f.read()
    last = 0
    for start, stop in inside + [(SIZE, SIZE)]:
        assert copy[last:start] == bytes(start - last), tool
        last = stop
copy = bytearray(old)
v = daemon.connect(b["export"])
for offset, length, kind in ranges(daemon.uri, b["export"]):
    if not kind & HOLE:
        copy[offset:offset + length] = (bytes(length) if kind & ZERO
                                        else v.pread(length, offset))
v.shutdown()
assert copy == outside
subprocess.check_call(["nbdcopy", "--no-extents", daemon.uri(b["export"]),
                       "out"])
with open("out", "rb") as f:
    assert f.read() == now
chain = json.loads(subprocess.check_output(
    ["qemu-img", "map", "--output=json", "-f", "raw",
     daemon.uri(b["export"])]))
assert [(e["start"], e["length"]) for e in chain
        if e["data"] and not e["zero"]] == [
    (o, n) for o, n, kind in ranges(daemon.uri, b["export"]) if kind == 0]
end(qmp, b)

# ---- exports: listed, of the right kind, gone in time
b = begin(qmp, "a", bitmap=NAME)
encoded = urllib.parse.quote(NAME, safe="-._~")
listed = [e["export-name"] for e in json.loads(subprocess.check_output(
    ["nbdinfo", "--json", "--list", "--no-content",
     daemon.uri("")]))["exports"]]
assert b["export"] in listed and "a@bitmap/" + encoded in listed, listed
v = daemon.connect(b["export"])
assert v.is_read_only() and v.can_multi_conn()
refused("Operation not permitted", v.pwrite, bytes(512), 0)
v.shutdown()
for bad in (b["export"] + "0", "a@backup/", "a@bitmap/none", "a@bitmap/%zz",
            "a@bitmap/%00", "tiny@bitmap/" + encoded, "none@bitmap/b"):
    refused("", daemon.connect, bad)
v = daemon.connect("a@bitmap/" + encoded)
assert v.is_read_only()
assert status_ranges(v, "base:allocation", lambda f: not f & HOLE) == [
    (0, 65536), (65536 * 20, 65536 * 21)]
assert v.pread(65536, 0) == bytes(range(256)) * 256
end(qmp, b)
qmp.command("block-dirty-bitmap-remove", node="a", name=NAME)
refused("Input/output error", status_ranges, v, "base:allocation", bool)
v.shutdown()
refused("", daemon.connect, b["export"])

# ---- many at once, each of its own instant
many = []
for i in range(20):
    many.append((begin(qmp, "a"), read_all(daemon.uri("a"))))
    write(i * 65536 + 512, 1024)
for b, was in many:
    assert read_all(daemon.uri(b["export"])) == was
    end(qmp, b)

# ---- ids that would be no name of a point, or that of two
refused("expects a UUID", begin, qmp, "a",
        id="00000000-0000-0000-0000-000000000000")
qmp.command("block-dirty-bitmap-add", node="a", name="twice")
b = begin(qmp, "a", bitmap="twice", full=True)
end(qmp, b)
refused("of that id already", begin, qmp, "a", bitmap="twice", id=b["id"])
refused("of that id already", begin, qmp, "a", bitmap="twice", id=b["id"],
        full=True)
assert not backups(qmp)
qmp.command("block-dirty-bitmap-remove", node="a", name="twice")

# ---- where to find them
found = qmp.command("x-ferry-query-exports")
assert found == {"uris": ["nbd+unix:///?socket=" + urllib.parse.quote(
    daemon.socket)], "tls": False}, found
qmp.close()
daemon.stop()
daemon = Nbdkit("disk=a=a.raw", "control=c", name="t", tcp=True)
qmp = QMP("c")
found = qmp.command("x-ferry-query-exports")
assert found["uris"] == ["nbd://127.0.0.1:%d" % daemon.port], found
qmp.close()
daemon.stop()

# Over TLS, as its command line says; several addresses.
with open("psk", "w") as f:
    f.write("alice:" + "0123456789abcdef" * 4 + "\n")
try:
    daemon = Nbdkit("disk=a=a.raw", "control=c", name="s", tcp=True,
                    options=("--tls=require", "--tls-psk=psk"))
except RuntimeError:
    daemon = None  # an nbdkit without TLS
if daemon:
    qmp = QMP("c")
    found = qmp.command("x-ferry-query-exports")
    assert found == {"uris": ["nbds://127.0.0.1:%d" % daemon.port],
                     "tls": True}, found
    qmp.close()
    daemon.stop()
