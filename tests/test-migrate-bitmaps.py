#!/usr/bin/python3
# nbdferry - bitmaps that are changed while they are migrated
# SPDX-License-Identifier: BSD-3-Clause
"""Clear, merge, add, remove, enable and disable in the middle of a migration,
alone and in transactions: the destination has what the source had, bit for
bit.  Then the same with a writer; and many, long and dense bitmaps."""

from ferrytest import *
from migratetest import *

requires("nbdkit", "qemu-img", "qemu-nbd")

MiB = 1 << 20
SIZE = 32 * MiB + 5 * 512
SLOW = 6 * MiB                  # a second


class Bits:
    """What a bitmap must be."""

    def __init__(self, granularity, recording=True, persistent=True):
        self.granularity, self.recording = granularity, recording
        self.persistent, self.bits = persistent, set()

    def mark(self, start, end):
        if self.recording:
            self.set(start, end)

    def set(self, start, end):
        self.bits.update(range(start // self.granularity,
                               -(-end // self.granularity)))

    def ranges(self, size):
        return granules([(b * self.granularity,
                          min((b + 1) * self.granularity, size))
                         for b in self.bits], self.granularity, size)


class World:
    """A pair of daemons, and what the bitmaps of disk vda must be.  What is
    done here is done to both, in order."""

    def __init__(self, size=SIZE):
        Nbdkit.all.clear()      # all have ended
        clear_folder()
        self.size = size
        self.pair = Pair({"vda": size}, step=512 * 1024)
        self.qmp = self.pair.qmp
        self.disk_model = self.pair.models["vda"]
        self.handle = self.pair.src.connect("vda")
        self.bitmaps = {}

    def write(self, offset, length, seed=1):
        data = random.Random(seed).randbytes(length)
        self.handle.pwrite(data, offset)
        self.disk_model.set(offset, data)
        for b in self.bitmaps.values():
            b.mark(offset, offset + length)

    # One action each: what QMP calls it, and what it does to the model.

    def add(self, name, granularity=65536, persistent=True, disabled=False):
        def change():
            self.bitmaps[name] = Bits(granularity, not disabled, persistent)
        return "add", dict(name=name, granularity=granularity,
                           persistent=persistent, disabled=disabled), change

    def remove(self, name):
        return "remove", dict(name=name), lambda: self.bitmaps.pop(name)

    def clear(self, name):
        return ("clear", dict(name=name),
                lambda: self.bitmaps[name].bits.clear())

    def enable(self, name, on=True):
        def change():
            self.bitmaps[name].recording = on
        return "enable" if on else "disable", dict(name=name), change

    def merge(self, target, *sources):
        def change():
            for source in sources:
                for r in self.bitmaps[source].ranges(self.size):
                    self.bitmaps[target].set(*r)
        return "merge", dict(target=target, bitmaps=sources), change

    def do(self, *actions):
        """One after the other."""
        for name, args, change in actions:
            self.qmp.execute("block-dirty-bitmap-" + name,
                             dict(args, node="vda"))
            change()

    def transaction(self, *actions):
        self.qmp.execute("transaction", {"actions": [
            {"type": "block-dirty-bitmap-" + name,
             "data": dict(args, node="vda")} for name, args, change in actions]
        })
        for name, args, change in actions:
            change()

    # The migration.

    def info(self):
        return self.qmp.command("query-migrate")

    def begin(self):
        self.pair.migrate("vda", max_bandwidth=SLOW)
        self.pair.wait("active")

    def until_left(self, fraction):
        """It must still be far from its end then."""
        def there():
            info = self.info()
            assert info["status"] == "active", info
            return info["disk"]["remaining"] < fraction * self.size
        wait_for(there, "the migration")

    def still_active(self):
        info = self.info()
        assert info["status"] == "active", info

    def finish(self):
        self.still_active()
        self.qmp.command("migrate-set-parameters", max_bandwidth=0)
        return self.pair.wait("completed")

    def listed(self, control="dst.ctl"):
        qmp = QMP(control)
        node, = qmp.command("query-named-block-nodes")
        qmp.close()
        return {b["name"]: b for b in node.get("dirty-bitmaps", [])}

    def check(self, exact=True):
        """What the destination says, and what it leaves behind."""
        have = self.listed()
        assert set(have) == set(self.bitmaps), (set(have) ^ set(self.bitmaps))
        for name, want in self.bitmaps.items():
            b = have[name]
            got = b["granularity"], b["recording"], b["persistent"], b["busy"]
            assert got == (want.granularity, want.recording, want.persistent,
                           False), (name, b)
            assert "inconsistent" not in b, b
            count = len(want.bits) * want.granularity
            assert not exact or b["count"] == count, (name, b, count)
        self.handle.shutdown()
        self.qmp.close()
        self.pair.stop()
        self.pair.check_disk("vda")
        for name, want in self.bitmaps.items():
            if exact and want.persistent:
                self.pair.check_bitmap("vda", name, want.ranges(self.size))
        listed = qemu_img_info(self.pair.sidecar("vda"))[
            "format-specific"]["data"].get("bitmaps", [])
        assert ({b["name"]: (b["granularity"], "auto" in b["flags"])
                 for b in listed}
                == {n: (b.granularity, b.recording)
                    for n, b in self.bitmaps.items() if b.persistent}), listed


# ---- every operation at a known moment: bit for bit ----

def deterministic():
    w = World()
    for t in "", "t ":
        w.do(w.add(t + "cleared"), w.add(t + "fine", 512),
             w.add(t + "target", 4096), w.add(t + "source", 1 << 20),
             w.add(t + "removed"), w.add(t + "again", 65536),
             w.add(t + "sleeps", 1 << 16), w.add(t + "wakes", disabled=True),
             w.add(t + "passing", persistent=False),
             w.add(t + "passing target", 2048, persistent=False))
    w.do(w.add("empty"), w.add("whole", 1 << 31))
    for i in range(40):
        w.write(i * 801 * 1024 % SIZE // 512 * 512, 1536, i)
    w.write(SIZE - 512, 512)
    w.do(w.enable("target", False), w.enable("t target", False))
    w.begin()
    w.until_left(0.9)
    for i in range(10):
        w.write(i * 777 * 1024, 3 * 512, i)
    w.do(w.clear("cleared"))
    w.write(5 * MiB, 4096)
    w.do(w.merge("target", "fine", "source"))
    w.do(w.add("added", 8192), w.remove("removed"))
    w.write(29 * MiB - 512, 70000 // 512 * 512)
    w.do(w.remove("again"), w.add("again", 1024), w.enable("sleeps", False),
         w.clear("fine"), w.enable("wakes"))
    w.write(31 * MiB, 512)
    w.do(w.clear("passing"), w.merge("passing target", "sleeps"))
    w.do(w.add("short-lived"), w.remove("short-lived"))
    w.write(1 * MiB, 2048)
    w.still_active()
    w.until_left(0.6)
    w.transaction(
        w.clear("t cleared"), w.merge("t target", "t fine", "t source"),
        w.add("t added", 8192), w.remove("t removed"), w.remove("t again"),
        w.enable("t sleeps", False), w.clear("t fine"), w.enable("t wakes"),
        w.clear("t passing"), w.merge("t passing target", "t sleeps"))
    w.write(7 * MiB, 4096)
    w.do(w.add("t again", 1 << 20))
    # Merged, cleared, merged again; cleared and set in one.
    w.transaction(w.merge("t cleared", "fine"), w.clear("t source"),
                  w.merge("t source", "t target"), w.clear("t target"))
    w.write(SIZE - 1024, 1024)
    try:
        w.transaction(w.clear("whole"), w.remove("there is none"))
        raise AssertionError("a transaction was done that cannot be")
    except QMPError as e:
        assert "there is none" in str(e), e
    info = w.finish()
    # What clients write afterwards is recorded over there.
    w.write(11 * MiB, 1024)
    w.check()
    print("at known moments: %d ms, %d rounds" % (
        info["total-time"], info["disk"]["dirty-sync-count"]))


# ---- with a writer ----

class TimedWriter(LoggingWriter):
    """It knows when, too: .log has (start, end, begun, ended)."""

    def __init__(self, *args, **kwargs):
        self.log = []
        super().__init__(*args, **kwargs)

    def request(self, offset, length):
        began = time.monotonic()
        super().request(offset, length)
        self.log.append((offset, offset + length, began, time.monotonic()))


def bits_of(ranges, granularity):
    return {g for start, end in ranges
            for g in range(start // granularity, -(-end // granularity))}


def with_writer(seed):
    """At the least what was written after the operation had been done, at
    most what was under way when it was asked for, or later."""
    w = World()
    for name, granularity in (("cleared", 65536), ("twice", 512),
                              ("again", 4096), ("all", 65536),
                              ("fine", 512)):
        w.do(w.add(name, granularity))
    w.do(w.add("stopped", 4096), w.add("target", 16384, disabled=True),
         w.add("wakes", 32768, disabled=True))
    writer = TimedWriter(w.pair.src.uri("vda"), w.disk_model, seed=seed,
                         max_length=8192, pause=0.001)
    settle(writer, 50)
    w.begin()
    rng = random.Random(seed)
    forever, moment = float("inf"), {n: (0, 0) for n in w.bitmaps}
    until = {n: (forever, forever) for n in w.bitmaps}

    def timed(name, *actions, times=moment, together=False):
        asked = time.monotonic()
        (w.transaction if together else w.do)(*actions)
        times[name] = asked, time.monotonic()
        settle(writer, rng.randint(1, 40))

    settle(writer, rng.randint(20, 60))
    timed("cleared", w.clear("cleared"))
    timed("twice", w.clear("twice"))
    timed("again", w.remove("again"), w.add("again", 1024))
    timed("added", w.add("added", 2048))
    until["added"] = forever, forever
    timed("stopped", w.enable("stopped", False), times=until)
    timed("twice", w.clear("twice"), w.enable("wakes"), together=True)
    moment["wakes"] = moment["twice"]
    w.do(w.merge("target", "stopped"))
    w.until_left(0.5)
    # The writer ends with the migration still under way ...
    settle(writer, 20)
    if seed % 2:
        writer.stop()
        last = w.listed("src.ctl")
    else:
        last = None
    w.finish()
    if last:
        have = w.listed()
        assert ({n: b["count"] for n, b in have.items()}
                == {n: b["count"] for n, b in last.items()})
    else:                       # ... or goes on after it
        settle(writer, 20)
        writer.stop()
    assert writer.errors == 0, writer.last_error
    w.check(exact=False)
    got = {}
    for name, b in w.bitmaps.items():
        got[name] = bits_of(bitmap_ranges(w.pair.sidecar("vda"), name),
                            b.granularity)
        if name == "target":
            continue
        (asked, done), (from_, to) = moment[name], until[name]
        least = bits_of([r[:2] for r in writer.log
                         if r[2] >= done and r[3] <= from_], b.granularity)
        most = bits_of([r[:2] for r in writer.log
                        if r[3] >= asked and r[2] <= to], b.granularity)
        assert got[name] >= least, (name, len(least - got[name]))
        assert got[name] <= most, (name, len(got[name] - most))
    assert got["target"] == bits_of(
        [(g * 4096, g * 4096 + 4096) for g in got["stopped"]], 16384)
    print("with a writer: %d requests" % writer.done)


# ---- many of them, long names, dense bits ----

def many():
    w = World(16 * MiB + 512)
    for i in range(46):
        w.do(w.add("bitmap %d \u00fc" % i, 512 << i % 15, bool(i % 3),
                   i % 7 == 6))
    long = "\u00e4" * 511 + "x"
    assert len(long.encode()) == 1023
    w.do(w.add(long, 512), w.add("y" * 1023, 4096),
         w.add("z" * 1023, 4096, persistent=False))
    try:
        w.do(w.add(long + "y"))
        raise AssertionError("a name of 1024 bytes was taken")
    except QMPError as e:
        pass
    w.do(w.add("dense", 512))
    # Every other sector, then random ones, to the last.
    for offset in range(2 * MiB, 5 * MiB, 1024):
        w.write(offset, 512, offset)
    rng = random.Random(9)
    for i in range(1500):
        w.write(rng.randrange(w.size // 512) * 512, 512, i)
    w.write(w.size - 512, 512)
    assert len(w.listed("src.ctl")) == 50
    w.begin()
    w.until_left(0.8)
    for offset in range(9 * MiB, 10 * MiB, 1024):
        w.write(offset, 512, offset)
    w.do(w.clear("bitmap 3 \u00fc"), w.merge("bitmap 5 \u00fc", "dense"))
    info = w.finish()
    assert info["x-ferry"]["bitmap-bytes"] > 0
    w.check()
    print("50 bitmaps: %d bytes of them were sent" %
          info["x-ferry"]["bitmap-bytes"])


deterministic()
with_writer(1)
with_writer(2)
many()
