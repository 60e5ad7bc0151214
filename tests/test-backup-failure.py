#!/usr/bin/python3
# nbdferry - backups that fail, or are cut short: nothing is lost
# SPDX-License-Identifier: BSD-3-Clause
"""Whatever ends a backup before its time, the bitmap has all its bits, the
guest's writes succeed, and the next incremental one is complete."""

import os
import subprocess
import time

from backuptest import (Held, action, apply, backups, begin, bitmap, end,
                        in_backup, refused, transaction)
from ferrytest import (Model, Nbdkit, QMP, make_disk, own_mounts, read_all,
                       requires, wait_for)

requires("nbdkit", "nbdinfo")
own_mounts()
SIZE = (8 << 20) + 512

model = make_disk("a.raw", SIZE, step=SIZE)
daemon = Nbdkit("disk=a=a.raw", "control=c", name="d")
qmp = QMP("c")
h = daemon.connect("a")
data = os.urandom(65536)


def write(granule):
    h.pwrite(data, granule * 65536)
    model.set(granule * 65536, data)


qmp.command("block-dirty-bitmap-add", node="a", name="day", persistent=True)
refused("does not follow a backup", begin, qmp, "a", bitmap="day")
refused("not found", begin, qmp, "a", bitmap="none", full=True)
refused("not found", begin, qmp, "none")
refused("expects a UUID", qmp.command, "x-ferry-backup-begin", node="a",
        id="first")
refused("does not accept value", begin, qmp, "a", on_limit="stop")
refused("is unexpected", begin, qmp, "a", other=1)
for limit in 0, -1, -2 ** 63:
    refused("1 or more", begin, qmp, "a", scratch_limit=limit)
b = begin(qmp, "a", bitmap="day", full=True)
refused("has a backup", begin, qmp, "a", id=b["id"])
assert sorted(b) == sorted([
    "node", "id", "bitmap", "full", "scope", "export", "size", "granularity",
    "dirty-bytes", "lineage", "generation", "point", "time", "scratch-used",
    "scratch-limit", "on-limit", "linger", "state"]), b
assert backups(qmp) == {b["id"]: b}
base = bytearray(read_all(daemon.uri(b["export"])))
assert base == model.data
end(qmp, b)
refused("has no backup", end, qmp, b)

# The limit: the write succeeds, the backup does not; slow: a moment later.
write(1)
for how in "fail", "slow":
    b = begin(qmp, "a", bitmap="day", scratch_limit=2 * 65536, on_limit=how)
    assert b["scratch-limit"] == 2 * 65536 and b["on-limit"] == how
    reader = daemon.connect(b["export"])
    for g in 10, 11, 12:
        write(g)
    b = backups(qmp)[b["id"]]
    assert b["state"] == "failed" and "used up" in b["error"], b
    refused("Input/output error", reader.pread, 512, 0)
    refused("Input/output error", reader.pread, 512, 65536 * 20)
    reader.shutdown()
    refused("used up", end, qmp, b)
    assert bitmap(qmp, "a", "day")["busy"]
    write(13)
    end(qmp, b, success=False)
    assert not bitmap(qmp, "a", "day")["busy"]
assert bitmap(qmp, "a", "day")["count"] == 65536 * 5

# The client that has begun it goes, without a word or with the daemon.
other = QMP("c")
b = begin(other, "a", bitmap="day", linger=False)
kept = begin(other, "a")
write(20)
other.close()
wait_for(lambda: b["id"] not in backups(qmp), "the end of a backup")
assert backups(qmp)[kept["id"]]["state"] == "running"
assert not bitmap(qmp, "a", "day")["busy"]
assert bitmap(qmp, "a", "day")["count"] == 65536 * 6
end(qmp, kept, success=False)
b = begin(qmp, "a", bitmap="day")
write(21)
qmp.close()
daemon.kill()
daemon.start()
qmp, h = QMP("c"), daemon.connect("a")
assert bitmap(qmp, "a", "day")["count"] == 65536 * 7
assert not backups(qmp)
b = begin(qmp, "a", bitmap="day")
assert in_backup(daemon.uri, b["export"]) == [
    (65536 * g, 65536 * (e + 1)) for g, e in
    ((1, 1), (10, 13), (20, 21))]
write(1)
# A reader that is connected when the daemon ends does not hold it up.
reader = daemon.connect(b["export"])
qmp.close()
daemon.stop()
daemon.start()
qmp, h = QMP("c"), daemon.connect("a")
assert bitmap(qmp, "a", "day")["count"] == 65536 * 7
b = begin(qmp, "a", bitmap="day")
assert apply(daemon.uri, b["export"], base) == model.data
end(qmp, b)
assert bitmap(qmp, "a", "day")["count"] == 0

# No space for what is copied aside.
qmp.close()
daemon.stop()
os.mkdir("small")
mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs",
                          "small"], stderr=subprocess.DEVNULL).returncode == 0
if mounted:
    try:
        make_disk("b.raw", SIZE, step=SIZE)
        daemon.args = ("disk=a=b.raw", "state=small/state", "control=c")
        daemon.start()
        qmp, h = QMP("c"), daemon.connect("a")
        b = begin(qmp, "a", scratch_limit=1 << 30)
        filler = open("small/filler", "wb")
        try:
            while filler.write(bytes(4096)):
                filler.flush()
        except OSError:
            pass
        for g in range(40):
            h.pwrite(data, g * 65536)
        b = backups(qmp)[b["id"]]
        assert b["state"] == "failed" and "No space" in b["error"], b
        end(qmp, b, success=False)
        try:
            filler.close()
        except OSError:
            pass
        qmp.close()
        daemon.stop()
    finally:
        daemon.kill()
        subprocess.check_call(["umount", "small"])
daemon.args = ("disk=a=a.raw", "control=c")

# Killed in the midst of writes, again and again: each incremental backup has
# all that differs from the one before.
daemon.start()
qmp = QMP("c")
for i in range(6):
    held = Held(daemon, ["a"], [model], max_length=32768)
    held.wait(5)
    if backups(qmp) == {}:
        with held:
            was = bytes(model.data)
            full = "point" not in bitmap(qmp, "a", "day")
            b = begin(qmp, "a", bitmap="day", full=full)
        held.wait(5)
    if i % 3 == 2:  # it ends just as the daemon is killed
        base = bytearray(read_all(daemon.uri(b["export"]))) if full else \
            apply(daemon.uri, b["export"], base)
        assert base == was
        qmp.send({"execute": "x-ferry-backup-end", "arguments": {
            "node": "a", "id": b["id"], "success": True}})
        time.sleep(i / 10000)
        daemon.kill()
    else:
        held.wait(5)
        daemon.kill()
    for w in held.writers:
        w.stop()
    qmp.close()
    daemon.start()
    qmp = QMP("c")
    # What was in flight may have landed or not.
    h = daemon.connect("a")
    model = Model(SIZE, read_all(daemon.uri("a")))
    assert bitmap(qmp, "a", "day").get("inconsistent") is None
b = begin(qmp, "a", bitmap="day", full="point" not in bitmap(qmp, "a", "day"))
if b["full"]:
    base = bytearray(read_all(daemon.uri(b["export"])))
else:
    apply(daemon.uri, b["export"], base)
assert base == model.data
end(qmp, b)
qmp.close()
daemon.stop()
