#!/usr/bin/python3
# nbdferry - the end of a daemon, asked for or not
# SPDX-License-Identifier: BSD-3-Clause
"""SIGTERM with clients idle, busy or held, with a migration under way: nbdkit
ends in seconds, with status 0, and leaves a clean store with exact bitmaps.
kill -9 under load loses no bit of what was acknowledged."""

from ferrytest import *
from migratetest import *

requires("nbdkit", "qemu-img", "qemu-nbd")

MiB = 1 << 20
SIZE = 16 * MiB + 11 * 512
BITMAPS = {"fine": 512, "page": 4096, "daily": 65536, "whole": 1 << 31}
SIDECAR = "vda.raw.ferry/bitmaps.qcow2"
SOON = 10                       # seconds


class DeepWriter(threading.Thread):
    """Keeps 32 writes in flight until its connection is lost, or stop ().
    No two of those in flight overlap."""

    DEPTH, SLOT = 32, 8192

    def __init__(self, uri, model, start, end, seed):
        super().__init__(daemon=True)
        self.handle, self.model = connect(uri), model
        self.rng = random.Random(seed)
        self.slots = range(start, end - self.SLOT, self.SLOT)
        self.flying, self.ending = {}, threading.Event()
        self.sent, self.acked = [], []
        self.start()

    def submit(self):
        slot = self.rng.choice(self.slots)
        if any(slot <= offset < slot + self.SLOT
               for offset, data in self.flying.values()):
            return
        length = self.rng.randint(1, self.SLOT // SECTOR) * SECTOR
        offset = slot + self.rng.randint(
            0, (self.SLOT - length) // SECTOR) * SECTOR
        data = self.rng.randbytes(length)
        self.sent.append((offset, offset + length))
        self.model.set_unsure(offset, length)
        cookie = self.handle.aio_pwrite(nbd.Buffer.from_bytearray(
            bytearray(data)), offset)
        self.flying[cookie] = offset, data

    def reap(self):
        for cookie, (offset, data) in list(self.flying.items()):
            try:
                if not self.handle.aio_command_completed(cookie):
                    continue
                self.model.set(offset, data)
                self.acked.append((offset, offset + len(data)))
            except nbd.Error:
                pass
            del self.flying[cookie]

    def run(self):
        try:
            while not self.handle.aio_is_dead() and (
                    self.flying or not self.ending.is_set()):
                if (len(self.flying) < self.DEPTH
                        and not self.ending.is_set()):
                    self.submit()
                else:
                    self.handle.poll(100)
                self.reap()
        except nbd.Error:
            pass
        # A reply may have come before the end of the connection.
        self.reap()

    def stop(self):
        """Nothing is in flight any more."""
        self.ending.set()
        self.join(20)
        assert not self.is_alive() and not self.flying


class Disk:
    """A daemon with one disk."""

    def __init__(self, **kwargs):
        Nbdkit.all.clear()      # all have ended
        clear_folder()
        self.model = make_disk("vda.raw", SIZE)
        self.daemon = Nbdkit("disk=vda=vda.raw", "control=src.ctl",
                             name="src", **kwargs)
        for name, granularity in BITMAPS.items():
            run_nbdferry("bitmap", "add", "src.ctl", name, "--granularity",
                         granularity)
        self.uri = self.daemon.uri("vda")
        self.acked, self.sent = [], []

    def deep(self, n=2):
        """So many busy clients."""
        part = SIZE // n // 512 * 512
        writers = [DeepWriter(self.uri, self.model, i * part, (i + 1) * part,
                              seed=len(self.sent) + i) for i in range(n)]
        for w in writers:
            pause_until(lambda: len(w.acked) > 100)
        return writers

    def gone(self, writers):
        """Their connections are lost."""
        for w in writers:
            w.join(10)
            assert not w.is_alive()
            self.acked += w.acked
            self.sent += w.sent

    def check(self, sidecar=SIDECAR, path="vda.raw"):
        """What has been left behind."""
        check_clean(sidecar)
        compare(path, self.model)
        for name, granularity in BITMAPS.items():
            least = granules(self.acked, granularity, SIZE)
            most = granules(self.sent, granularity, SIZE)
            got = bitmap_ranges(sidecar, name)
            assert includes(got, least), name
            assert includes(most, got), name


def includes(ranges, others):
    """Are all of the others inside of one of the ranges?"""
    i = 0
    for start, end in others:
        while i < len(ranges) and ranges[i][1] <= start:
            i += 1
        if i == len(ranges) or start < ranges[i][0] or end > ranges[i][1]:
            return False
    return True


def check_clean(sidecar):
    qemu_img_check(sidecar)
    for b in qemu_img_info(sidecar)["format-specific"]["data"]["bitmaps"]:
        assert "in-use" not in b["flags"], b


def ends(daemon, how, rude=False):
    """It must, soon and well, and not by the last resort unless a client
    does not behave."""
    began = time.monotonic()
    how()
    daemon.wait(SOON)
    assert rude or "ending without it" not in daemon.log_text()
    return time.monotonic() - began


def idle(how):
    d = Disk(tcp=True)
    clients = [d.daemon.connect(e) for e in ("vda", "", "vda")]
    clients[0].pwrite(b"x" * 512, 512)
    d.model.set(512, b"x" * 512)
    d.acked = d.sent = [(512, 1024)]
    # One that says nothing, one that stops before it has chosen an export.
    silent = socket.create_connection(("127.0.0.1", d.daemon.port))
    half = nbd.NBD()
    half.set_opt_mode(True)
    half.connect_uri(d.uri)
    qmp = QMP("src.ctl")
    if how == "quit":
        took = ends(d.daemon, lambda: qmp.command("quit"))
    else:
        took = ends(d.daemon, lambda: d.daemon.process.send_signal(how))
    d.check()
    for client in clients:
        assert client.get_size() == SIZE
    silent.close()
    print("idle, %s: %.2f s" % (how, took))


def rude():
    """A client asks, and never takes the answer."""
    d = Disk()
    client = d.daemon.connect("vda")
    for i in range(15):
        client.aio_pread(nbd.Buffer(MiB), i * MiB)
    other = d.daemon.connect("vda")
    other.pwrite(b"y" * 512, 1024)
    d.model.set(1024, b"y" * 512)
    d.acked = d.sent = [(1024, 1536)]
    took = ends(d.daemon, d.daemon.terminate, rude=True)
    d.check()
    client.get_size()
    print("a client that takes no answers: %.2f s" % took)


def busy():
    d = Disk()
    took = []
    for i in range(4):
        writers = d.deep(1 + i % 3)
        took.append(ends(d.daemon, d.daemon.terminate))
        d.gone(writers)
        check_clean(SIDECAR)
        d.daemon.start()
    d.daemon.stop()
    d.check()
    print("busy: %s, %d writes" % (
        ", ".join("%.2f s" % t for t in took), len(d.acked)))


def killed():
    d = Disk()
    for i in range(4):
        quiet = i % 2 == 1
        writers = d.deep(1 + i % 3)
        if quiet:
            for w in writers:
                w.stop()
        d.daemon.kill()
        d.gone(writers)
        d.daemon.start()
        # Nothing less than what was acknowledged, and the disk is served.
        have = {b["name"]: b for b in json.loads(run_nbdferry(
            "bitmap", "list", "src.ctl", "--json").stdout)}
        assert set(have) == set(BITMAPS), have
        for b in have.values():
            assert b["recording"] and "inconsistent" not in b, b
        compare(read_all(d.uri), d.model)
        d.daemon.stop()
        check_clean(SIDECAR)
        d.daemon.start()
    d.daemon.stop()
    d.check()
    print("killed: %d writes, %d in flight" % (
        len(d.acked), len(d.sent) - len(d.acked)))


def killed_idle():
    """Nothing was in flight: the bitmaps are what was written, no more."""
    d = Disk()
    for w in d.deep(2):
        w.stop()
        d.acked += w.acked
        d.sent += w.sent
    assert len(d.acked) == len(d.sent)
    d.daemon.kill()
    d.daemon.start()
    d.daemon.stop()
    d.check()
    for name, granularity in BITMAPS.items():
        assert (bitmap_ranges(SIDECAR, name)
                == granules(d.sent, granularity, SIZE)), name
    print("killed with nothing in flight: %d writes" % len(d.sent))


class SureWriter(LoggingWriter):
    """It also knows which of its requests were acknowledged."""

    def __init__(self, *args, **kwargs):
        self.acked = []
        super().__init__(*args, **kwargs)

    def request(self, offset, length):
        errors = self.errors
        super().request(offset, length)
        if self.errors == errors:
            self.acked.append((offset, offset + length))


class Move(Disk):
    """The same with a destination, and a writer."""

    def __init__(self):
        super().__init__()
        self.dst = Nbdkit("disk=vda=dst.raw", "size=%d" % SIZE, "incoming=on",
                          "control=dst.ctl", name="dst")
        self.touched, self.writers = [], []
        self.qmp = QMP("src.ctl")

    def write(self, n=1, pause=0.001):
        part = SIZE // n // 512 * 512
        self.writers = [SureWriter(
            self.uri, self.model, i * part, (i + 1) * part, max_length=8192,
            seed=len(self.touched) + i, pause=pause) for i in range(n)]
        for w in self.writers:
            settle(w, 5)

    def rest(self):
        """Writers end; their last requests may have failed."""
        for w in self.writers:
            w.stop()
            self.sent += w.touched
            self.acked += w.acked

    def migrate(self, **params):
        self.qmp.command("migrate-set-parameters", **params)
        self.qmp.command("migrate", uri=self.dst.uri().rstrip("/"))

    def status(self, *wanted, timeout=20):
        def there():
            info = self.qmp.command("query-migrate")
            return info if info.get("status") in wanted else None
        return wait_for(there, " or ".join(wanted), timeout)

    def finish(self):
        """All goes on where it was, and a migration completes; one that was
        under way goes on by itself."""
        fast = {"max_bandwidth": 0, "downtime_limit": 30}
        if self.qmp.command("query-migrate").get("status", "failed") in (
                "failed", "cancelled"):
            self.migrate(**fast)
        self.qmp.command("migrate-set-parameters", **fast)
        self.status("completed")
        self.rest()
        self.qmp.close()
        self.daemon.stop()
        self.dst.stop()
        self.check("dst.raw.ferry/bitmaps.qcow2", "dst.raw")


def source_ends_while_migrating():
    m = Move()
    m.write()
    m.migrate(max_bandwidth=4 * MiB)
    m.status("active")
    settle(m.writers[0], 20)
    took = ends(m.daemon, m.daemon.terminate)
    m.rest()
    m.check()
    # The destination can end, and be asked again.
    m.dst.stop()
    m.dst.start()
    m.daemon.start()
    m.qmp = QMP("src.ctl")
    m.write()
    m.finish()
    print("the source ends with a migration under way: %.2f s" % took)


def destination_ends_while_migrating():
    m = Move()
    m.write()
    m.migrate(max_bandwidth=4 * MiB)
    m.status("active")
    settle(m.writers[0], 20)
    took = ends(m.dst, m.dst.terminate)
    info = m.status("postcopy-paused")
    assert info["error-desc"], info
    settle(m.writers[0], 20)
    m.dst.start()
    m.finish()
    print("the destination ends with a migration under way: %.2f s (%s)" % (
        took, info["error-desc"]))


def hold(m, wait):
    """Stop the destination in the handover; False if that came too late.

    While requests are held, what is left is sent slowly, so that there is
    time enough."""
    m.migrate(max_bandwidth=8 * MiB if wait is None else 0,
              downtime_limit=1000 if wait is None else 30)
    while True:
        status = m.qmp.event("MIGRATION")["data"]["status"]
        assert status not in ("failed", "cancelled"), (
            m.qmp.command("query-migrate"))
        if status == "device":
            break
    until = time.monotonic() + (wait or 0)
    pause_until(lambda: time.monotonic() >= until)
    m.dst.process.send_signal(signal.SIGSTOP)
    # Held are those whose number does not change any more.
    end = time.monotonic() + 1
    while time.monotonic() < end:
        done = [w.done for w in m.writers]
        m.qmp.command("query-migrate")
        probe = time.monotonic() + 0.15
        pause_until(lambda: time.monotonic() >= probe)
        if [w.done for w in m.writers] == done:
            return m.qmp.command("query-migrate")["status"] == "device"
    return False


def source_ends_while_holding():
    """Requests wait at the gate, the destination says nothing."""
    held, modes = [], []
    for wait in None, None, 0.002, 0.005, 0.01:
        m = Move()
        m.write(3, pause=0.02)
        if hold(m, wait):
            held.append(ends(m.daemon, m.daemon.terminate))
        else:
            ends(m.daemon, m.daemon.terminate)
        m.dst.process.send_signal(signal.SIGCONT)
        m.rest()
        m.daemon.start()
        qmp = QMP("src.ctl")
        disk, = qmp.command("x-ferry-status")["disks"]
        qmp.close()
        modes.append(disk["mode"])

        # Wherever the disk is now, it is reached from here.
        def serves():
            try:
                m.daemon.connect("vda").shutdown()
                return True
            except nbd.Error:
                return False

        wait_for(serves, "the disk", 15)
        compare(read_all(m.uri), m.model)
        m.qmp = QMP("src.ctl")
        m.write(2)
        if disk["mode"] == "active":
            m.finish()
        else:
            m.rest()
            m.qmp.close()
            m.daemon.stop()
            m.dst.stop()
            m.check("dst.raw.ferry/bitmaps.qcow2", "dst.raw")
    assert held, "never was a request held"
    print("requests held: %s; afterwards: %s" % (
        ", ".join("%.2f s" % t for t in held), ", ".join(modes)))


for test in ((idle, signal.SIGTERM), (idle, signal.SIGINT), (idle, "quit"),
             (rude,), (busy,), (killed,), (killed_idle,),
             (source_ends_while_migrating,),
             (destination_ends_while_migrating,),
             (source_ends_while_holding,)):
    started = time.monotonic()
    test[0](*test[1:])
    print("  %.1f s" % (time.monotonic() - started))
