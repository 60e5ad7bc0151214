#!/usr/bin/python3
# nbdferry - hashes of disks, and disks compared by them
# SPDX-License-Identifier: BSD-3-Clause
"""verify finds just what differs, whatever holds the two disks; between two
daemons of ours no data moves."""

import unittest

from ferrytest import *

requires("nbdkit", "qemu-nbd", "qemu-img")

KiB, MiB = 1 << 10, 1 << 20
SIZE = 24 * MiB + 3 * 512
BLOCK = 64 * KiB


def verify(*args, status):
    p = run_nbdferry("verify", *args, check=False)
    assert p.returncode == status, (p.returncode, p.stdout, p.stderr)
    return p


def verify_json(*args, status):
    return json.loads(verify(*args, "--json", status=status).stdout)


def write(path, offset, data):
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(data)


def ranges(result):
    return [(r["offset"], r["length"]) for r in result["ranges"]]


class Verify(unittest.TestCase):
    def setUp(self):
        make_disk("a.raw", SIZE)
        subprocess.run(["cp", "--sparse=never", "a.raw", "b.raw"], check=True)

    def tearDown(self):
        for daemon in Nbdkit.all:
            daemon.kill()
        for name in os.listdir("."):
            subprocess.run(["rm", "-rf", name], check=True)

    def test_files(self):
        out = verify("a.raw", "b.raw", status=0).stdout
        self.assertIn("The same", out)
        # One byte, the last one, a block's last and the next one's first.
        for at in 5 * MiB + 7, SIZE - 1, 9 * BLOCK - 1, 9 * BLOCK:
            write("b.raw", at, b"\xa5")
        r = verify_json("a.raw", "b.raw", status=1)
        self.assertEqual(ranges(r), [
            (8 * BLOCK, 2 * BLOCK), (5 * MiB, BLOCK),
            (SIZE // BLOCK * BLOCK, SIZE % BLOCK)])
        self.assertEqual(r["differing"], 3 * BLOCK + SIZE % BLOCK)
        self.assertEqual(r["differing-ranges"], 3)
        self.assertEqual((r["a"]["read-as"], r["b"]["read-as"]),
                         ("file", "file"))
        r = verify_json("a.raw", "b.raw", "--block-size", "4k", status=1)
        self.assertEqual(r["differing"], 3 * 4096 + SIZE % 4096)
        out = verify("a.raw", "b.raw", status=1).stdout
        self.assertIn("offset %d length %d (128 KiB) differs" % (
            8 * BLOCK, 2 * BLOCK), out)

    def test_many_ranges(self):
        for i in range(0, 60, 2):
            write("b.raw", i * BLOCK, b"\x5a")
        out = verify("a.raw", "b.raw", status=1).stdout
        self.assertEqual(out.count("differs\n"), 20)
        self.assertIn("10 more ranges", out)
        out = verify("a.raw", "b.raw", "--all", status=1).stdout
        self.assertEqual(out.count("differs\n"), 30)
        self.assertEqual(len(verify_json("a.raw", "b.raw", "--all",
                                         status=1)["ranges"]), 30)

    def test_sizes(self):
        with open("b.raw", "ab") as f:
            f.write(bytes(MiB - SIZE % MiB))
        out = verify("a.raw", "b.raw", status=1).stdout
        self.assertIn("sizes differ", out)
        # the last block of the shorter one is compared as far as it goes
        self.assertIn("Different: 0 B", out)
        for where in "a.raw", "b.raw":
            one = Nbdkit("disk=d=" + where, name="one")
            r = verify_json(one.uri(), {"a.raw": "b.raw",
                                        "b.raw": "a.raw"}[where], status=1)
            self.assertEqual((r["differing"], r["a"]["read-as"]),
                             (0, "hashes"))
            one.stop()
        write("b.raw", SIZE - 1, b"\xa5")
        self.assertEqual(ranges(verify_json("a.raw", "b.raw", status=1)), [
            (SIZE // BLOCK * BLOCK, SIZE % BLOCK)])
        os.truncate("a.raw", 8 * MiB)
        r = verify_json("a.raw", "b.raw", status=1)
        self.assertEqual((r["differing"], r["compared"]), (0, 8 * MiB))
        self.assertFalse(r["same"])

    def test_refused(self):
        for args, what in (
                (("none.raw", "b.raw"), "none.raw"),
                (("a.raw", "nbd+unix:///?socket=/nonexistent"), "connect"),
                (("a.raw", "."), "neither"),
                (("a.raw",), "missing"),
                (("a.raw", "b.raw", "--block-size", "5000"), "power of two"),
                (("a.raw", "b.raw", "--connections", "0"), "1 to 64")):
            self.assertIn(what, verify(*args, status=2).stderr)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "q.qcow2",
                        "1M"], check=True)
        self.assertIn("qemu-nbd", verify("a.raw", "q.qcow2",
                                         status=2).stderr)

    def test_daemons(self):
        """No data moves: what the daemons send is counted."""
        ours = Nbdkit("disk=vda=a.raw", name="a")
        theirs = Nbdkit("disk=vdb=b.raw", "statsfile=%s/stats" % os.getcwd(),
                        name="b", options=["--filter=stats"])
        r = verify_json(ours.uri("vda"), theirs.uri("vdb"), status=0)
        self.assertEqual((r["a"]["read-as"], r["b"]["read-as"]),
                         ("hashes", "hashes"))
        h = theirs.connect("vdb")
        h.pwrite(b"\x01" * 512, 3 * MiB)
        h.shutdown()
        r = verify_json(ours.uri(), theirs.uri(), status=1)
        self.assertEqual(ranges(r), [(3 * MiB, BLOCK)])
        self.assertEqual(r["b"]["read-as"], "hashes")
        theirs.stop()
        with open("stats") as f:
            stats = f.read()
        read = re.search(r"read: \d+ ops, [0-9.]+ s, ([0-9.]+) (\w+),", stats)
        bytes_read = float(read[1]) * {"bytes": 1, "KiB": KiB,
                                       "MiB": MiB}[read[2]]
        self.assertLess(bytes_read, 64 * KiB, stats)

    def test_others(self):
        """Servers that know nothing of hashes: one that refuses the name, and
        one that gives its only export under any name."""
        ours = Nbdkit("disk=vda=a.raw", name="a")
        plain = Nbdkit("b.raw", name="plain", plugin="file")
        r = verify_json(ours.uri("vda"), plain.uri("x"), status=0)
        self.assertEqual((r["a"]["read-as"], r["b"]["read-as"]),
                         ("hashes", "data"))
        socket_path = os.path.join(TMPDIR, "qemu.sock")
        q = subprocess.Popen(["qemu-nbd", "-r", "-f", "raw", "-x", "q", "-k",
                              socket_path, "--persistent", "--shared=8",
                              "b.raw"])
        try:
            wait_for(lambda: is_served(socket_path), "qemu-nbd")
            uri = "nbd+unix:///q?socket=" + socket_path
            r = verify_json(uri, ours.uri("vda"), status=0)
            self.assertEqual(r["a"]["read-as"], "data")
        finally:
            q.kill()
            q.wait()
        plain.kill()
        write("b.raw", 0, b"\xff")
        plain.start()
        r = verify_json(ours.uri("vda"), plain.uri(), status=1)
        self.assertEqual(ranges(r), [(0, BLOCK)])

    def test_archives(self):
        """A chain of archives and the disk that it is of, at each point."""
        daemon = Nbdkit("disk=vda=a.raw", "control=ctl", name="a")
        h = daemon.connect("vda")
        chain = []
        for i in range(3):
            run_nbdferry("backup", "ctl", "%d.nbf" % i, "--bitmap", "b")
            chain.append("%d.nbf" % i)
            both = ",".join(chain), daemon.uri("vda")
            r = verify_json(*both, status=0)
            self.assertEqual((r["a"]["read-as"], r["b"]["read-as"]),
                             ("archive", "hashes"))
            h.pwrite(bytes([i + 1]) * 512, (3 + i) * MiB)
            h.zero(65536, (11 + i) * MiB - 512)
            r = verify_json(*both, status=1)
            got = [x for start, length in ranges(r)
                   for x in range(start, start + length, BLOCK)]
            self.assertIn((3 + i) * MiB, got)
            self.assertLessEqual(len(got), 3)
        h.shutdown()
        r = verify_json("0.nbf", "0.nbf,1.nbf", status=1)
        self.assertEqual(ranges(r)[0], (3 * MiB, BLOCK))
        verify("0.nbf,1.nbf,2.nbf", "0.nbf,1.nbf,2.nbf", status=0)
        # a gap, no full one, damage
        verify("0.nbf,2.nbf", "a.raw", status=2)
        self.assertIn("incremental", verify("1.nbf", "b.raw",
                                            status=2).stderr)
        for at in os.path.getsize("0.nbf") - 20, 2 * MiB:
            subprocess.run(["cp", "0.nbf", "bad.nbf"], check=True)
            with open("bad.nbf", "r+b") as f:
                f.seek(at)
                byte = f.read(1)
                f.seek(at)
                f.write(bytes([byte[0] ^ 4]))
            verify("bad.nbf", "b.raw", status=2)

    def test_hash_export(self):
        daemon = Nbdkit("disk=vda=a.raw", name="a")
        h = daemon.connect("vda@hash/65536", contexts=())
        nr = -(-SIZE // BLOCK)
        self.assertEqual(h.get_size(), 16 * nr)
        self.assertTrue(h.is_read_only())
        whole = h.pread(16 * nr, 0)
        # any range of bytes of it
        for offset, length in (0, 1), (5, 30), (16 * nr - 7, 7), (31, 200):
            self.assertEqual(h.pread(length, offset),
                             whole[offset:offset + length])
        with open("a.raw", "rb") as f:
            data = f.read()
        try:
            import xxhash
            self.assertEqual(whole, b"".join(
                xxhash.xxh3_128_digest(data[i:i + BLOCK])
                for i in range(0, SIZE, BLOCK)))
        except ImportError:
            pass
        # It follows the disk.
        w = daemon.connect("vda")
        w.pwrite(b"\x77" * 512, 4 * MiB)
        after = h.pread(16 * nr, 0)
        self.assertEqual([i for i in range(nr) if
                          after[16 * i:16 * i + 16] !=
                          whole[16 * i:16 * i + 16]], [4 * MiB // BLOCK])
        self.assertEqual(daemon.connect("vda@hash/64K", ()).get_size(),
                         16 * nr)
        for bad in "vda@hash/1000", "vda@hash/128M", "vda@hash/", \
                "no@hash/65536", "vda@hash/x":
            with self.assertRaises(nbd.Error):
                daemon.connect(bad)


if __name__ == "__main__":
    unittest.main()
