#!/usr/bin/python3
# nbdferry - a handover under fire
# SPDX-License-Identifier: BSD-3-Clause
"""One disk, and two, are moved while a client writes and flushes.  Either side
is killed, or loses its power with all that was not synced, before or after each
of its syncs and renames; or the link is cut after each packet.  Both sides come
back, in either order.  Never are two active, or none for good; what was
acknowledged and flushed is there, the bitmaps have it, and the disks are
together.  A few of the points; CHECK_LONG=1: all of them."""

from failuretest import *

requires("nbdkit", "qemu-img", "qemu-nbd")
if os.environ.get("FERRY_PRELOAD"):
    skip("not with a sanitizer, which is preloaded itself")

LONG = bool(os.environ.get("CHECK_LONG"))
SHIM_SOURCE = os.path.join(os.environ["srcdir"], "tests/crash-shim.c")
SHIM = os.path.abspath("shim.so")
subprocess.run([*os.environ["FERRY_CC"].split(), "-shared", "-fPIC", "-o",
                SHIM, SHIM_SOURCE, "-ldl"], check=True)
SECTORS = 256                   # of each disk, for the writer
DISK = 1 * MiB


class FlushingWriter(threading.Thread):
    """Writes sectors, each followed by a flush; comes back by itself.  Of each
    sector it knows what it must hold, or what else it may."""

    def __init__(self, uri, seed):
        super().__init__(daemon=True)
        self.uri, self.rng = uri, random.Random(seed)
        self.must = {}          # sector: number that was flushed last
        self.may = {}           # sector: numbers that may have replaced it
        self.n, self.done = seed << 20, 0
        self.ending = threading.Event()
        self.handle = connect(uri)
        self.start()

    def run(self):
        while not self.ending.is_set():
            sector = self.rng.randrange(SECTORS)
            self.n += 1
            data = self.n.to_bytes(8, "big") * 64
            self.may.setdefault(sector, set()).add(self.n)
            try:
                self.handle.pwrite(data, sector * 512)
                self.handle.flush()
                self.must[sector] = self.n
                self.may[sector] = set()
                self.done += 1
                self.ending.wait(0.002)
            except nbd.Error:
                self.connect_again()

    def connect_again(self):
        while not self.ending.wait(0.01):
            try:
                self.handle = connect(self.uri)
                return
            except nbd.Error:
                pass

    def stop(self):
        self.ending.set()
        self.join(30)
        if self.is_alive():
            raise TimeoutError("a writer hangs in a request")

    def check(self, path, dirty, old):
        with open(path, "rb") as f:
            data = f.read()
        for sector in self.must.keys() | self.may.keys():
            have = data[sector * 512:sector * 512 + 512]
            n = int.from_bytes(have[:8], "big")
            must = self.must.get(sector)
            may = self.may.get(sector, set())
            if must is None and have == old[sector * 512:sector * 512 + 512]:
                continue        # it was not written at all
            assert have == have[:8] * 64, ("torn", sector, have, must, may)
            assert n == must or n in may, (path, sector, n, must, may)
            assert sector in dirty, (path, sector, n, must)


class Side:
    """One daemon, which may die, and what was durable then."""

    def __init__(self, name, pair):
        self.name, self.pair, self.boots = name, pair, 0
        self.daemon = getattr(pair, name)
        self.shadow = os.path.abspath("shadow-" + name)
        self.daemon.stop()

    def start(self, die=None):
        self.boots += 1
        self.daemon.env = {"FERRY_TEST_BOOT_ID": "boot-%s-%d" % (
            self.name, self.boots)}
        if die is not None:
            self.daemon.env.update(LD_PRELOAD=SHIM, SHIM_DIR=self.shadow,
                                   SHIM_DIE=str(die))
        self.daemon.start()

    def start_same_boot(self):
        self.boots -= 1
        self.start()

    def folders(self):
        for name in self.pair.disks:
            yield "%s-%s.raw.ferry" % (self.name, name)

    def arm(self):
        """From here on; what there is is durable, or what the shim has seen
        synced meanwhile."""
        os.makedirs(self.shadow)
        open(self.shadow + "/armed", "w").close()
        for name in self.pair.disks:
            self.keep("%s-%s.raw" % (self.name, name))
        for folder in self.folders():
            with open("list", "w") as f:
                for entry in os.scandir(folder):
                    f.write("%d %s\n" % (entry.inode(), entry.name))
                    self.keep(entry.path)
            self.put("list", "%d.list" % os.stat(folder).st_ino)

    def keep(self, path):
        subprocess.run(["cp", "--sparse=always", "--preserve=timestamps", path,
                        "copy"], check=True)
        self.put("copy", str(os.stat(path).st_ino))

    def put(self, name, to):
        try:
            os.link(name, os.path.join(self.shadow, to))
        except FileExistsError:
            pass                # newer
        os.unlink(name)

    def lose_power(self):
        """Put back what was durable, in place, so that inodes stay."""
        self.daemon.kill()
        for name in self.pair.disks:
            self.put_back("%s-%s.raw" % (self.name, name))
        for folder in self.folders():
            with open("%s/%d.list" % (self.shadow,
                                      os.stat(folder).st_ino)) as f:
                listed = dict(reversed(line.split()) for line in f)
            now = {e.name: e.inode() for e in os.scandir(folder)}
            kept = {}
            for name, inode in listed.items():
                if name in (".", ".."):
                    continue
                path = os.path.join(folder, name)
                if str(now.get(name)) == inode:
                    self.put_back(path)
                    continue
                kept[path] = inode
            for name in now:    # what was renamed or made since
                if str(now[name]) != listed.get(name):
                    os.unlink(os.path.join(folder, name))
            for path, inode in kept.items():
                source = "%s/%s" % (self.shadow, inode)
                if os.path.exists(source):
                    subprocess.run(["cp", "--sparse=always",
                                    "--preserve=timestamps", source, path],
                                   check=True)
                else:
                    open(path, "w").close()

    def put_back(self, path):
        source = "%s/%d" % (self.shadow, os.stat(path).st_ino)
        if not os.path.exists(source):
            os.truncate(path, 0)
            return
        st = os.stat(source)
        with open(source, "rb") as f, open(path, "r+b") as g:
            g.truncate(0)
            g.truncate(st.st_size)
            while True:
                block = f.read(1 << 16)
                if not block:
                    break
                if any(block):
                    g.seek(f.tell() - len(block))
                    g.write(block)
        os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))

    def modes(self):
        try:
            qmp = QMP(self.name + ".ctl", timeout=10)
            disks = qmp.command("x-ferry-status")["disks"]
            qmp.close()
            return [d["mode"] for d in disks]
        except (OSError, EOFError, TimeoutError):
            return []


def watch(sides):
    """The destination first: a source that is active after that is one too
    many."""
    dst = sides["dst"].modes()
    src = sides["src"].modes()
    if "active" in dst:
        assert "active" not in src, (src, dst)
    return src, dst


def trial(nr, victim, how, die, order):
    """Returns whether the victim died."""
    Nbdkit.all.clear()
    for f in os.listdir("."):
        if f != "shim.so":
            subprocess.run(["rm", "-rf", f], check=True)
    names = ["a", "b"][:nr]
    pair = Pair({n: DISK for n in names}, tcp=True, step=64 << 10)
    for n in names:
        pair.add(n, "bits", 512)
    pair.qmp.close()
    sides = {s: Side(s, pair) for s in ("src", "dst")}
    proxy = None
    port = pair.dst.port
    if victim == "link":
        proxy = Proxy(port)
        port = proxy.port
    for s in sides.values():
        s.start(die if s.name == victim else None)
    writers = [FlushingWriter(pair.src.uri(n), i + 1)
               for i, n in enumerate(names)]
    wait_for(lambda: all(w.done > 3 for w in writers), "the writers")
    qmp = QMP("src.ctl")
    if victim != "link":
        sides[victim].arm()
    else:
        proxy.cut_after(die)
    try:
        qmp.command("migrate-set-parameters", multifd_channels=1)
        qmp.command("migrate", uri="nbd://127.0.0.1:%d" % port)
    except (OSError, EOFError):
        pass
    died = fire(sides, victim, how, order, proxy)
    if victim != "link":        # it may die no more
        os.unlink(sides[victim].shadow + "/armed")
    finish(sides, port)
    for w in writers:
        w.stop()
    qmp.close()
    pair.stop()
    for w, n in zip(writers, names):
        dirty = {g for start, end in bitmap_ranges(pair.sidecar(n), "bits")
                 for g in range(start // 512, end // 512)}
        w.check("dst-%s.raw" % n, dirty, pair.models[n].data)
        assert not os.path.exists("src-%s.raw.ferry/migration.json" % n)
    return died


def fire(sides, victim, how, order, proxy):
    """Until the victim has died, or all is over."""
    if victim == "link":
        wait_for(lambda: proxy.was_cut or over(sides), "the cut")
        return proxy.was_cut
    v = sides[victim]
    wait_for(lambda: v.daemon.process.poll() is not None or over(sides),
             "a death or the end")
    if v.daemon.process.poll() is None:
        return False
    v.daemon.kill()
    other = sides["dst" if victim == "src" else "src"]
    if order == "both":         # it dies as well, and comes back first
        other.daemon.kill()
    if how == "power":
        v.lose_power()
    if order == "both":
        other.start_same_boot()
        watch(sides)
    if how == "power":
        v.start()
    else:
        v.start_same_boot()
    watch(sides)
    return True


def over(sides):
    src, dst = watch(sides)
    return src and all(m == "forwarding" for m in src)


def finish(sides, port):
    """It completes by itself, or, if it had not begun, when told to."""
    end = time.monotonic() + 60
    while True:
        for s in sides.values():
            if s.daemon.process.poll() is not None:
                s.daemon.kill()     # it died, just when all was over
                s.start_same_boot()
        src, dst = watch(sides)
        if src and all(m == "forwarding" for m in src):
            dst = sides["dst"].modes()
            if not dst:
                continue
            assert all(m == "active" for m in dst), dst
            return
        assert time.monotonic() < end, (src, dst, state())
        if src and all(m == "active" for m in src):
            qmp = QMP("src.ctl")
            if qmp.command("query-migrate").get("status") in (
                    None, "failed"):
                try:
                    qmp.command("migrate", uri="nbd://127.0.0.1:%d" % port)
                except QMPError:
                    pass
            qmp.close()
        time.sleep(0.02)


def state():
    try:
        qmp = QMP("src.ctl")
        return qmp.command("query-migrate")
    except OSError as e:
        return e


def points(victim, how, nr, order, which):
    tried, n = 0, 0
    for n in which:
        if not trial(nr, victim, how, n, order):
            break
        tried += 1
    return tried, n


def all_points(step, first=0):
    n = first
    while n < 400:
        yield n
        n += step


rng = random.Random(os.environ.get("SEED", time.time_ns()))
if len(sys.argv) > 1:           # VICTIM HOW DISKS POINT ORDER
    v, h, d, n, o = sys.argv[1:]
    print(trial(int(d), v, h, int(n), o))
    sys.exit()
for victim, hows in ("src", ("kill", "power")), ("dst", ("kill", "power")), (
        "link", ("cut",)):
    for how in hows:
        for nr in 1, 2:
            for order in ("one", "both") if victim != "link" else ("one",):
                step = 1 if LONG else 23 if victim != "link" else 29
                first = rng.randrange(step)
                started = time.monotonic()
                try:
                    tried, last = points(victim, how, nr, order,
                                         all_points(step, first))
                except BaseException:
                    print("victim %s, %s, %d disks, %s, first point %d" % (
                        victim, how, nr, order, first))
                    raise
                print("%s: %s, %d disk%s, %s: %d points up to %d, %.1f s" % (
                    victim, how, nr, "s"[:nr > 1], order, tried, last,
                    time.monotonic() - started), flush=True)
