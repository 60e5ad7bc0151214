#!/usr/bin/python3
# nbdferry - a chain of backups goes on where the disk has moved to
# SPDX-License-Identifier: BSD-3-Clause
"""Full and incremental here, a migration with a writer, incrementals there
(and back again): one chain, without a new full backup."""

from ferrytest import *
from chaintest import *

requires("nbdkit", "qemu-img")

MiB = 1 << 20
SIZE = 8 * MiB + 512


class Moving:
    """A disk that goes from one daemon to the next."""

    def __init__(self):
        self.disk = Disk(SIZE, name="host0")
        self.hosts, self.archives, self.models = 0, [], []

    def back_up(self):
        """An incremental one, unless it is the first."""
        out = "m%d.nbf" % len(self.archives)
        backup(self.disk, out, "--bitmap=nightly",
               "--incremental" if self.archives else "--full")
        self.archives.append(out)
        self.models.append(self.disk.snapshot())

    def move(self):
        self.hosts += 1
        name = "host%d" % self.hosts
        daemon = Nbdkit("disk=vda=%s.raw" % name, "size=%d" % SIZE,
                        "incoming=on", "control=%s.ctl" % name, name=name)
        writer = self.disk.writer(pause=0.001)
        run_nbdferry("migrate", self.disk.control,
                     daemon.uri().replace("///?", "///vda?"))
        until = writer.done + 20        # through the source, which forwards
        wait_for(lambda: writer.done >= until or not writer.is_alive(),
                 "the writer")
        writer.stop()
        assert writer.errors == 0, writer.last_error
        old, new = self.disk, Disk.__new__(Disk)
        new.size, new.model, new.seed = SIZE, old.model, old.seed
        new.control, new.daemon = "%s.ctl" % name, daemon
        new.qmp = QMP(new.control)
        old.stop()
        self.disk = new


m = Moving()
for hop in range(3):
    m.back_up()
    m.disk.write()
    m.back_up()
    m.disk.write(20)
    if hop < 2:
        m.move()
run_nbdferry("archive", "verify", "--chain", *m.archives)
infos = [info(a) for a in m.archives]
assert [i["full"] for i in infos] == [True] + [False] * 5, infos
assert [i["generation"] for i in infos] == [0, 0, 1, 1, 2, 2], infos
assert len({i["lineage"] for i in infos}) == 1, infos
for i in range(len(infos)):
    restore(m.archives[:i + 1], m.models[i])
refused("wrong order", "restore", "m0.nbf", "m2.nbf", "m1.nbf", "x.raw")
refused("a gap", "restore", "m0.nbf", "m2.nbf", "x.raw")
m.disk.stop()
