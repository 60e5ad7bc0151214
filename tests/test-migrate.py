#!/usr/bin/python3
# nbdferry - a disk and its bitmaps move while clients write
# SPDX-License-Identifier: BSD-3-Clause
"""Every combination of what the design promises: data byte for byte, bitmaps
bit for bit, clients that notice nothing, over TCP and Unix sockets."""

from ferrytest import *
from migratetest import *

requires("nbdkit", "qemu-img", "qemu-nbd")

MiB = 1 << 20
ODD = 48 * MiB + 7 * 512  # a multiple of 512 only

SHIFTS = [9, 12, 16, 21, 31]


def one(tcp, size, channels, compression="none", seed=1):
    clear_folder()
    pair = Pair({"vda": size}, tcp=tcp, step=512 * 1024 + 512)
    for shift in SHIFTS:
        pair.add("vda", "g%d" % shift, 1 << shift)
    pair.add("vda", "empty", disabled=True)
    pair.add("vda", "name with spaces, ü and \U0001F600", 4096)
    pair.add("vda", "transient", persistent=False)
    uri = pair.src.uri("vda")
    model = pair.models["vda"]
    area = size // 2 // 512 * 512
    writers = [LoggingWriter(uri, model, 0, area, seed=seed, pause=0.0002),
               LoggingWriter(uri, model, area, size, seed=seed + 1,
                             pause=0.0002)]
    settle(writers[0], 20)
    # A bitmap that is frozen half way.
    pair.add("vda", "frozen", 65536)
    settle(writers[0], 20)
    pair.qmp.command("block-dirty-bitmap-disable", node="vda", name="frozen")
    pair.migrate("vda", multifd_channels=channels,
                 multifd_compression=compression)
    info = pair.wait("completed")
    done = writers[0].done
    settle(writers[0], 20)
    for w in writers:
        w.stop()
        assert w.errors == 0 and w.last_error is None, w.last_error
    slowest = max(w.longest for w in writers)
    print("%s, %d channels, %s: %d ms, downtime %d ms, slowest request "
          "%.1f ms, %d rounds, %d requests" % (
              "TCP" if tcp else "Unix", channels, compression,
              info["total-time"], info["downtime"], slowest * 1e3,
              info["disk"]["dirty-sync-count"],
              sum(w.done for w in writers)))
    assert info["downtime"] * 1e3 >= info["x-ferry"]["hold-us"], info
    # What a client sees through the source is what the destination has.
    assert done > 0 and read_all(uri) == bytes(model.data)
    dst = QMP("dst.ctl")
    node, = dst.command("query-named-block-nodes")
    have = {b["name"]: b for b in node["dirty-bitmaps"]}
    assert have["transient"]["persistent"] is False
    assert have["frozen"]["recording"] is False
    assert have["empty"] == dict(have["empty"], count=0, recording=False,
                                 persistent=True, granularity=65536)
    touched = [t for w in writers for t in w.touched]
    want = granules(touched, 65536, size)
    bits = sum(-(-(e - s) // 65536) for s, e in want)
    assert have["transient"]["count"] == bits * 65536, have["transient"]
    dst.close()
    src = QMP("src.ctl")
    frozen = {b["name"]: b for b in have.values()}["frozen"]["count"]
    assert 0 < frozen < bits * 65536
    src.close()
    pair.stop()
    pair.check_disk("vda")
    for shift in SHIFTS:
        pair.check_bitmap("vda", "g%d" % shift,
                          granules(touched, 1 << shift, size))
    pair.check_bitmap("vda", "empty", [])
    pair.check_bitmap("vda", "name with spaces, ü and \U0001F600",
                      granules(touched, 4096, size))
    names = {b["name"] for b in qemu_img_info(pair.sidecar("vda"))
             ["format-specific"]["data"]["bitmaps"]}
    assert "transient" not in names and "frozen" in names, names


one(tcp=True, size=ODD, channels=4)
one(tcp=False, size=ODD, channels=1, seed=3)
one(tcp=True, size=ODD, channels=16, compression="zstd", seed=5)
one(tcp=False, size=64 * MiB, channels=3, compression="zlib", seed=7)
