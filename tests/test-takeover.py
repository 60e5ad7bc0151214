#!/usr/bin/python3
# nbdferry - nbdferry takeover
# SPDX-License-Identifier: BSD-3-Clause
"""A handover that nobody finishes: either side can be taken over, with its
bitmaps, and what is left of the other side can do it no harm."""

import pty

from ferrytest import *
from migratetest import *

requires("nbdkit", "qemu-img", "qemu-nbd")

MiB = 1 << 20
SIZE = 4 * MiB + 512
COMMIT = b"NBDFERRY\0\1\0\5"    # how such a packet begins


class Line:
    """A Unix socket that passes all on to another, until a COMMIT comes:
    that one is lost, and everything after it, until repair ()."""

    def __init__(self, path, target):
        self.path, self.target = path, target
        self.cut, self.sockets = threading.Event(), []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.armed = True
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            here, _ = self.listener.accept()
            there = socket.socket(socket.AF_UNIX)
            try:
                if self.cut.is_set():
                    raise OSError
                there.connect(self.target)
            except OSError:
                here.close()
                there.close()
                continue
            self.sockets += [here, there]
            for a, b in (here, there), (there, here):
                threading.Thread(target=self.copy, args=(a, b),
                                 daemon=True).start()

    def copy(self, a, b):
        last = b""
        try:
            while True:
                data = a.recv(1 << 16)
                if not data:
                    break
                if self.armed and COMMIT in last + data:
                    self.cut.set()
                    self.hang_up()
                    return
                last = data[-len(COMMIT):]
                b.sendall(data)
        except OSError:
            pass
        for s in a, b:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def hang_up(self):
        for s in self.sockets:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def repair(self):
        self.armed = False
        self.cut.clear()


class Stuck:
    """Disks that the source has let go of, and the destination has not been
    told.  Both daemons are dead."""
    count = 0

    def __init__(self, *disks):
        Stuck.count += 1
        self.tag = "t%d" % Stuck.count
        self.disks, self.models = disks, {}
        src, dst = [], ["incoming=on"]
        for i, d in enumerate(disks):
            self.models[d] = make_disk(self.path("src", d), SIZE, seed=i)
            src.append("disk=%s=%s" % (d, self.path("src", d)))
            dst += ["disk=%s=%s" % (d, self.path("dst", d)),
                    "size=%d" % SIZE]
        self.src = Nbdkit(*src, "control=%s-src.ctl" % self.tag,
                          name=self.tag + "-src")
        self.dst = Nbdkit(*dst, "control=%s-dst.ctl" % self.tag,
                          name=self.tag + "-dst")
        self.line = Line(os.path.join(TMPDIR, self.tag + ".line"),
                         self.dst.socket)
        qmp = QMP(self.tag + "-src.ctl")
        self.writers = {}
        for d in disks:
            qmp.command("block-dirty-bitmap-add", node=d, name="b",
                        persistent=True, granularity=4096)
            run_nbdferry("backup", self.tag + "-src.ctl", "--node", d,
                         "--bitmap", "b", self.path("full", d))
            self.writers[d] = LoggingWriter(self.src.uri(d), self.models[d])
            settle(self.writers[d], 20)
        for w in self.writers.values():
            w.stop()
        qmp.command("migrate", uri="nbd+unix://?socket=" + self.line.path)
        if not self.line.cut.wait(30):
            raise TimeoutError("no COMMIT came: %s"
                               % qmp.command("query-migrate"))
        qmp.close()
        self.src.kill()
        self.dst.kill()

    def path(self, side, disk):
        return "%s-%s-%s.raw" % (self.tag, side, disk)

    def paths(self, side):
        return [self.path(side, d) for d in self.disks]

    def status(self, side):
        return {d["name"]: d for d in json.loads(run_nbdferry(
            "status", "%s-%s.ctl" % (self.tag, side),
            "--json").stdout)["disks"]}

    def check(self, side, disk):
        """The daemon has ended well: all of the disk, and just its bits."""
        compare(self.path(side, disk), self.models[disk])
        sidecar = self.path(side, disk) + ".ferry/bitmaps.qcow2"
        qemu_img_check(sidecar)
        got = bitmap_ranges(sidecar, "b")
        want = granules(self.writers[disk].touched, 4096, SIZE)
        assert got == want, (side, disk)


def journal(path):
    with open(path + ".ferry/journal", "rb") as f:
        return f.read()


def record(path):
    """The last one."""
    data, best = journal(path), None
    for slot in data[:16384], data[16384:]:
        if slot.startswith(b"FERRYJNL"):
            n = int.from_bytes(slot[12:16], "big")
            this = (int.from_bytes(slot[16:24], "big"),
                    json.loads(slot[32:32 + n]))
            if best is None or this[0] > best[0]:
                best = this
    return best[1]


def refused(*args, says):
    paths = [a for a in args if a.endswith(".raw")]
    before = [journal(p) for p in paths]
    p = run_nbdferry("takeover", *args, check=False)
    print(args, p.returncode, p.stderr.strip())
    assert p.returncode == 1, p
    for text in says:
        assert re.search(text, p.stderr), (text, p.stderr)
    assert [journal(p) for p in paths] == before


def take(*args):
    p = run_nbdferry("takeover", "--json", "--yes", *args)
    print(p.stderr)
    assert "gone for good" in p.stderr
    return json.loads(p.stdout)


def confirm(answer, *args):
    """With a terminal that gives that answer."""
    main, other = pty.openpty()
    os.write(main, answer.encode() + b"\n")
    p = subprocess.run([NBDFERRY, "takeover", *args], stdin=other, text=True,
                       capture_output=True, timeout=60)
    os.close(main)
    os.close(other)
    return p


# ---- the source takes its disk back ----

t = Stuck("d")
src, dst = t.path("src", "d"), t.path("dst", "d")
was = record(src)
assert was["state"] == "gone" and not was["acknowledged"], was
assert record(dst)["state"] == "prepared"
refused(src, says=["--yes"])
t.src.start()
refused(src, "--yes", says=["in use by another process"])
refused("%s-src.ctl" % t.tag, "--yes", says=["is a socket"])
t.src.stop()
refused("nothing.raw.none", "--yes", says=["journal"])
for answer in "no", "", "y", "yes!":
    before = journal(src)
    p = confirm(answer, src)
    assert p.returncode == 1 and "nothing was done" in p.stderr, p
    assert journal(src) == before
p = confirm("yes", src)
assert p.returncode == 0, p
assert "has let go of it" in p.stderr and "taken over" in p.stdout, p
now = record(src)
assert now["state"] == "active" and now["generation"] == 1, now
assert now["taken-from"] == was["session"], now
assert len({now[x] for x in ("lineage", "session")}
           | {was["lineage"], was["session"]}) == 4, now
refused(src, "--yes", "--force", says=["is active here"])
t.check("src", "d")
# It serves, and goes on recording, also with incoming=on.
t.src.args += ("incoming=on",)
t.src.start()
assert t.status("src")["d"]["mode"] == "active"
# What builds upon a backup of the old lineage could not be restored.
p = run_nbdferry("backup", "%s-src.ctl" % t.tag, "no.nbf", "--bitmap", "b",
                 "--incremental", check=False)
assert p.returncode == 1 and "knows of no earlier backup" in p.stderr, p
h = t.src.connect("d")
h.pwrite(b"n" * 512, 1024)
t.models["d"].set(1024, b"n" * 512)
t.writers["d"].touched.append((1024, 1536))
h.shutdown()
# The other side waits for ever, for it is another disk that it was to get.
t.dst.start()
p = run_nbdferry("migrate", "%s-src.ctl" % t.tag, t.dst.uri("d"), check=False)
assert p.returncode == 1 and "nbdferry takeover" in p.stderr, p
assert t.status("dst")["d"]["mode"] == "prepared"
t.src.stop()
t.dst.stop()
t.check("src", "d")
assert record(dst)["state"] == "prepared"

# ---- the destination is served, and its source comes back from the dead ----

t = Stuck("d")
src, dst = t.path("src", "d"), t.path("dst", "d")
session = record(dst)["session"]
out, = take(dst)
assert [b["name"] for b in out["bitmaps"]] == ["b"], out
assert record(dst)["lineage"] == out["lineage"] != record(src)["lineage"]
t.check("dst", "d")
t.dst.start()                   # with incoming=on, as before
t.line.repair()
t.src.start()
wait_for(lambda: "not the disk that was handed over" in t.src.log_text(),
         "the refusal of COMMIT")
assert t.status("src")["d"]["mode"] == "gone"
assert t.status("dst")["d"]["mode"] == "active"
assert record(dst)["lineage"] == out["lineage"]
for export, says in (("d@forward/%s/1" % session, "not handed over by that"),):
    try:
        t.dst.connect(export)
    except nbd.Error:
        assert says in t.dst.log_text()
    else:
        raise AssertionError("the dead one is forwarded")
assert read_all(t.dst.uri("d")) == bytes(t.models["d"].data)
t.src.stop()
t.dst.stop()
t.check("dst", "d")
# Both taken over: two disks, each with a lineage of its own, that never meet.
other, = take(src)
assert other["lineage"] not in (out["lineage"], record(dst)["lineage"])
t.check("src", "d")
t.src.start()
t.dst.start()
p = run_nbdferry("migrate", "%s-src.ctl" % t.tag, t.dst.uri("d"), check=False)
assert p.returncode == 1 and "is active at the destination" in p.stderr, p
t.src.stop()
t.dst.stop()

# ---- several disks are taken over together ----

for side in "src", "dst":
    t = Stuck("a", "b", "c")
    a, b, c = t.paths(side)
    for few in (a,), (b,), (c,), (a, b), (b, c), (a, c):
        refused(*few, "--yes", says=["moved together with 2 other disks"])
    refused(a, b, c, a, "--yes", says=["named twice"])
    # One is in use: nothing is changed.
    with open(c, "r+b") as f:
        q = subprocess.Popen(
            ["qemu-nbd", "-f", "raw", "-k",
             os.path.join(TMPDIR, "q%s.sock" % side), "-t", c])
        wait_for(lambda: is_served("q%s.sock" % side), "qemu-nbd")
        refused(a, b, c, "--yes", says=["in use by another process"])
        q.terminate()
        q.wait()
    # Interrupted after the first: the same command does the others.
    for x in b, c:
        shutil.copytree(x + ".ferry", x + ".before")
    take(a, b, c)
    for x in b, c:
        for name in os.listdir(x + ".before"):
            # In place: another inode is another sidecar to the trust rule.
            path = "%s.ferry/%s" % (x, name)
            mode = "r+b" if os.path.exists(path) else "wb"
            with open("%s.before/%s" % (x, name), "rb") as f, \
                    open(path, mode) as to:
                to.truncate()
                to.write(f.read())
    first = record(a)
    refused(b, "--yes", says=["moved together"])
    assert len(take(c, a, b)) == 2
    assert record(a) == first
    daemon = t.src if side == "src" else t.dst
    daemon.start()
    assert {d["mode"] for d in t.status(side).values()} == {"active"}
    for d in "abc":
        assert read_all(daemon.uri(d)) == bytes(t.models[d].data)
    daemon.stop()
    t.check(side, "a")

# ---- the machine was started anew since: too much is dirty, not too little --

t = Stuck("d")
src = t.path("src", "d")
t.src.env["FERRY_TEST_BOOT_ID"] = "another"
t.src.start()                   # it is gone, and says so
t.src.stop()
os.environ["FERRY_TEST_BOOT_ID"] = "another"
# Its time must not be of this boot, as it is not after a real one.
os.utime(src, (1, 1))
out, = take(src)
del os.environ["FERRY_TEST_BOOT_ID"]
b, = out["bitmaps"]
print(b)
assert not b["inconsistent"], b
got = bitmap_ranges(src + ".ferry/bitmaps.qcow2", "b")
for start, end in granules(t.writers["d"].touched, 4096, SIZE):
    assert any(s <= start and end <= e for s, e in got), (start, end)
assert "reason" in b, b

# ---- what needs --force ----

# A handover that has completed.
p = Pair({"d": SIZE})
p.migrate()
p.wait("completed")
p.stop()
refused("src-d.raw", "--yes", says=["has completed", "--force"])
take("src-d.raw", "--force")
assert record("src-d.raw")["state"] == "active"

# A disk of which a part has come, and one to which nothing has.
model = make_disk("part-src.raw", 32 * MiB, step=32 * MiB)
src = Nbdkit("disk=d=part-src.raw", "control=part.ctl", name="part-src")
dst = Nbdkit("disk=d=part.raw", "size=%d" % (32 * MiB), name="part",
             *["control=part-dst.ctl"])
run_nbdferry("bitmap", "add", "part-dst.ctl", "own")
dst.stop()
dst.args += ("incoming=on",)
dst.start()
dst.stop()
refused("part.raw", "--yes", "--force", says=["no data has ever come"])
dst.start()
qmp = QMP("part.ctl")
qmp.command("migrate-set-parameters", max_bandwidth=2 * MiB,
            multifd_channels=1)
qmp.command("migrate", uri=dst.uri("d"))
wait_for(lambda: record("part.raw")["state"] == "incoming"
         and record("part.raw")["session"].strip("0-"), "the first data")
dst.kill()
src.kill()
qmp.close()
refused("part.raw", "--yes", says=["only a part", "--force"])
out, = take("part.raw", "--force")
b, = out["bitmaps"]
assert b["name"] == "own" and b["count"] == 32 * MiB, b
assert "a migration" in b["reason"], b
