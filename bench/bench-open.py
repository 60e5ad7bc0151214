#!/usr/bin/python3
# nbdferry - benchmark: opening a large disk with bitmaps
# SPDX-License-Identifier: BSD-3-Clause
"""How long nbdkit takes to serve a sparse disk, by nbdkit's file plugin and
by ours: new (the sidecar is made), after a clean stop, and after kill -9.
"""

from ferrybench import *

a = options(__doc__, rounds=(5, 2), size_gib=(1024, 1024),
            granularity=("64K", "64K"))

disk = path("big.raw")
with open(disk, "wb") as f:
    f.truncate(a.size_gib << 30)
FERRY = [PLUGIN, "disk=" + disk, "control=" + path("ctl")]


def open_it(argv, end, prepare=False):
    t = time.monotonic()
    d = Daemon("d", argv)
    t = time.monotonic() - t
    if prepare:
        timed([NBDFERRY, "bitmap", "add", path("ctl"), "b", "--granularity",
               a.granularity])
    if end == signal.SIGKILL:
        d.process.kill()
        d.process.wait()
    else:
        d.stop()
    return t * 1e3


rows = {"file plugin": [], "new": [], "after a clean stop": [],
        "after kill -9": []}
for _ in range(a.rounds):
    subprocess.run(["rm", "-rf", disk + ".ferry"], check=True)
    rows["file plugin"].append(open_it(["file", disk], signal.SIGTERM))
    rows["new"].append(open_it(FERRY, signal.SIGTERM, True))
    rows["after a clean stop"].append(open_it(FERRY, signal.SIGKILL))
    rows["after kill -9"].append(open_it(FERRY, signal.SIGTERM))
table("opening a disk of %d GiB with a bitmap of %s (%d rounds, ms until "
      "nbdkit serves)" % (a.size_gib, a.granularity, a.rounds),
      ["", "median", "min", "max"],
      [[k, med(v), min(v), max(v)] for k, v in rows.items()])
done()
