#!/usr/bin/python3
# nbdferry - the dirty map: x-ferry-bitmap-map, bitmap map, bitmap list --json
# SPDX-License-Identifier: BSD-3-Clause
"""The map's numbers are those of the bitmap, and what is drawn is what they
say, in lines that fit and in an SVG that is well-formed."""

import unittest
import xml.etree.ElementTree as ET

from ferrytest import *

requires("nbdkit")

KiB, MiB = 1 << 10, 1 << 20
SIZE = 160 * MiB + 5 * 512
G = 64 * KiB
BITS = -(-SIZE // G)


class Map(unittest.TestCase):
    def setUp(self):
        with open("disk.raw", "wb") as f:
            f.truncate(SIZE)
        self.daemon = Nbdkit("disk=v<d>a=disk.raw", "control=ctl")
        self.qmp = QMP("ctl")
        self.qmp.command("block-dirty-bitmap-add", node="v<d>a", name='a&"b')
        self.dirty = set()
        self.handle = self.daemon.connect("v<d>a")

    def tearDown(self):
        self.handle.shutdown()
        self.qmp.close()
        self.daemon.kill()
        for name in os.listdir("."):
            subprocess.run(["rm", "-rf", name], check=True)

    def write(self, offset, length):
        self.handle.zero(length, offset)
        self.dirty.update(range(offset // G, -(-(offset + length) // G)))

    def map(self, cells):
        return self.qmp.command("x-ferry-bitmap-map", node="v<d>a",
                                name='a&"b', cells=cells)

    def draw(self, *args, check=True, **kwargs):
        return run_nbdferry("bitmap", "map", "ctl", 'a&"b', *args,
                            check=check, **kwargs)

    def test_numbers(self):
        rng = random.Random(5)
        self.write(32 * MiB, 40 * MiB)
        self.write(SIZE - 512, 512)
        for _ in range(100):
            self.write(rng.randrange(SIZE // 512 - 300) * 512,
                       rng.randint(1, 300) * 512)
        for cells in 1, 2, 7, 64, 1000, BITS - 1, BITS, BITS + 1, 65536:
            m = self.map(cells)
            per = m["cell-granules"]
            self.assertLessEqual(len(m["cells"]), cells)
            self.assertEqual(per & (per - 1), 0)
            if per > 1:     # no coarser than it has to be
                self.assertGreater(-(-BITS // (per // 2)), cells)
            want = [0] * -(-BITS // per)
            for bit in self.dirty:
                want[bit // per] += 1
            self.assertEqual(m["cells"], want)
            self.assertEqual(m["count"], len(self.dirty) * G)
            self.assertEqual((m["size"], m["granularity"]), (SIZE, G))
        listed = json.loads(run_nbdferry("bitmap", "list", "ctl",
                                         "--json").stdout)[0]
        self.assertEqual(listed["size"], SIZE)
        self.assertAlmostEqual(listed["share"], len(self.dirty) / BITS)
        for key in "granularity", "count", "recording", "persistent", \
                "busy", "trust", "node", "name":
            self.assertIn(key, listed)
        j = json.loads(self.draw("--json").stdout)
        self.assertAlmostEqual(j["share"], len(self.dirty) / BITS)

    def test_text(self):
        # One line of 64 cells of 256 KiB each is 16 MiB.
        self.write(0, MiB)                      # cells 0 to 3 full
        self.write(MiB, G)                      # a quarter of the next
        self.write(MiB + 256 * KiB, 2 * G)      # a half
        self.write(MiB + 512 * KiB, 3 * G)      # more
        self.write(SIZE - 512, 512)             # all of the last, short one
        out = self.draw("--width", "80").stdout
        rows = [line for line in out.splitlines() if "│" in line]
        self.assertEqual(rows[0], "    0 │████░▒▓" + "·" * 57 + "│")
        self.assertEqual(rows[1], "  16M │" + "·" * 64 + "│")
        self.assertEqual(rows[-1], " 160M │█│")
        self.assertEqual(len(rows), 11)
        self.assertIn("each stands for 256 KiB", out)
        out = self.draw("--width", "80", "--ascii").stdout
        self.assertIn("    0 |####:+%" + "." * 57 + "|", out)
        out.encode("ascii")
        for locale in "C", "POSIX":
            env = dict(os.environ, LC_ALL=locale)
            out = self.draw("--width", "80", env=env).stdout
            self.assertIn("####:+%", out)
        for width in 24, 40, 80, 200:
            out = self.draw("--width", width).stdout
            rows = [line for line in out.splitlines() if "│" in line]
            self.assertLessEqual(max(map(len, rows)), width)
            self.assertLessEqual(len(rows), 16)

    def test_svg(self):
        self.write(0, MiB)
        self.write(80 * MiB, G)
        self.assertEqual(self.draw("--svg", "map.svg").stdout, "")
        with open("map.svg", encoding="utf-8") as f:
            text = f.read()
        root = ET.fromstring(text)
        ns = "{http://www.w3.org/2000/svg}"
        self.assertEqual(root.tag, ns + "svg")
        self.assertEqual(root.find(ns + "title").text,
                         'Dirty map of v<d>a, bitmap a&"b')
        words = " ".join(e.text for e in root.iter(ns + "text"))
        for what in ("1.06 MiB of 160 MiB dirty (0.66 %)",
                     "granularity 64 KiB", "a square is 128 KiB", "96 MiB"):
            self.assertIn(what, words)
        # As many squares as cells, and one of each level in the legend.
        squares = sum(e.get("d").count("M") for e in root.iter(ns + "path"))
        self.assertEqual(squares, len(self.map(2048)["cells"]) + 5)
        # to standard output
        self.assertEqual(ET.fromstring(self.draw("--svg", "-").stdout).tag,
                         ns + "svg")

    def test_refused(self):
        for cells in 0, 65537:
            with self.assertRaisesRegex(QMPError, "cells"):
                self.map(cells)
        with self.assertRaisesRegex(QMPError, "not found"):
            self.qmp.command("x-ferry-bitmap-map", node="v<d>a", name="no",
                             cells=1)
        self.assertEqual(self.draw("--svg", "/none/x", check=False).returncode,
                         1)
        self.assertEqual(self.draw("--width", "5", check=False).returncode, 2)
        p = run_nbdferry("bitmap", "map", "ctl", "no", check=False)
        self.assertEqual(p.returncode, 1)
        self.assertIn("not found", p.stderr)


if __name__ == "__main__":
    unittest.main()
