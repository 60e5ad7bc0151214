#!/usr/bin/python3
# nbdferry - destinations that cannot take the disk
# SPDX-License-Identifier: BSD-3-Clause
"""A migration that is refused says what and where, and leaves the source as
it was: serving, recording, its bitmaps intact, and able to migrate later."""

from ferrytest import *
from migratetest import *

requires("nbdkit", "qemu-img", "qemu-nbd")

MiB = 1 << 20
SIZE = 16 * MiB + 3 * 512
SMALL = 8 * MiB
BITMAPS = {"daily": 65536, "fine": 512}
GRANULE = 65536


class Source:
    """Two disks; a writer is in the lower half of the first all the time,
    and each probe () touches a granule of the upper half."""

    def __init__(self):
        self.model = make_disk("src-vda.raw", SIZE, step=MiB + 512)
        self.small = make_disk("src-vdb.raw", SMALL, seed=2)
        self.daemon = Nbdkit("disk=vda=src-vda.raw", "disk=vdb=src-vdb.raw",
                             "control=src.ctl", name="src")
        self.qmp = QMP("src.ctl")
        for name, granularity in BITMAPS.items():
            self.qmp.command("block-dirty-bitmap-add", node="vda", name=name,
                             granularity=granularity, persistent=True)
        uri = self.daemon.uri("vda")
        self.handle = connect(uri)
        self.middle = SIZE // 2 // GRANULE * GRANULE
        self.writer = LoggingWriter(uri, self.model, 0, self.middle,
                                    max_length=16384, pause=0.002)
        self.next, self.touched = self.middle, []

    def bitmaps(self):
        node, = [n for n in self.qmp.command("query-named-block-nodes")
                 if n["node-name"] == "vda"]
        return {b["name"]: b for b in node["dirty-bitmaps"]}

    def probe(self):
        data = os.urandom(512)
        self.handle.pwrite(data, self.next)
        self.model.set(self.next, data)
        self.touched.append((self.next, self.next + 512))
        self.next += GRANULE

    def check(self):
        """It serves, and its bitmaps record."""
        settle(self.writer, 3)
        assert self.writer.errors == 0, self.writer.last_error
        before = self.bitmaps()
        self.probe()
        after = self.bitmaps()
        for name, granularity in BITMAPS.items():
            assert after[name]["recording"] and after[name]["persistent"]
            assert not after[name]["busy"] and "inconsistent" not in after[name]
            assert after[name]["count"] >= before[name]["count"] + granularity
        for disk in self.qmp.command("x-ferry-status")["disks"]:
            assert disk["mode"] == "active" and disk["generation"] == 0, disk

    def all_touched(self):
        return self.writer.touched + self.touched


src = Source()


def refused(what, *args, says, begins=True):
    """nbdferry migrate ARGS must fail, and say all of these."""
    src.check()
    p = run_nbdferry("migrate", "src.ctl", *args, check=False, timeout=20)
    print("%s: %d, %s" % (what, p.returncode, p.stderr.strip()))
    assert p.returncode == 1, (what, p)
    for text in says:
        assert re.search(text, p.stderr), (what, text, p.stderr)
    info = src.qmp.command("query-migrate")
    if begins:
        assert info["status"] == "failed", info
        assert info["error-desc"] in p.stderr, info
        assert "Success" not in info["error-desc"], info
    src.check()


def destination(*args, name):
    return Nbdkit(*args, "control=%s.ctl" % name, name=name)


def bare(daemon):
    return daemon.uri().rstrip("/")


def only_vda(uri):
    return uri, "--node", "vda"


# ---- destinations of another shape ----

d = destination("disk=vda=small.raw", "size=%d" % (SIZE - 512), "incoming=on",
                name="small")
refused("too small", *only_vda(bare(d)),
        says=["vda", "too small", str(SIZE), str(SIZE - 512)])
d.stop()

d = destination("disk=vda=large.raw", "size=%d" % (SIZE + 512), "incoming=on",
                name="large")
refused("a larger file", *only_vda(bare(d)),
        says=["vda", str(SIZE), str(SIZE + 512)])
d.stop()

d = destination("disk=other=other.raw", "size=%d" % SIZE, "incoming=on",
                name="other")
refused("no such disk", *only_vda(bare(d)), says=["vda"])
refused("no such export", *only_vda(d.uri("nowhere")), says=["nowhere"])
refused("only one of two disks", bare(d), says=["vd[ab]"])
d.stop()

# The other disk has to come, too: one refusal is for all.
d = destination("disk=vda=one.raw", "size=%d" % SIZE,
                "disk=vdb=two.raw", "size=%d" % (SMALL - 512), "incoming=on",
                name="two")
refused("the second too small", bare(d),
        says=["vdb", "too small", str(SMALL)])
d.stop()

# ---- destinations that are in use ----

d = destination("disk=vda=has.raw", "size=%d" % SIZE, name="has")
run_nbdferry("bitmap", "add", "has.ctl", "fine")
refused("active", *only_vda(bare(d)), says=["vda", "incoming=on"])
d.stop()
d = destination("disk=vda=has.raw", "incoming=on", name="has")
refused("the bitmap exists", *only_vda(bare(d)),
        says=["Bitmap already exists", "fine", "vda"])
have = json.loads(run_nbdferry("bitmap", "list", "has.ctl", "--json").stdout)
assert [b["name"] for b in have] == ["fine"], have
d.stop()

refused("nobody listens", *only_vda("nbd://127.0.0.1:%d" % free_port()),
        says=["127.0.0.1", "(?i)connection refused"])
refused("no such socket", *only_vda("nbd+unix://?socket=/nonexistent/sock"),
        says=["/nonexistent/sock", "No such file"])

# ---- URIs ----

refused("no URI at all", "garbage", says=["garbage"], begins=False)
refused("another protocol", "http://127.0.0.1/", says=["http"], begins=False)
refused("no socket in it", *only_vda("nbd+unix:///vda"), says=["nbd.unix"],
        begins=False)
refused("one disk for two", "nbd://127.0.0.1:%d/vda" % free_port(),
        "--node", "vda", "--node", "vdb", says=["name", "server"],
        begins=False)
refused("an export that is no disk here", "nbd://127.0.0.1/elsewhere",
        says=["elsewhere"], begins=False)
refused("no such node", "nbd://127.0.0.1", "--node", "vdz", says=["vdz"],
        begins=False)


# ---- servers that are something else ----

def foreign(name, status, answer):
    """A server that answers packets in its own way."""
    with open(name + ".status", "wb") as f:
        f.write(status)
    path = os.path.join(TMPDIR, name + ".status")
    return Nbdkit(
        "get_size=echo 67108864", "can_write=exit 0", "can_flush=exit 0",
        "flush=exit 0", "pwrite=" + answer,
        "pread=(cat %s; head -c $3 /dev/zero) | head -c $3" % path,
        plugin="eval", name=name, options=["-t", "4"],
        env={"LD_PRELOAD": ""}) # its programs know no sanitizer


no = "cat > /dev/null; echo EPROTO packet of another version >&2; exit 1"
d = foreign("newer", json.dumps({
    "version": 99, "errno": 71,
    "error": "packet of version 1, this server speaks 99"}).encode(), no)
refused("another version", *only_vda(bare(d)),
        says=["destination", "version", "99"])
d.stop()
for name, status in (("zeros", b""), ("text", b"go away"),
                     ("array", b"[1, 2]"), ("number", b'{"error": 7}'),
                     ("bytes", b'{"error": "\xff\xfe"}')):
    d = foreign(name, status, no)
    refused("refuses with " + name, *only_vda(bare(d)),
            says=["destination|server|refused"])
    d.stop()

# These take everything for granted.
yes = "cat > /dev/null"
d = foreign("polite", json.dumps({"version": 99}).encode(), yes)
refused("accepts all, another version", *only_vda(bare(d)),
        says=["version", "99"])
d.stop()
for session in ({}, {"session": "2f9c0b8e-7a53-4d6e-9d7a-1f0c5d1f8e11"},
                {"session": None}):
    d = foreign("parrot", json.dumps(dict(version=1, **session)).encode(),
                yes)
    refused("accepts all, session %s" % session, *only_vda(bare(d)),
            says=["parrot.sock|destination"])
    d.stop()

# ---- a good one, at last ----

src.check()
d = destination("disk=vda=good.raw", "size=%d" % SIZE,
                "disk=vdb=good-b.raw", "size=%d" % SMALL, "incoming=on",
                name="good")
run_nbdferry("migrate", "src.ctl", bare(d))
assert src.qmp.command("query-migrate")["status"] == "completed"
settle(src.writer, 10)
src.writer.stop()
assert src.writer.errors == 0, src.writer.last_error
src.handle.shutdown()
src.qmp.close()
src.daemon.stop()
d.stop()
compare("good.raw", src.model)
compare("good-b.raw", src.small)
for name, granularity in BITMAPS.items():
    got = bitmap_ranges("good.raw.ferry/bitmaps.qcow2", name)
    assert got == granules(src.all_touched(), granularity, SIZE), name
