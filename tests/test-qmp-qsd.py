#!/usr/bin/python3
# nbdferry - the control socket beside QEMU's
# SPDX-License-Identifier: BSD-3-Clause
"""Holds the same conversations with qemu-storage-daemon and with us: replies,
classes and words of errors, and the bitmaps that are left, must be equal.

QEMU's dictionaries have an order of their own, so no message here has two
faults of which either could be found first.
"""

import json
import os
import random
import subprocess

from ferrytest import (Nbdkit, QMP, TMPDIR, connect, is_served, requires,
                       wait_for)

requires("nbdkit", "qemu-storage-daemon", "qemu-img")
SIZE, SMALL = 64 << 20, 32 << 20
OURS, THEIRS = os.path.join(TMPDIR, "ours"), os.path.join(TMPDIR, "theirs")
NBD = os.path.join(TMPDIR, "nbd")
SEED = 7
END = b'\xff\n{"execute":"query-version","id":"the end"}\n'
B = "block-dirty-bitmap-"


def start_qsd():
    """One qcow2 disk, so that it can have persistent bitmaps, and one raw."""
    subprocess.check_call(["qemu-img", "create", "-q", "-f", "qcow2",
                           "a.qcow2", str(SIZE)])
    with open("b.img", "wb") as f:
        f.truncate(SMALL)
    return subprocess.Popen(
        ["qemu-storage-daemon",
         "--chardev", "socket,id=c,path=%s,server=on,wait=off" % THEIRS,
         "--monitor", "chardev=c", "--nbd-server",
         "addr.type=unix,addr.path=" + NBD,
         "--blockdev", "driver=qcow2,node-name=vda,discard=unmap,"
         "file.driver=file,file.filename=a.qcow2",
         "--blockdev", "driver=file,node-name=vdb,filename=b.img",
         "--export", "type=nbd,id=a,node-name=vda,name=vda,writable=on",
         "--export", "type=nbd,id=b,node-name=vdb,name=vdb,writable=on"],
        stdin=subprocess.DEVNULL)


class Pair:
    """Both of them."""

    def __init__(self):
        self.both = [QMP(THEIRS, negotiate=False), QMP(OURS, negotiate=False)]

    def replies(self, client, message):
        """All replies to a message, which may be anything.  What it leaves
        open is ended by a byte that is garbage everywhere."""
        client.socket.sendall(message + END)
        replies = []
        while True:
            reply = client.read()
            if "event" in reply:
                continue
            if reply.get("id") == "the end":
                return replies
            if isinstance(reply.get("return"), dict):
                reply["return"].pop("package", None)
                reply["return"].pop("qemu", None)
            replies.append(reply)

    def same(self, message, words=True):
        """The reply to it, which must be the same."""
        if isinstance(message, str):
            message = message.encode()
        theirs, ours = [self.replies(c, message) for c in self.both]
        if not words:
            for reply in theirs + ours:
                reply.get("error", {}).pop("desc", None)
        assert ours == theirs, "\n%r\nQEMU: %s\nwe:   %s" % (
            message, theirs, ours)
        return ours

    def execute(self, command, **arguments):
        arguments = {k.replace("_", "-"): v for k, v in arguments.items()}
        return self.same(json.dumps({"execute": command, "id": 1,
                                     "arguments": arguments}))[0]

    def ok(self, command, **arguments):
        reply = self.execute(command, **arguments)
        assert reply == {"return": {}, "id": 1}, (command, arguments, reply)

    def bad(self, command, **arguments):
        reply = self.execute(command, **arguments)
        assert "error" in reply, (command, arguments, reply)

    def same_bitmaps(self):
        """The lists of bitmaps, in their order."""
        lists = []
        for c in self.both:
            nodes = c.command("query-named-block-nodes", flat=True)
            lists.append({n["node-name"]: n.get("dirty-bitmaps", [])
                          for n in nodes if n["node-name"][0] != "#"})
        assert lists[0] == lists[1], "\nQEMU: %s\nwe:   %s" % tuple(lists)
        return lists[1]


NEGOTIATION = [
    '{"execute":"query-version","id":1}', '{"execute":"nope"}', "{}", "1 ",
    '{"execute":"qmp_capabilities","arguments":{"enable":3}}',
    '{"execute":"qmp_capabilities","arguments":{"enable":[3]}}',
    '{"execute":"qmp_capabilities","arguments":{"enable":["x"]}}',
    '{"execute":"qmp_capabilities","arguments":{"x":1}}',
    '{"execute":"qmp_capabilities","arguments":{"enable":[]},"id":[1]}',
    '{"execute":"qmp_capabilities"}',
]

MESSAGES = [
    # requests
    "{}", "3 ", '"x"', "[]", "null ", '{"execute":3}', '{"execute":null}',
    '{"execute":"nope"}', '{"execute":""}', '{"execute":"nope\\u00e9"}',
    '{"id":7}', '{"arguments":{}}', '{"x":1}', '{"return":1}', '{"":1}',
    '{"execute":"query-version","x":1}', '{"exec-oob":"query-version"}',
    '{"execute":"query-version","arguments":3}',
    '{"execute":"query-version","arguments":null}',
    '{"execute":"query-version","arguments":[]}',
    '{"execute":"query-version","arguments":{"x":1}}',
    '{"execute":"query-version","id":{"a":[1,2.5,null,"é€😀",true]}}',
    '{"execute":"query-version","id":-0}', '{"execute":"nope","id":1e300}',
    '{"id":-9223372036854775808,"execute":"nope"}',
    '{"id":"\\b\\f\\n\\r\\t\\/\\"\\u007f\\ud83d\\ude00","execute":"nope"}',
    "{'execute':'query-\\u0076ersion','id':'a\\'b\"c'}",
    '{"execute":\n\n"query-version"\n}\n',
    '{"execute":"query-version"}{"execute":"query-version","id":1}',
    # JSON that is none
    '{"a":1,"a":2}', '{"execute" "x"}', "{,}", '{"a":}', '{"a":1,}', "[1,]",
    "}", "]", ":", ",", "[}", '[{]}{"id":5}', '{"a":1]', '{"a":1 "b":2}',
    "[1 2]", "{1:2}", '{"a":1,2}', "xyz ", "nul ", "{'a':tru}", "}}}", "1,2 ",
    "'abc\n{\"id\":1}", '{"id":"abc\n"}', '"\\x"', "01 ", "-\n", "1.\n",
    "1ex ", "+1 ", ".5 ", "%d\n", '{"id":"%d","execute":"nope"}', "//x\n",
    '{"id":%d}\n', '{"id":"\t","execute":"nope"}\n', "\v", "\f", '"', "'",
    "[[[", '{"id":', "1e", b"\xff\xff\n", b'"\xff"\n', b"\x00\n",
    b'\x01{"id":1}', b'\xef\xbb\xbf{"id":1}',
    b'{"id":"\xed\xa0\x80","execute":"nope"}',
]


def test_messages(pair):
    for message in NEGOTIATION + MESSAGES:
        pair.same(message)


def test_soup(pair):
    """Random tokens, most of them nonsense: as many replies, alike but for
    the words (QEMU reads a message from its front, we do so twice)."""
    tokens = ["{", "}", "[", "]", ":", ",", '"execute"', "'id'", "1", "-2.5e1",
              "true", "nul", " ", "\n", "%", "\t", "01", '"', "'", "\\",
              '"query-version"', '{"execute":"query-version"}', '{"id":[{}]}']
    rng = random.Random(SEED)
    for _ in range(1500):
        pair.same("".join(rng.choice(tokens)
                          for _ in range(rng.randrange(1, 14))), words=False)


def test_arguments(pair):
    for command in "add", "remove", "clear", "enable", "disable", "merge":
        pair.bad(B + command)
        pair.bad(B + command, node=3)
        pair.bad(B + command, node="vda")
        pair.bad(B + command, node="vda", name=None, target=None)
        more = {"target": "x", "bitmaps": []} if command == "merge" else {
            "name": "x"}
        pair.bad(B + command, node="nope", **more)
        pair.bad(B + command, node="vda", x=1, **more)
    for value in (3, "x", None, {}, [3], [None], [[]], [{}], [{"node": "vda"}],
                  [{"node": "vda", "name": 3}],
                  [{"node": "vda", "name": "x", "z": 1}], ["x", 3]):
        pair.bad(B + "merge", node="vda", target="x", bitmaps=value)
    for name in "persistent", "disabled":
        for value in 1, "x", None, []:
            pair.bad(B + "add", node="vda", name="x", **{name: value})
    for value in ("x", None, True, 1.0, 1.5, 1e30, -1, 2 ** 32, 2 ** 63,
                  2 ** 64 - 1, 2 ** 64 * 4):
        pair.bad(B + "add", node="vda", name="x", granularity=value)
    pair.bad("query-named-block-nodes", flat=1)
    pair.bad("query-block", x=1)
    pair.bad("quit", x=1)


def test_add(pair):
    pair.ok(B + "add", node="vda", name="a")
    pair.bad(B + "add", node="vda", name="a")
    pair.bad(B + "add", node="vda", name="")
    pair.bad(B + "add", node="vda", name="", granularity=0)
    for persistent in False, True:
        for granularity in 0, 1, 100, 256, 1536, 2 ** 31 + 1:
            pair.bad(B + "add", node="vda", name="g", persistent=persistent,
                     granularity=granularity)
        for granularity in 512, 65536, 2 ** 31:
            pair.ok(B + "add", node="vda", persistent=persistent,
                    name="g%d%d" % (granularity, persistent),
                    granularity=granularity)
        pair.ok(B + "add", node="vda", name="%d" % persistent * 1023,
                persistent=persistent)
        pair.bad(B + "add", node="vda", name="%d" % persistent * 1024,
                 persistent=persistent)
    pair.bad(B + "add", node="vda", name="a", granularity=100)
    pair.bad(B + "add", node="vda", name="a", persistent=True)
    pair.ok(B + "add", node="vda", name="ä😀 \"'\\%/\n", disabled=True)
    pair.same_bitmaps()


def test_change(pair):
    for command in "remove", "clear", "enable", "disable":
        pair.bad(B + command, node="vda", name="nope")
        pair.bad(B + command, node="vda", name="")
    for command in "enable", "enable", "disable", "disable", "clear":
        pair.ok(B + command, node="vda", name="a")
        pair.same_bitmaps()
    pair.ok(B + "remove", node="vda", name="g5121")
    pair.ok(B + "remove", node="vda", name="g5120")
    pair.same_bitmaps()


def test_counts(pair, server):
    """The same writes to both."""
    uri = "nbd+unix:///%s?socket=" + NBD
    handles = [connect(uri % "vda"), connect(server.uri("vda"))]
    rng = random.Random(SEED)
    pair.ok(B + "add", node="vda", name="c512", granularity=512)
    pair.ok(B + "enable", node="vda", name="a")
    for i in range(40):
        offset = rng.randrange(SIZE // 512 - 512) * 512
        length = rng.randrange(1, 512) * 512
        for h in handles:
            if i % 4 == 3:
                h.zero(length, offset)
            else:
                h.pwrite(bytes([i]) * length, offset)
    for h in handles:
        h.shutdown()
    found = {b["name"]: b["count"] for b in pair.same_bitmaps()["vda"]}
    assert found["c512"] > 0 and found["a"] >= found["c512"], found


def test_merge(pair):
    pair.ok(B + "add", node="vdb", name="small")
    pair.ok(B + "add", node="vda", name="m")
    pair.ok(B + "add", node="vda", name="m512", granularity=512)
    for target, sources in (("nope", ["a"]), ("m", ["a", "nope"]),
                            ("m", [{"node": "nope", "name": "a"}]),
                            ("m", [{"node": "vdb", "name": "nope"}]),
                            ("m", [{"node": "vdb", "name": "small"}]),
                            ("m", ["a", {"node": "vdb", "name": "small"}])):
        pair.bad(B + "merge", node="vda", target=target, bitmaps=sources)
        pair.same_bitmaps()
    for target, sources in (("m", ["m"]), ("m", ["c512", "c512"]),
                            ("m512", ["m", {"node": "vda", "name": "a"}])):
        pair.ok(B + "merge", node="vda", target=target, bitmaps=sources)
        pair.same_bitmaps()
    # An empty list kills qemu-storage-daemon 7.2.
    pair.both[1].execute(B + "merge", {"node": "vda", "target": "m",
                                       "bitmaps": []})


def act(kind, **data):
    data.setdefault("node", "vda")
    return {"type": B + kind, "data": data}


ABORT = {"type": "abort", "data": {}}


def test_transaction(pair):
    clear = act("clear", name="m")
    for actions in (3, [3], [{}], [{"type": B + "clear"}], [{"data": {}}],
                    [{"type": 5, "data": {}}], [{"type": "x", "data": {}}],
                    [{"type": B + "clear", "data": None}],
                    [{"type": B + "clear", "data": {"node": "vda"}}],
                    [dict(clear, z=1)], [act("clear", name="m", z=1)],
                    [clear, act("clear", name=3)],
                    [act("merge", target="m", bitmaps=[{}])],
                    [act("add", name="x", granularity=-1)],
                    [{"type": "abort"}], [dict(ABORT, data=None)],
                    [dict(ABORT, data={"x": 1})], [dict(ABORT, z=1)]):
        pair.bad("transaction", actions=actions)
    pair.bad("transaction")
    pair.bad("transaction", actions=[], x=1)
    for value in None, 3, {"x": 1}, {"completion-mode": "x"}, {
            "completion-mode": 3}:
        pair.bad("transaction", actions=[], properties=value)
    for value in {}, {"completion-mode": "individual"}, {
            "completion-mode": "grouped"}:
        pair.ok("transaction", actions=[], properties=value)
    for actions in [clear], [clear, ABORT], [ABORT, clear], [ABORT]:
        pair.bad("transaction", actions=actions,
                 properties={"completion-mode": "grouped"})
    good = [
        [clear],
        [act("add", name="t"), act("remove", name="t")],
        [act("add", name="t"), act("merge", target="t", bitmaps=["a"])],
        [act("merge", target="m", bitmaps=["t"]), act("clear", name="t")],
        [act("disable", name="t"), act("enable", name="m"),
         act("add", node="vdb", name="t", granularity=1024, disabled=True)],
        [act("add", name="p", persistent=True),
         act("merge", target="p", bitmaps=["m"]), act("remove", name="m")],
    ]
    bad = [
        [act("add", name="u"), act("add", name="u")],
        [act("remove", name="t"), act("add", name="t")],
        [act("remove", name="t"), act("clear", name="t")],
        [act("remove", name="t"), act("remove", name="t")],
        [act("remove", name="t"), act("merge", target="p", bitmaps=["t"])],
        [act("clear", name="a"), act("clear", name="nope")],
        [act("clear", name="a"), act("disable", name="a"),
         act("remove", name="p"), act("merge", target="t", bitmaps=["c512"]),
         act("add", node="vdb", name="t")],
        [act("clear", name="a"), act("clear", node="nope", name="a")],
        # What comes before an abort is looked at, what follows is not.
        [ABORT],
        [clear, act("add", name="u"), act("remove", name="t"), ABORT],
        [act("clear", name="nope"), ABORT],
        [act("clear", node="nope", name="a"), ABORT],
        [ABORT, act("clear", name="nope"),
         act("clear", node="nope", name="a"), act("add", name="a")],
        [clear, ABORT, ABORT],
    ]
    for actions in good:
        pair.ok("transaction", actions=actions)
        pair.same_bitmaps()
    for actions in bad:
        pair.bad("transaction", actions=actions)
        pair.same_bitmaps()


qsd = start_qsd()
try:
    wait_for(lambda: is_served(THEIRS), "qemu-storage-daemon")
    server = Nbdkit("disk=vda=a.raw", "size=%d" % SIZE, "disk=vdb=b.raw",
                    "size=%d" % SMALL, "control=" + OURS)
    pair = Pair()
    test_messages(pair)
    test_soup(pair)
    test_arguments(pair)
    test_add(pair)
    test_change(pair)
    test_counts(pair, server)
    test_merge(pair)
    test_transaction(pair)
    server.stop()
finally:
    qsd.kill()
    qsd.wait()
