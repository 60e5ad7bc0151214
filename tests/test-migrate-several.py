#!/usr/bin/python3
# nbdferry - several disks move as one
# SPDX-License-Identifier: BSD-3-Clause
"""Four disks in one migration, with writers on all of them; all are held at
one instant; and if one of them is refused, nothing happens to any."""

import urllib.parse

from ferrytest import *
from migratetest import *

requires("nbdkit", "qemu-img", "qemu-nbd")

MiB = 1 << 20
DISKS = {"root": 24 * MiB + 512, "data": 9 * MiB + 7 * 512, "swap": 4 * MiB,
         "ein Stück": 512 * 9}


def fresh():
    Nbdkit.all.clear()          # all have ended
    clear_folder()


def bare(daemon):
    return daemon.uri().rstrip("/")


def export(daemon, name):
    """The URI of a disk, whatever its name."""
    name = urllib.parse.quote(name, safe="")
    return daemon.uri().replace("///?", "///%s?" % name) if daemon.socket \
        else daemon.uri() + name


def all_four(tcp, **params):
    fresh()
    pair = Pair(DISKS, tcp=tcp, step=256 * 1024)
    writers = {}
    for i, name in enumerate(DISKS):
        pair.add(name, "same name", 4096)
        pair.add(name, "of its own %d" % i, 512 << 2 * i)
        writers[name] = LoggingWriter(export(pair.src, name), pair.models[name],
                                      seed=i, max_length=16384, pause=0.001)
    for w in writers.values():
        settle(w, 20)
    pair.migrate(**params)
    info = pair.wait("completed")
    assert info["disk"]["total"] == sum(DISKS.values()), info
    for w in writers.values():
        settle(w, 20)
        w.stop()
        assert w.errors == 0, w.last_error
    for name in DISKS:
        assert read_all(export(pair.src, name)) == bytes(pair.models[name].data)
        assert read_all(export(pair.dst, name)) == bytes(pair.models[name].data)
    dst = QMP("dst.ctl")
    disks = dst.command("x-ferry-status")["disks"]
    assert [(d["name"], d["mode"], d["generation"]) for d in disks] == [
        (n, "active", 1) for n in DISKS], disks
    dst.close()
    pair.stop()
    for i, name in enumerate(DISKS):
        pair.check_disk(name)
        pair.check_bitmap(name, "same name",
                          granules(writers[name].touched, 4096, DISKS[name]))
        pair.check_bitmap(name, "of its own %d" % i,
                          granules(writers[name].touched, 512 << 2 * i,
                                   DISKS[name]))
    print("four disks over %s: %d ms, downtime %d ms, %d requests" % (
        "TCP" if tcp else "Unix", info["total-time"], info["downtime"],
        sum(w.done for w in writers.values())))


class Pacer(threading.Thread):
    """Writes 1, 2, 3, ... to the first disk and then to the second: number n
    to the second when it is acknowledged by the first, and so on.  Ends when
    a connection is lost."""

    def __init__(self, first, second, offset):
        super().__init__(daemon=True)
        self.handles = [connect(first), connect(second)]
        self.n, self.offset = 0, offset
        self.start()

    def run(self):
        try:
            while True:
                for h in self.handles:
                    h.pwrite(self.n.to_bytes(512, "big"), self.offset)
                self.n += 1
        except nbd.Error:
            pass

    def number(self, uri):
        return int.from_bytes(connect(uri).pread(512, self.offset), "big")


def one_instant(when):
    """Kill the source when the destination is active for sure."""
    fresh()
    pair = Pair({"a": 2 * MiB, "b": 6 * MiB, "c": MiB})
    pacers = {}
    for i, order in enumerate((("a", "b"), ("b", "c"), ("c", "a"))):
        # Each in a place of its own.
        pacers[order] = Pacer(*map(pair.src.uri, order), i * 512)
    for p in pacers.values():
        pause_until(lambda: p.n > 20)
    before = {order: p.n for order, p in pacers.items()}
    pair.qmp.command("migrate", uri=bare(pair.dst))
    while True:
        event = pair.qmp.event("MIGRATION")["data"]["status"]
        assert event not in ("failed", "cancelled"), (
            pair.qmp.command("query-migrate"))
        if event == "completed":
            break
    if when > 0:
        at = {p: p.n for p in pacers.values()}
        pause_until(lambda: all(p.n >= at[p] + when for p in at))
    pair.src.kill()
    for p in pacers.values():
        p.join(20)
        assert not p.is_alive()
    for (first, second), p in pacers.items():
        x, y = (p.number(pair.dst.uri(name))
                for name in (first, second))
        # All that was acknowledged is there, and nothing out of order.
        assert x >= p.n - 1 and y >= p.n - 1, (first, x, second, y, p.n)
        assert x == y or x == y + 1, (first, x, second, y)
        assert p.n > before[first, second]
    print("one instant: %s" % [p.n for p in pacers.values()])
    pair.dst.stop()


def one_refused():
    fresh()
    pair = Pair(DISKS)
    pair.dst.stop()
    names = list(DISKS)
    for name in names:
        pair.add(name, "daily")
    for bad in names:
        args = ["incoming=on"]
        for name, size in DISKS.items():
            args += ["disk=%s=%s-%d.raw" % (name, "to", names.index(name)),
                     "size=%d" % (size - (512 if name == bad else 0))]
        dst = Nbdkit(*args, "control=to.ctl", name="to")
        p = run_nbdferry("migrate", "src.ctl", bare(dst), check=False)
        assert p.returncode == 1, p
        assert bad in p.stderr and "too small" in p.stderr, p.stderr
        qmp = QMP("to.ctl")
        for d in qmp.command("x-ferry-status")["disks"]:
            assert (d["mode"], d["bitmaps"]) == ("incoming", 0), d
        qmp.close()
        for d in pair.qmp.command("x-ferry-status")["disks"]:
            assert (d["mode"], d["bitmaps"]) == ("active", 1), d
        dst.stop()
        for i in range(len(names)):
            with open("to-%d.raw" % i, "rb") as f:
                assert not any(f.read()), "disk %d was written to" % i
            os.unlink("to-%d.raw" % i)
            subprocess.run(["rm", "-r", "to-%d.raw.ferry" % i], check=True)
    # As if nothing had been.
    pair.dst.start()
    pair.migrate()
    pair.wait("completed")
    pair.stop()
    for name in names:
        pair.check_disk(name)
        pair.check_bitmap(name, "daily", [])
    print("one refused, then all together")


def some_of_them():
    """--node: two of four, the others stay."""
    fresh()
    pair = Pair(DISKS)
    p = run_nbdferry("migrate", "src.ctl", bare(pair.dst), "--node", "swap",
                     "--node", "root", "--json")
    info = json.loads(p.stdout.splitlines()[-1])
    assert info["disk"]["total"] == DISKS["swap"] + DISKS["root"], info
    modes = {d["name"]: d["mode"][:7] for d in
             pair.qmp.command("x-ferry-status")["disks"]}
    assert modes == {"root": "forward", "swap": "forward", "data": "active",
                     "ein Stück": "active"}, modes
    # The rest later, in another one.
    p = run_nbdferry("migrate", "src.ctl", bare(pair.dst), check=False)
    assert p.returncode == 1 and "handed over" in p.stderr, p
    run_nbdferry("migrate", "src.ctl", bare(pair.dst), "--node", "data",
                 "--node", "ein Stück")
    pair.stop()
    for name in DISKS:
        pair.check_disk(name)
    print("two, then the other two")


all_four(True)
all_four(False, multifd_channels=2, multifd_compression="zstd",
         max_bandwidth=20 * MiB)
for when in 0, 0, 1, 5:
    one_instant(when)
one_refused()
some_of_them()
