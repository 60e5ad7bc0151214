#!/usr/bin/python3
# nbdferry - nbdferry backup reads the disk itself, as far as it is as it was
# SPDX-License-Identifier: BSD-3-Clause
"""What nobody overwrites does not pass through the daemon, and what somebody
does, comes from there as it was; with --uri all does.  When the daemon has died,
nothing that was read counts, whoever has written since."""

import os
import re
import subprocess

from ferrytest import *

requires("nbdkit")
MiB = 1 << 20
SIZE = 48 * MiB
GRANULE = 65536

model = make_disk("a.raw", SIZE)
daemon = Nbdkit("disk=vda=a.raw", "control=c",
                "logfile=" + os.path.abspath("log"), name="d",
                options=("--filter=log",))
h = daemon.connect("vda")


def reads():
    """(offset, length) of all that was read of backups since the last call."""
    with open("log") as f:
        text = f.read()
    ours = re.findall(r"connection=(\d+) Connect export.*@backup/", text)
    found = [(int(o, 16), int(n, 16)) for c, o, n in re.findall(
        r"connection=(\d+) Read .*offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)",
        text) if c in ours]
    os.truncate("log", 0)
    return found


def write(offset, length):
    data = os.urandom(length)
    h.pwrite(data, offset)
    model.set(offset, data)


class Held:
    """An archive that goes to a pipe; most of it waits for .rest ()."""

    def __init__(self, *args):
        self.process = subprocess.Popen(
            [NBDFERRY, "backup", "c", "-", "--compression=none", *args],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0,
            stderr=subprocess.PIPE)
        self.data = b""
        while len(self.data) < 100000: # of data: all extents are known
            more = self.process.stdout.read(100000)
            assert more, self.process.stderr.read()
            self.data += more

    def rest(self, out):
        more, errors = self.process.communicate(timeout=60)
        with open(out, "wb") as f:
            f.write(self.data + more)
        self.errors = errors.decode()
        return self.process.returncode


# ---- nobody writes
run_nbdferry("backup", "c", "full.nbf", "--bitmap=b")
assert reads() == []
run_nbdferry("backup", "c", "other.nbf", "--uri", daemon.uri())
assert sum(n for _, n in reads()) >= 8 * MiB
run_nbdferry("backup", "c", "image.raw", "--format=raw", "--bitmap=i")
compare("image.raw", model)
reads()
for i in range(20):
    write(i * 2 * MiB, GRANULE)
run_nbdferry("backup", "c", "image.raw", "--format=raw", "--bitmap=i")
compare("image.raw", model)
assert reads() == []

# ---- somebody overwrites what is still to be read, and more
write(MiB, 40 * MiB)
was = Model(SIZE, model.data)
b = Held("--bitmap=b")
write(39 * MiB + 4096, 2 * MiB)
write(30 * MiB, 512)
assert b.rest("inc.nbf") == 0, b.errors
late = reads()
assert late and all(o >= 30 * MiB for o, _ in late), late
run_nbdferry("restore", "full.nbf", "inc.nbf", "restored.raw")
compare("restored.raw", was)

# ---- the daemon dies, and somebody writes behind the backup's back
write(0, 45 * MiB)
b = Held("--bitmap=b")
h.shutdown()
daemon.kill()
daemon.start()
h = daemon.connect("vda")
write(20 * MiB, 20 * MiB)
assert b.rest("torn.nbf") == 1
assert "closed the connection" in b.errors, b.errors
assert "complete" not in b.errors, b.errors
# What the pipe has got holds some of that, so it must not count as complete.
r = run_nbdferry("archive", "verify", "torn.nbf", check=False)
assert r.returncode == 1 and "no end" in r.stdout + r.stderr, r
assert run_nbdferry("restore", "full.nbf", "torn.nbf", "torn.raw",
                    check=False).returncode == 1
assert not os.path.exists("torn.raw")

h.shutdown()
daemon.stop()
