# nbdferry - what tests of backups share
# SPDX-License-Identifier: BSD-3-Clause
"""Backups over QMP, and ways to hold what they show against a Model."""

import json
import subprocess
import threading
import uuid

import nbd

from ferrytest import Model, QMPError, Writer, connect, read_all

HOLE, ZERO = 1, 2  # of base:allocation


def begin(qmp, node, **arguments):
    return qmp.command("x-ferry-backup-begin", node=node,
                       **dict({"id": str(uuid.uuid4())}, **arguments))


def end(qmp, backup, success=True):
    qmp.command("x-ferry-backup-end", node=backup["node"], id=backup["id"],
                success=success)


def backups(qmp):
    return {b["id"]: b for b in qmp.command("x-ferry-query-backups")}


def action(what, **data):
    prefix = "x-ferry-backup-" if what in ("begin", "end") \
        else "block-dirty-bitmap-"
    return {"type": prefix + what,
            "data": {k.replace("_", "-"): v for k, v in data.items()}}


def transaction(qmp, *actions):
    qmp.command("transaction", actions=list(actions))


def bitmap(qmp, node, name):
    """What query-named-block-nodes says of a bitmap, with its point."""
    for n in qmp.command("query-named-block-nodes"):
        for b in n.get("dirty-bitmaps", []):
            if n["node-name"] == node and b["name"] == name:
                for f in qmp.command("x-ferry-query-bitmaps"):
                    for x in f["bitmaps"]:
                        if f["node"] == node and x["name"] == name:
                            return dict(x, **b)
    return None


def refused(what, function, *args, **kwargs):
    """It must fail, and say so with these words."""
    try:
        function(*args, **kwargs)
    except (QMPError, nbd.Error) as e:
        assert what in str(e), e
        return
    raise AssertionError("not refused: %s" % what)


def ranges(uri, export):
    """What 'nbdinfo --map' says: [(offset, length, type)]."""
    text = subprocess.check_output(["nbdinfo", "--map", "--json",
                                    uri(export)])
    return [(e["offset"], e["length"], e["type"]) for e in json.loads(text)]


def in_backup(uri, export):
    """[(start, end)] of what is in an incremental one: all but holes."""
    found = []
    for offset, length, kind in ranges(uri, export):
        if kind & HOLE:
            continue
        if found and found[-1][1] == offset:
            found[-1] = found[-1][0], offset + length
        else:
            found.append((offset, offset + length))
    return found


def apply(uri, export, base):
    """'base' (bytearray) with what is in an incremental backup put over it."""
    h = connect(uri(export))
    for start, stop in in_backup(uri, export):
        for at in range(start, stop, 1 << 20):
            n = min(1 << 20, stop - at)
            base[at:at + n] = h.pread(n, at)
    h.shutdown()
    return base


class Held:
    """Writers that can be made to pause between two requests, so that what the
    disk holds then is known."""

    def __init__(self, daemon, exports, models, areas=2, **kwargs):
        self.gate = threading.RLock()
        self.writers = []
        for k, (export, model) in enumerate(zip(exports, models)):
            size = len(model.data)
            for i in range(areas):
                first = size * i // areas // 512 * 512
                last = size * (i + 1) // areas // 512 * 512
                w = Writer(daemon.uri(export), model, first, last,
                           seed=100 * k + i, **kwargs)
                self.hold(w)
                self.writers.append(w)

    def hold(self, writer):
        request = writer.request

        def gated(offset, length):
            with writer.held:
                request(offset, length)
        writer.held = threading.Lock()
        writer.request = gated

    def __enter__(self):
        for w in self.writers:
            w.held.acquire()

    def __exit__(self, *_):
        for w in self.writers:
            w.held.release()

    def check(self):
        for w in self.writers:
            assert w.is_alive(), "a writer has ended: %s" % w.last_error

    def wait(self, requests):
        """Until each has done so many more."""
        was = [w.done + w.errors for w in self.writers]
        for w, n in zip(self.writers, was):
            while w.done + w.errors < n + requests and w.is_alive():
                w.join(0.005)

    def stop(self):
        for w in self.writers:
            w.stop()
            assert w.errors == 0, w.last_error
