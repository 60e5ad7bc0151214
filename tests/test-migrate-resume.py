#!/usr/bin/python3
# nbdferry - migrations that are interrupted, and go on
# SPDX-License-Identifier: BSD-3-Clause
"""The link is cut, either side is killed or stopped, at any moment and in any
order, while a client writes: the migration pauses, goes on by itself or when
it is told to, sends only what is missing, and is exact to the byte and bit.
CHECK_LONG=1: many more of them at random moments."""

from failuretest import *

requires("nbdkit", "qemu-img", "qemu-nbd")
LONG = bool(os.environ.get("CHECK_LONG"))
SHIP_MAP = "x-ferry-ship"


class SureWriter(LoggingWriter):
    """A writer that comes back after its server did, and knows for certain
    where it wrote (.sure) and where it may have (.touched)."""

    def __init__(self, *args, **kwargs):
        self.sure = []
        super().__init__(*args, reconnect=True, **kwargs)

    def request(self, offset, length):
        before = self.done
        super().request(offset, length)
        if self.done > before:
            self.sure.append((offset, offset + length))


class Trip(Move):
    """A migration with a gentle writer, which survives its server."""

    def __init__(self, **kwargs):
        self.sure = []
        super().__init__(**kwargs)

    def write(self, daemon=None):
        self.seed += 1
        self.writer = SureWriter((daemon or self.src).uri("vda"), self.model,
                                 seed=self.seed, max_length=4096, pause=0.01)
        settle(self.writer, 5)

    def rest(self):
        settle(self.writer, 5)
        self.writer.stop()
        self.touched += self.writer.touched
        self.sure += self.writer.sure

    def paused(self, timeout=20):
        info = self.pair.wait("postcopy-paused", timeout=timeout)
        assert info["error-desc"], info
        return info

    def still_served(self):
        settle(self.writer, 5)
        disk, = self.qmp.command("x-ferry-status")["disks"]
        assert (disk["mode"], disk["generation"]) == ("active", 0), disk
        names = {b["name"] for n in
                 self.qmp.command("query-named-block-nodes")
                 for b in n["dirty-bitmaps"]}
        assert names == set(BITMAPS) | {"asleep"}, names

    def fast(self):
        self.qmp.command("migrate-set-parameters", max_bandwidth=0)

    def reconnect(self):
        try:
            self.qmp.close()
        except OSError:
            pass
        self.qmp = self.pair.qmp = QMP("src.ctl")

    def kill_source(self):
        self.src.kill()

    def start_source(self):
        self.src.start()
        self.reconnect()

    def sent(self):
        return self.info()["disk"]["transferred"]

    def check(self, side="dst"):
        compare(side + "-vda.raw", self.model)
        qemu_img_check(self.pair.sidecar("vda", side))
        for name, granularity in BITMAPS.items():
            got = bits(bitmap_ranges(self.pair.sidecar("vda", side), name),
                       granularity)
            sure = bits(self.sure, granularity)
            maybe = bits(self.touched, granularity)
            assert sure <= got <= maybe, (
                name, sorted(sure - got)[:5], sorted(got - maybe)[:5])
        self.pair.check_bitmap("vda", "asleep", [], side)
        assert not os.path.exists("src-vda.raw.ferry/migration.json")

    def finish(self):
        """It completes by itself."""
        self.fast()
        info = self.pair.wait("completed")
        self.rest()
        self.qmp.close()
        self.pair.stop()
        self.check()
        return info


def bits(ranges, granularity):
    return {g for start, end in ranges
            for g in range(start // granularity, -(-end // granularity))}


def held_for_sure(m):
    """Wait for a flush of what has come so far."""
    sent = m.sent()
    wait_for(lambda: m.sent() > sent + 2 * SLOW, "two seconds' worth")


def link():
    m = Trip(proxy=True, size=64 * MiB)
    m.begin(0.95)
    held_for_sure(m)
    m.proxy.cut()
    info = m.paused()
    assert "lost" in info["error-desc"] or "onnect" in info["error-desc"], info
    m.still_served()
    left, sent = m.info()["disk"]["remaining"], m.sent()
    assert left < 52 * MiB, left    # of 64, of which half are holes
    p = run_nbdferry("status", "src.ctl")
    assert "postcopy-paused" in p.stdout and "migrate-recover" in p.stdout, p
    m.proxy.mend()
    m.pair.wait("active", "device", "completed")
    info = m.finish()
    # Far from all: what was held was not sent again.
    again = info["disk"]["transferred"] - sent
    assert again < 26 * MiB, (again, left)
    assert info["x-ferry"]["pauses"] >= 1, info
    print("link cut: %.1f MiB sent before, %.1f after" % (
        sent / MiB, again / MiB))


def destination_killed():
    m = Trip()
    m.begin()
    m.dst.kill()
    m.paused()
    m.still_served()
    m.dst.start()
    m.refuses(m.dst)
    m.finish()
    print("destination killed, and started again")


def source_killed():
    m = Trip(size=64 * MiB)
    m.begin(0.95)
    held_for_sure(m)
    sent = m.sent()
    m.kill_source()
    m.refuses(m.dst)
    m.start_source()
    m.pair.wait("active", "postcopy-paused", "device", "completed")
    m.still_served()
    info = m.finish()
    assert info["disk"]["transferred"] < 26 * MiB, info
    print("source killed: %.1f MiB sent before, %.1f after" % (
        sent / MiB, info["disk"]["transferred"] / MiB))


def source_stopped():
    """In good order; the map is kept, and nobody sees it."""
    m = Trip(size=64 * MiB)
    m.begin(0.95)
    held_for_sure(m)
    m.writer.stop()
    m.touched += m.writer.touched
    m.sure += m.writer.sure
    m.qmp.close()
    m.src.stop()
    qemu_img_check(m.pair.sidecar("vda", "src"))
    assert os.path.exists("src-vda.raw.ferry/migration.json")
    m.start_source()
    m.write()
    m.still_served()
    try:
        m.qmp.command("block-dirty-bitmap-add", node="vda", name=SHIP_MAP)
        raise AssertionError("a user made the ship map")
    except QMPError as e:
        assert "reserved" in str(e), e
    try:
        m.qmp.command("migrate-set-parameters", block_bitmap_mapping=[
            {"node-name": "vda", "alias": "vda", "bitmaps": [
                {"name": "fine", "alias": SHIP_MAP}]}])
        raise AssertionError("a bitmap is to become a ship map")
    except QMPError as e:
        assert "reserved" in str(e), e
    info = m.finish()
    assert info["disk"]["transferred"] < 26 * MiB, info
    print("source stopped: %.1f MiB after" % (
        info["disk"]["transferred"] / MiB))


def both_killed(first):
    m = Trip()
    m.begin(0.6)
    for side in ("src", "dst") if first == "src" else ("dst", "src"):
        getattr(m, side).kill()
    if first == "src":
        m.start_source()
        m.paused()
        m.still_served()
        m.dst.start()
    else:
        m.dst.start()
        m.refuses(m.dst)
        m.start_source()
    m.finish()
    print("both killed, %s started first" % first)


def destination_lost_all():
    """Disk and state are gone: all is sent again."""
    m = Trip()
    m.begin(0.5)
    m.dst.kill()
    m.paused()
    subprocess.run(["rm", "-r", "dst-vda.raw", "dst-vda.raw.ferry"],
                   check=True)
    m.dst.start()
    m.finish()
    assert "all of it is sent again" in m.src.log_text()
    print("the destination lost all")


def write_raw():
    with open("dst-vda.raw", "r+b") as f:
        f.write(b"x" * 512)


def write_by_qemu():
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 120 0 512",
                    "dst-vda.raw.ferry/bitmaps.qcow2"], check=True,
                   stdout=subprocess.DEVNULL)


def destination_touched(write):
    """Somebody writes to the destination's disk while its daemon is down, and
    it is started twice before the source comes back."""
    m = Trip(proxy=True)
    m.begin(0.5)
    m.proxy.cut()
    m.paused()
    m.dst.stop()
    write()
    for i in range(2):
        m.dst.start()
        m.dst.stop()
    m.dst.start()
    m.proxy.mend()
    m.finish()
    assert "all of it is sent again" in m.src.log_text()
    print("the destination's disk was written to: " + write.__name__)


def destination_raw():
    destination_touched(write_raw)


def destination_qemu():
    destination_touched(write_by_qemu)


def by_hand():
    """migrate-pause lasts, over a restart too; migrate-recover ends it, over
    another way to the destination."""
    m = Trip(proxy=True)
    for command in "migrate-pause", "migrate-recover":
        p = run_nbdferry(command, "src.ctl", check=False)
        assert p.returncode == 1, p
    m.begin()
    p = run_nbdferry("migrate-recover", "src.ctl", check=False)
    assert p.returncode == 1 and "paused" in p.stderr, p
    run_nbdferry("migrate-pause", "src.ctl")
    info = m.paused()
    assert info["x-ferry"]["waits"] and "migrate-pause" in info["error-desc"]
    m.writer.stop()
    m.touched += m.writer.touched
    m.sure += m.writer.sure
    m.qmp.close()
    m.src.stop()
    m.start_source()
    m.write()
    assert m.paused()["x-ferry"]["waits"]
    m.proxy.cut()
    run_nbdferry("migrate-recover", "src.ctl",
                 "nbd://127.0.0.1:%d" % m.dst.port)
    m.finish()
    print("paused by hand, and gone on another way")


def cancelled_while_paused():
    m = Trip(proxy=True)
    m.begin()
    m.proxy.cut()
    m.paused()
    run_nbdferry("migrate-cancel", "src.ctl")
    m.pair.wait("cancelled")
    m.still_served()
    assert not os.path.exists("src-vda.raw.ferry/migration.json")
    m.proxy.mend()
    m.kill_source()             # it does not come back
    m.start_source()
    assert m.info() == {}, m.info()
    m.still_served()
    info = m.qmp.command("query-named-block-nodes")
    assert SHIP_MAP not in json.dumps(info)
    m.qmp.command("migrate", uri=m.uri)
    m.finish()
    print("cancelled while paused")


def taken():
    """The destination belongs to somebody else by now."""
    m = Trip(proxy=True)
    m.begin()
    m.proxy.cut()
    m.paused()
    make_disk("other.raw", SIZE, seed=9)
    other = Nbdkit("disk=vda=other.raw", "control=other.ctl", name="other")
    run_nbdferry("migrate", "other.ctl", "nbd://127.0.0.1:%d" % m.dst.port)
    m.proxy.mend()
    info = m.pair.wait("failed")
    assert "is active at the destination" in info["error-desc"], info
    m.still_served()
    m.rest()
    m.qmp.close()
    other.stop()
    m.pair.stop()
    print("taken: %s" % info["error-desc"])


def followed():
    """nbdferry migrate goes through a pause; Ctrl-C cancels in one."""
    for cancel in False, True:
        m = Trip(proxy=True)
        p = subprocess.Popen(
            [NBDFERRY, "migrate", "src.ctl", m.uri, "--max-bandwidth", "8M"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True)
        wait_for(lambda: m.info().get("status") == "active" and
                 m.info()["disk"]["remaining"] < 0.8 * SIZE, "a part of it")
        m.proxy.cut()
        m.paused()
        time_to_look = m.writer.done + 40
        wait_for(lambda: m.writer.done > time_to_look, "some time")
        if cancel:
            p.send_signal(signal.SIGINT)
            output = p.communicate(timeout=20)[0]
            assert p.returncode == 130, (p.returncode, output)
            m.still_served()
            m.rest()
            m.qmp.close()
            m.pair.stop()
        else:
            m.proxy.mend()
            m.fast()
            output = p.communicate(timeout=TIMEOUT)[0]
            assert p.returncode == 0, (p.returncode, output)
            m.finish()
            assert "goes on" in output, output
        assert "paused: " in output and "trying again" in output, output
    print("followed through a pause, and cancelled in one")


def wrong_host():
    m = Trip()
    p = run_nbdferry("migrate", "src.ctl", "nbd://127.0.0.1:1", check=False)
    assert p.returncode == 1 and "paused" not in p.stderr, p
    assert not os.path.exists("src-vda.raw.ferry/migration.json")
    m.still_served()
    m.rest()
    m.qmp.close()
    m.pair.stop()
    print("a wrong host ends it at once")


def mistyped():
    """migrate-pause while it is paused lasts over a restart; and who says
    where to go on, and is wrong, may say so again."""
    m = Trip(proxy=True)
    m.begin()
    m.proxy.cut()
    m.paused()
    m.qmp.command("migrate-pause")
    wait_for(lambda: "migrate-pause" in m.info()["error-desc"], "the pause")
    m.kill_source()
    m.start_source()
    info = m.paused()
    assert info["x-ferry"]["waits"] and "migrate-pause" in info["error-desc"]
    # This very server, whose disk is active.
    m.qmp.command("migrate-recover",
                  uri="nbd://127.0.0.1:%d" % m.src.port)
    wait_for(lambda: "is active at" in m.info()["error-desc"], "the refusal")
    m.paused()
    m.proxy.mend()
    m.qmp.command("migrate-recover", uri=m.uri)
    m.finish()
    print("mistyped")


def answered():
    """What migrate-recover and migrate-pause have answered lasts, even if the
    source is killed in that moment."""
    def says():
        with open("src-vda.raw.ferry/migration.json") as f:
            d = json.load(f)
        return d["uri"], d["disks"][0]["target"], d["paused"]

    m = Trip(proxy=True)
    m.begin()
    m.proxy.cut()
    m.paused()
    for i in range(1, 40):
        uri = "nbd://127.0.0.1:%d" % i + ("/other" if i % 2 else "/vda")
        m.qmp.command("migrate-recover", uri=uri)
        assert says() == (uri, uri.split("/")[-1], False), (i, says())
        m.qmp.command("migrate-pause")
        assert says() == (uri, uri.split("/")[-1], True), (i, says())
        if i % 2:               # not taken yet, perhaps; it still counts
            wait_for(lambda: m.info()["x-ferry"]["waits"], "the pause")
            m.qmp.command("migrate-recover")
            assert says() == (uri, uri.split("/")[-1], False), (i, says())
        wait_for(lambda: m.info()["status"] == "postcopy-paused", "a pause")
    m.qmp.command("migrate-recover", uri="nbd://127.0.0.1:%d/vda" % m.dst.port)
    m.kill_source()
    m.start_source()
    m.pair.wait("active", "device", "completed")
    m.finish()
    print("what was answered lasts")


def offline():
    """The map is nobody's business: not with nbdferry recover, not when
    bitmaps are imported from the sidecar, and a takeover removes it."""
    def names():
        info = qemu_img_info(m.pair.sidecar("vda", "src"))
        return {b["name"] for b in info["format-specific"]["data"]["bitmaps"]}

    m = Trip(proxy=True)
    m.begin()
    m.proxy.cut()
    m.paused()
    m.kill_source()
    p = run_nbdferry("recover", "src-vda.raw")
    assert "daily" in p.stdout and SHIP_MAP not in p.stdout, p
    make_disk("other.raw", SIZE)
    other = Nbdkit("other.raw", "control=other.ctl", name="other")
    run_nbdferry("bitmap", "import", "other.ctl",
                 m.pair.sidecar("vda", "src"))
    p = run_nbdferry("bitmap", "list", "other.ctl")
    assert "daily" in p.stdout and SHIP_MAP not in p.stdout, p
    other.stop()
    assert SHIP_MAP in names()
    m.start_source()
    m.proxy.mend()
    m.finish()
    run_nbdferry("takeover", "src-vda.raw", "--force", "--yes")
    assert names() == set(BITMAPS) | {"asleep"}, names()
    assert not os.path.exists("src-vda.raw.ferry/ship-clearing")
    print("offline")


def several():
    """Two disks, the source killed; neither is served twice or not at all."""
    Nbdkit.all.clear()
    for f in os.listdir("."):
        subprocess.run(["rm", "-rf", f], check=True)
    pair = Pair({"a": 8 * MiB, "b": 12 * MiB}, tcp=True)
    for name in "a", "b":
        pair.add(name, "daily")
    pair.migrate(max_bandwidth=SLOW)
    pair.wait("active")
    wait_for(lambda: pair.qmp.command("query-migrate")["disk"]["remaining"] <
             14 * MiB, "a part of it")
    pair.src.kill()
    pair.src.start()
    pair.qmp = QMP("src.ctl")
    pair.qmp.command("migrate-set-parameters", max_bandwidth=0)
    pair.wait("completed")
    pair.qmp.close()
    pair.stop()
    for name in "a", "b":
        pair.check_disk(name)
        pair.check_bitmap(name, "daily", [])
        assert not os.path.exists("src-%s.raw.ferry/migration.json" % name)
    print("two disks")


def anything(seed, times):
    """Whatever may happen, at random moments, then it completes."""
    rng = random.Random(seed)
    m = Trip(proxy=True, size=24 * MiB, seed=seed)
    m.qmp.command("migrate-set-parameters", max_bandwidth=SLOW,
                  multifd_channels=rng.randint(1, 4))
    m.qmp.command("migrate", uri=m.uri)
    m.pair.wait("active", "device", "completed")
    done = []
    for i in range(times):
        moment = time.monotonic() + rng.choice([0, 0.05, 0.5, 1.5]) * (
            rng.random())
        pause_until(lambda: time.monotonic() >= moment)
        if m.info()["status"] == "completed":
            break
        what = rng.choice(["cut", "src", "dst", "both", "stop", "clear"])
        done.append(what)
        if what == "cut":
            m.proxy.cut()
            m.proxy.mend()
        elif what == "clear":   # bits change without a write
            m.qmp.command("block-dirty-bitmap-add", node="vda",
                          name="new%d" % i, persistent=True)
            m.qmp.command("block-dirty-bitmap-clear", node="vda",
                          name="asleep")
        elif what == "dst":
            m.dst.kill()
            m.dst.start()
        elif what == "stop":
            m.dst.stop()
            m.dst.start()
        else:
            m.kill_source()
            if what == "both":
                m.dst.kill()
                m.dst.start()
            m.start_source()
    if "completed" not in m.info().get("status", ""):
        disk, = m.qmp.command("x-ferry-status")["disks"]
        if disk["mode"] != "active":
            # It was let go of when it was killed: the daemon finishes it.
            wait_for(lambda: m.qmp.command("x-ferry-status")["disks"][0]
                     ["mode"] == "forwarding", "the handover")
        else:
            m.fast()
            m.pair.wait("completed")
    m.rest()
    m.qmp.close()
    m.pair.stop()
    m.check()
    print("seed %d: %s" % (seed, " ".join(done)))


tests = [link, destination_killed, source_killed, source_stopped,
         lambda: both_killed("src"), lambda: both_killed("dst"),
         destination_lost_all, destination_raw, destination_qemu, by_hand,
         cancelled_while_paused, taken, followed, wrong_host,
         mistyped, answered, offline, several]
if len(sys.argv) > 1:
    tests = [globals()[name] for name in sys.argv[1:] if name in globals()]
for test in tests:
    started = time.monotonic()
    test()
    print("  %.1f s" % (time.monotonic() - started))
seeds = [int(s) for s in sys.argv[1:] if s.isdigit()] or (
    range(60) if LONG else range(3))
for seed in seeds if len(sys.argv) == 1 or sys.argv[-1].isdigit() else ():
    anything(seed, 12 if LONG else 6)
