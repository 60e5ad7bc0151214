#!/usr/bin/python3
# nbdferry - what a migration takes of memory
# SPDX-License-Identifier: BSD-3-Clause
"""nbdkit has a buffer of the largest packet for each of its threads: with eight
channels these would be 128 MiB at the destination.  They are given back."""

from ferrytest import *
from migratetest import *

requires("nbdkit")

MiB = 1 << 20
SIZE = 512 * MiB
CHANNELS = 8
if os.environ.get("FERRY_PRELOAD"):
    skip("a sanitizer has memory of its own")


def peak(daemon):
    with open("/proc/%d/status" % daemon.process.pid) as f:
        for line in f:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    raise ValueError("no VmHWM")


pair = Pair({"vda": SIZE}, step=65536)
with open("src-vda.raw", "r+b") as f:
    block = os.urandom(MiB)
    for at in range(0, SIZE, MiB):
        f.write(block)
src, dst = peak(pair.src), peak(pair.dst)
pair.migrate("vda", multifd_channels=CHANNELS)
info = pair.wait("completed")
assert info["x-ferry"]["channels"] == CHANNELS, info
src, dst = peak(pair.src) - src, peak(pair.dst) - dst
print("source %.1f MiB, destination %.1f MiB more than at rest" % (src, dst))
assert src < 40, src
assert dst < 80, dst
pair.qmp.close()
pair.stop()
subprocess.run(["cmp", "src-vda.raw", "dst-vda.raw"], check=True)
