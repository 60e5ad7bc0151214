#!/usr/bin/python3
# nbdferry - the command against a daemon that says what we want it to
# SPDX-License-Identifier: BSD-3-Clause
"""Against a fake daemon (clitest.py), which also does what real ones do
seldom: refuse, fail, hang, vanish.  The last class talks to a real QEMU.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import unicodedata
import unittest

from clitest import (Case, Drop, Fake, GiB, Migration, Refuse, finish, info,
                     run, start)
from ferrytest import TMPDIR, is_served, wait_for


def bitmap(name, **more):
    return {"name": name, "recording": True, "persistent": True, "busy": False,
            "granularity": 65536, "count": 0, **more}


def node(name, *bitmaps):
    return {"node-name": name, "dirty-bitmaps": list(bitmaps)[::-1]}


def width(text):
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else
               0 if unicodedata.combining(c) else 1 for c in text)


class Usage(Case):
    commands = ("", "status", "bitmap", "bitmap add", "bitmap remove",
                "bitmap clear", "bitmap enable", "bitmap disable",
                "bitmap merge", "bitmap list", "bitmap import",
                "bitmap audit", "migrate", "recover")

    def test_help(self):
        for command in self.commands:
            words = command.split()
            usage = " ".join(["Usage: nbdferry", *words])
            for option in "--help", "-h":
                self.expect(0, run(*words, option), out=usage)
        self.expect(0, run("bitmap", "add", "x", "y", "--help"),
                    out="--granularity")

    def test_version(self):
        self.expect(0, run("--version"), out="nbdferry ")

    def test_wrong(self):
        for command in self.commands:
            words = command.split()
            hint = "Try 'nbdferry%s --help'" % "".join(" " + w for w in words)
            self.expect(2, run(*words, "--nonsense"), err=hint)
            self.expect(2, run(*words), err=hint)
        for words in (("foo",), ("bitmap", "foo"), ("bitmap", "ad", "x", "y"),
                      ("status", "x", "y"), ("migrate", "x"),
                      ("migrate", "x", "y", "z"), ("bitmap", "add", "x"),
                      ("bitmap", "merge", "x", "y"), ("status", "--", "--json",
                                                      "x"),
                      ("bitmap", "list", "x", "--node"),
                      ("bitmap", "clear", "x", "y", "--granularity", "64K")):
            self.expect(2, run(*words), err="Try 'nbdferry")

    def test_values(self):
        for g in ("0", "256", "3K", "4G", "-64K", "+64K", "1.5K", "64KB", " 1K",
                  "", "K", "18446744073709551616", "18014398509481985K"):
            self.expect(2, run("bitmap", "add", "x", "y", "--granularity", g),
                        err="--granularity: ")
        for option, values in (
                ("--channels", ("0", "65", "x", "4K", "-1")),
                ("--max-bandwidth", ("", "x", "8E", "1Z", "1KB", "-1")),
                ("--downtime-limit", ("", "30ms", "-1", "9223372036854775808")),
                ("--compression", ("", "gzip", "ZSTD"))):
            for value in values:
                self.expect(2, run("migrate", "x", "y", option, value),
                            err=option + ": ")

    def test_not_utf8(self):
        bad = b"\xff\x1b[1m"
        for words in (("bitmap", "add", "x", bad),
                      ("bitmap", "add", "x", "y", "--node", bad),
                      ("bitmap", "merge", "x", "y", "z", bad),
                      ("migrate", "x", bad)):
            got = run(*words)
            self.expect(2, got, err="not valid UTF-8")
            self.assertNotIn("\x1b", got[2])


class Connecting(Case):
    @classmethod
    def setUpClass(cls):
        # Takes ten seconds, so it begins now.
        cls.silent = Fake(greeting=b"")
        cls.silent_run = start("status", cls.silent.path)

    def test_silent(self):
        self.expect(1, finish(self.silent_run), err="no greeting")

    def test_no_socket(self):
        path = os.path.join(TMPDIR, "none.sock")
        self.expect(1, run("status", path), err="there is no control socket "
                    + path)
        self.expect(1, run("status", os.path.join(TMPDIR, "x" * 200)),
                    err="at most 107 bytes")

    def test_failure_json(self):
        """Whoever reads JSON hears there why there is nothing else."""
        path = os.path.join(TMPDIR, "none.sock")
        for args in (["status", path], ["bitmap", "list", path],
                     ["bitmap", "audit", path, "b", "x"],
                     ["bitmap", "import", path, "x"],
                     ["bitmap", "map", path, "b"], ["verify", path, "x"],
                     ["sync", path, "x", "--bitmap=b"], ["recover", path],
                     ["takeover", path], ["sync", path, "x"]):
            status, out, err = run(*args, "--json")
            self.assertIn(status, (1, 2), args)
            result = json.loads(out)
            self.assertEqual(result["status"], "failed", args)
            self.assertEqual("nbdferry: %s" % result["error"],
                             err.splitlines()[0])

    def test_no_listener(self):
        path = tempfile.mktemp(".sock", dir=TMPDIR)
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path)
        self.expect(1, run("status", path), err="nobody listens on " + path)

    def test_no_qmp(self):
        self.expect(1, run("status", os.path.abspath(__file__)),
                    err="is not a socket")
        for greeting in (b"NBDMAGICIHAVEOPT\0\0", b'{"hello": 1}\n', b"[1]\n",
                         b"\n\nSSH-2.0-x\n"):
            with Fake(greeting) as fake:
                self.expect(1, run("status", fake.path),
                            err="does not speak QMP")
        with Fake(b"{ nonsense }\n") as fake:
            self.expect(1, run("status", fake.path), err="not JSON")

    def test_turned_away(self):
        with Fake(greeting=None) as fake:
            self.expect(1, run("status", fake.path),
                        err="closed the connection")


class Bitmaps(Case):
    def asks(self, commands, *args, nodes=("vda",)):
        """The daemon is asked exactly these commands."""
        answers = {c.replace("-", "_"): {} for c, _ in commands}
        answers["query_named_block_nodes"] = [node(n) for n in nodes]
        with Fake(**answers) as fake:
            args = [fake.path if a == "CONTROL" else a for a in args]
            self.expect(0, run("bitmap", *args))
            self.assertEqual(fake.commands, commands)

    def test_requests(self):
        query = ("query-named-block-nodes", {})
        self.asks([query, ("block-dirty-bitmap-add", {
            "node": "vda", "name": "täglich 1", "persistent": True})],
                  "add", "CONTROL", "täglich 1")
        self.asks([("block-dirty-bitmap-add", {
            "node": "v", "name": "b", "persistent": False, "disabled": True,
            "granularity": 1 << 31})],
                  "add", "--granularity", "2g", "CONTROL", "--transient", "b",
                  "--disabled", "--node", "v")
        self.asks([query, ("block-dirty-bitmap-add", {
            "node": "vda", "name": "--node", "persistent": True,
            "granularity": 512})],
                  "add", "--granularity=512", "CONTROL", "--", "--node")
        for verb in "remove", "clear", "enable", "disable":
            command = "block-dirty-bitmap-" + verb
            self.asks([(command, {"node": "vdb", "name": "b"})],
                      verb, "CONTROL", "b", "--node", "vdb",
                      nodes=("vda", "vdb"))
        self.asks([query, ("block-dirty-bitmap-merge", {
            "node": "vda", "target": "t", "bitmaps": ["a:b", "c"]})],
                  "merge", "CONTROL", "t", "a:b", "c")

    def test_several_disks(self):
        with Fake(query_named_block_nodes=[node("b"), node("a\x1b")]) as fake:
            for verb in "add", "remove", "clear", "enable", "disable":
                self.expect(1, run("bitmap", verb, fake.path, "x"),
                            err="--node: a\\x1b, b")
            self.expect(1, run("bitmap", "list", fake.path, "--node", "c"),
                        err="no disk 'c', but: a\\x1b, b")
            self.assertEqual(set(fake.names()), {"query-named-block-nodes",
                                                 "x-ferry-query-bitmaps"})

    def test_refused(self):
        def refuse(_):
            raise Refuse("Bitmap already exists: \x1b")
        with Fake(block_dirty_bitmap_add=refuse) as fake:
            self.expect(1, run("bitmap", "add", fake.path, "x", "--node", "a"),
                        err="nbdferry: Bitmap already exists: \\x1b\n")

    def lists(self, *args, env=None):
        nodes = [node("vda", bitmap("plain", count=3 << 29),
                      bitmap("漢字", recording=False, granularity=512),
                      bitmap("esc\x1b[1m\u202e\u2067", busy=True, count=1000)),
                 node("vdb", bitmap("x", persistent=False, inconsistent=True)),
                 {"node-name": "none"}]
        with Fake(query_named_block_nodes=nodes[::-1]) as fake:
            got = run("bitmap", "list", fake.path, *args, env=env)
            self.expect(0, got, out="")
            return got[1]

    def test_list(self):
        for locale in "C.UTF-8", "C", "de_DE.UTF-8", "nonsense":
            out = self.lists(env={**os.environ, "LC_ALL": locale})
            lines = out.splitlines()
            self.assertEqual(len(lines), 5, out)
            rows = [re.split(r"  +", line) for line in lines]
            self.assertEqual(rows[1], ["vda", "plain", "64 KiB", "1.50 GiB",
                                       "yes", "yes", "no", "ok"])
            self.assertEqual(rows[2][:5], ["vda", "漢字", "512 B", "0 B", "no"])
            self.assertEqual(rows[3][1], "esc\\x1b[1m\\u202e\\u2067")
            self.assertEqual(rows[3][3:], ["1000 B", "yes", "yes", "yes", "ok"])
            self.assertEqual(rows[4], ["vdb", "x", "64 KiB", "0 B", "yes", "no",
                                       "no", "inconsistent"])
            # Each column begins at the same place, wide characters or not.
            begins = {width(line[:line.index(row[2])])
                      for line, row in zip(lines, rows)}
            self.assertEqual(len(begins), 1, out)

    def test_list_one(self):
        self.assertEqual(len(self.lists("--node", "vdb").splitlines()), 2)
        self.assertEqual(len(self.lists("--node", "none").splitlines()), 1)

    def test_list_json(self):
        got = json.loads(self.lists("--json"))
        self.assertEqual([b["node"] for b in got], ["vda"] * 3 + ["vdb"])
        self.assertEqual(got[2]["name"], "esc\x1b[1m\u202e\u2067")
        self.assertEqual(got[0], {"node": "vda", **bitmap("plain",
                                                          count=3 << 29)})
        self.assertEqual(json.loads(self.lists("--json", "--node=none")), [])


class Status(Case):
    status = {"version": "0.1.0", "pid": 4711, "disks": [
        {"name": "vda\x07", "path": "/x/vda.raw", "state-dir": "/x/vda.ferry",
         "size": 10 * GiB + 512, "mode": "active", "lineage": "0123-45",
         "generation": 7, "bitmaps": 3, "longest-hold-us": 12}],
              "migration": {}}

    def test_text(self):
        with Fake(x_ferry_status=self.status) as fake:
            got = run("status", fake.path)
            self.expect(0, got, out="nbdferry 0.1.0, process 4711\n")
            for text in ("disk vda\\x07\n", "/x/vda.raw", "/x/vda.ferry",
                         "10.0 GiB (10737418752 bytes)", "active", "0123-45",
                         "12 us", "migration: none"):
                self.assertIn(text, got[1])

    def test_migration(self):
        failed = info("failed", **{"error-desc": "it was not to be"})
        with Fake(x_ferry_status={**self.status, "migration": failed}) as fake:
            self.expect(0, run("status", fake.path), out="it was not to be")

    def test_json(self):
        with Fake(x_ferry_status=self.status) as fake:
            got = run("status", fake.path, "--json")
            self.expect(0, got, out="")
            self.assertEqual(json.loads(got[1]), self.status)

    def test_full(self):
        with Fake(x_ferry_status=self.status) as fake, \
                open("/dev/full", "w") as full:
            p = start("status", fake.path, stdout=full)
            self.assertIn("cannot write", p.communicate()[1])
            self.assertEqual(p.returncode, 1)


class Migrating(Case):
    def test_completes(self):
        m = Migration(info("setup"), info("active"), info("device"),
                      info("completed", downtime=23))
        with m.fake(piecewise=True) as fake:
            got = run("migrate", fake.path, "nbd://host/vda")
            self.expect(0, got, out="")
            # What --no-resume has said once does not hold for the next one.
            self.assertEqual(fake.commands[:2], [
                ("migrate-set-parameters", {"x-ferry-resume": True}),
                ("migrate", {"uri": "nbd://host/vda"})])
            self.assertEqual(set(fake.names()[1:]),
                             {"migrate", "query-migrate"})
        lines = got[1].splitlines()
        self.assertEqual([line.split(":")[0] for line in lines[:4]],
                         ["setup", "active", "device", "completed"])
        self.assertIn("6 GiB of 10 GiB (60%), round 2, 4 GiB left, "
                      "1 GiB/s, dirty 10 MiB/s", lines[1])
        self.assertIn("about 4 s", lines[1])
        summary = "\n".join(lines[4:])
        for text in ("12.345 s", "3 GiB", "2 KiB of it bitmaps",
                     "2 GiB skipped", "23 ms", "rounds    2"):
            self.assertIn(text, summary)

    def test_lines_are_few(self):
        # Six queries a second at the least, one line.
        m = Migration(*[info("active")] * 8, info("completed"))
        with m.fake() as fake:
            got = run("migrate", fake.path, "nbd://host")
            self.expect(0, got, out="")
            self.assertGreaterEqual(fake.names().count("query-migrate"), 9)
        active = [s for s in got[1].splitlines() if s.startswith("active")]
        self.assertLessEqual(len(active), 3)

    def test_parameters(self):
        m = Migration(info("completed"))
        with m.fake() as fake:
            got = run("migrate", "--channels", "7", fake.path, "nbd://host",
                      "--max-bandwidth", "500m", "--downtime-limit=0",
                      "--compression", "zstd", "--node", "b", "--node", "ä")
            self.expect(0, got, out="")
            self.assertEqual(fake.commands[:2], [
                ("migrate-set-parameters", {
                    "multifd-channels": 7, "max-bandwidth": 500 << 20,
                    "downtime-limit": 0, "multifd-compression": "zstd",
                    "x-ferry-resume": True}),
                ("migrate", {"uri": "nbd://host",
                             "x-ferry-nodes": ["b", "ä"]})])

    def test_one_parameter(self):
        with Migration(info("completed")).fake() as fake:
            self.expect(0, run("migrate", fake.path, "nbd://host",
                               "--max-bandwidth=0", "--no-resume"), out="")
            self.assertEqual(fake.commands[0], (
                "migrate-set-parameters", {"max-bandwidth": 0,
                                           "x-ferry-resume": False}))

    def test_parameters_refused(self):
        def refuse(_):
            raise Refuse("Parameter 'downtime-limit' expects less")
        with Migration().fake(migrate_set_parameters=refuse) as fake:
            self.expect(1, run("migrate", fake.path, "nbd://host",
                               "--downtime-limit=99999999"), err="expects less")
            self.assertEqual(fake.names(), ["migrate-set-parameters"])

    def refuse(self, _):
        raise Refuse("a migration is running already")

    def test_refused(self):
        with Migration().fake(migrate=self.refuse) as fake:
            for more in (), ("--no-wait",):
                self.expect(1, run("migrate", fake.path, "nbd://host", *more),
                            err="refused: a migration is running already")
            self.assertEqual(set(fake.names()),
                             {"migrate-set-parameters", "migrate"})

    def test_fails_at_setup(self):
        m = Migration(info("failed", **{"error-desc": "it is too small"}))
        with m.fake() as fake:
            self.expect(1, run("migrate", fake.path, "nbd://host"), out="",
                        err="the migration failed: it is too small\n")

    def test_cancelled_by_others(self):
        with Migration(info("active"), info("cancelled")).fake() as fake:
            self.expect(1, run("migrate", fake.path, "nbd://host"), out="",
                        err="cancelled")

    def test_daemon_vanishes(self):
        count = 0

        def query(_):
            nonlocal count
            count += 1
            if count == 3:
                raise Drop
            return info("active")
        with Migration().fake(query_migrate=query) as fake:
            self.expect(1, run("migrate", fake.path, "nbd://host"), out="",
                        err="closed the connection")

    def test_garbage(self):
        for garbage in b"{]\n", b"rubbish":
            fake = Migration(info("active")).fake()
            fake.answers["query-migrate"] = lambda _, g=garbage, f=fake: \
                f.send(f.connections[0], g) or info("active")
            with fake:
                got = run("migrate", fake.path, "nbd://host")
                self.assertEqual(got[0], 1, got)
                self.assertRegex(got[2], "not JSON|not speak QMP")

    def test_forgotten(self):
        with Migration({}).fake() as fake:
            self.expect(1, run("migrate", fake.path, "nbd://host"),
                        err="knows of no migration")

    def test_no_wait(self):
        with Migration(info("setup")).fake() as fake:
            self.expect(0, run("migrate", fake.path, "nbd://host",
                               "--no-wait"), out="has begun")
            self.assertEqual(fake.names(), ["migrate-set-parameters",
                                            "migrate"])
            got = run("migrate", fake.path, "nbd://host", "--no-wait",
                      "--json")
            self.expect(0, got, out="")
            self.assertEqual(json.loads(got[1])["status"], "setup")

    def test_json(self):
        infos = [info("setup"), info("active"), info("completed", downtime=3)]
        with Migration(*infos).fake() as fake:
            got = run("migrate", fake.path, "nbd://host", "--json")
            self.expect(0, got, out="")
            self.assertEqual([json.loads(s) for s in got[1].splitlines()],
                             infos)
        with Migration().fake(migrate=self.refuse) as fake:
            got = run("migrate", fake.path, "nbd://host", "--json")
            self.expect(1, got, out="", err="running already")
            self.assertEqual(json.loads(got[1]), {
                "status": "failed",
                "error-desc": "a migration is running already"})

    def test_events_wake(self):
        # The shortest time from an event to the query that it causes.  Other
        # events cause none.
        asked, gaps = threading.Event(), []

        def query(_):
            asked.set()
            return info("completed" if len(gaps) == 5 else "active")
        with Migration().fake(query_migrate=query) as fake:
            p = start("migrate", fake.path, "nbd://host")
            while len(gaps) < 5:
                self.assertTrue(asked.wait(10))
                time.sleep(0.05)  # past the least time between two
                asked.clear()
                began = time.monotonic()
                fake.event("JOB_STATUS_CHANGE")
                fake.event("MIGRATION", status="active")
                self.assertTrue(asked.wait(10))
                gaps.append(time.monotonic() - began)
            self.expect(0, finish(p), out="")
        self.assertLess(min(gaps), 0.1)

    def test_lines_to_nobody(self):
        # A disk that has moved has moved.
        with Migration(info("completed")).fake() as fake, \
                open("/dev/full", "w") as full:
            p = start("migrate", fake.path, "nbd://host", stdout=full)
            self.assertIn("cannot write", p.communicate()[1])
            self.assertEqual(p.returncode, 0)


class Qemu(Case):
    """What we say to a daemon is what QEMU understands."""

    def setUp(self):
        if not shutil.which("qemu-storage-daemon"):
            self.skipTest("qemu-storage-daemon is not installed")
        self.path = os.path.join(TMPDIR, "qemu.sock")
        image = os.path.join(TMPDIR, "qemu.qcow2")
        subprocess.check_call(["qemu-img", "create", "-q", "-f", "qcow2",
                               image, "100M"])
        self.daemon = subprocess.Popen([
            "qemu-storage-daemon", "--chardev",
            "socket,path=%s,server=on,wait=off,id=c" % self.path,
            "--monitor", "chardev=c", "--blockdev",
            "driver=qcow2,node-name=vda,file.driver=file,file.filename="
            + image])
        wait_for(lambda: is_served(self.path), self.path)

    def tearDown(self):
        self.daemon.terminate()
        self.daemon.wait()

    def nbdferry(self, *args):
        got = run("bitmap", args[0], self.path, "--node", "vda", *args[1:])
        self.expect(0, got, out="")
        return got[1]

    def flags(self):
        return [(b["name"], b["granularity"], b["recording"], b["persistent"])
                for b in json.loads(self.nbdferry("list", "--json"))]

    def test_bitmaps(self):
        self.nbdferry("add", "täglich 1", "--granularity", "1M")
        self.nbdferry("add", "t", "--transient", "--disabled")
        self.nbdferry("merge", "t", "täglich 1")
        self.assertEqual(sorted(self.flags()), [
            ("t", 65536, False, False), ("täglich 1", 1 << 20, True, True)])
        self.nbdferry("enable", "t")
        self.nbdferry("disable", "täglich 1")
        self.nbdferry("clear", "t")
        self.assertEqual(sorted(self.flags()), [
            ("t", 65536, True, False), ("täglich 1", 1 << 20, False, True)])
        self.nbdferry("remove", "t")
        self.assertEqual(len(self.flags()), 1)
        self.expect(1, run("bitmap", "clear", self.path, "t", "--node", "vda"),
                    err="not found")


if __name__ == "__main__":
    unittest.main()
