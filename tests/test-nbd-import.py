#!/usr/bin/python3
# nbdferry - bitmaps that an NBD server offers are taken over
# SPDX-License-Identifier: BSD-3-Clause
"""What QEMU has tracked so far goes on here, bit for bit, with no write
missed between the two."""

from ferrytest import *
from migratetest import *
from nbdtest import *

requires("nbdkit", "qemu-img", "qemu-nbd", "qemu-storage-daemon")

SIZE = 32 * MiB


def prepare():
    """Two images of one size with bitmaps; what is dirty in them."""
    make_qcow2("a.qcow2", SIZE)
    for name, granularity in ("coarse", 65536), ("fine", 4096):
        subprocess.check_call(["qemu-img", "bitmap", "--add", "-g",
                               str(granularity), "a.qcow2", name])
    subprocess.check_call(["qemu-img", "bitmap", "--add", "--disable",
                           "a.qcow2", "a name, with ü"])
    qsd = Storage({"vda": "a.qcow2"})
    model = Model(SIZE)
    w = LoggingWriter(qsd.uri("vda"), model, max_length=16384)
    settle(w, 40)
    w.stop()
    assert w.errors == 0
    qsd.stop()
    return model, w.touched


def at_start():
    model, touched = prepare()
    names = ["coarse", "fine", "a name, with ü"]
    qsd = Storage({"vda": "a.qcow2"}, bitmaps={"vda": names})
    args = ("disk=vda=" + qsd.uri("vda"), "state=st", "control=ctl")
    say = refused(*args, "import-bitmaps=fine,nothing")
    assert "offers no bitmap 'nothing'" in say, say
    subprocess.run(["rm", "-rf", "st"], check=True)
    kit = Nbdkit(*args, "import-bitmaps=on", "import-granularity=4K")
    w = LoggingWriter(kit.uri("vda"), model, seed=7, max_length=16384)
    settle(w, 40)
    w.stop()
    assert w.errors == 0
    # A second start leaves what is here alone.
    kit.kill()
    kit.start()
    qmp = QMP("ctl")
    for name in names:
        b = ranges_of(qmp, "vda", name)
        assert b["recording"] and b["persistent"], b
    kit.stop()
    assert not [e for e in bitmap_names("st") if "x-ferry" in e]
    # Bits as fine as 64 KiB there are so here, in smaller ones.
    both = granules(touched, 4096, SIZE)
    got = bitmap_ranges("st/bitmaps.qcow2", "fine")
    assert got == granules(touched + w.touched, 4096, SIZE), (got, both)
    coarse = granules(touched, 65536, SIZE)
    got = bitmap_ranges("st/bitmaps.qcow2", "coarse")
    assert got == granules(coarse + w.touched, 4096, SIZE), got
    got = bitmap_ranges("st/bitmaps.qcow2", "a name, with ü")
    assert got == granules(w.touched, 4096, SIZE), got
    qemu_img_check("st/bitmaps.qcow2")
    qsd.stop()
    subprocess.run(["rm", "-rf", "st", "a.qcow2"], check=True)


def bitmap_names(state):
    info = qemu_img_info(state + "/bitmaps.qcow2")
    return [b["name"] for b in
            info["format-specific"]["data"].get("bitmaps", [])]


def refused(*args):
    try:
        Nbdkit(*args, name="refused")
    except RuntimeError as e:
        return str(e)
    raise AssertionError("was not refused: %s" % (args,))


def while_writing():
    """bitmap import from a server, under load: nothing is missed."""
    model, touched = prepare()
    qsd = Storage({"vda": "a.qcow2"}, bitmaps={"vda": ["coarse", "fine"]})
    kit = Nbdkit("disk=vda=" + qsd.uri("vda"), "state=st", "control=ctl")
    w = LoggingWriter(kit.uri("vda"), model, seed=9, max_length=16384)
    for i in range(4):
        settle(w, 5)
        out = json.loads(run_nbdferry(
            "bitmap", "import", "ctl", qsd.uri("vda"), "fine", "--as",
            "f%d" % i, "--granularity", "512", "--json").stdout)
        assert [b["name"] for b in out["bitmaps"]] == ["f%d" % i], out
        assert out["bitmaps"][0]["granularity"] == 512
    settle(w, 5)
    w.stop()
    run_nbdferry("bitmap", "import", "ctl", qsd.uri("vda"))
    p = run_nbdferry("bitmap", "import", "ctl", qsd.uri("vda"), check=False)
    assert p.returncode == 1 and "already exists" in p.stderr, p.stderr
    p = run_nbdferry("bitmap", "import", "ctl", qsd.uri("vda"), "none",
                     check=False)
    assert p.returncode == 1 and "offers no bitmap" in p.stderr, p.stderr
    names = {b["name"] for b in json.loads(run_nbdferry(
        "bitmap", "list", "ctl", "--json").stdout)}
    assert names == {"f0", "f1", "f2", "f3", "coarse", "fine"}, names
    kit.stop()
    # At least what was dirty there, and each write since, as fine as there.
    before = granules(touched, 4096, SIZE)
    most = granules(touched + w.touched, 4096, SIZE)
    least = granules(before + w.touched, 512, SIZE)
    for i in range(4):
        got = bitmap_ranges("st/bitmaps.qcow2", "f%d" % i)
        assert granules(got + least, 512, SIZE) == got, "bits are missing"
        assert granules(got, 4096, SIZE) == most
    qsd.stop()
    subprocess.run(["rm", "-rf", "st", "a.qcow2"], check=True)


def wrong_servers():
    """Another size, and no bitmaps at all."""
    server = Nbdkit("1M", plugin="memory", name="server")
    small = Nbdkit("512K", plugin="memory", name="small")
    kit = Nbdkit("disk=vda=" + server.uri(), "state=st", "control=ctl")
    p = run_nbdferry("bitmap", "import", "ctl", server.uri(), check=False)
    assert p.returncode == 1 and "offers no bitmaps" in p.stderr, p.stderr
    p = run_nbdferry("bitmap", "import", "ctl", "nbd+unix:///?socket=no.sock",
                     check=False)
    assert p.returncode == 1 and TMPDIR + "/no.sock" in p.stderr, p.stderr
    make_qcow2("b.qcow2", SIZE)
    subprocess.check_call(["qemu-img", "bitmap", "--add", "b.qcow2", "b"])
    qsd = Storage({"": "b.qcow2"}, bitmaps={"": ["b"]})
    p = run_nbdferry("bitmap", "import", "ctl", qsd.uri(), check=False)
    assert p.returncode == 1 and "but this disk has" in p.stderr, p.stderr
    assert json.loads(run_nbdferry("bitmap", "list", "ctl",
                                   "--json").stdout) == []
    qsd.stop()
    kit.stop()
    # At the start it is no error that there is nothing to take over.
    kit = Nbdkit("disk=vda=" + server.uri(), "state=st", "import-bitmaps=on")
    kit.stop()
    small.stop()
    server.stop()


at_start()
while_writing()
wrong_servers()
