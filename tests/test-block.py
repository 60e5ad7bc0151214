#!/usr/bin/python3
# nbdferry - block devices: as disks, and as what backups are written to
# SPDX-License-Identifier: BSD-3-Clause
"""On loop devices: a disk is served from one, backed up to another one (in full,
and what has changed), restored to one, synced from, and moved to one."""

import shutil

from ferrytest import *
from chaintest import *
from migratetest import granules, LoggingWriter, settle

requires("nbdkit", "qemu-img", "qemu-nbd", "losetup")

MiB = 1 << 20
SIZE = 32 * MiB + 4096          # loop devices are in sectors
LARGER = SIZE + 3 * MiB


def device(name, size, fill=None):
    with open(name, "wb") as f:
        f.truncate(size)
        for at in range(0, size, MiB) if fill else ():
            f.write(fill * min(MiB, size - at))
    return loop_device(os.path.abspath(name)) or skip("no loop devices here")


def is_disk(path, model):
    """The device begins with it; what follows is as it was."""
    with open(path, "rb") as f:
        got = f.read()
    assert got[:SIZE] == bytes(model.data), path
    assert not got[SIZE:].strip(b"\xaa"), "%s: behind the disk" % path


class BlockDisk(Disk):
    """As in chaintest, on a device."""

    def __init__(self, path):
        self.size = SIZE
        self.model = Model(SIZE, open(path, "rb").read())
        self.control, self.seed = "src.ctl", 0
        self.daemon = Nbdkit("disk=vda=" + path, "state=src.state",
                             "control=" + self.control, name="src")
        self.qmp = QMP(self.control)


make_disk("src.raw", SIZE, step=MiB)
source = loop_device(os.path.abspath("src.raw")) or skip("no loop devices here")
target = device("target.raw", LARGER, b"\xaa")
small = device("small.raw", SIZE - 4096)
disk = BlockDisk(source)


def backups():
    """In place on a larger device that held something else."""
    p = run_nbdferry("backup", disk.control, small, "--bitmap=raw", "--force",
                     check=False)
    assert p.returncode == 1 and small in p.stderr, p
    for i in range(4):
        disk.write()
        h = disk.daemon.connect("vda")
        h.zero(MiB, 5 * MiB + i * 4096)
        h.trim(MiB, 9 * MiB)
        h.shutdown()
        disk.model.set(5 * MiB + i * 4096, bytes(MiB))
        disk.model.set(9 * MiB, bytes(MiB))
        models.append(disk.snapshot())
        raw = backup(disk, target, "--bitmap=raw",
                     *(["--force"] if i == 0 else ["--incremental"]))
        assert raw["status"] == "completed", raw
        is_disk(target, models[-1])
        backup(disk, "a%d.nbf" % i, "--bitmap=archive")
    p = run_nbdferry("bitmap", "map", disk.control, "raw", "--svg", small,
                     check=False)
    assert p.returncode == 1 and "block device" in p.stderr, p


def restored():
    """To a device: over all that was there."""
    archives = ["a%d.nbf" % i for i in range(4)]
    out = device("restored.raw", SIZE, b"\x55")
    for n in 1, 4:
        refused(out, "restore", *archives[:n], out)     # without --force
        run_nbdferry("restore", "--overwrite", *archives[:n], out)
        is_disk(out, models[n - 1])
    p = run_nbdferry("restore", "--overwrite", *archives, small, check=False)
    assert p.returncode == 1 and small in p.stderr, p
    with open(small, "rb") as f:
        assert not f.read().strip(b"\0"), "written to"
    # What is mounted is not touched.
    if subprocess.run(["mkfs.ext4", "-q", out]).returncode == 0:
        os.mkdir("mnt")
        if subprocess.run(["mount", out, "mnt"]).returncode == 0:
            try:
                for command in (("restore", "--overwrite", *archives, out),
                                ("backup", disk.control, out, "--force")):
                    p = run_nbdferry(*command, check=False)
                    assert p.returncode == 1 and out in p.stderr, p
            finally:
                subprocess.run(["umount", "mnt"], check=True)


def moved():
    """From device to device, with clients and their bitmaps."""
    out = device("moved.raw", SIZE, b"\x77")
    dst = Nbdkit("disk=vda=" + out, "state=dst.state", "incoming=on",
                 "control=dst.ctl", name="dst")
    names = {"fine": 512, "daily": 65536}
    for name, granularity in names.items():
        disk.qmp.command("block-dirty-bitmap-add", node="vda", name=name,
                         granularity=granularity, persistent=True)
    w = LoggingWriter(disk.daemon.uri("vda"), disk.model, seed=7)
    settle(w, 20)
    run_nbdferry("migrate", disk.control, dst.uri().rstrip("/"),
                 "--overwrite")
    settle(w, 20)
    w.stop()
    assert w.errors == 0, w.last_error
    disk.stop()
    dst.stop()
    is_disk(out, disk.model)
    for name, granularity in names.items():
        want = granules(w.touched, granularity, SIZE)
        got = bitmap_ranges("dst.state/bitmaps.qcow2", name)
        assert got == want, (name, got[:5], want[:5])
    qemu_img_check("dst.state/bitmaps.qcow2")


def in_memory():
    """Its state, without state=, is in /dev, which goes with the machine."""
    state = small + ".ferry"
    d = Nbdkit("disk=vda=" + small, name="small")
    try:
        d.stop()
        told = "is in memory and goes" in d.log_text()
        kind = subprocess.run(["stat", "-f", "-c", "%T", state], text=True,
                              stdout=subprocess.PIPE, check=True).stdout
        assert told == (kind.strip() == "tmpfs"), (kind, d.log_text())
    finally:
        shutil.rmtree(state)


models = []
in_memory()
backups()
restored()
moved()
