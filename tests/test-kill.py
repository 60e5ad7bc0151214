#!/usr/bin/python3
# nbdferry - kill -9
# SPDX-License-Identifier: BSD-3-Clause
"""The daemon is killed at random: while clients write and bitmaps are added,
removed, merged, cleared, enabled and disabled; while it closes; while it opens,
several times in a row.  After that each bitmap must have every bit that it must
have, and none that it can't have; when nothing was under way both are the same.
The sidecar must be clean for qemu-img after the next close.

CHECK_LONG=1 goes on for minutes.  FERRY_SEED repeats a run, as far as threads
allow it.
"""

import os
import random
import signal
import subprocess
import threading
import time

from ferrytest import (Nbdkit, QMP, QMPError, SECTOR, TMPDIR, Writer,
                       bitmap_ranges, compare, make_disk, qemu_img_check,
                       requires)

requires("nbdkit", "qemu-img", "qemu-nbd")
SECONDS = 240 if os.environ.get("CHECK_LONG") else 12
SEED = int(os.environ.get("FERRY_SEED", random.randrange(1 << 32)))
SIZE = 48 << 20
SHIFT = 12
GRANULES = SIZE >> SHIFT
DISK = os.path.join(TMPDIR, "vm.raw")
SIDECAR = DISK + ".ferry/bitmaps.qcow2"
CONTROL = os.path.join(TMPDIR, "c")
INFINITY = float("inf")


class TimedWriter(Writer):
    """Knows of each request when it began and ended, and whether it was
    acknowledged: (first granule, last + 1, began, ended, acknowledged)."""

    def __init__(self, *args, **kwargs):
        self.log = []
        super().__init__(*args, **kwargs)

    def request(self, offset, length):
        done, began = self.done, time.monotonic()
        super().request(offset, length)
        self.log.append((offset >> SHIFT, ((offset + length - 1) >> SHIFT) + 1,
                         began, time.monotonic(), self.done > done))


def union(writes):
    """All granules of some writes, as a bytearray of flags."""
    flags = bytearray(GRANULES)
    for first, last, *_ in writes:
        flags[first:last] = b"\1" * (last - first)
    return flags


class Operations(threading.Thread):
    """Works on bitmaps until the daemon is gone, or until stop ().

    .log has (operation, bitmap, sent, answered); the last one may have been
    answered never (INFINITY), and then may have been done, or not.
    """

    def __init__(self, seed):
        super().__init__(daemon=True)
        self.qmp, self.rng = QMP(CONTROL), random.Random(seed)
        self.log, self.ending = [], threading.Event()
        self.enabled, self.extra, self.count = True, [], 0
        self.failure = None
        self.start()

    def stop(self):
        self.ending.set()
        self.join(30)
        assert not self.is_alive(), "an operation hangs"
        if self.failure:
            raise self.failure
        self.qmp.close()

    def choose(self):
        kind = self.rng.choice(["clear", "toggle", "merge", "add", "remove"])
        if kind == "toggle":
            self.enabled = not self.enabled
            return ("enable" if self.enabled else "disable"), "toggled", {}
        if kind == "merge":
            return kind, "sum", {"target": "sum", "bitmaps": ["always"]}
        if kind == "clear":
            return kind, "cleared", {}
        if kind == "remove" and self.extra:
            name = self.extra.pop(self.rng.randrange(len(self.extra)))
            return kind, name, {}
        self.count += 1
        self.extra.append("extra%d" % self.count)
        return "add", self.extra[-1], {"granularity": 1 << SHIFT,
                                       "persistent": True}

    def run(self):
        while not self.ending.is_set():
            kind, name, args = self.choose()
            if kind != "merge":
                args["name"] = name
            sent = time.monotonic()
            self.log.append((kind, name, sent, INFINITY))
            try:
                self.qmp.execute("block-dirty-bitmap-" + kind,
                                 dict(args, node="d"))
            except (OSError, EOFError, ValueError):
                return  # the daemon is gone
            except QMPError as e:
                if "shut" not in str(e):  # it is closing
                    self.failure = e
                return
            self.log[-1] = kind, name, sent, time.monotonic()
            self.ending.wait(self.rng.random() * 0.01)


def expected(name, writes, log):
    """(what must be dirty, what may be) after these writes and operations."""
    log = [entry for entry in log if entry[1] == name]
    acked = [w for w in writes if w[4]]
    if name == "always":
        return union(acked), union(writes)
    if name == "cleared" or name.startswith("extra"):  # from then on
        answered = [e for e in log if e[3] < INFINITY]
        since = answered[-1][2:] if answered else (0, 0)
        pending = bool(log) and log[-1][3] == INFINITY
        must = [] if pending else [w for w in acked if w[2] >= since[1]]
        return union(must), union(w for w in writes if w[3] >= since[0])
    if name == "sum":
        done = [e[2] for e in log if e[3] < INFINITY]
        until = log[-1][3] if log else 0
        return (union(w for w in acked if done and w[3] <= done[-1]),
                union(w for w in writes if w[2] <= until))
    # When it records for certain, and when it may.
    certain, possible = [[0, INFINITY]], [[0, INFINITY]]
    for kind, _, sent, answered in log:
        if kind == "enable":
            certain.append([answered, INFINITY])
            possible.append([sent, INFINITY])
        else:
            certain[-1][1], possible[-1][1] = sent, answered
    return (union(w for w in acked
                  if any(a <= w[2] and w[3] <= b for a, b in certain)),
            union(w for w in writes
                  if any(a <= w[3] and w[2] <= b for a, b in possible)))


def names_expected(log):
    """{name: may it be missing?}"""
    names = dict.fromkeys(("always", "cleared", "toggled", "sum"), False)
    for kind, name, _, answered in log:
        if kind == "add":
            names[name] = answered == INFINITY
        elif kind == "remove" and answered == INFINITY:
            names[name] = True
        elif kind == "remove":
            del names[name]
    return names


class Test:
    def __init__(self, rng):
        self.rng = rng
        self.model = make_disk(DISK, SIZE)
        self.start()
        for name in "always", "cleared", "toggled", "sum":
            self.qmp.command("block-dirty-bitmap-add", node="d", name=name,
                             persistent=True, granularity=1 << SHIFT,
                             disabled=name == "sum")

    def arguments(self):
        return ["disk=d=" + DISK, "control=" + CONTROL,
                "durability=" + self.rng.choice(["power", "process"])]

    def start(self):
        if os.path.exists(CONTROL):
            os.unlink(CONTROL)
        self.daemon = Nbdkit(*self.arguments())
        self.qmp = QMP(CONTROL)

    def stop(self):
        self.qmp.close()
        self.daemon.stop()
        Nbdkit.all.remove(self.daemon)

    def infos(self):
        node, = self.qmp.command("query-named-block-nodes")
        return {b["name"]: b for b in node.get("dirty-bitmaps", [])}

    def kill(self):
        """At once, or while it closes."""
        if self.rng.random() < 0.3:
            self.daemon.terminate()
            time.sleep(self.rng.random() * 0.04)
        self.daemon.kill()
        Nbdkit.all.remove(self.daemon)
        self.qmp.close()

    def kill_while_opening(self):
        p = subprocess.Popen(
            ["nbdkit", "-f", "-U", os.path.join(TMPDIR, "k"),
             self.daemon.plugin, *self.arguments()],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(self.rng.random() * 0.06)
        p.send_signal(signal.SIGKILL)
        p.wait()
        for name in "k", "c":
            if os.path.exists(os.path.join(TMPDIR, name)):
                os.unlink(os.path.join(TMPDIR, name))

    def load(self, quiet):
        """Some time of writing and working; what was done."""
        writers = [TimedWriter(self.daemon.uri("d"), self.model,
                               start=i * SIZE // 6, end=(i + 1) * SIZE // 6,
                               seed=self.rng.random(), max_length=32768)
                   for i in range(6)]
        operations = Operations(self.rng.random())
        time.sleep(0.02 + self.rng.random() * 0.25)
        if quiet:
            for thread in *writers, operations:
                thread.stop()
        self.kill()
        if not quiet:
            for thread in *writers, operations:
                thread.stop()
        return [w for x in writers for w in x.log], operations.log

    def check_list(self, log):
        infos, names = self.infos(), names_expected(log)
        for name, info in infos.items():
            assert name in names, "%s is back" % name
            assert "inconsistent" not in info, info
            assert info["persistent"] and info["granularity"] == 1 << SHIFT
        for name, may_be_missing in names.items():
            assert name in infos or may_be_missing, "%s is lost" % name
        changes = [e for e in log if e[1] == "toggled"]
        if not changes or changes[-1][3] < INFINITY:
            enabled = not changes or changes[-1][0] == "enable"
            assert infos["toggled"]["recording"] == enabled, infos["toggled"]
        assert not infos["sum"]["recording"]
        assert infos["always"]["recording"] and infos["cleared"]["recording"]
        return list(infos)

    def died_in_clear(self, name, log):
        """Was it made dirty because the daemon was killed in a clear?  Only the
        last operation can have been that."""
        disk, = self.qmp.command("x-ferry-query-bitmaps")
        reason, = (b.get("reason", "") for b in disk["bitmaps"]
                   if b["name"] == name)
        return ("while a bitmap was being cleared" in reason
                and log[-1][0] == "clear" and log[-1][3] == INFINITY)

    def check_bits(self, name, writes, log):
        must, may = expected(name, writes, log)
        if name in self.dirtied:
            may = bytearray(b"\1" * GRANULES)
        got = union((a >> SHIFT, b >> SHIFT)
                    for a, b in bitmap_ranges(SIDECAR, name))
        lost = [g for g in range(GRANULES) if must[g] and not got[g]]
        excess = [g for g in range(GRANULES) if got[g] and not may[g]]
        assert not lost, "%s lost %d bits: %s" % (name, len(lost), lost[:8])
        assert not excess, "%s has %d bits too many: %s" % (
            name, len(excess), excess[:8])
        return must == may

    def check_landed(self):
        """What was not acknowledged, and yet changed the disk, is dirty."""
        with open(DISK, "rb") as f:
            data = f.read()
        compare(data, self.model)
        landed = {s * SECTOR >> SHIFT for s, unsure in
                  enumerate(self.model.unsure) if unsure and
                  data[s * SECTOR:(s + 1) * SECTOR] !=
                  self.model.data[s * SECTOR:(s + 1) * SECTOR]}
        got = union((a >> SHIFT, b >> SHIFT)
                    for a, b in bitmap_ranges(SIDECAR, "always"))
        lost = [g for g in landed if not got[g]]
        assert not lost, "landed, and lost: %s" % lost[:8]
        self.model.set(0, data)
        return len(landed)

    def clean_up(self, names):
        """Begin anew, with nothing dirty."""
        for name in names:
            if name.startswith("extra"):
                self.qmp.command("block-dirty-bitmap-remove", node="d",
                                 name=name)
            else:
                self.qmp.command("block-dirty-bitmap-clear", node="d",
                                 name=name)
        self.qmp.command("block-dirty-bitmap-enable", node="d",
                         name="toggled")

    def round(self):
        quiet = self.rng.random() < 0.4
        writes, log = self.load(quiet)
        for _ in range(self.rng.choice([0, 0, 1, 3])):
            self.kill_while_opening()
        self.start()
        names = self.check_list(log)
        self.dirtied = {n for n in names if self.died_in_clear(n, log)}
        self.stop()
        qemu_img_check(SIDECAR)
        for name in names:
            exact = self.check_bits(name, writes, log)
            if name == "always" and quiet:
                assert exact
        landed = self.check_landed()
        self.start()
        self.clean_up(names)
        return len(writes), landed, len(log)


def main():
    print("FERRY_SEED=%d" % SEED, flush=True)
    test = Test(random.Random(SEED))
    end = time.monotonic() + SECONDS
    rounds = 0
    while time.monotonic() < end:
        rounds += 1
        print("round %d: %d writes, %d granules not "
              "acknowledged, %d operations" % (
                  rounds, *test.round()), flush=True)
    test.stop()


main()
