#!/usr/bin/python3
# nbdferry - many writers with large writes, and a link that is slow
# SPDX-License-Identifier: BSD-3-Clause
"""What is being written at any moment is far more than the link carries within
the downtime limit: writers are slowed until it converges, however many they
are; in both copy modes, and none of them is left behind."""

from ferrytest import *
from linktest import Link
from migratetest import *

requires("nbdkit", "qemu-img")

MiB = 1 << 20
WRITERS = 16
SIZE = WRITERS * 3 * MiB // 2


def converges(mode):
    Nbdkit.all.clear()
    clear_folder()
    pair = Pair({"vda": SIZE}, tcp=True)
    link = Link(pair.dst.port, rate=16e6)
    step = SIZE // WRITERS
    writers = [LoggingWriter(pair.src.uri("vda"), pair.models["vda"],
                             i * step, (i + 1) * step, seed=i + 1,
                             max_length=MiB) for i in range(WRITERS)]
    pair.qmp.command("migrate-set-parameters", copy_mode=mode)
    pair.qmp.command("migrate", uri=link.uri("vda"))
    slowed = 0

    def over():
        nonlocal slowed
        info = pair.qmp.command("query-migrate")
        slowed = max(slowed, info["x-ferry"]["throttle-longest-us"])
        return info["status"] in ("completed", "failed") and info

    info = wait_for(over, "the end of the migration", 120)
    assert info["status"] == "completed", info
    for w in writers:
        w.stop()
        assert w.errors == 0 and w.done > 2, (w.last_error, w.done)
    pair.qmp.close()
    pair.stop()
    link.stop()
    pair.check_disk("vda")
    slowest = max(w.longest for w in writers)
    print("%s: %d ms, %d rounds, hold %d us, a write waited up to %d ms, "
          "of it %d ms for its turn" % (
              mode, info["total-time"], info["disk"]["dirty-sync-count"],
              info["x-ferry"]["hold-us"], slowest * 1e3, slowed / 1e3))
    # Who waits for the link with each write may be slow enough by that.
    assert slowed > 0 or mode == "write-blocking", info
    assert slowest < 20, slowest


converges("background")
converges("write-blocking")
