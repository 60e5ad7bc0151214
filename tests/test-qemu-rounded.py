#!/usr/bin/python3
# nbdferry - a disk that QEMU has rounded up
# SPDX-License-Identifier: BSD-3-Clause
"""QEMU rounds the raw file behind the sidecar up to a cluster, when it zeroes
or discards the last one and then writes to it, or resizes the image.  The disk
has the size that it has in the image, whatever happens while it is opened.
CHECK_LONG=1: it is killed at more points.
"""

import json
import os
import subprocess
import time

from ferrytest import (Nbdkit, PRELOAD, QMP, TMPDIR, bitmap_ranges, is_served,
                       own_mounts, qemu_img_check, qemu_img_info, requires,
                       run_nbdferry, wait_for)

requires("nbdkit", "qemu-img", "qemu-io", "qemu-storage-daemon")
MOUNTS = own_mounts()
MIB = 1 << 20
CLUSTER = 2 * MIB
SIZE = 10 * MIB + 1536
TAIL = 10 * MIB                 # where the last cluster begins
DISK = os.path.join(TMPDIR, "vm.raw")
STATE = DISK + ".ferry"
SIDECAR = os.path.join(STATE, "bitmaps.qcow2")
CONTROL = os.path.join(TMPDIR, "c")
LONG = bool(os.environ.get("CHECK_LONG"))
SHADOW = os.path.join(TMPDIR, "shadow")
SHIM = os.path.join(TMPDIR, "crash-shim.so")
SHIM_SOURCE = os.path.join(os.environ["srcdir"], "tests/crash-shim.c")
WAYS = (("discard 0 %d" % SIZE,), ("write -z 8M %d" % (SIZE - 8 * MIB),),
        ("write -z -u %d 1536" % TAIL,))


def run(*args):
    p = subprocess.run(args, text=True, stdin=subprocess.DEVNULL,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert p.returncode == 0, (args, p.stdout)
    return p.stdout


class Daemon:
    def __init__(self, *args, options=(), env=None):
        self.nbdkit = Nbdkit("disk=d=" + DISK, *args, "control=" + CONTROL,
                             options=options, env=env)
        self.h = self.nbdkit.connect("d")

    def stop(self):
        self.h.shutdown()
        self.nbdkit.stop()
        Nbdkit.all.remove(self.nbdkit)
        os.path.exists(CONTROL) and os.unlink(CONTROL)

    def bitmaps(self):
        qmp = QMP(CONTROL)
        node, = qmp.command("query-named-block-nodes")
        more, = qmp.command("x-ferry-query-bitmaps")
        qmp.close()
        infos = {b["name"]: b for b in node["dirty-bitmaps"]}
        for b in more["bitmaps"]:
            infos[b["name"]].update(b)
        return infos


def fails_to_start(text, *args, env=None):
    try:
        Daemon(*args, env=env)
    except RuntimeError as e:
        assert text in str(e), e
        Nbdkit.all.pop()
        return
    raise AssertionError("started")


def new(size=SIZE, *args):
    """A disk with a bitmap that has one granule of it, not served."""
    subprocess.run(["rm", "-rf", STATE, DISK], check=True)
    d = Daemon("size=%d" % size, *args)
    qmp = QMP(CONTROL)
    for name, disabled in ("b", False), ("off", True):
        qmp.command("block-dirty-bitmap-add", node="d", name=name,
                    persistent=True, granularity=4096, disabled=disabled)
    qmp.close()
    d.h.pwrite(b"\x22" * 4096, 4 * MIB)
    d.stop()


def qemu_io(*commands):
    words = [w for c in commands for w in ("-c", c)]
    run("qemu-io", "-f", "qcow2", "-d", "unmap", *words, SIDECAR)


def round_up(way):
    """What QEMU's bitmap has then."""
    qemu_io(*way, "write -P 1 %d 512" % TAIL)
    assert os.path.getsize(DISK) == TAIL + CLUSTER, os.path.getsize(DISK)
    with open(DISK, "rb") as f:
        data = f.read(SIZE)
    return bitmap_ranges(SIDECAR, "b"), data


def is_exact(size, dirty, data):
    """Not served: the disk, its bitmap, and the image."""
    assert os.path.getsize(DISK) == size, os.path.getsize(DISK)
    assert qemu_img_info(SIDECAR)["virtual-size"] == size
    qemu_img_check(SIDECAR)
    assert bitmap_ranges(SIDECAR, "b") == dirty, bitmap_ranges(SIDECAR, "b")
    assert bitmap_ranges(SIDECAR, "off") == []
    with open(DISK, "rb") as f:
        assert f.read() == data
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", SIDECAR, DISK)


def kept(d, reason=None):
    b = d.bitmaps()
    assert set(b) == {"b", "off"}, b
    assert not any("inconsistent" in i for i in b.values()), b
    assert "reason" not in b["off"], b
    assert (reason in b["b"]["reason"] if reason
            else "reason" not in b["b"]), b


def extended(was, size):
    return "was extended from %d to %d bytes" % (was, size)


def test_rounded():
    for durability in "power", "process":
        for way in WAYS:
            for args in (), ("size=%d" % SIZE,):
                args += ("durability=" + durability,)
                new(SIZE, "durability=" + durability)
                dirty, data = round_up(way)
                assert dirty[-1][1] == SIZE, dirty
                d = Daemon(*args)
                assert d.h.get_size() == SIZE, d.h.get_size()
                assert os.path.getsize(DISK) == SIZE
                assert "cut back from %d to %d bytes" % (
                    TAIL + CLUSTER, SIZE) in d.nbdkit.log_text()
                kept(d)
                assert d.h.pread(512, TAIL) == b"\1" * 512
                d.stop()
                is_exact(SIZE, dirty, data)
                # and it stays so
                d = Daemon(*args)
                kept(d)
                d.stop()
                is_exact(SIZE, dirty, data)


def test_resized():
    for durability in "power", "process":
        for more in 512, 3 * MIB, CLUSTER:
            for with_size in False, True:
                args = ("durability=" + durability,)
                new(8 * MIB, *args)
                with open(DISK, "rb") as f:
                    data = f.read() + bytes(more)
                run("qemu-img", "resize", "-f", "qcow2", SIDECAR,
                    "+%d" % more)
                size = 8 * MIB + more
                assert os.path.getsize(DISK) == -(-size // CLUSTER) * CLUSTER
                if with_size:
                    fails_to_start("has %d bytes, not the" % size,
                                   "size=8M", *args)
                    args += ("size=%d" % size,)
                d = Daemon(*args)
                assert d.h.get_size() == size, d.h.get_size()
                kept(d, extended(8 * MIB, size))
                d.stop()
                is_exact(size, [(4 * MIB, 4 * MIB + 4096), (8 * MIB, size)],
                         data)


def test_recover():
    new()
    dirty, data = round_up(WAYS[0])
    out = json.loads(run_nbdferry("recover", "--json", DISK).stdout)
    assert {b["result"] for b in out["bitmaps"]} == {"kept"}, out
    is_exact(SIZE, dirty, data)
    new(8 * MIB)
    run("qemu-img", "resize", "-f", "qcow2", SIDECAR, "+512")
    run_nbdferry("recover", DISK)
    assert os.path.getsize(DISK) == 8 * MIB + 512
    assert bitmap_ranges(SIDECAR, "b")[-1] == (8 * MIB, 8 * MIB + 512)


def snapshot():
    paths = [DISK] + sorted(e.path for e in os.scandir(STATE))
    return [(p, os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in paths]


def test_readonly():
    """A file that cannot be written: the size is right, nothing is changed."""
    new()
    dirty, data = round_up(WAYS[0])
    before = snapshot()
    if MOUNTS:
        run("mount", "--bind", DISK, DISK)
        run("mount", "-o", "remount,bind,ro", DISK)
        for args in (), ("size=%d" % SIZE,):
            d = Daemon(*args)
            assert d.h.get_size() == SIZE and d.h.is_read_only()
            assert d.h.pread(512, TAIL) == b"\1" * 512
            assert d.h.pread(512, SIZE - 512) == bytes(512)
            d.stop()
        run("umount", DISK)
        assert snapshot() == before, (snapshot(), before)
    # nbdkit's -r concerns clients only
    d = Daemon(options=["-r"])
    assert d.h.get_size() == SIZE and d.h.is_read_only()
    kept(d)
    d.stop()
    is_exact(SIZE, dirty, data)


def test_not_rounded():
    """Something lies beyond; or nobody wrote through the sidecar."""
    for byte in SIZE, TAIL + CLUSTER - 1:
        new()
        round_up(WAYS[0])
        with open(DISK, "r+b") as f:
            f.seek(byte)
            f.write(b"!")
        d = Daemon()
        assert d.h.get_size() == TAIL + CLUSTER
        kept(d, extended(SIZE, TAIL + CLUSTER))
        d.stop()
    new()
    os.truncate(DISK, TAIL + CLUSTER)
    d = Daemon()
    assert d.h.get_size() == TAIL + CLUSTER
    kept(d, extended(SIZE, TAIL + CLUSTER))
    d.stop()
    # not to where the cluster ends
    new()
    qemu_io("write 0 512")
    os.truncate(DISK, TAIL + CLUSTER + 512)
    d = Daemon()
    assert d.h.get_size() == TAIL + CLUSTER + 512
    d.stop()


def test_in_use():
    """QEMU has the image open: its file is not cut."""
    new()
    dirty, data = round_up(WAYS[0])
    socket = os.path.join(TMPDIR, "q")
    qsd = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev",
         "driver=qcow2,node-name=n,file.driver=file,file.filename=" + SIDECAR,
         "--nbd-server", "addr.type=unix,addr.path=" + socket,
         "--export", "type=nbd,id=e,node-name=n,writable=on,name="])
    wait_for(lambda: is_served(socket), "qemu-storage-daemon")
    fails_to_start("")
    assert os.path.getsize(DISK) == TAIL + CLUSTER
    qsd.terminate()
    qsd.wait()
    d = Daemon()
    kept(d)
    d.stop()
    is_exact(SIZE, dirty, data)


def test_bypassed():
    """It does not hide who wrote past the image."""
    new()
    round_up(WAYS[0])
    time.sleep(0.05)
    with open(DISK, "r+b") as f:
        f.write(b"!")
    d = Daemon()
    assert d.h.get_size() == SIZE
    b = d.bitmaps()
    assert b["b"]["inconsistent"] and "was modified at" in b["b"]["reason"], b
    d.stop()


def die_at(point):
    """True if it died; what it had synced until then is in SHADOW."""
    subprocess.run(["rm", "-rf", SHADOW], check=True)
    os.mkdir(SHADOW)
    for path in DISK, SIDECAR:
        run("cp", "-p", path, "%s/%d" % (SHADOW, os.stat(path).st_ino))
    open(SHADOW + "/armed", "w").close()
    env = {"LD_PRELOAD": SHIM, "SHIM_DIR": SHADOW, "SHIM_DIE": str(point)}
    try:
        d = Daemon(env=env)
    except RuntimeError as e:
        assert "ended with -9" in str(e), e
        Nbdkit.all.pop()
        for path in CONTROL, os.path.join(TMPDIR, "nbdkit.sock"):
            os.path.exists(path) and os.unlink(path)
        return True
    os.unlink(SHADOW + "/armed")
    d.stop()
    return False


def put_back(path):
    kept_file = "%s/%d" % (SHADOW, os.stat(path).st_ino)
    st = os.stat(kept_file)
    run("cp", kept_file, path)
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


def test_killed():
    """At each sync; with all that was written, or with what was durable of the
    disk and the sidecar, of each or of one of them."""
    if PRELOAD:
        print("not with a sanitizer, which is preloaded itself")
        return
    subprocess.run([*os.environ["FERRY_CC"].split(), "-shared", "-fPIC", "-o",
                    SHIM, SHIM_SOURCE, "-ldl"], check=True)
    for lost in (), (DISK,), (SIDECAR,), (DISK, SIDECAR):
        point, step, died = 0, 1, True
        while died:
            new()
            dirty, data = round_up(WAYS[0])
            inode = os.stat(SIDECAR).st_ino
            died = die_at(point)
            point += step
            if os.stat(SIDECAR).st_ino != inode:
                if lost:
                    break       # what comes now is not new
                step = 1 if LONG else 4
            if died:
                for path in lost:
                    put_back(path)
            d = Daemon(env={"FERRY_TEST_BOOT_ID": "later"} if lost else None)
            assert d.h.get_size() == SIZE, (lost, point, d.h.get_size())
            kept(d)
            d.stop()
            is_exact(SIZE, dirty, data)
        assert point > 4, point


for test in (test_rounded, test_resized, test_recover, test_readonly,
             test_not_rounded, test_in_use, test_bypassed, test_killed):
    print("== %s" % test.__name__, flush=True)
    test()
