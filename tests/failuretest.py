# nbdferry - what tests of migrations that fail share
# SPDX-License-Identifier: BSD-3-Clause
"""A link that can be cut or stall, and a pair of daemons over it."""

import os
import select
import socket
import subprocess
import threading
import time

from ferrytest import *
from ferrytest import nbd
from migratetest import *

MiB = 1 << 20
SIZE = 18 * MiB + 9 * 512
SLOW = 8 * MiB                  # a second
BITMAPS = {"fine": 512, "daily": 65536, "coarse": 2 * MiB}


class Proxy(threading.Thread):
    """A link to a port of this host that can be cut, or stall."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.to = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.peers, self.stalled, self.cutting = {}, False, False
        self.pieces, self.was_cut = None, False
        self.lock = threading.Lock()
        self.start()

    def stall(self, stalled=True):
        self.stalled = stalled

    def cut(self):
        """All connections are reset, new ones as well."""
        with self.lock:
            self.cutting = True
            for s in self.peers:
                self.reset(s)
            self.peers.clear()

    def mend(self):
        self.cutting = False

    def cut_after(self, pieces):
        """Cut it once, when so many pieces of data have come through."""
        self.pieces = pieces

    @staticmethod
    def reset(s):
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                     b"\1\0\0\0\0\0\0\0")
        s.close()

    def accept(self):
        one = self.listener.accept()[0]
        try:
            if self.cutting:
                raise OSError
            other = socket.create_connection(("127.0.0.1", self.to))
        except OSError:
            self.reset(one)
            return
        for s in one, other:
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peers[one], self.peers[other] = other, one

    def carry(self, s):
        try:
            data = s.recv(1 << 18)
            if data and self.pieces == 0 and not self.was_cut:
                self.was_cut = True
                for end in list(self.peers):
                    self.reset(end)
                self.peers.clear()
                return
            if data:
                self.peers[s].sendall(data)
                if self.pieces is not None:
                    self.pieces -= 1
                return
        except OSError:
            pass
        for end in s, self.peers.pop(s):
            self.peers.pop(end, None)
            end.close()

    def run(self):
        while True:
            with self.lock:
                watched = [self.listener]
                if not self.stalled:
                    watched += self.peers
                ready = select.select(watched, [], [], 0.02)[0]
                for s in ready:
                    if s is self.listener:
                        self.accept()
                    elif s in self.peers:
                        self.carry(s)
            time.sleep(0)


class Move:
    """A pair of daemons over TCP, with a writer and its bitmaps."""

    def __init__(self, proxy=False, size=SIZE, seed=1):
        Nbdkit.all.clear()      # all have ended
        clear_folder()
        self.size = size
        self.pair = Pair({"vda": size}, tcp=True)
        self.src, self.dst = self.pair.src, self.pair.dst
        self.qmp = self.pair.qmp
        self.model = self.pair.models["vda"]
        self.proxy = Proxy(self.dst.port) if proxy else None
        port = self.proxy.port if proxy else self.dst.port
        self.uri = "nbd://127.0.0.1:%d" % port
        for name, granularity in BITMAPS.items():
            self.pair.add("vda", name, granularity)
        self.pair.add("vda", "asleep", disabled=True)
        self.touched, self.writer, self.seed = [], None, seed
        self.write()

    def write(self, daemon=None):
        """A new writer."""
        self.seed += 1
        self.writer = LoggingWriter((daemon or self.src).uri("vda"),
                                    self.model, seed=self.seed,
                                    max_length=16384, pause=0.002)
        settle(self.writer, 10)

    def rest(self):
        """The writer ends, nothing having failed."""
        settle(self.writer, 5)
        self.writer.stop()
        assert self.writer.errors == 0, self.writer.last_error
        self.touched += self.writer.touched

    def no_resume(self):
        """What could be overcome ends the migration all the same."""
        self.qmp.command("migrate-set-parameters", x_ferry_resume=False)

    def begin(self, left=0.8):
        """A slow migration, up to where only that much is left."""
        self.qmp.command("migrate-set-parameters", max_bandwidth=SLOW)
        self.qmp.command("migrate", uri=self.uri)
        self.pair.wait("active")
        wait_for(lambda: self.info()["disk"]["remaining"] < left * self.size,
                 "the migration")

    def info(self):
        return self.qmp.command("query-migrate")

    def complete(self):
        self.qmp.command("migrate-set-parameters", max_bandwidth=0)
        self.qmp.command("migrate", uri=self.uri)
        return self.pair.wait("completed")

    def as_before(self):
        """The source serves, and what it records is right."""
        assert self.writer.errors == 0, self.writer.last_error
        settle(self.writer, 5)
        disk, = self.qmp.command("x-ferry-status")["disks"]
        assert (disk["mode"], disk["generation"]) == ("active", 0), disk
        self.rest()
        node, = self.qmp.command("query-named-block-nodes")
        have = {b["name"]: b for b in node["dirty-bitmaps"]}
        assert set(have) == set(BITMAPS) | {"asleep"}, have
        for name, granularity in BITMAPS.items():
            bits = {g for start, end in self.touched for g in
                    range(start // granularity, -(-end // granularity))}
            b = have[name]
            assert b["count"] == len(bits) * granularity, (b, len(bits))
            assert b["recording"] and not b["busy"], b
        assert read_all(self.src.uri("vda")) == bytes(self.model.data)
        self.write()

    def refuses(self, daemon, says=None):
        try:
            daemon.connect("vda").shutdown()
        except nbd.Error:
            assert says is None or says in daemon.log_text(), (
                daemon.log_text())
            return
        raise AssertionError("%s serves the disk" % daemon.name)

    def check(self, side="dst"):
        """Data and bitmaps; nothing runs any more."""
        compare(side + "-vda.raw", self.model)
        qemu_img_check(self.pair.sidecar("vda", side))
        for name, granularity in BITMAPS.items():
            self.pair.check_bitmap(
                "vda", name, granules(self.touched, granularity, self.size),
                side)
        self.pair.check_bitmap("vda", "asleep", [], side)

    def end(self):
        """A migration that completes, after all that was."""
        self.complete()
        self.rest()
        self.qmp.close()
        self.pair.stop()
        self.check()
