#!/usr/bin/python3
# nbdferry - QEMU and we take turns
# SPDX-License-Identifier: BSD-3-Clause
"""While we have a disk open QEMU cannot write to it nor to its sidecar, and the
other way round.  In between QEMU may use the sidecar as an image: write, zero,
discard, change bitmaps, grow it.  We go on from there, bit for bit; and what it
did not track is noticed.
"""

import json
import os
import random
import re
import subprocess
import time

from ferrytest import (Model, Nbdkit, QMP, TMPDIR, bitmap_ranges, compare,
                       is_served, qemu_img_check, requires, wait_for)
from migratetest import LoggingWriter, granules

requires("nbdkit", "qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon")
MIB = 1 << 20
SIZE = 37 * MIB + 512
DISK = os.path.join(TMPDIR, "vm.raw")
STATE = DISK + ".ferry"
SIDECAR = os.path.join(STATE, "bitmaps.qcow2")
CONTROL = os.path.join(TMPDIR, "c")
GRANULARITY = {"a": 65536, "fine": 512, "off": 4096, "new": 8192}


class Stage:
    """A new disk, what it must hold, and where each bitmap is dirty."""

    def __init__(self):
        subprocess.run(["rm", "-rf", STATE, DISK], check=True)
        self.model = Model(SIZE)
        with open(DISK, "wb") as f:
            f.truncate(SIZE)
        self.dirty = {"a": [], "fine": [], "off": []}
        self.recording = {"a", "fine"}
        self.start()
        for name in self.dirty:
            self.qmp.command("block-dirty-bitmap-add", node="d", name=name,
                             persistent=True, disabled=name == "off",
                             granularity=GRANULARITY[name])
        self.write(0, 3 * MIB)
        self.write(SIZE - 700, 700)

    def start(self):
        self.daemon = Nbdkit("disk=d=" + DISK, "control=" + CONTROL)
        self.qmp = QMP(CONTROL)
        return self

    def stop(self):
        self.qmp.close()
        self.daemon.stop()
        Nbdkit.all.remove(self.daemon)
        os.path.exists(CONTROL) and os.unlink(CONTROL)
        return self

    def kill(self):
        self.qmp.close()
        self.daemon.kill()
        Nbdkit.all.remove(self.daemon)
        os.unlink(CONTROL)
        return self

    def touched(self, offset, length):
        for name in self.recording:
            self.dirty[name].append((offset, offset + length))

    def write(self, offset, length):
        data = random.randbytes(length)
        h = self.daemon.connect("d")
        h.pwrite(data, offset)
        h.shutdown()
        self.model.set(offset, data)
        self.touched(offset, length)

    def qemu_io(self, *commands, image=SIDECAR, options=()):
        args = [word for c in commands for word in ("-c", c)]
        return run("qemu-io", "-f", "qcow2", *options, *args, image)

    def bitmaps(self):
        node, = self.qmp.command("query-named-block-nodes")
        more, = self.qmp.command("x-ferry-query-bitmaps")
        infos = {b["name"]: b for b in node.get("dirty-bitmaps", [])}
        for b in more["bitmaps"]:
            infos[b["name"]].update(b)
        return infos

    def listed(self):
        """The running daemon has just these bitmaps, and none is lost."""
        b = self.bitmaps()
        assert set(b) == set(self.dirty), b
        for name, info in b.items():
            assert "inconsistent" not in info and "reason" not in info, info
            assert info["recording"] == (name in self.recording), info
            assert info["granularity"] == GRANULARITY[name], info
        return self

    def exact(self):
        """Stopped: the bits, and the disk as such and through the sidecar."""
        qemu_img_check(SIDECAR)
        for name, touched in self.dirty.items():
            want = granules(touched, GRANULARITY[name], len(self.model.data))
            got = bitmap_ranges(SIDECAR, name)
            assert got == want, (name, got[:4], want[:4], len(got), len(want))
        compare(DISK, self.model)
        run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", SIDECAR, DISK)
        return self

    def given_up(self, names, reason):
        for end in self.stop, self.kill, None:
            b = self.bitmaps()
            assert {n for n in b if b[n].get("inconsistent")} == names, b
            for name in names:
                assert re.search(reason, b[name]["reason"]), b[name]
            if end:
                end()
                self.start()


def run(*args, ok=True):
    p = subprocess.run(args, text=True, stdin=subprocess.DEVNULL,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if (p.returncode == 0) != ok:
        raise AssertionError("%s: exit status %d: %s" % (
            " ".join(args), p.returncode, p.stdout))
    return p.stdout


class StorageDaemon:
    """qemu-storage-daemon with the sidecar, exported for writing; or with the
    raw disk."""

    def __init__(self, filename, driver):
        self.socket, control = (os.path.join(TMPDIR, "q" + s) for s in "sc")
        self.process = subprocess.Popen(
            ["qemu-storage-daemon",
             "--blockdev", "driver=file,node-name=f,filename=%s,discard=unmap"
             % filename,
             "--blockdev", "driver=%s,node-name=n,file=f,discard=unmap" % driver,
             "--nbd-server", "addr.type=unix,addr.path=" + self.socket,
             "--export", "type=nbd,id=e,node-name=n,writable=on,name=",
             "--chardev", "socket,id=c,path=%s,server=on,wait=off" % control,
             "--monitor", "chardev=c"])
        wait_for(lambda: is_served(self.socket) and is_served(control),
                 "qemu-storage-daemon")
        self.uri = "nbd+unix:///?socket=" + self.socket
        self.qmp, self.control = QMP(control), control

    def end(self, kill=False):
        if kill:
            self.process.kill()
        else:
            self.qmp.command("quit")
        self.process.wait()
        for path in self.socket, self.control:
            os.path.exists(path) and os.unlink(path)


def refused_start(text):
    try:
        Nbdkit("disk=d=" + DISK, name="refused")
    except RuntimeError as e:
        assert text in str(e), e
        return
    raise AssertionError("started on what QEMU has open")


def test_locks():
    s = Stage()
    for image, fmt in (SIDECAR, "qcow2"), (DISK, "raw"):
        out = run("qemu-io", "-f", fmt, "-c", "write 0 512", image, ok=False)
        assert "lock" in out, out
        run("qemu-io", "-r", "-U", "-f", fmt, "-c", "read 0 512", image)
    run("qemu-img", "bitmap", "--remove", SIDECAR, "a", ok=False)
    run("qemu-img", "info", "-U", SIDECAR)
    s.listed().stop().exact()
    for image, fmt in (SIDECAR, "qcow2"), (DISK, "raw"):
        q = StorageDaemon(image, fmt)
        refused_start("is in use by another process")
        q.end()
    s.start().listed().stop().exact()


def test_reading():
    s = Stage().stop()
    s.qemu_io("read 0 1M", options=["-r"])
    s.start().listed()
    s.write(9 * MIB, 512)
    s.stop().exact()


def test_qemu_io():
    """Zeroing and discarding leave L2 entries that hide later data."""
    s = Stage().stop()
    pattern = b"\x5a" * 5 * MIB
    s.qemu_io("write -P 0x5a 8M 5M", "write -z 10M 2M", "write -z 1M 700K",
              "discard 20M 4M", "write -z -u 30M 4M", options=["-d", "unmap"])
    s.model.set(8 * MIB, pattern)
    for offset, length in ((10 * MIB, 2 * MIB), (MIB, 700 << 10),
                           (20 * MIB, 4 * MIB), (30 * MIB, 4 * MIB)):
        s.model.set(offset, bytes(length))
        s.touched(offset, length)
    s.touched(8 * MIB, 5 * MIB)
    entries = json.loads(run("qemu-img", "map", "--output=json", SIDECAR))
    assert any(e["zero"] for e in entries if e["start"] <= 30 * MIB <
               e["start"] + e["length"]), entries
    s.start().listed()
    for offset in 10 * MIB, 11 * MIB - 512, 21 * MIB, 33 * MIB, MIB + 4096:
        s.write(offset, 1024)
    s.stop().exact()


def test_load():
    """A real load through QEMU, several times in turn."""
    s = Stage().stop()
    for turn in range(3):
        q = StorageDaemon(SIDECAR, "qcow2")
        w = LoggingWriter(q.uri, s.model, seed=turn)
        time.sleep(0.3)
        w.stop()
        assert w.done > 10 and w.errors == 0, w.last_error
        q.end()
        for start, end in w.touched:
            s.touched(start, end - start)
        s.start().listed()
        w = LoggingWriter(s.daemon.uri("d"), s.model, seed=100 + turn)
        time.sleep(0.2)
        w.stop()
        for start, end in w.touched:
            s.touched(start, end - start)
        s.listed().stop().exact()


def test_bitmap_commands():
    s = Stage().stop()
    img = lambda *args: run("qemu-img", "bitmap", *args)
    img("--add", "-g", "8192", SIDECAR, "new")
    img("--merge", "a", SIDECAR, "new")
    img("--disable", SIDECAR, "a")
    img("--enable", SIDECAR, "off")
    img("--clear", SIDECAR, "off")
    img("--remove", SIDECAR, "fine")
    # merged in granules of 64 KiB
    s.dirty["new"] = granules(s.dirty["a"], 65536, SIZE)
    del s.dirty["fine"]
    s.recording = {"new", "off"}
    s.qemu_io("write -P 1 13M 1024")
    s.model.set(13 * MIB, b"\1" * 1024)
    s.touched(13 * MIB, 1024)
    s.start().listed()
    s.write(14 * MIB, 5000 // 512 * 512)
    s.stop().exact()
    # all of them gone, and one again
    for name in list(s.dirty):
        img("--remove", SIDECAR, name)
    s.dirty, s.recording = {}, set()
    s.start().listed().stop().exact()
    img("--add", "-g", "8192", SIDECAR, "new")
    s.dirty, s.recording = {"new": []}, {"new"}
    s.start().listed()
    s.write(15 * MIB, 512)
    s.stop().exact()


def test_grown():
    """QEMU leaves what it adds clean; here it is dirty."""
    s = Stage().stop()
    run("qemu-img", "resize", SIDECAR, "40M")
    s.start()
    b = s.bitmaps()
    assert not any("inconsistent" in i for i in b.values()), b
    assert "was extended from %d to" % SIZE in b["a"]["reason"], b
    assert "reason" not in b["off"], b
    s.model.data.extend(bytes(40 * MIB - SIZE))
    s.model.unsure.extend(bytes((40 * MIB - SIZE) // 512))
    s.touched(SIZE, 40 * MIB - SIZE)
    s.stop().exact()


def test_killed_opening():
    """Killed when we have made its sidecar ours, and have not said so."""
    s = Stage()
    for i in range(12):
        s.stop()
        s.qemu_io("write -P 9 %dM 64K" % (4 + i))
        s.model.set((4 + i) * MIB, b"\x09" * 65536)
        s.touched((4 + i) * MIB, 65536)
        p = subprocess.Popen(
            ["nbdkit", "-f", "-U", os.path.join(TMPDIR, "k"), s.daemon.plugin,
             "disk=d=" + DISK], stderr=subprocess.DEVNULL)
        time.sleep(0.02 + random.random() * 0.06)
        p.kill()
        p.wait()
        if os.path.exists(os.path.join(TMPDIR, "k")):
            os.unlink(os.path.join(TMPDIR, "k"))
        s.start().listed()
    s.stop().exact()


def test_after_our_crash():
    """It opened what we had in use: nothing was tracked.  What it makes then is
    tracked again."""
    s = Stage().kill()
    s.qemu_io("write -P 2 16M 64K")
    s.start().given_up({"a", "fine", "off"}, "^another program .QEMU. opened "
                       "bitmaps.qcow2 for writing after a daemon had died")
    s.kill()
    run("qemu-img", "bitmap", "--add", "-g", "8192", SIDECAR, "new")
    s.qemu_io("write -P 3 17M 64K")
    s.start()
    b = s.bitmaps()
    assert "inconsistent" not in b["new"] and b["new"]["recording"], b
    assert b["new"]["count"] == 65536 and b["a"]["inconsistent"], b
    s.stop()
    qemu_img_check(SIDECAR)


def test_opened_only():
    """Even if it only looked, with the right to write: who knows."""
    s = Stage().kill()
    s.qemu_io("read 0 512")
    s.start().given_up({"a", "fine", "off"}, "after a daemon had died")
    s.stop()


def test_qemu_crash():
    s = Stage().stop()
    q = StorageDaemon(SIDECAR, "qcow2")
    w = LoggingWriter(q.uri, s.model)
    time.sleep(0.1)
    q.end(kill=True)
    w.stop()
    s.start().given_up({"a", "fine", "off"}, "^another program .QEMU. had "
                       "bitmaps.qcow2 open, and did not close it in good")
    s.stop()


def test_written_after_qemu():
    s = Stage().stop()
    s.qemu_io("write -P 4 18M 64K")
    time.sleep(0.05)
    with open(DISK, "r+b") as f:
        f.write(b"!")
    s.start().given_up({"a", "fine"}, r"vm.raw was modified at .* UTC, after "
                       r"another program \(QEMU\) had closed bitmaps.qcow2$")
    s.stop()


def test_patched():
    """Somebody changes the sidecar as QEMU never would: bit 63 stays, and the
    third cluster of the disk is zeros to whoever reads through it."""
    s = Stage()
    s.write(4 * MIB, 512)
    s.stop()
    with open(SIDECAR, "r+b") as f:
        f.seek(8 * MIB + 2 * 8)         # docs/sidecar.md
        f.write((1).to_bytes(8, "big"))
    s.start().given_up({"a", "fine"}, "and not of .*, when it was closed$")
    s.stop()
    assert s.model.data[4 * MIB:4 * MIB + 512] != bytes(512)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", DISK, SIDECAR)


def test_bypassed():
    """QEMU with the raw disk, and not the sidecar."""
    s = Stage().stop()
    run("qemu-io", "-f", "raw", "-c", "write 0 512", DISK)
    s.start().given_up({"a", "fine"}, "while no daemon had it open")
    s.stop()


random.seed(3)
for test in (test_locks, test_reading, test_qemu_io, test_load,
             test_bitmap_commands, test_grown, test_killed_opening,
             test_after_our_crash, test_opened_only, test_qemu_crash,
             test_written_after_qemu, test_patched,
             test_bypassed):
    print("== %s" % test.__name__, flush=True)
    test()
