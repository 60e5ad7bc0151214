#!/usr/bin/python3
# nbdferry - a migration in the middle of a chain of backups
# SPDX-License-Identifier: BSD-3-Clause
"""A full backup at the source; one that is begun and committed while the disk
migrates; the next one at the destination, by the same bitmap, without a new
full one.  Each is put over the one before, and must be the disk as it was.
One that runs when the disk is handed over fails, and loses nothing."""

from backuptest import (Held, apply, backups, begin, bitmap, end, in_backup,
                        refused)
from ferrytest import QMP, QMPError, read_all, requires, wait_for
from migratetest import Pair

requires("nbdkit", "nbdinfo")
SIZE = (24 << 20) + 3 * 512

pair = Pair({"a": SIZE})
src, qmp, model = pair.src, pair.qmp, pair.models["a"]
pair.add("a", "day")
pair.add("a", "mem", persistent=False, granularity=4096)
held = Held(src, ["a"], [model], max_length=65536, pause=0.001)


def begin_known(q, name, **kwargs):
    with held:
        return begin(q, "a", bitmap=name, **kwargs), bytes(model.data)


bases = {}
for name in "day", "mem":
    held.wait(3)
    b, was = begin_known(qmp, name, full=True)
    held.wait(3)
    bases[name] = bytearray(read_all(src.uri(b["export"])))
    assert bases[name] == was
    end(qmp, b)
held.wait(3)

# Slow enough that a backup fits in.
pair.migrate(max_bandwidth=4 << 20)
pair.wait("active")
b, was = begin_known(qmp, "day")
held.wait(3)
assert apply(src.uri, b["export"], bases["day"]) == was
end(qmp, b)
assert qmp.command("query-migrate")["status"] == "active"
point = b["id"]
held.wait(3)

# And one that will not end before the disk goes.
running, _ = begin_known(qmp, "day")
assert running["parent"] == point
reader = src.connect(running["export"])
assert len(reader.pread(512, 0)) == 512
qmp.command("migrate-set-parameters", max_bandwidth=0)
pair.wait("completed")
b = backups(qmp)[running["id"]]
assert b["state"] == "failed" and "handed over" in b["error"], b
refused("Input/output error", reader.pread, 512, 0)
refused("handed over", end, qmp, b)
refused("handed over", begin, qmp, "a", bitmap="day")
end(qmp, b, success=False)
assert backups(qmp) == {}
reader.shutdown()
held.wait(5)

dst = QMP("dst.ctl")
assert bitmap(dst, "a", "day")["point"] == point
assert not bitmap(dst, "a", "day")["busy"]
for name in "day", "mem":
    b, was = begin_known(dst, name)
    held.wait(3)
    assert apply(pair.dst.uri, b["export"], bases[name]) == was
    assert b["generation"] == 1
    end(dst, b)
    if name == "day":
        assert b["parent"] == point
        last = b
held.stop()

# The destination's points are on its disk.
dst.close()
qmp.close()
pair.src.stop()
pair.dst.kill()
pair.dst.start()
dst = QMP("dst.ctl")
assert bitmap(dst, "a", "day")["point"] == last["id"]
b = begin(dst, "a", bitmap="day")
assert apply(pair.dst.uri, b["export"], bases["day"]) == model.data
assert b["lineage"] == last["lineage"]
end(dst, b)
dst.close()
pair.dst.stop()
