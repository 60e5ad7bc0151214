#!/usr/bin/python3
# nbdferry - a disk is not copied over itself
# SPDX-License-Identifier: BSD-3-Clause
"""migrate --data-only, backup and sync to the disk itself, on whatever way:
refused before anything is written, and no write of a client is lost.  Another disk, however
like it, is not taken for it."""

import shutil

from ferrytest import *
from linktest import Link
from migratetest import *
from nbdtest import *

requires("nbdkit", "qemu-nbd", "qemu-storage-daemon")

SIZE = 8 * MiB
ITSELF = "is the disk itself"


def refused_all(control, uri):
    """A copy, a backup and a sync alike."""
    refused(control, uri)
    for args in (["backup", control, uri, "--bitmap", "b", "--force"],
                 ["backup", control, uri],
                 ["sync", control, uri, "--bitmap", "b", "--full"],
                 ["sync", control, uri, "--compare"]):
        p = run_nbdferry(*args, check=False)
        assert p.returncode == 1 and ITSELF in p.stderr, (args, p)
    assert json.loads(run_nbdferry("bitmap", "list", control, "--json")
                      .stdout) == []


def refused(source, uri, *args):
    p = run_nbdferry("migrate", source, uri, "--data-only", *args,
                     check=False)
    assert p.returncode == 1 and ITSELF in p.stderr, (uri, p)


def allowed(source, uri, *args):
    run_nbdferry("migrate", source, uri, "--data-only", *args)


def own_names():
    """All names that the daemon has for it, while a client writes."""
    model = make_disk("src.raw", SIZE)
    src = Nbdkit("disk=vda=src.raw", "control=src.ctl", name="src", tcp=True)
    qmp = QMP("src.ctl")
    link = Link(src.port)
    qmp.command("block-dirty-bitmap-add", node="vda", name="b")
    writer = Writer(src.uri("vda"), model, pause=0.0005)
    settle(writer, 20)
    for uri in src.uri("vda"), src.uri(""), link.uri("vda"), link.uri(""), \
            src.uri("vda@bitmap%2Fb"):
        refused("src.ctl", uri)
        refused("src.ctl", uri, "--overwrite", "--channels", "1")
        qmp.command("migrate", uri=uri, x_ferry_data_only=True)
        wait_for(lambda: qmp.command("query-migrate")["status"] == "failed",
                 "the end")
        info = qmp.command("query-migrate")
        assert ITSELF in info["error-desc"], info
        assert info["disk"]["transferred"] == 0, info
        # There is nothing that could go on with it.
        for command in "migrate-recover", "migrate":
            try:
                qmp.command(command, uri=uri, **(
                    {"resume": True, "x_ferry_data_only": True}
                    if command == "migrate" else {}))
                raise AssertionError("went on")
            except QMPError:
                pass
    settle(writer, 20)
    writer.stop()
    assert writer.errors == 0, writer.last_error
    assert read_all(src.uri("vda")) == bytes(model.data)
    # A copy of it is another disk, though it has the same lineage.
    src.stop()
    shutil.copytree("src.raw.ferry", "copy.raw.ferry")
    shutil.copy("src.raw", "copy.raw")
    src.start()
    copy = Nbdkit("disk=vda=copy.raw", name="copy")
    allowed("src.ctl", copy.uri("vda"))
    copy.stop()
    src.stop()
    link.stop()
    clear_folder()


def several():
    """One of two is enough; and a neighbour is not it."""
    for n in "a", "b", "b-2":
        make_disk("%s.raw" % n, SIZE)
    src = Nbdkit("disk=a=a.raw", "disk=b=b.raw", "disk=b-2=b-2.raw",
                 "control=src.ctl", name="src")
    server = "nbd+unix://?socket=" + src.socket
    refused("src.ctl", server)
    refused("src.ctl", server, "--node", "a", "--node", "b")
    refused("src.ctl", src.uri("b-2"))
    refused("src.ctl", src.uri(""), "--node", "a")
    allowed("src.ctl", src.uri("b-2"), "--node", "b")
    assert read_all(src.uri("b-2")) == read_all(src.uri("b"))
    src.stop()
    clear_folder()


def forwarded():
    """The disk came from another host, which forwards its clients here."""
    make_disk("old.raw", SIZE)
    old = Nbdkit("disk=vda=old.raw", "control=old.ctl", name="old")
    new = Nbdkit("disk=x=new.raw", "size=%d" % SIZE, "incoming=on",
                 "control=new.ctl", name="new")
    run_nbdferry("migrate", "old.ctl", new.uri("x"))
    before = read_all(new.uri("x"))
    refused_all("new.ctl", old.uri("vda"))
    assert read_all(old.uri("vda")) == before
    # Neither the old host nor one that is served from it is asked for ever.
    old.stop()
    old.start()
    wait_for(lambda: json.loads(run_nbdferry("status", "old.ctl", "--json")
                                .stdout)["disks"][0]["mode"] == "forwarding",
             "the old host")
    refused("new.ctl", old.uri("vda"))
    old.kill()
    new.stop()
    clear_folder()


def through_others():
    """Daemons whose disk is what another one, of ours or not, serves."""
    make_disk("a.raw", SIZE)
    a = Nbdkit("disk=vda=a.raw", "control=a.ctl", name="a")
    b = Nbdkit("disk=vdb=" + a.uri("vda"), "state=b", "control=b.ctl",
               name="b")
    c = Nbdkit("disk=vdc=" + b.uri("vdb"), "state=c", "control=c.ctl",
               name="c")
    refused_all("a.ctl", b.uri("vdb"))
    refused_all("a.ctl", c.uri("vdc"))
    refused_all("b.ctl", a.uri("vda"))
    refused("c.ctl", a.uri("vda"))
    refused("c.ctl", b.uri("vdb"))
    c.stop()
    b.stop()
    # The same without a daemon.
    refused(a.uri("vda"), a.uri("vda"), "--state", "l")
    a.stop()
    make_qcow2("q.qcow2", SIZE)
    qsd = Storage({"vda": "q.qcow2"})
    refused(qsd.uri("vda"), qsd.uri("vda"), "--state", "q")
    b = Nbdkit("disk=vdb=" + qsd.uri("vda"), "state=q", "control=b.ctl",
               name="b")
    refused("b.ctl", qsd.uri("vda"))
    refused("b.ctl", b.uri("vdb"))
    b.stop()
    qsd.stop()
    clear_folder()


def one_client():
    """A server that takes one client at a time, and whose last one is the last
    indeed."""
    make_disk("a.raw", SIZE)
    a = Nbdkit("disk=vda=a.raw", "control=a.ctl", name="a")
    sock = os.path.abspath("q")
    for n, args in enumerate((["migrate", "--data-only"], ["backup"],
                              ["sync", "--bitmap", "b"])):
        with open("q%d.raw" % n, "wb") as f:
            f.truncate(SIZE)
        server = subprocess.Popen(["qemu-nbd", "-f", "raw", "-k", sock,
                                   "q%d.raw" % n])
        wait_for(lambda: os.path.exists(sock), "qemu-nbd")
        began = time.monotonic()
        run_nbdferry(args[0], "a.ctl", "nbd+unix:///?socket=" + sock,
                     *args[1:])
        assert time.monotonic() - began < 5
        server.wait(10)
        compare("q%d.raw" % n, Model(SIZE, read_all(a.uri("vda"))))
    a.stop()
    clear_folder()


def hanging():
    """A server that says nothing is given up by a cancel."""
    make_disk("a.raw", SIZE)
    a = Nbdkit("disk=vda=a.raw", "control=a.ctl", name="a")
    other = Nbdkit("%d" % SIZE, plugin="memory", name="other")
    qmp = QMP("a.ctl")
    other.process.send_signal(signal.SIGSTOP)
    qmp.command("migrate", uri=other.uri(), x_ferry_data_only=True)
    time.sleep(0.2)
    qmp.command("migrate-cancel")
    wait_for(lambda: qmp.command("query-migrate")["status"] == "cancelled",
             "the end")
    other.process.send_signal(signal.SIGCONT)
    other.stop()
    a.stop()


own_names()
several()
forwarded()
through_others()
one_client()
hanging()
