#!/usr/bin/python3
# nbdferry - kill -9 while a bitmap is cleared
# SPDX-License-Identifier: BSD-3-Clause
"""No other bitmap notices; and unless a clear was under way, which may have begun
at any time, the bitmap has all that was written after the last one."""

from ferrytest import *

requires("nbdkit", "qemu-nbd")

MiB = 1 << 20
SIZE = 1 << 30
GRANULE = 65536
rng = random.Random(7)


class Clears(threading.Thread):
    """Fills it and clears it, again and again; .since is when the last clear
    was answered, None while it is under way."""

    def __init__(self):
        super().__init__()
        self.qmp = QMP("ctl")
        self.since, self.rounds = 0, 0

    def run(self):
        try:
            while True:
                self.qmp.command("block-dirty-bitmap-merge", node="d",
                                 target="c", bitmaps=["full"])
                self.since = None
                self.qmp.command("block-dirty-bitmap-clear", node="d",
                                 name="c")
                self.since = time.monotonic()
                self.rounds += 1
        except (EOFError, OSError, ValueError):
            pass


def write(uri, stop, log):
    """One granule after another; when each was begun, and is there."""
    h = connect(uri)
    for i in range(16, SIZE // GRANULE):
        began = time.monotonic()
        try:
            h.pwrite(b"w" * 512, i * GRANULE)
        except nbd.Error:
            break
        log.append((began, i))
        if stop.is_set():
            break


def one_round(durability):
    daemon = Nbdkit("disk=d=d.raw", "size=%d" % SIZE, "control=ctl",
                    "durability=" + durability)
    qmp = QMP("ctl")
    h = daemon.connect("d")
    for name, granularity in ("full", MiB), ("keep", 4096), ("c", 512):
        if name == "keep":      # only the first one has what was written
            h.zero(SIZE, 0)
            qmp.command("block-dirty-bitmap-disable", node="d", name="full")
        qmp.command("block-dirty-bitmap-add", node="d", name=name,
                    granularity=granularity, persistent=True)
    h.pwrite(b"x" * 4096, 4096)
    clears, log, stop = Clears(), [], threading.Event()
    writer = threading.Thread(target=write,
                              args=(daemon.uri("d"), stop, log))
    clears.start()
    writer.start()
    time.sleep(rng.uniform(0.01, 0.2))          # any moment will do
    daemon.kill()
    stop.set()
    clears.join()
    writer.join()
    daemon.start()
    bitmaps = {b["name"]: b for d in QMP("ctl").command(
        "query-named-block-nodes") for b in d["dirty-bitmaps"]}
    listed = {b["name"]: b for d in QMP("ctl").command(
        "x-ferry-query-bitmaps") for b in d["bitmaps"]}
    assert not [b for b in listed.values() if "reason" in b], listed
    # The writer's granules are those of 'keep', too: 4 KiB of each.
    written = {i for began, i in log}
    count = bitmaps["keep"]["count"] // 4096
    assert len(written) + 1 <= count <= len(written) + 2, (count, len(written))
    daemon.stop()
    dirty = bitmap_ranges("d.raw.ferry/bitmaps.qcow2", "c")
    for began, i in log:
        if clears.since is not None and began > clears.since:
            at = i * GRANULE
            assert any(a <= at < b for a, b in dirty), (i, clears.since)
    os.unlink("d.raw")
    shutil.rmtree("d.raw.ferry")
    return clears.rounds


for how in "power", "process":
    print(how, [one_round(how) for i in range(6)])
