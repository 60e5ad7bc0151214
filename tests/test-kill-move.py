#!/usr/bin/python3
# nbdferry - killed while bits move from one bitmap to another
# SPDX-License-Identifier: BSD-3-Clause
"""Two full bitmaps, and a transaction that replaces one by the other, or moves
one into a third: before and after it every bit is somewhere.  Killed in the
middle of it, it must still be."""

import os
import time

from ferrytest import Nbdkit, QMP, requires

requires("nbdkit")
GiB = 1 << 30
SIZE, GRANULE = 64 * GiB, 1024
ROUNDS = 20 if os.environ.get("CHECK_LONG") else 4

with open("big.raw", "wb") as f:
    f.truncate(SIZE)


def start():
    if os.path.exists("c"):
        os.unlink("c")
    return Nbdkit("disk=d=big.raw", "control=c", name="d"), QMP("c")


def action(what, **data):
    return {"type": "block-dirty-bitmap-" + what, "data": dict(data, node="d")}


def counts(qmp):
    node, = qmp.command("query-named-block-nodes")
    return {b["name"]: b["count"] for b in node.get("dirty-bitmaps", [])
            if not b.get("inconsistent")}


def fill(daemon, qmp):
    have = counts(qmp)
    for name in "ab":
        if name not in have:
            qmp.command("block-dirty-bitmap-add", node="d", name=name,
                        granularity=GRANULE, persistent=True)
    h = daemon.connect("d")
    for offset in range(0, SIZE, GiB):
        h.zero(GiB, offset)
    h.shutdown()
    assert counts(qmp)["a"] == counts(qmp)["b"] == SIZE


for i in range(ROUNDS):
    daemon, qmp = start()
    fill(daemon, qmp)
    qmp.close()
    daemon.stop()  # all is durable, and no region armed
    daemon, qmp = start()
    qmp.send({"execute": "transaction", "arguments": {"actions": [
        action("clear", name="b"), action("merge", target="b", bitmaps=["a"])]
        if i % 2 else
        [action("clear", name="b"), action("merge", target="b", bitmaps=["a"]),
         action("clear", name="a")]}})
    time.sleep(0.01 + 0.03 * i)  # a different place each time, no more
    daemon.kill()
    qmp.close()
    daemon, qmp = start()
    have = counts(qmp)
    print("killed after %d ms: %s" % (10 + 30 * i, have))
    assert have["b"] == SIZE, have
    if i % 2:
        assert have["a"] == SIZE, have
    qmp.close()
    daemon.stop()
