#!/usr/bin/python3
# nbdferry - block-bitmap-mapping
# SPDX-License-Identifier: BSD-3-Clause
"""Bitmaps and disks travel under other names; what a mapping does not name
stays behind.  By QMP in QEMU's words, and by the command's options."""

from ferrytest import *
from migratetest import *

requires("nbdkit", "qemu-img", "qemu-nbd")

MiB = 1 << 20
SIZE = 4 * MiB + 512


class Two:
    """A source with the disks vda (a=b, c, d/e, off, brief) and vdb (a), and
    a destination with disks of these names."""
    count = 0

    def __init__(self, *names):
        Two.count += 1
        self.tag = "t%d" % Two.count
        self.models, args = {}, []
        for i, disk in enumerate(("vda", "vdb")):
            path = "%s-%s.raw" % (self.tag, disk)
            self.models[disk] = make_disk(path, SIZE, seed=i)
            args.append("disk=%s=%s" % (disk, path))
        self.control = self.tag + ".ctl"
        self.src = Nbdkit(*args, "control=" + self.control,
                          name=self.tag + "s")
        args = []
        for name in names:
            args += ["disk=%s=%s-to-%s.raw" % (name, self.tag, name),
                     "size=%d" % SIZE]
        self.dst = Nbdkit(*args, "incoming=on",
                          "control=%s-to.ctl" % self.tag,
                          name=self.tag + "d")
        self.qmp = QMP(self.control)
        for name in ("a=b", "c", "d/e", "off"):
            self.add("vda", name, persistent=True)
        self.add("vda", "brief")
        self.add("vdb", "a", persistent=True)
        self.writers = {
            disk: LoggingWriter(self.src.uri(disk), self.models[disk],
                                pause=0.002) for disk in self.models}
        for w in self.writers.values():
            settle(w, 10)
        self.qmp.command("block-dirty-bitmap-disable", node="vda",
                         name="off")

    def add(self, node, name, **args):
        self.qmp.command("block-dirty-bitmap-add", node=node, name=name,
                         granularity=4096, **args)

    def uri(self, export=""):
        return self.dst.uri(export) if export else self.dst.uri().rstrip("/")

    def migrate(self, *args, export="", check=True):
        p = run_nbdferry("migrate", self.control, self.uri(export), *args,
                         check=check, timeout=60)
        return p.stderr

    def bitmaps(self):
        """Of the destination: {disk: {name: info}}."""
        nodes = QMP(self.tag + "-to.ctl").command("query-named-block-nodes")
        return {n["node-name"]: {b["name"]: b for b
                                 in n.get("dirty-bitmaps", [])}
                for n in nodes}

    def end(self, disks, exact):
        """{destination's disk: the source's}, and bitmaps that must have all
        that was written: [(disk, name)]."""
        for w in self.writers.values():
            settle(w, 5)
            w.stop()
            assert w.errors == 0, w.last_error
        self.qmp.close()
        self.src.stop()
        self.dst.stop()
        for there, here in disks.items():
            path = "%s-to-%s.raw" % (self.tag, there)
            compare(path, self.models[here])
            qemu_img_check(path + ".ferry/bitmaps.qcow2")
        for there, name in exact:
            got = bitmap_ranges("%s-to-%s.raw.ferry/bitmaps.qcow2" % (
                self.tag, there), name)
            want = granules(self.writers[disks[there]].touched, 4096, SIZE)
            assert got == want, (there, name)


def names(t):
    return {disk: sorted(b) for disk, b in t.bitmaps().items()}


# ---- by QMP ----

def node(name, alias, *bitmaps):
    return {"node-name": name, "alias": alias, "bitmaps": list(bitmaps)}


def bitmap(name, alias, **transform):
    b = {"name": name, "alias": alias}
    if transform:
        b["transform"] = transform
    return b


t = Two("root", "data")
before = t.qmp.command("query-migrate-parameters")
assert "block-bitmap-mapping" not in before


def refused(mapping, says):
    try:
        t.qmp.execute("migrate-set-parameters",
                      {"block-bitmap-mapping": mapping})
    except QMPError as e:
        print(e)
        assert re.search(says, str(e)), (says, e)
    else:
        raise AssertionError(mapping)
    assert t.qmp.command("query-migrate-parameters") == before


refused([node("vda", "x"), node("vda", "y")],
        "The node name 'vda' is mapped twice")
refused([node("vda", "x"), node("vdb", "x")],
        "The node alias 'x' is used twice")
refused([node("vda", "x", bitmap("c", "1"), bitmap("c", "2"))],
        "The bitmap 'vda'/'c' is mapped twice")
refused([node("vda", "x", bitmap("c", "1"), bitmap("a=b", "1"))],
        "The bitmap alias 'x'/'1' is used twice")
refused([node("vda", "x", bitmap("c", "1" * 1024))],
        "The bitmap alias '1*\\.\\.\\.' is longer than 1023 bytes")
refused([node("vda", "x", bitmap("c", ""))], "empty")
refused([node("vda", "")], "The node alias '' is not well-formed")
refused(["vda"], "expected: object|object")
refused([{"node-name": "vda", "alias": "x"}], "bitmaps' is missing")
refused([node("vda", "x", {"name": "c"})], "alias' is missing")
refused([node("vda", "x", bitmap("c", "1", persistent="yes"))], "boolean")
refused([node("vda", "x", bitmap("c", "1", other=True))], "other")
refused("all", "array")

mapping = [node("vda", "root", bitmap("a=b", "d/e"), bitmap("d/e", "a=b"),
                bitmap("off", "long " + "x" * 1000),
                bitmap("brief", "kept", persistent=True),
                bitmap("nonesuch", "nothing")),
           node("vdb", "data", bitmap("a", "a", persistent=False))]
t.qmp.execute("migrate-set-parameters", {"block-bitmap-mapping": mapping})
assert t.qmp.command("query-migrate-parameters")["block-bitmap-mapping"] == \
    mapping
# A name in the URI must be the same one.
try:
    t.qmp.command("migrate", uri=t.uri("data"), x_ferry_nodes=["vda"])
except QMPError as e:
    assert "'data'" in str(e) and "'root'" in str(e), e
else:
    raise AssertionError("two names for one disk")
t.qmp.command("migrate", uri=t.uri())
# One that changes without a write, and one that comes while it runs.
t.qmp.command("block-dirty-bitmap-clear", node="vda", name="off")
wait_for(lambda: t.qmp.command("query-migrate")["status"] == "completed",
         "the migration")
got = t.bitmaps()
assert sorted(got["root"]) == ["a=b", "d/e", "kept", "long " + "x" * 1000], got
assert list(got["data"]) == ["a"], got
assert got["root"]["kept"]["persistent"]
assert not got["data"]["a"]["persistent"]
assert not got["root"]["long " + "x" * 1000]["recording"]
t.end({"root": "vda", "data": "vdb"},
      [("root", "a=b"), ("root", "d/e"), ("root", "kept")])

# An empty mapping: nothing but data.  A disk without an alias keeps its name.
t = Two("vda", "vdb")
t.qmp.execute("migrate-set-parameters", {"block-bitmap-mapping": []})
t.qmp.command("migrate", uri=t.uri())
wait_for(lambda: t.qmp.command("query-migrate")["status"] == "completed",
         "the migration")
assert names(t) == {"vda": [], "vdb": []}, names(t)
t.end({"vda": "vda", "vdb": "vdb"}, [])

# ---- by options ----

t = Two("root", "vdb")
for args, says in ((["--bitmap", "zzz"], "zzz"),
                   (["--bitmap", "vdb/c"], "vdb/c"),
                   (["--node", "zzz=root"], "zzz"),
                   (["--node", "vda=r", "--node", "vdb=r"], "r"),
                   (["--bitmap", "c=x", "--bitmap", "d/e=x"], "used twice"),
                   (["--bitmap", "c", "--no-bitmaps"], "exclude")):
    said = t.migrate(*args, check=False)
    print(args, said.strip())
    assert says in said, (args, said)
assert names(t) == {"root": [], "vdb": []}
t.migrate("--node", "vda=root", "--node", "vdb", "--bitmap", "vda/a=b=new",
          "--bitmap", "d/e", "--bitmap", "a=alpha")
assert names(t) == {"root": ["d/e", "new"], "vdb": ["alpha"]}, names(t)
assert "block-bitmap-mapping" not in t.qmp.command("query-migrate-parameters")
t.end({"root": "vda", "vdb": "vdb"},
      [("root", "new"), ("root", "d/e"), ("vdb", "alpha")])

# One disk, named by the URI; a new name alone leaves all bitmaps as they are.
t = Two("only", "other")
t.migrate("--node", "vda", "--no-bitmaps", export="only")
t.migrate("--node", "vdb=other")
assert names(t) == {"only": [], "other": ["a"]}, names(t)
t.end({"only": "vda", "other": "vdb"}, [("other", "a")])

# ---- at the destination ----

t = Two("vda", "vdb")
there = QMP(t.tag + "-to.ctl")


def expect(mapping, says):
    """The destination refuses, and nothing has come."""
    there.execute("migrate-set-parameters", {"block-bitmap-mapping": mapping})
    said = t.migrate("--node", "vda", "--bitmap", "c=x", "--bitmap", "d/e=y",
                     check=False)
    assert says in said, (mapping, said)
    assert names(t)["vda"] == []


expect([], "Unknown node alias 'vda'")
expect([node("vdb", "vda")], "The node alias 'vda' stands for the node 'vdb'")
expect([node("vda", "vda", bitmap("new", "x"))],
       "Unknown bitmap alias 'y' on node 'vda' (alias 'vda')")
run_nbdferry("bitmap", "add", t.tag + "-to.ctl", "mine", "--node", "vda")
there.execute("migrate-set-parameters", {"block-bitmap-mapping": [
    node("vda", "vda", bitmap("y", "x"), bitmap("x", "y", persistent=False)),
    node("vdb", "vdb", bitmap("a b", "a"))]})
t.migrate("--node", "vda", "--node", "vdb", "--bitmap", "vda/c=x",
          "--bitmap", "d/e=y", "--bitmap", "vdb/a")
got = t.bitmaps()
assert sorted(got["vda"]) == ["mine", "x", "y"], got
assert got["vda"]["y"]["persistent"] and not got["vda"]["x"]["persistent"]
assert sorted(got["vdb"]) == ["a b"], got
there.close()
t.end({"vda": "vda", "vdb": "vdb"}, [("vda", "y"), ("vdb", "a b")])
