#!/usr/bin/python3
# nbdferry - a destination that comes back at another address
# SPDX-License-Identifier: BSD-3-Clause
"""After the source has let go: migrate-recover with another URI, to which
COMMIT and the requests of clients go from then on, once who answers there has
proved to be the destination; before, nothing is sent to him."""

from failuretest import *

requires("nbdkit", "qemu-img", "qemu-nbd")
COMMIT = b"NBDFERRY\0\1\0\5"


class Gate(Proxy):
    """Cuts the link for good when COMMIT is about to pass."""
    seen = False

    def carry(self, s):
        try:
            data = s.recv(1 << 18, socket.MSG_PEEK)
        except OSError:
            data = b""
        if COMMIT not in data:
            super().carry(s)
            return
        self.cutting = self.seen = True
        for end in list(self.peers):
            self.reset(end)
        self.peers.clear()


class Move2(Move):
    """A Move up to where the source has let go, and nobody knows."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.proxy = Gate(self.dst.port)
        self.uri = "nbd://127.0.0.1:%d" % self.proxy.port
        self.qmp.command("migrate", uri=self.uri)
        wait_for(lambda: self.proxy.seen, "COMMIT")
        self.is_in("leaving")

    def mode(self):
        return self.qmp.command("x-ferry-status")["disks"][0]["mode"]

    def is_in(self, mode):
        wait_for(lambda: self.mode() == mode, mode)

    def restart_source(self):
        self.writer.ending.set()
        self.qmp.close()
        self.src.kill()
        self.writer.stop()
        if self.writer.errors and self.writer.touched:
            # It was held, and so never done.
            self.writer.touched.pop()
        self.touched += self.writer.touched
        self.writer.touched = []
        self.src.start()
        self.qmp = self.pair.qmp = QMP("src.ctl")

    def says(self, text, count=1):
        wait_for(lambda: self.src.log_text().count(text) >= count, text)

    def look_at(self, uri):
        self.qmp.command("migrate-recover", uri=uri)

    def dst_moves(self):
        self.dst.kill()
        self.dst.port = free_port()
        self.dst.start()

    def check_end(self):
        self.rest()
        self.qmp.close()
        self.pair.stop()
        self.check()


def try_wrong_ones(m):
    """Nobody of these gets anything."""
    other = Nbdkit("disk=vda=other.raw", "size=%d" % m.size, "incoming=on",
                   "control=other.ctl", name="other", tcp=True)
    memory = Nbdkit("size=%d" % m.size, name="memory", plugin="memory",
                    tcp=True)
    m.look_at(other.uri().rstrip("/"))
    m.says("not the disk that was handed over")
    m.look_at(memory.uri().rstrip("/"))
    m.says("not an nbdferry destination")
    m.look_at(m.src.uri().rstrip("/"))
    m.says("was not prepared for this handover")
    m.look_at("nbd://127.0.0.1:1/vda")
    assert "incoming migration" not in other.log_text(), other.log_text()
    assert read_all(memory.uri()) == bytes(m.size)
    for server in other, memory:
        server.kill()
    assert m.mode() in ("leaving", "gone", "forwarding"), m.mode()


def leaving():
    m = Move2()
    try_wrong_ones(m)
    assert m.mode() == "leaving"
    m.qmp.command("migrate-recover")    # this is still allowed
    m.dst_moves()
    p = run_nbdferry("migrate-recover", "src.ctl", m.dst.uri())
    assert "trying" in p.stdout, p.stdout
    m.is_in("forwarding")
    m.pair.wait("completed")
    m.check_end()
    print("found at another address, in the same process")


def gone():
    """Also killed right after the answer."""
    m = Move2()
    m.restart_source()
    m.is_in("gone")
    try_wrong_ones(m)
    m.dst_moves()
    m.qmp.command("migrate-recover", uri=m.dst.uri("vda"))
    m.restart_source()
    m.is_in("forwarding")
    disk, = m.qmp.command("x-ferry-status")["disks"]
    assert disk["peer"] == m.dst.uri("vda"), disk
    m.write()
    m.check_end()
    print("found at another address, after restarts")


def forwarding(restart):
    """Clients go on, though the old address never says a word again."""
    m = Move(proxy=True)
    m.complete()
    m.is_in = lambda mode: Move2.is_in(m, mode)
    for name in ("mode", "says", "look_at", "dst_moves", "restart_source",
                 "check_end"):
        setattr(m, name, getattr(Move2, name).__get__(m))
    if restart:
        m.writer.stop()
        m.restart_source()
        m.is_in("forwarding")
        m.write()
    settle(m.writer, 10)
    m.proxy.stall()
    done = m.writer.done
    try_wrong_ones(m)
    assert m.writer.done <= done + 1, (done, m.writer.done)
    m.look_at(m.dst.uri().rstrip("/"))
    settle(m.writer, 10)
    m.dst_moves()
    m.look_at(m.dst.uri("vda"))
    settle(m.writer, 10)
    assert m.writer.errors == 0, m.writer.last_error
    m.check_end()
    print("clients go on at another address")


def taken_over():
    """The destination is another disk by now."""
    m = Move2()
    m.dst.kill()
    run_nbdferry("takeover", "dst-vda.raw", "--yes")
    m.dst.port = free_port()
    m.dst.start()
    m.look_at(m.dst.uri("vda"))
    m.says("not the disk that was handed over")
    assert m.mode() == "leaving"
    m.writer.ending.set()
    m.qmp.close()
    m.src.kill()
    m.dst.stop()
    print("not to one that was taken over")


def several():
    Nbdkit.all.clear()
    for f in os.listdir("."):
        subprocess.run(["rm", "-rf", f], check=True)
    pair = Pair({"a": 2 * MiB, "b": 3 * MiB}, tcp=True)
    gate = Gate(pair.dst.port)
    pair.qmp.command("migrate", uri="nbd://127.0.0.1:%d" % gate.port)
    wait_for(lambda: gate.seen, "COMMIT")

    def modes():
        return {d["mode"] for d in
                pair.qmp.command("x-ferry-status")["disks"]}

    wait_for(lambda: modes() == {"leaving"}, "the end of the doubts")
    pair.dst.kill()
    pair.dst.port = free_port()
    pair.dst.start()
    pair.qmp.command("migrate-recover", uri=pair.dst.uri().rstrip("/"))
    wait_for(lambda: modes() == {"forwarding"}, "the end")
    pair.wait("completed")
    # One of them by its name, of the two.
    pair.dst.kill()
    pair.dst.port = free_port()
    pair.dst.start()
    for name in "a", "b":
        pair.qmp.command("migrate-recover", uri=pair.dst.uri(name))
        assert read_all(pair.src.uri(name)) == bytes(pair.models[name].data)
    try:
        pair.qmp.command("migrate-recover", uri=pair.dst.uri("c"))
        raise AssertionError("a disk that is not there")
    except QMPError as e:
        assert "names a disk" in str(e), e
    pair.qmp.close()
    pair.stop()
    for name in "a", "b":
        pair.check_disk(name)
    print("two disks")


def nothing():
    m = Move()
    try:
        m.qmp.command("migrate-recover", uri=m.uri)
        raise AssertionError("there is nothing to recover")
    except QMPError as e:
        assert "no paused migration" in str(e), e
    m.end()
    print("nothing to recover")


tests = [leaving, gone, lambda: forwarding(False), lambda: forwarding(True),
         taken_over, several, nothing]
if len(sys.argv) > 1:
    tests = [globals()[name] for name in sys.argv[1:]]
for test in tests:
    started = time.monotonic()
    test()
    print("  %.1f s" % (time.monotonic() - started), flush=True)
