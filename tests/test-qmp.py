#!/usr/bin/python3
# nbdferry - the control socket
# SPDX-License-Identifier: BSD-3-Clause
"""Talks to the control socket of the real plugin: the protocol, the clients,
bitmaps, questions and parameters.  test-qmp-qsd.py compares with QEMU.
"""

import json
import os
import socket
import stat
import threading
import time

from ferrytest import (Nbdkit, QMP, QMPError, TMPDIR, connect, make_disk,
                       requires, wait_for)

requires("nbdkit")
SIZE = 16 << 20
CONTROL = os.path.join(TMPDIR, "c")
ADD, REMOVE = "block-dirty-bitmap-add", "block-dirty-bitmap-remove"
CLEAR, MERGE = "block-dirty-bitmap-clear", "block-dirty-bitmap-merge"
COMMAND = b'{"execute":"query-version"}'


class Raw:
    """A connection that shows each byte."""

    def __init__(self, path=CONTROL):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(path)
        self.data = b""

    def send(self, data):
        self.socket.sendall(data)
        return self

    def line(self):
        while b"\n" not in self.data:
            more = self.socket.recv(65536)
            if not more:
                raise EOFError(self.data)
            self.data += more
        line, self.data = self.data.split(b"\n", 1)
        assert line.endswith(b"\r"), line
        return json.loads(line)

    def reply(self):
        while True:
            line = self.line()
            if "event" not in line:
                return line

    def closed(self):
        """Read until the other side closes; what was left."""
        try:
            while True:
                more = self.socket.recv(1 << 20)
                if not more:
                    return self.data
                self.data += more
        except ConnectionResetError:
            return self.data


def greeted():
    """A client, or None if there are too many."""
    raw = Raw()
    return raw if "QMP" in raw.line() else None


def negotiated():
    raw = wait_for(greeted, "a place for a client")
    raw.send(b'{"execute":"qmp_capabilities"}')
    assert raw.line() == {"return": {}}
    return raw


def refused(text, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except QMPError as e:
        assert text in str(e), (text, str(e))
        assert e.cls == "GenericError", e.cls
        return
    raise AssertionError("not refused: %s %r %r" % (text, args, kwargs))


def bitmaps(qmp, node):
    """{name: BlockDirtyInfo} of a node, and the names in order."""
    for n in qmp.command("query-named-block-nodes"):
        if n["node-name"] == node:
            infos = n.get("dirty-bitmaps", [])
            return {b["name"]: b for b in infos}, [b["name"] for b in infos]
    raise KeyError(node)


def test_protocol():
    raw = Raw()
    greeting = raw.line()["QMP"]
    assert greeting["capabilities"] == []
    assert set(greeting["version"]["qemu"]) == {"major", "minor", "micro"}
    assert "nbdferry" in greeting["version"]["package"]
    raw.send(b'{"execute":"query-version","id":1}')
    assert raw.line() == {"id": 1, "error": {
        "class": "CommandNotFound",
        "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}}
    raw.send(b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}')
    assert raw.line()["error"]["class"] == "GenericError"
    raw.send(b'{"execute":"qmp_capabilities","arguments":{"enable":[]}}')
    assert raw.line() == {"return": {}}
    # any id; strings as they were
    for value in (0, -1, 2 ** 53, 1.5, True, None, "", "ä€😀\"\\/\x01", [],
                  {"a": [{}]}):
        raw.send(json.dumps({"execute": "query-version", "id": value},
                            ensure_ascii=False).encode())
        assert raw.line()["id"] == value
    # garbage is answered and survived
    raw.send(b'\xff\nfoo\n{"execute":}}' + COMMAND + b"\n")
    assert ["error" in raw.line() for _ in range(4)] == [True] * 4
    assert "return" in raw.line()


def test_framing():
    raw = negotiated()
    # bytes one by one; several in a line; one over lines
    for b in COMMAND:
        raw.send(bytes([b]))
        time.sleep(0.001)
    assert "return" in raw.line()
    raw.send(COMMAND * 100)
    for _ in range(100):
        assert "return" in raw.line()
    raw.send(json.dumps({"execute": "query-version"}, indent=4).encode())
    assert "return" in raw.line()
    # too large, too deep: one error, and the next line is fine
    raw.send(b'{"id":"' + b"x" * (3 << 20) + b'"}\n' + COMMAND)
    assert raw.line()["error"]["desc"] == "JSON token size limit exceeded"
    assert "return" in raw.line()
    raw.send(b"[" * 100000 + b"\n" + COMMAND)
    assert raw.line()["error"]["desc"] == "JSON nesting depth limit exceeded"
    assert "return" in raw.line()
    # an unfinished message, then gone
    raw.send(b'{"execute":"qu')
    raw.socket.close()
    assert "return" in negotiated().send(COMMAND).line()


def test_clients():
    """Neither many clients nor bad ones are in the way of others."""
    many = [negotiated() for _ in range(31)]
    # one that sends and never reads: its own thread waits, nobody else
    stuck = negotiated()
    stuck.socket.settimeout(0.5)
    try:
        while True:
            stuck.send(COMMAND * 1000)
    except socket.timeout:
        pass
    for raw in many:
        assert "return" in raw.send(COMMAND).line()
    too_many = Raw()
    assert "Too many clients" in too_many.line()["error"]["desc"]
    assert too_many.closed() == b""
    # After a while the stuck one is given up, and its place is free.
    wait_for(greeted, "the end of a stuck client")
    assert len(stuck.closed()) > 0
    for raw in many:
        raw.socket.close()


def test_bitmaps(qmp, server):
    names = ["plain", "ünïcode ☂", "1" * 1023, "q'\"\\/%@\n\x01"]
    for name in names:
        qmp.command(ADD, node="vda", name=name)
    qmp.command(ADD, node="vda", name="fine", granularity=512,
                persistent=True, disabled=True)
    infos, order = bitmaps(qmp, "vda")
    assert order == ["fine"] + names[::-1], order
    assert infos["fine"] == {
        "name": "fine", "granularity": 512, "count": 0, "recording": False,
        "busy": False, "persistent": True}, infos["fine"]
    h = connect(server.uri("vda"))
    h.pwrite(b"x" * 512, 65536)
    infos, _ = bitmaps(qmp, "vda")
    assert [infos[n]["count"] for n in names] == [65536] * 4
    assert infos["fine"]["count"] == 0
    qmp.command("block-dirty-bitmap-enable", node="vda", name="fine")
    qmp.command("block-dirty-bitmap-disable", node="vda", name="plain")
    h.pwrite(b"x" * 1024, 4 << 20)
    infos, _ = bitmaps(qmp, "vda")
    assert infos["fine"]["count"] == 1024 and infos["fine"]["recording"]
    assert infos["plain"]["count"] == 65536
    # merge: nothing, across granularities, into itself
    qmp.command(MERGE, node="vda", target="plain", bitmaps=[])
    qmp.command(MERGE, node="vda", target="plain",
                bitmaps=["fine", {"node": "vda", "name": "plain"}])
    assert bitmaps(qmp, "vda")[0]["plain"]["count"] == 2 * 65536
    qmp.command(CLEAR, node="vda", name="fine")
    assert bitmaps(qmp, "vda")[0]["fine"]["count"] == 0
    for name in names[1:]:
        qmp.command(REMOVE, node="vda", name=name)
    assert bitmaps(qmp, "vda")[1] == ["fine", "plain"]
    for length in 512, 100000:
        refused("Bitmap name too long", qmp.command, ADD, node="vda",
                name="ä" * length)
    refused("Cannot find device=''", qmp.command, ADD, node="", name="x")


def action(kind, **data):
    return {"type": "block-dirty-bitmap-" + kind, "data": data}


def test_transaction(qmp):
    before = bitmaps(qmp, "vda"), bitmaps(qmp, "vdb")
    refused("Dirty bitmap 'nope' not found", qmp.command, "transaction",
            actions=[action("add", node="vdb", name="t"),
                     action("merge", node="vdb", target="t", bitmaps=[
                         {"node": "vda", "name": "plain"}]),
                     action("remove", node="vda", name="plain"),
                     action("clear", node="vdb", name="nope")])
    assert (bitmaps(qmp, "vda"), bitmaps(qmp, "vdb")) == before
    qmp.command("transaction", actions=[
        action("add", node="vdb", name="t", disabled=True),
        action("add", node="vda", name="t", persistent=True),
        action("merge", node="vda", target="t", bitmaps=["plain"]),
        action("clear", node="vda", name="plain"),
        action("merge", node="vdb", target="t", bitmaps=[
            {"node": "vda", "name": "t"}])],
        properties={"completion-mode": "individual"})
    assert bitmaps(qmp, "vda")[0]["t"]["count"] == 2 * 65536
    assert bitmaps(qmp, "vdb")[0]["t"]["count"] == 2 * 65536
    assert bitmaps(qmp, "vda")[0]["plain"]["count"] == 0
    qmp.command("transaction", actions=[])


def test_queries(qmp):
    names = {c["name"] for c in qmp.command("query-commands")}
    assert names >= {
        "qmp_capabilities", "quit", "query-version", "query-commands",
        "query-block", "query-named-block-nodes", "transaction", "migrate",
        "migrate-cancel", "migrate_cancel", "query-migrate",
        "migrate-set-parameters", "query-migrate-parameters",
        "x-ferry-status"}, names
    nodes = qmp.command("query-named-block-nodes", flat=True)
    assert [n["node-name"] for n in nodes] == ["vdb", "vda"]
    assert nodes[1]["image"]["virtual-size"] == SIZE
    assert nodes[1]["file"] == os.path.join(TMPDIR, "a.raw")
    assert nodes[1]["ro"] is False and nodes[1]["drv"] == "raw"
    blocks = qmp.command("query-block")
    assert [b["device"] for b in blocks] == ["vda", "vdb"]
    assert blocks[0]["inserted"] == nodes[1]
    status = qmp.command("x-ferry-status")
    assert status["pid"] > 0 and status["migration"] == {}
    disk = status["disks"][0]
    assert disk["name"] == "vda" and disk["mode"] == "active", disk
    assert disk["generation"] == 0 and len(disk["lineage"]) == 36
    assert disk["bitmaps"] == len(bitmaps(qmp, "vda")[1])


def test_parameters(qmp):
    default = qmp.command("query-migrate-parameters")
    assert default["multifd-channels"] in (3, 4), default # by the CPUs
    assert default == {"max-bandwidth": 0, "downtime-limit": 30,
                       "multifd-channels": default["multifd-channels"],
                       "multifd-compression": "none",
                       "copy-mode": "background",
                       "multifd-zlib-level": 1, "multifd-zstd-level": 1,
                       "x-ferry-resume": True}
    new = {"max-bandwidth": 2 ** 40, "downtime-limit": 2000000,
           "multifd-channels": 64, "multifd-compression": "zstd",
           "copy-mode": "write-blocking",
           "multifd-zlib-level": 9, "multifd-zstd-level": 20,
           "x-ferry-resume": False}
    qmp.execute("migrate-set-parameters", new)
    assert qmp.command("query-migrate-parameters") == new
    for name, value, text in (
            ("multifd-channels", 0,
             "Parameter 'multifd-channels' expects a value between 1 and 64"),
            ("multifd-channels", 65, "expects a value between 1 and 64"),
            ("multifd-channels", 256, "expects uint8_t"),
            ("multifd-channels", "4", "expects uint64"),
            ("downtime-limit", 2000001, "Parameter 'downtime-limit' expects "
             "an integer in the range of 0 to (2000 * 1000) ms"),
            ("multifd-compression", "gzip", "Parameter 'multifd-compression' "
             "does not accept value 'gzip'"),
            ("block-bitmap-map", [], "Parameter 'block-bitmap-map' is "
             "unexpected")):
        refused(text, qmp.execute, "migrate-set-parameters",
                {"max-bandwidth": 1, name: value})
    assert qmp.command("query-migrate-parameters") == new  # all or nothing
    qmp.execute("migrate-set-parameters", {"max-bandwidth": 2 ** 64 - 1})
    assert (qmp.command("query-migrate-parameters")["max-bandwidth"]
            == 2 ** 63 - 1)
    qmp.execute("migrate-set-parameters", default)
    qmp.execute("migrate-set-parameters", {})
    assert qmp.command("query-migrate-parameters") == default


def test_migrate(qmp):
    assert qmp.command("query-migrate") == {}
    assert qmp.command("migrate_cancel") == {}
    assert qmp.command("migrate-cancel") == {}
    uri = "nbd+unix:///%%s?socket=%s/nobody" % TMPDIR
    refused("Parameter 'uri' is missing", qmp.command, "migrate")
    refused("no paused migration", qmp.command, "migrate", uri=uri % "",
            resume=True)
    refused("'blk' and 'inc'", qmp.command, "migrate", uri=uri % "", blk=True)
    refused("Node 'nope' not found", qmp.command, "migrate", uri=uri % "",
            x_ferry_nodes=["vda", "nope"])
    refused("named twice", qmp.command, "migrate", uri=uri % "",
            x_ferry_nodes=["vda", "vda"])
    refused("at least one", qmp.command, "migrate", uri=uri % "",
            x_ferry_nodes=[])
    refused("export 'v c/d'", qmp.command, "migrate", uri=uri % "v%20c%2Fd")
    refused("", qmp.command, "migrate", uri="")
    assert qmp.command("query-migrate") == {}
    # to nobody: it begins, and fails
    qmp.events.clear()
    qmp.command("migrate", uri=uri % "vd%62", detach=True)
    wait_for(lambda: qmp.command("query-migrate")["status"] == "failed",
             "the failure of a migration to nobody")
    info = qmp.command("query-migrate")
    assert info["error-desc"], info
    assert info["disk"]["total"] == SIZE, info
    assert info["disk"]["page-size"] == 4096
    statuses = []
    while not statuses or statuses[-1] != "failed":
        statuses.append(qmp.event("MIGRATION")["data"]["status"])
    assert statuses[0] == "setup", statuses
    assert qmp.command("x-ferry-status")["migration"] == info


def test_migrated():
    """One that completes, as its clients see it."""
    make_disk("src.raw", SIZE)
    with open("dst.raw", "wb") as f:
        f.truncate(SIZE)
    src = Nbdkit("disk=vda=src.raw", "control=cs", name="src")
    dst = Nbdkit("disk=vda=dst.raw", "incoming=on", "control=cd", name="dst")
    there, here = QMP("cd"), QMP("cs")
    assert there.command("x-ferry-status")["disks"][0]["mode"] == "incoming"
    refused("itself the destination", there.command, "migrate",
            uri=src.uri("vda"))
    here.command(ADD, node="vda", name="b", persistent=True)
    here.command("migrate", uri=dst.uri("vda"))
    statuses, passes = [], []
    while not statuses or statuses[-1] not in ("completed", "failed"):
        event = here.read()
        (statuses if event["event"] == "MIGRATION" else passes).extend(
            event["data"].values())
    assert statuses == ["setup", "active", "device", "completed"], statuses
    assert passes == list(range(1, len(passes) + 1)) and passes, passes
    info = here.command("query-migrate")
    assert info["status"] == "completed" and "downtime" in info, info
    assert "expected-downtime" not in info and "error-desc" not in info
    assert info["disk"]["normal-bytes"] == SIZE // 2, info
    assert info["disk"]["remaining"] == 0, info
    gone = here.command("x-ferry-status")["disks"][0]
    came = there.command("x-ferry-status")["disks"][0]
    assert gone["peer"] and gone["mode"] != "active", gone
    assert came["mode"] == "active" and came["bitmaps"] == 1, came
    assert came["lineage"] == gone["lineage"]
    assert came["generation"] == gone["generation"] + 1
    refused("handed over", here.command, "migrate", uri=dst.uri("vda"))
    assert here.command("migrate_cancel") == {}
    src.stop()
    dst.stop()


def test_socket():
    """Mode, what may be replaced, and what may not."""
    assert stat.S_IMODE(os.stat(CONTROL).st_mode) == 0o600
    make_disk("other.raw", 1 << 20)

    def fails(path, text):
        try:
            Nbdkit("other.raw", "control=" + path, name="other")
        except RuntimeError as e:
            assert text in str(e), str(e)
            return
        raise AssertionError(path)

    fails(CONTROL, "is in use by another process")
    assert "QMP" in Raw().line()
    fails("x" * 200, "too long")
    with open("file", "w") as f:
        f.write("precious")
    fails(os.path.join(TMPDIR, "file"), "not a socket")
    assert open("file").read() == "precious"
    # a relative path; one left behind by kill -9
    other = Nbdkit("other.raw", "control=o", name="other")
    other.kill()
    assert os.path.exists("o")
    other.start()
    assert "QMP" in Raw("o").line()
    other.stop()
    assert not os.path.exists("o")


def test_quit(server):
    """The last reply and event arrive, also while others are idle or stuck
    in the middle of a message."""
    idle, half, silent = negotiated(), negotiated(), Raw()
    half.send(b'{"execute":')
    quitter = negotiated()
    quitter.send(b'{"execute":"quit","id":9}' + COMMAND)
    assert quitter.line() == {"return": {}, "id": 9}
    began = time.monotonic()
    for raw in quitter, idle, half:
        event = raw.line()
        assert event["event"] == "SHUTDOWN", event
        assert event["data"] == {"guest": False, "reason": "host-qmp-quit"}
        assert set(event["timestamp"]) == {"seconds", "microseconds"}
        assert raw.closed() == b""
    assert silent.closed().count(b"\n") == 1  # the greeting
    server.wait()
    assert time.monotonic() - began < 5
    assert not os.path.exists(CONTROL)


def test_stop(server):
    """SIGTERM, with clients that talk all the time and one that is stuck."""
    server.start()
    stop = threading.Event()

    def talk():
        try:
            raw = negotiated()
            while not stop.is_set():
                raw.send(COMMAND * 3)
                raw.line()
        except OSError:
            pass
        except EOFError:
            pass

    threads = [threading.Thread(target=talk) for _ in range(4)]
    for t in threads:
        t.start()
    stuck = negotiated()
    stuck.socket.settimeout(0.3)
    try:
        while True:
            stuck.send(COMMAND * 1000)
    except socket.timeout:
        pass
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 4
    stop.set()
    for t in threads:
        t.join(10)
        assert not t.is_alive()


make_disk("a.raw", SIZE)
make_disk("b.raw", SIZE)
server = Nbdkit("disk=vda=a.raw", "disk=vdb=b.raw", "control=" + CONTROL)
test_protocol()
test_framing()
test_clients()
qmp = wait_for(lambda: QMP(CONTROL), "the control socket")
test_bitmaps(qmp, server)
test_transaction(qmp)
test_queries(qmp)
test_parameters(qmp)
test_migrate(qmp)
qmp.close()
test_migrated()
test_socket()
test_quit(server)
test_stop(server)
