#!/usr/bin/python3
# nbdferry - what is trimmed or zeroed while a disk moves costs its extents
# SPDX-License-Identifier: BSD-3-Clause

import random

from ferrytest import *
from migratetest import *

requires("nbdkit", "qemu-img", "qemu-nbd")

MiB, GiB, TiB = 1 << 20, 1 << 30, 1 << 40
SIZE, KEEP, RATE = 128 * MiB, 8 * MiB, 32 * MiB


def pair(size):
    for side in "src", "dst":
        subprocess.run(["rm", "-rf", "%s.raw" % side, "%s.raw.ferry" % side],
                       check=True)
    with open("src.raw", "wb") as f:
        f.truncate(size)
        yield f
    src = Nbdkit("disk=vda=src.raw", "control=src.ctl", name="src")
    dst = Nbdkit("disk=vda=dst.raw", "size=%d" % size, "incoming=on",
                 "control=dst.ctl", name="dst")
    qmp = QMP("src.ctl")
    yield src, dst, qmp
    qmp.close()
    src.stop()
    dst.stop()


def wait_end(qmp):
    def ended():
        info = qmp.command("query-migrate")
        assert info["status"] not in ("failed", "cancelled"), info
        return info if info["status"] == "completed" else None
    return wait_for(ended, "the end of the migration", 60)


def transferred(qmp):
    return qmp.command("query-migrate").get("disk", {}).get("transferred", 0)


def is_sparse(path):
    """Nothing is allocated where nothing should be."""
    return os.stat(path).st_blocks * 512 < KEEP + 4 * MiB


def test_data_goes(how):
    """Data that is trimmed before its turn is not sent at all; what was sent
    already becomes a hole there."""
    steps = pair(SIZE)
    f = next(steps)
    f.write(random.Random(1).randbytes(SIZE))
    src, dst, qmp = next(steps)
    qmp.command("block-dirty-bitmap-add", node="vda", name="daily",
                granularity=65536, persistent=True)
    qmp.command("migrate-set-parameters", **{"max-bandwidth": RATE})
    h = src.connect("vda")
    qmp.command("migrate", uri=dst.uri("vda"))
    wait_for(lambda: transferred(qmp) > 2 * MiB, "some data to be sent")
    getattr(h, how)(SIZE - KEEP, 0)
    sent = transferred(qmp)
    info = wait_end(qmp)
    h.shutdown()
    more = info["disk"]["transferred"] - sent
    print("%s: %d KiB sent before, %d KiB after, %d KiB as extents" % (
        how, sent >> 10, more >> 10, info["disk"]["duplicate"] * 4))
    # What was in flight, and what is kept: no more than that.
    assert more < KEEP + 16 * MiB, info
    assert info["disk"]["duplicate"] * 4096 >= SIZE - KEEP
    next(steps, None)
    with open("src.raw", "rb") as a, open("dst.raw", "rb") as b:
        assert a.read() == b.read()
    assert is_sparse("src.raw") and is_sparse("dst.raw")
    got = bitmap_ranges("dst.raw.ferry/bitmaps.qcow2", "daily")
    assert got == [(0, SIZE - KEEP)], got


def test_large():
    """Half a terabyte that is trimmed costs some packets without data."""
    steps = pair(TiB)
    f = next(steps)
    f.seek(TiB // 2)
    f.write(random.Random(2).randbytes(24 * MiB))
    src, dst, qmp = next(steps)
    qmp.command("block-dirty-bitmap-add", node="vda", name="daily",
                granularity=65536, persistent=True)
    qmp.command("migrate-set-parameters", **{"max-bandwidth": RATE})
    h = src.connect("vda")
    qmp.command("migrate", uri=dst.uri("vda"))
    wait_for(lambda: transferred(qmp) > 2 * MiB, "some data to be sent")
    for at in range(0, 512 * GiB, GiB):
        h.trim(GiB, 128 * GiB + at)
    info = wait_end(qmp)
    h.shutdown()
    print("1 TiB: %d KiB sent in %d ms" % (
        info["disk"]["transferred"] >> 10, info["total-time"]))
    assert info["disk"]["transferred"] < 25 * MiB
    assert info["x-ferry"]["bitmap-bytes"] < MiB
    next(steps, None)
    assert os.stat("dst.raw").st_blocks * 512 < 32 * MiB
    got = bitmap_ranges("dst.raw.ferry/bitmaps.qcow2", "daily")
    assert got == [(128 * GiB, 640 * GiB)], got


test_data_goes("trim")
test_data_goes("zero")
test_large()
