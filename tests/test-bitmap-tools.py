#!/usr/bin/python3
# nbdferry - bitmap import, bitmap audit, recover
# SPDX-License-Identifier: BSD-3-Clause
"""Bitmaps of any qcow2 come in bit for bit; the audit finds every planted
difference, and raises no alarm while clients write; after kill -9 and
recover QEMU opens the sidecar and goes on tracking."""

import unittest

from ferrytest import *

requires("nbdkit", "qemu-img", "qemu-io", "qemu-nbd")

KiB, MiB = 1 << 10, 1 << 20
SIZE = 40 * MiB + 3 * 512


def sh(*args):
    return subprocess.run(args, check=True, text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT).stdout


def refused(*args, status=1):
    """The command must fail; what it says."""
    p = run_nbdferry(*args, check=False)
    assert p.returncode == status, (p.returncode, p.stdout, p.stderr)
    return p.stderr


def bitmaps(control):
    listed = json.loads(run_nbdferry("bitmap", "list", control,
                                     "--json").stdout)
    return {b["name"]: b for b in listed}


def make_image(path, cluster="64k", granularities=(65536,), size=SIZE):
    """A qcow2 with a bitmap for each granularity and some writes in it."""
    sh("qemu-img", "create", "-q", "-f", "qcow2", "-o",
       "cluster_size=" + cluster, path, str(size))
    for g in granularities:
        sh("qemu-img", "bitmap", "--add", "-g", str(g), path, "g%d" % g)
    rng = random.Random(cluster)
    args = []
    for _ in range(20):
        length = rng.choice([512, 4096, 70000 // 512 * 512, MiB])
        offset = rng.randrange((size - length) // 512) * 512
        args += ["-c", "write -q -P 7 %d %d" % (offset, length)]
    args += ["-c", "write -q %d 512" % (size - 512)]
    sh("qemu-io", *args, path)


class Import(unittest.TestCase):
    def setUp(self):
        make_disk("disk.raw", SIZE)
        self.daemon = Nbdkit("disk.raw", "control=ctl")

    def tearDown(self):
        self.daemon.kill()
        for name in os.listdir("."):
            subprocess.run(["rm", "-rf", name], check=True)

    def test_any_layout(self):
        want = {}
        for cluster in "512", "4k", "64k", "2M":
            image = "image-%s.qcow2" % cluster
            # small clusters limit what a table can hold
            some = [512, 4096, 65536, 2 * MiB, 1 << 31]
            make_image(image, cluster, some)
            for g in some:
                name = "%s-%d" % (cluster, g)
                want[name] = g, bitmap_ranges(image, "g%d" % g)
                run_nbdferry("bitmap", "import", "ctl", image, "g%d" % g,
                             "--as", name)
        have = bitmaps("ctl")
        self.assertEqual(set(have), set(want))
        for name, (g, ranges) in want.items():
            bits = sum(-(-(e - s) // g) for s, e in ranges)
            self.assertGreater(bits, 0)
            self.assertEqual(have[name]["count"], bits * g, name)
            self.assertEqual(have[name]["granularity"], g)
            self.assertTrue(have[name]["persistent"])
            self.assertTrue(have[name]["recording"])
        # They record from now on.
        h = self.daemon.connect("disk.raw")
        h.pwrite(bytes(512), 0)
        h.shutdown()
        self.daemon.stop()
        sidecar = "disk.raw.ferry/bitmaps.qcow2"
        qemu_img_check(sidecar)
        for name, (g, ranges) in want.items():
            got = bitmap_ranges(sidecar, name)
            self.assertEqual(
                got, merged(ranges + [(0, min(g, SIZE))]), name)

    def test_all_flags_and_internal_data(self):
        make_image("image.qcow2", granularities=(512, 65536))
        sh("qemu-img", "bitmap", "--disable", "image.qcow2", "g512")
        before = sha("image.qcow2")
        out = run_nbdferry("bitmap", "import", "ctl", "image.qcow2").stdout
        self.assertIn("g512", out)
        self.assertIn("not recording", out)
        have = bitmaps("ctl")
        self.assertEqual(list(have), ["g512", "g65536"])
        self.assertFalse(have["g512"]["recording"])
        self.assertTrue(have["g65536"]["recording"])
        self.assertEqual(sha("image.qcow2"), before)
        said = json.loads(run_nbdferry("bitmap", "import", "ctl",
                                       "image.qcow2", "g512", "--as", "täglich",
                                       "--json").stdout)["bitmaps"]
        self.assertEqual([(b["name"], b["count"]) for b in said],
                         [("täglich", have["g512"]["count"])])
        # kill -9: they are there, and whole
        self.daemon.kill()
        run_nbdferry("recover", "disk.raw")
        for name in "g512", "g65536":
            self.assertEqual(
                bitmap_ranges("disk.raw.ferry/bitmaps.qcow2", name),
                bitmap_ranges("image.qcow2", name))

    def test_all_or_nothing(self):
        make_image("image.qcow2", granularities=(512, 4096, 65536))
        run_nbdferry("bitmap", "add", "ctl", "g65536")
        self.assertIn("already exists: g65536", refused(
            "bitmap", "import", "ctl", "image.qcow2"))
        self.assertEqual(list(bitmaps("ctl")), ["g65536"])
        qmp = QMP("ctl")
        qmp.command("block-dirty-bitmap-remove", node="disk.raw",
                    name="g65536")
        qmp.close()
        run_nbdferry("bitmap", "import", "ctl", "image.qcow2")
        self.assertEqual(len(bitmaps("ctl")), 3)

    def test_refused(self):
        make_image("image.qcow2", size=SIZE + 512)
        text = refused("bitmap", "import", "ctl", "image.qcow2")
        for what in "image.qcow2", str(SIZE), str(SIZE + 512), "qemu-img":
            self.assertIn(what, text)
        sh("qemu-img", "create", "-q", "-f", "qcow2", "none.qcow2", str(SIZE))
        self.assertIn("has no bitmaps", refused(
            "bitmap", "import", "ctl", "none.qcow2"))
        make_image("good.qcow2")
        self.assertIn("no bitmap 'x'", refused(
            "bitmap", "import", "ctl", "good.qcow2", "x"))
        self.assertIn("none.raw", refused(
            "bitmap", "import", "ctl", "none.raw"))
        self.assertIn("not a qcow2", refused(
            "bitmap", "import", "ctl", "disk.raw.ferry/journal"))
        os.mkfifo("fifo")
        self.assertIn("neither", refused("bitmap", "import", "ctl", "fifo"))
        refused("bitmap", "import", "ctl", "good.qcow2", "--as", "y", status=2)
        # cut: named, left alone, and nobody is told to remove it
        with open("good.qcow2", "rb") as f:
            data = f.read()
        with open("cut.qcow2", "wb") as f:
            f.write(data[:len(data) // 2])
        text = refused("bitmap", "import", "ctl", "cut.qcow2")
        self.assertIn("damaged", text)
        self.assertNotIn("without bitmaps", text)
        # our own sidecar, open
        self.assertIn("in use", refused(
            "bitmap", "import", "ctl", "disk.raw.ferry/bitmaps.qcow2"))
        qmp = QMP("ctl")
        for args, what in (({"file": "image.qcow2"}, "absolute"),
                           ({"file": "/x", "new-name": "y"}, "needs 'name'"),
                           ({"file": "/x", "zzz": 1}, "unexpected"),
                           ({"file": 1}, "expected: string")):
            with self.assertRaisesRegex(QMPError, what):
                qmp.execute("x-ferry-bitmap-import",
                            dict(args, node="disk.raw"))
        with self.assertRaisesRegex(QMPError, "Node 'no' not found"):
            qmp.execute("x-ferry-bitmap-import", {"node": "no", "file": "/x"})
        qmp.close()
        self.assertEqual(bitmaps("ctl"), {})

    def test_in_use_and_inconsistent(self):
        make_image("image.qcow2", granularities=(512, 65536))
        # QEMU holds it, then dies: inconsistent
        qemu = subprocess.Popen(["qemu-io", "image.qcow2"],
                                stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE)
        qemu.stdin.write(b"write 0 512\n")
        qemu.stdin.flush()
        wait_for(lambda: b"wrote" in qemu.stdout.readline(), "qemu-io")
        self.assertIn("in use", refused(
            "bitmap", "import", "ctl", "image.qcow2"))
        qemu.kill()
        qemu.communicate()
        text = refused("bitmap", "import", "ctl", "image.qcow2")
        self.assertIn("'g512' is inconsistent", text)
        self.assertIn("nothing was imported", text)
        self.assertEqual(bitmaps("ctl"), {})
        # Another disk's sidecar, as its daemon left it when it was killed.
        make_disk("other.raw", SIZE)
        other = Nbdkit("other.raw", "control=other.ctl", name="other")
        run_nbdferry("bitmap", "add", "other.ctl", "x")
        h = other.connect("other.raw")
        h.pwrite(bytes(512), 0)
        h.shutdown()
        other.kill()
        sidecar = "other.raw.ferry/bitmaps.qcow2"
        self.assertIn("nbdferry recover", refused(
            "bitmap", "import", "ctl", sidecar))
        run_nbdferry("recover", "other.raw")
        run_nbdferry("bitmap", "import", "ctl", sidecar)
        self.assertEqual(bitmaps("ctl")["x"]["count"], 65536)


def merged(ranges):
    out = []
    for start, end in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((start, end))
    return out


def sha(path):
    with open(path, "rb") as f:
        return hash(f.read())


class Audit(unittest.TestCase):
    """The daemon is new for each granularity; the bitmap is called b."""

    def start(self, granularity, size=SIZE):
        make_disk("disk.raw", size, step=MiB + 512)
        sh("cp", "--sparse=always", "disk.raw", "ref.raw")
        self.daemon = Nbdkit("disk.raw", "control=ctl")
        run_nbdferry("bitmap", "add", "ctl", "b", "--granularity", granularity)

    def tearDown(self):
        for d in Nbdkit.all:
            d.kill()
        for name in os.listdir("."):
            subprocess.run(["rm", "-rf", name], check=True)

    def audit(self, reference="ref.raw"):
        """Exit status and what it says as JSON."""
        p = run_nbdferry("bitmap", "audit", "ctl", "b", reference, "--json",
                         check=False)
        self.assertIn(p.returncode, (0, 1))
        self.assertEqual(p.stderr, "")
        result = json.loads(p.stdout)
        self.assertEqual(p.returncode, result["missed"] != 0)
        self.assertEqual(sum(r["length"] for r in result["ranges"]),
                         result["missed"])
        return result

    def write_behind(self, offset, data):
        with open("disk.raw", "r+b") as f:
            f.seek(offset)
            f.write(data)

    def plant(self, granularity):
        size = SIZE
        self.start(granularity, size)
        self.assertEqual(self.audit()["differing"], 0)
        # marked and different, marked and equal
        h = self.daemon.connect("disk.raw")
        h.pwrite(random.Random(1).randbytes(512), 3 * MiB)
        h.pwrite(h.pread(512, 9 * MiB), 9 * MiB)
        with open("disk.raw", "rb") as f:
            old = f.read()
        marked = {(at // granularity) for at in (3 * MiB, 9 * MiB)}
        # behind its back: at edges of granules, buffers, pieces and the disk,
        # in data and in holes
        spots = [(0, 1), (size - 1, 1), (MiB - 1, 2), (2 * MiB + 511, 1),
                 (5 * MiB + 700, 3000), (20 * MiB, 512), (31 * MiB + 77, 1),
                 (12 * MiB - 65536, 131072), (39 * MiB + 512, 70000)]
        for offset, length in spots:
            self.write_behind(offset, bytes(
                x ^ 0x55 for x in old[offset:offset + length]))
        result = self.audit()
        missed = [(r["offset"], r["offset"] + r["length"])
                  for r in result["ranges"]]
        self.assertEqual(missed, merged(missed))
        unit = min(granularity, max(4096, granularity // 256), MiB)
        want = []
        for offset, length in spots:
            first, last = offset // unit, (offset + length - 1) // unit
            want += [(u * unit, min((u + 1) * unit, size))
                     for u in range(first, last + 1)
                     if u * unit // granularity not in marked]
        self.assertEqual(missed, merged(want))
        dirty = sum(min((g + 1) * granularity, size) - g * granularity
                    for g in marked)
        self.assertEqual(result["dirty"], dirty)
        equal = {9 * MiB // granularity} - {3 * MiB // granularity} - {
            o // granularity for o, _ in spots} - {
            (o + n - 1) // granularity for o, n in spots}
        self.assertEqual(result["over-marked"], granularity * len(equal))
        h.shutdown()

    def test_512(self):
        self.plant(512)

    def test_64k(self):
        self.plant(65536)

    def test_2m(self):
        self.plant(2 * MiB)

    def test_2g(self):
        self.plant(1 << 31)

    def test_text_and_many_ranges(self):
        """More ranges than a reply holds, across pieces."""
        self.start(512, 260 * MiB)
        with open("ref.raw", "r+b") as f:
            old = f.read(3000 * 1024)
            for i in range(3000):
                f.seek(i * 1024)
                f.write(bytes([old[i * 1024] ^ 1]))
            # one range across the border of two commands
            f.seek(256 * MiB - 1024)
            f.write(b"\xa5" * 2048)
        p = run_nbdferry("bitmap", "audit", "ctl", "b", "ref.raw", check=False)
        self.assertEqual(p.returncode, 1)
        lines = [line for line in p.stdout.splitlines()
                 if line.startswith("offset ")]
        self.assertEqual(len(lines), 3001)
        self.assertEqual(lines[2999].split()[1:4],
                         [str(2999 * 1024), "length", "512"])
        self.assertEqual(lines[3000].split()[1:4],
                         [str(256 * MiB - 1024), "length", "2048"])
        self.assertIn("are not marked", p.stdout)
        qmp = QMP("ctl")
        answer = qmp.command("x-ferry-bitmap-audit", node="disk.raw", name="b",
                             reference=os.path.abspath("ref.raw"))
        # It ends with the buffer in which it has found enough.
        self.assertGreaterEqual(len(answer["ranges"]), 1024)
        self.assertLessEqual(len(answer["ranges"]), 1024 + 2048)
        self.assertLess(answer["next"], answer["size"])
        answer = qmp.command("x-ferry-bitmap-audit", node="disk.raw", name="b",
                             reference=os.path.abspath("ref.raw"),
                             offset=512, length=1)
        self.assertEqual(answer["next"], 1024)
        with self.assertRaisesRegex(QMPError, "multiple"):
            qmp.command("x-ferry-bitmap-audit", node="disk.raw", name="b",
                        reference="/x", offset=513)
        qmp.close()

    def test_nbd_and_sizes(self):
        self.start(65536)
        ref = Nbdkit("ref.raw", plugin="file", name="ref")
        self.write_behind(8 * MiB, b"differs")
        result = self.audit(ref.uri())
        self.assertEqual(result["ranges"],
                         [{"offset": 8 * MiB, "length": 4096}])
        # A shorter reference: what it lacks differs.
        os.truncate("ref.raw", SIZE - 65536)
        result = self.audit()
        self.assertEqual(result["reference-size"], SIZE - 65536)
        ranges = result["ranges"]
        self.assertEqual(ranges[-1]["offset"], (SIZE - 65536) // 4096 * 4096)
        self.assertEqual(ranges[-1]["offset"] + ranges[-1]["length"], SIZE)
        # A longer one does not matter.
        shutil.copy("disk.raw", "ref.raw")
        os.truncate("ref.raw", 2 * SIZE)
        self.assertEqual(self.audit()["missed"], 0)

    def test_odd_extents(self):
        """Zeros end inside a granule that is clean, near one that is not."""
        with open("disk.raw", "wb") as f:
            f.truncate(MiB)
        self.daemon = Nbdkit("disk.raw", "control=ctl")
        run_nbdferry("bitmap", "add", "ctl", "b")
        h = self.daemon.connect("disk.raw")
        h.pwrite(b"x" * 512, 65536)
        h.shutdown()
        ref = Nbdkit("get_size=echo 1M", "can_extents=exit 0",
                     "pread=unset LD_PRELOAD; head -c $3 /dev/zero",
                     "extents=echo 0 61952 hole,zero; echo 61952 986624",
                     plugin="eval", name="ref")
        result = self.audit(ref.uri())
        self.assertEqual((result["missed"], result["differing"]), (0, 4096))

    def test_no_false_alarm(self):
        """Writers and clears go on while it is audited again and again."""
        self.start(4096, 8 * MiB)
        model = Model(8 * MiB, open("disk.raw", "rb").read())
        writers = [Writer(self.daemon.uri("disk.raw"), model, i * 2 * MiB,
                          (i + 1) * 2 * MiB, seed=i, max_length=8192)
                   for i in range(4)]
        qmp, audits = QMP("ctl"), 0
        end = time.monotonic() + (20 if os.environ.get("CHECK_LONG") else 5)
        while time.monotonic() < end:
            result = self.audit()
            self.assertEqual(result["missed"], 0)
            audits += 1
            # so that there is something to be marked anew
            if audits % 2:
                for w in writers:
                    w.stop()
                qmp.command("block-dirty-bitmap-clear", node="disk.raw",
                            name="b")
                shutil.copy("disk.raw", "ref.raw")
                writers = [Writer(self.daemon.uri("disk.raw"), model,
                                  i * 2 * MiB, (i + 1) * 2 * MiB,
                                  seed=100 * audits + i, max_length=8192)
                           for i in range(4)]
        for w in writers:
            w.stop()
        print("%d audits" % audits)
        self.assertGreater(result["differing"], 0)
        qmp.close()

    def test_busy_and_errors(self):
        self.start(65536)
        # A reference that does not answer: the bitmap is busy, the daemon
        # ends all the same.
        slow = Nbdkit("ref.raw", plugin="file", name="slow",
                      options=("--filter=delay",))
        slow.stop()
        slow.options = ("--filter=delay",)
        slow.args = ("ref.raw", "delay-read=60")
        slow.start()
        qmp, other = QMP("ctl", timeout=60), QMP("ctl")
        qmp.send({"execute": "x-ferry-bitmap-audit", "arguments": {
            "node": "disk.raw", "name": "b", "reference": slow.uri()}})
        wait_for(lambda: other.command("query-block")[0]["inserted"]
                 ["dirty-bitmaps"][0]["busy"], "the audit")
        for command in "remove", "clear":
            with self.assertRaisesRegex(QMPError, "in use by another"):
                other.command("block-dirty-bitmap-" + command,
                              node="disk.raw", name="b")
        with self.assertRaisesRegex(QMPError, "in use by another"):
            other.command("x-ferry-bitmap-audit", node="disk.raw", name="b",
                          reference="/x")
        # One whose client goes ends; who asks again is not told 'busy'.
        qmp.close()
        busy = lambda: other.command("query-block")[0]["inserted"][
            "dirty-bitmaps"][0]["busy"]
        wait_for(lambda: not busy(), "the end of the audit")
        qmp = QMP("ctl", timeout=60)
        qmp.send({"execute": "x-ferry-bitmap-audit", "arguments": {
            "node": "disk.raw", "name": "b", "reference": slow.uri()}})
        wait_for(busy, "the audit")
        began = time.monotonic()
        self.daemon.stop()
        self.assertLess(time.monotonic() - began, 10)
        slow.kill()
        self.daemon.start()
        for reference, what in (("none.raw", "none.raw"),
                                ("disk.raw", "the disk itself"),
                                ("nbd+unix:///?socket=nowhere", "nowhere")):
            self.assertIn(what, refused("bitmap", "audit", "ctl", "b",
                                        reference))
        os.mkfifo("fifo")
        self.assertIn("neither", refused("bitmap", "audit", "ctl", "b",
                                         "fifo"))
        make_image("image.qcow2")
        self.assertIn("qemu-nbd", refused("bitmap", "audit", "ctl", "b",
                                          "image.qcow2"))
        self.assertIn("'c' not found", refused("bitmap", "audit", "ctl", "c",
                                               "ref.raw"))
        # and after all that it is free again
        self.assertEqual(self.audit()["missed"], 0)
        run_nbdferry("bitmap", "remove", "ctl", "b")

    def test_not_recording(self):
        self.start(65536)
        run_nbdferry("bitmap", "disable", "ctl", "b")
        h = self.daemon.connect("disk.raw")
        h.pwrite(b"x" * 512, 0)
        h.shutdown()
        p = run_nbdferry("bitmap", "audit", "ctl", "b", "ref.raw", check=False)
        self.assertEqual(p.returncode, 1)
        self.assertIn("offset 0 length 4096", p.stdout)
        self.assertIn("not recording", p.stdout)


class Recover(unittest.TestCase):
    SIDECAR = "disk.raw.ferry/bitmaps.qcow2"

    def setUp(self):
        make_disk("disk.raw", SIZE)
        self.daemon = Nbdkit("disk.raw", "control=ctl")
        run_nbdferry("bitmap", "add", "ctl", "b")
        run_nbdferry("bitmap", "add", "ctl", "frozen", "--disabled")
        h = self.daemon.connect("disk.raw")
        h.pwrite(b"x" * 512, 5 * MiB)
        h.shutdown()

    def tearDown(self):
        self.daemon.kill()
        for name in os.listdir("."):
            subprocess.run(["rm", "-rf", name], check=True)

    def flags(self, name):
        for b in qemu_img_info(self.SIDECAR)["format-specific"]["data"][
                "bitmaps"]:
            if b["name"] == name:
                return b["flags"]

    def test_after_a_kill(self):
        before = bitmaps("ctl")
        self.daemon.kill()
        self.assertEqual(self.flags("b"), ["in-use", "auto"])
        result = json.loads(run_nbdferry("recover", "disk.raw",
                                         "--json").stdout)
        self.assertTrue(result["unclean"])
        self.assertEqual(result["disk"], os.path.abspath("disk.raw"))
        for b in result["bitmaps"]:
            self.assertEqual(b["result"], "kept")
            self.assertEqual(b["count"], before[b["name"]]["count"])
        self.assertEqual([b["name"] for b in result["bitmaps"]],
                         ["b", "frozen"])
        self.assertEqual(self.flags("b"), ["auto"])
        self.assertEqual(self.flags("frozen"), [])
        qemu_img_check(self.SIDECAR)
        self.assertEqual(bitmap_ranges(self.SIDECAR, "b"),
                         [(5 * MiB, 5 * MiB + 65536)])
        # The manual's way into an image of one's own.
        sh("qemu-img", "create", "-q", "-f", "qcow2", "own.qcow2", str(SIZE))
        sh("qemu-img", "bitmap", "--add", "own.qcow2", "own")
        sh("qemu-img", "bitmap", "--merge", "b", "-F", "qcow2", "-b",
           self.SIDECAR, "own.qcow2", "own")
        self.assertEqual(bitmap_ranges("own.qcow2", "own"),
                         [(5 * MiB, 5 * MiB + 65536)])
        # QEMU goes on with it, and so do we.
        sh("qemu-io", "-c", "write -P 9 20M 512", self.SIDECAR)
        out = run_nbdferry("recover", "disk.raw").stdout
        self.assertIn("closed in good order", out)
        self.assertIn("b: kept, 128 KiB dirty", out)
        self.daemon.start()
        self.assertEqual(bitmaps("ctl")["b"]["count"], 2 * 65536)
        self.assertEqual(read_all(self.daemon.uri("disk.raw"))[
            20 * MiB:20 * MiB + 512], b"\x09" * 512)

    def test_nothing_to_do(self):
        self.daemon.stop()
        out = run_nbdferry("recover", "disk.raw").stdout
        self.assertIn("nothing to repair", out)
        self.assertIn("frozen: kept, 0 B dirty", out)

    def test_given_up(self):
        """Somebody else wrote after the crash."""
        self.daemon.kill()
        time.sleep(1.1)
        with open("disk.raw", "r+b") as f:
            f.write(b"behind its back")
        result = json.loads(run_nbdferry("recover", "disk.raw",
                                         "--json").stdout)
        b, frozen = result["bitmaps"]
        self.assertEqual((b["result"], frozen["result"]),
                         ("given-up", "kept"))
        self.assertIn("disk.raw", b["reason"])
        out = run_nbdferry("recover", "disk.raw").stdout
        self.assertIn("b: inconsistent, can only be removed", out)

    def test_state(self):
        self.daemon.stop()
        os.rename("disk.raw.ferry", "elsewhere")
        self.assertIn("nothing to recover", refused("recover", "disk.raw"))
        self.assertFalse(os.path.exists("disk.raw.ferry"))
        run_nbdferry("recover", "disk.raw", "--state", "elsewhere")

    def test_refused(self):
        self.assertIn("in use", refused("recover", "disk.raw"))
        self.assertIn("none.raw", refused("recover", "none.raw"))
        self.daemon.kill()
        # A damaged file is named, and left as it is.
        with open(self.SIDECAR, "r+b") as f:
            f.seek(0)
            f.write(b"garbage")
        before = sha(self.SIDECAR)
        text = refused("recover", "disk.raw")
        self.assertIn(self.SIDECAR, text)
        self.assertIn("without bitmaps", text)
        self.assertEqual(sha(self.SIDECAR), before)
        self.assertIn("Try 'nbdferry recover --help'",
                      refused("recover", status=2))

    def test_destination(self):
        dst = Nbdkit("disk=vda=dst.raw", "size=1M", "incoming=on", name="dst")
        dst.kill()
        with open("dst.raw.ferry/journal", "rb") as f:
            journal = f.read()
        self.assertIn("incoming=on", refused("recover", "dst.raw"))
        with open("dst.raw.ferry/journal", "rb") as f:
            self.assertEqual(f.read(), journal)


if __name__ == "__main__":
    unittest.main(verbosity=2)
