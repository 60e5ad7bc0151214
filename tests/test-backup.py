#!/usr/bin/python3
# nbdferry - backups: each shows the disk as it was, and no bit is lost
# SPDX-License-Identifier: BSD-3-Clause
"""A full backup and a chain of incremental ones, with writers throughout; what
each shows is compared, byte by byte, with what the disk held when it began.
The chain is applied to a copy after each, so a bit that is missing anywhere
makes it differ."""

import os
import subprocess

from backuptest import (Held, action, apply, backups, begin, bitmap, end,
                        in_backup, refused, transaction)
from ferrytest import Nbdkit, QMP, make_disk, read_all, requires

requires("nbdkit", "nbdinfo", "nbdcopy", "qemu-img", "qemu-nbd")
SIZE = (16 << 20) + 512 * 3
LINKS = 5

models = {"a": make_disk("a.raw", SIZE), "b": make_disk("b.raw", SIZE, 2)}
daemon = Nbdkit("disk=a=a.raw", "disk=b=b.raw", "control=c", name="d")
qmp = QMP("c")
GRANULES = {"a": 65536, "b": 4096}

# A full one of both disks, at one instant, by bitmaps that are made there.
copies = {}
held = Held(daemon, "ab", models.values(), max_length=128 * 1024, pause=0.001)
held.wait(3)
ID = "11111111-2222-4333-8444-%012d"


def begin_both(n, **data):
    adds = [action("add", node=d, name="day", granularity=GRANULES[d],
                   persistent=True) for d in "ab"] if n == 0 else []
    with held:
        transaction(qmp, *adds, *[action("begin", node=d, bitmap="day",
                                         id=ID % n, **data) for d in "ab"])
        return {d: bytes(models[d].data) for d in "ab"}


def end_both(n, success=True):
    transaction(qmp, *[action("end", node=d, id=ID % n, success=success)
                       for d in "ab"])


was = begin_both(0, full=True)
held.wait(30)
for d in "ab":
    b, = [b for b in qmp.command("x-ferry-query-backups") if b["node"] == d]
    assert b["state"] == "running" and b["export"] == "%s@backup/%s" % (
        d, ID % 0), b
    assert b["scratch-used"] > 0 and "parent" not in b
    assert bitmap(qmp, d, "day")["busy"]
    refused("in use", qmp.command, "block-dirty-bitmap-clear", node=d,
            name="day")
    assert read_all(daemon.uri(b["export"])) == was[d]
    subprocess.check_call(["nbdcopy", daemon.uri(b["export"]), "copy-" + d])
    copies[d] = bytearray(open("copy-" + d, "rb").read())
    assert copies[d] == was[d], "nbdcopy"
    subprocess.check_call(["qemu-img", "convert", "-n", "-f", "raw", "-O",
                           "raw", "-S", "4k", daemon.uri(b["export"]),
                           "copy-" + d])
    assert open("copy-" + d, "rb").read() == was[d], "qemu-img convert"
end_both(0)
assert not backups(qmp)

for n in range(1, LINKS + 1):
    held.wait(5)
    # One that fails changes nothing, wherever it was.
    begin_both(100 + n)
    held.wait(3)
    end_both(100 + n, success=False)
    held.wait(2)
    was = begin_both(n)
    held.wait(10)
    for d in "ab":
        b, = [b for b in qmp.command("x-ferry-query-backups")
              if b["node"] == d]
        assert b["parent"] == ID % (n - 1) and b["point"] == ID % n, b
        uri, export = daemon.uri, b["export"]
        dirty = in_backup(uri, export)
        held.wait(2)
        assert dirty == in_backup(uri, export), "what is in it has changed"
        assert sum(e - s for s, e in dirty) <= b["dirty-bytes"]
        assert read_all(uri(export)) == was[d]
        assert apply(uri, export, copies[d]) == was[d], "link %d" % n
    end_both(n)
    for d in "ab":
        assert bitmap(qmp, d, "day")["point"] == ID % n
held.stop()

# Nobody writes: what was written since the last one is what is dirty.
was = begin_both(LINKS + 1)
for d in "ab":
    assert apply(daemon.uri, "%s@backup/%s" % (d, ID % (LINKS + 1)),
                 copies[d]) == was[d]
end_both(LINKS + 1)
assert bitmap(qmp, "a", "day")["count"] == 0
h = daemon.connect("a")
h.pwrite(b"x" * 512, 65536 * 3 + 512)
h.zero(65536, 65536 * 8)
b = begin(qmp, "a", bitmap="day")
assert in_backup(daemon.uri, b["export"]) == [
    (65536 * 3, 65536 * 4), (65536 * 8, 65536 * 9)]
h.pwrite(b"y" * 512, 65536 * 5)
assert in_backup(daemon.uri, b["export"]) == [
    (65536 * 3, 65536 * 4), (65536 * 8, 65536 * 9)]
end(qmp, b)
last = b
assert in_backup(daemon.uri, "a@bitmap/day") == [(65536 * 5, 65536 * 6)]
h.shutdown()

# A reader that is much slower than a writer: how long a write took at most is
# for who reads this log.
for slow in False, True:
    w = Held(daemon, ["b"], [models["b"]], areas=1, max_length=65536)
    b = begin(qmp, "b") if slow else None
    reader = daemon.connect(b["export"] if slow else "b")
    parts = []
    for at in range(0, SIZE, 1 << 20):
        parts.append(reader.pread(min(1 << 20, SIZE - at), at))
        w.wait(10)
    reader.shutdown()
    if slow:
        assert read_all(daemon.uri(b["export"])) == b"".join(parts)
        end(qmp, b)
    w.stop()
    print("longest write %s: %.1f ms" % (
        "while a slow reader reads a backup" if slow else "without a backup",
        w.writers[0].longest * 1000))

# The points outlive the daemon, whether it ended well or not.
qmp.close()
daemon.stop()
daemon.start()
qmp = QMP("c")
assert bitmap(qmp, "a", "day")["point"] == last["id"]
assert bitmap(qmp, "a", "day")["count"] == 65536
c = begin(qmp, "a", bitmap="day")
assert c["parent"] == last["id"]
qmp.close()
daemon.kill()
daemon.start()
qmp = QMP("c")
assert bitmap(qmp, "a", "day")["point"] == last["id"]
assert bitmap(qmp, "a", "day")["count"] == 65536
assert not backups(qmp)
qmp.command("block-dirty-bitmap-clear", node="a", name="day")
refused("a full one is needed", begin, qmp, "a", bitmap="day")
qmp.close()
daemon.stop()
