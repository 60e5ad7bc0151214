#!/usr/bin/python3
# nbdferry - a store that is full, failing, broken, or somebody else's
# SPDX-License-Identifier: BSD-3-Clause
"""Writes fail rather than go untracked, with one line in the log, and the
daemon lives.  What is broken is refused with what, where and what to do, and
is not written to.  Needs root, for file systems of its own, which go away with
a mount namespace of its own."""

import errno
import hashlib
import struct
import unittest

from ferrytest import *

requires("nbdkit", "qemu-img", "qemu-nbd", "qemu-io", "unshare", "mount")
if os.geteuid() != 0:
    skip("only root can mount")
if not own_mounts():
    skip("no mount namespaces")

KiB, MiB = 1 << 10, 1 << 20
SIZE = 64 * MiB


def sh(*args):
    return subprocess.run(args, check=True, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT).stdout


def refused(*args):
    p = run_nbdferry(*args, check=False)
    assert p.returncode == 1, (p.returncode, p.stdout, p.stderr)
    return p.stderr


def start_refused(*args):
    """The daemon must not start; what it says."""
    try:
        Nbdkit(*args, name="refused")
    except RuntimeError as e:
        os.unlink("refused.log")
        return str(e)
    raise AssertionError("nbdkit %s was expected to fail" % (args,))


def count(control, name="b"):
    listed = json.loads(run_nbdferry("bitmap", "list", control,
                                     "--json").stdout)
    return {b["name"]: b for b in listed}[name]


def mount_tmpfs(path, size="16M"):
    os.makedirs(path, exist_ok=True)
    sh("mount", "-t", "tmpfs", "-o", "size=" + size, "none", path)


def fill(path):
    """Leave no room in a file system."""
    with open(path, "wb", buffering=0) as f:
        step = MiB
        while step:
            try:
                if f.write(bytes(step)) < step:
                    step //= 2
            except OSError as e:
                if e.errno != errno.ENOSPC:
                    raise
                step //= 2
        os.fsync(f.fileno())


def tree(*paths):
    """What files there are, and what they hold; of the disk, when it was
    written to."""
    found = {}
    for path in paths:
        for folder, _, names in list(os.walk(path)) or [("", [], [path])]:
            for name in names:
                full = os.path.join(folder, name)
                st = os.lstat(full)
                digest = None
                if st.st_size >= SIZE:
                    digest = st.st_mtime_ns, st.st_ctime_ns
                elif os.path.isfile(full) and not os.path.islink(full):
                    with open(full, "rb") as f:
                        digest = hashlib.sha256(f.read()).hexdigest()
                found[full] = st.st_mode, st.st_size, st.st_ino, digest
    return found


class Test(unittest.TestCase):
    mounts = []

    def setUp(self):
        make_disk("disk.raw", SIZE)

    def tearDown(self):
        for d in Nbdkit.all:
            d.kill()
        while self.mounts:
            sh("umount", "-l", self.mounts.pop())
        for name in os.listdir("."):
            subprocess.run(["rm", "-rf", name], check=True)

    def tmpfs(self, path, size="16M"):
        mount_tmpfs(path, size)
        self.mounts.append(path)
        return os.path.abspath(path)

    def loop_device(self, path):
        device = loop_device(path)
        if not device:
            self.skipTest("no loop devices")
        self.addCleanup(loop_detach, device)
        return device

    def write(self, daemon, offset, export="disk.raw", data=b"x" * 512):
        h = daemon.connect(export)
        try:
            h.pwrite(data, offset)
        finally:
            h.shutdown()

    def assert_eio(self, daemon, offset):
        with self.assertRaises(nbd.Error) as e:
            self.write(daemon, offset)
        self.assertEqual(e.exception.errnum, errno.EIO)

    # ---- no room ----

    def no_room(self, folder):
        daemon = Nbdkit("disk.raw", "state=%s/s" % folder, "control=ctl")
        run_nbdferry("bitmap", "add", "ctl", "b", "--granularity", 512)
        self.write(daemon, 0)
        fill(folder + "/filler")
        # A disk of 64 MiB has 16 KiB of such bits.
        text = refused("bitmap", "add", "ctl", "c", "--granularity", 512)
        for what in "'c'", "bitmaps.qcow2", "No space left":
            self.assertIn(what, text)
        # What there is goes on: all of its bits have their room.
        h = daemon.connect("disk.raw")
        for i in range(0, SIZE, 64 * KiB):
            h.pwrite(b"y" * 512, i)
        h.shutdown()
        self.assertEqual(count("ctl")["count"], 512 * (SIZE // (64 * KiB)))
        daemon.kill()
        daemon.start()
        self.assertEqual(count("ctl")["count"], 512 * (SIZE // (64 * KiB)))
        daemon.stop()
        qemu_img_check(folder + "/s/bitmaps.qcow2")
        daemon.start()
        os.unlink(folder + "/filler")
        run_nbdferry("bitmap", "add", "ctl", "c", "--granularity", 512)
        daemon.stop()
        qemu_img_check(folder + "/s/bitmaps.qcow2")

    def test_no_room_tmpfs(self):
        self.no_room(self.tmpfs("small", "8M"))

    def test_no_room_ext4(self):
        if not shutil.which("mkfs.ext4"):
            self.skipTest("no mkfs.ext4")
        with open("ext4.img", "wb") as f:
            f.truncate(24 * MiB)
        sh("mkfs.ext4", "-q", "-m0", "ext4.img")
        os.mkdir("small")
        p = subprocess.run(["mount", "-o", "loop", "ext4.img", "small"],
                           text=True, capture_output=True)
        if p.returncode != 0:
            self.skipTest(p.stderr)
        self.mounts.append("small")
        self.no_room(os.path.abspath("small"))

    def test_no_room_at_all(self):
        """Not even for a state directory."""
        folder = self.tmpfs("small", "1M")
        fill(folder + "/filler")
        before = tree("disk.raw")
        text = start_refused("disk.raw", "state=%s/s" % folder)
        self.assertIn(folder + "/s", text)
        self.assertIn("No space left", text)
        self.assertEqual(tree("disk.raw"), before)

    # ---- errors under the map ----

    def failing(self, daemon, lose):
        """lose () makes the pages of the bitmaps go away."""
        run_nbdferry("bitmap", "add", "ctl", "b", "--granularity", 512)
        self.write(daemon, 0)
        lose()
        before = read_all(daemon.uri("disk.raw"))
        for i in range(20):
            self.assert_eio(daemon, i * 3 * MiB)
        # The daemon lives, reads go on, nothing was written.
        self.assertEqual(read_all(daemon.uri("disk.raw")), before)
        self.assertTrue(daemon.is_running())
        self.assertIn("disk.raw", run_nbdferry("status", "ctl").stdout)
        lines = [line for line in daemon.log_text().splitlines()
                 if "error:" in line]
        self.assertEqual(len(lines), 1, lines)
        self.assertRegex(lines[0], "disk.raw.*bitmaps.qcow2")
        # No operation on bitmaps says that it went well.
        for command in "add c", "clear b", "disable b", "remove b":
            verb, name = command.split()
            self.assertIn("bitmaps.qcow2",
                          refused("bitmap", verb, "ctl", name))
        daemon.terminate()
        daemon.process.wait(TIMEOUT)
        daemon.process = None

    def not_trusted(self, daemon):
        """Started again: all dirty or given up, with a reason; or refused."""
        try:
            daemon.start()
        except RuntimeError as e:
            self.assertIn("bitmaps.qcow2", str(e))
            self.assertIn("to start without bitmaps", str(e))
            return
        b = count("ctl")
        self.assertTrue(b.get("inconsistent") or b["count"] == SIZE, b)
        self.assertIn("under bitmaps.qcow2", json.dumps(b))
        daemon.stop()

    def test_cut_while_running(self):
        daemon = Nbdkit("disk.raw", "control=ctl")
        sidecar = "disk.raw.ferry/bitmaps.qcow2"
        self.failing(daemon, lambda: os.truncate(sidecar, 4 * MiB))
        self.not_trusted(daemon)

    def test_cut_and_restored(self):
        """Nothing in the sidecar tells that anything happened to it."""
        daemon = Nbdkit("disk.raw", "control=ctl")
        sidecar = "disk.raw.ferry/bitmaps.qcow2"

        def lose():
            with open(sidecar, "rb") as f:
                data = f.read()
            os.truncate(sidecar, len(data) - 2 * MiB)
            self.data = data
        self.failing(daemon, lose)
        with open(sidecar, "r+b") as f:
            f.write(self.data)
        self.not_trusted(daemon)

    def test_no_room_for_a_page(self):
        """Somebody punched holes, and the file system is full."""
        folder = self.tmpfs("small", "8M")
        daemon = Nbdkit("disk.raw", "state=%s/s" % folder, "control=ctl")

        def lose():
            sidecar = folder + "/s/bitmaps.qcow2"
            size = os.path.getsize(sidecar)
            sh("fallocate", "-p", "-o", str(size - 2 * MiB), "-l",
               str(2 * MiB), sidecar)
            fill(folder + "/filler")
        self.failing(daemon, lose)

    def test_cut_lastwrite(self):
        """The page with the times of the last writes is no reason to die."""
        daemon = Nbdkit("disk.raw", "control=ctl")
        run_nbdferry("bitmap", "add", "ctl", "b")
        self.write(daemon, 0)
        os.truncate("disk.raw.ferry/lastwrite", 0)
        self.write(daemon, MiB)
        self.assertEqual(count("ctl")["count"], 2 * 65536)
        daemon.stop()
        daemon.start()
        self.assertEqual(count("ctl")["count"], 2 * 65536)
        self.assertNotIn("inconsistent", count("ctl"))

    # ---- where it is ----

    def test_other_file_system(self):
        folder = self.tmpfs("other", "32M")
        daemon = Nbdkit("disk.raw", "state=%s/deep" % folder, "control=ctl")
        run_nbdferry("bitmap", "add", "ctl", "b")
        self.write(daemon, 0)
        daemon.stop()
        for how in daemon.stop, daemon.kill, daemon.stop:
            daemon.start()
            self.assertEqual(count("ctl")["count"], 65536)
            self.assertNotIn("inconsistent", count("ctl"))
            how()
        self.assertFalse(os.path.exists("disk.raw.ferry"))
        qemu_img_check(folder + "/deep/bitmaps.qcow2")
        sh("qemu-io", "-c", "write 1M 512", folder + "/deep/bitmaps.qcow2")
        daemon.start()
        self.assertEqual(count("ctl")["count"], 2 * 65536)

    def test_two_daemons(self):
        daemon = Nbdkit("disk.raw", "control=ctl")
        run_nbdferry("bitmap", "add", "ctl", "b")
        os.link("disk.raw", "hard.raw")
        os.symlink("disk.raw", "soft.raw")
        os.mkdir("elsewhere")
        before = tree("disk.raw", "disk.raw.ferry", "elsewhere")
        for args in (["disk.raw"], ["disk.raw", "state=elsewhere"],
                     ["hard.raw"], ["soft.raw"],
                     ["hard.raw", "state=disk.raw.ferry"]):
            text = start_refused(*args)
            self.assertIn("in use by another process", text)
            self.assertIn(args[0], text)
        self.assertEqual(tree("disk.raw", "disk.raw.ferry", "elsewhere"),
                         before)
        # Another disk cannot have the same state directory.
        make_disk("other.raw", SIZE, seed=2)
        text = start_refused("other.raw", "state=disk.raw.ferry")
        self.assertIn("disk.raw.ferry/", text)
        self.assertIn("in use", text)
        self.write(daemon, 0)
        self.assertEqual(count("ctl")["count"], 65536)
        # Twice in one daemon is no better.
        daemon.stop()
        text = start_refused("disk=a=disk.raw", "disk=b=hard.raw")
        self.assertIn("in use", text)

    def test_read_only_disk(self):
        folder = self.tmpfs("ro", "100M")
        shutil.copy("disk.raw", folder)
        sh("mount", "-o", "remount,ro", folder)
        disk = folder + "/disk.raw"
        daemon = Nbdkit(disk, "control=ctl")
        h = daemon.connect("disk.raw")
        self.assertTrue(h.is_read_only())
        h.shutdown()
        with open("disk.raw", "rb") as f:
            self.assertEqual(read_all(daemon.uri("disk.raw")), f.read())
        self.assertIn("disk.raw", refused("bitmap", "add", "ctl", "b"))
        run_nbdferry("bitmap", "add", "ctl", "t", "--transient")
        daemon.stop()
        self.assertFalse(os.path.exists(disk + ".ferry"))
        self.assertIn("nothing to recover", refused("recover", disk))
        self.assertIn("cannot be written", start_refused(disk, "incoming=on"))

    def test_state_not_writable(self):
        folder = self.tmpfs("ro")
        daemon = Nbdkit("disk.raw", "state=%s/there" % folder, "control=ctl")
        run_nbdferry("bitmap", "add", "ctl", "b")
        daemon.stop()
        sh("mount", "-o", "remount,ro", folder)
        before = tree("disk.raw", folder)
        for name in "there", "new":
            text = start_refused("disk.raw", "state=%s/%s" % (folder, name))
            self.assertIn("%s/%s" % (folder, name), text)
            self.assertIn("Read-only file system", text)
        with open("file", "w"):
            pass
        self.assertIn("file", start_refused("disk.raw", "state=file"))
        self.assertEqual(tree("disk.raw", folder), before)

    def test_block_device(self):
        device = self.loop_device("disk.raw")
        args = "disk=vda=" + device, "state=state", "control=ctl"
        daemon = Nbdkit(*args)
        run_nbdferry("bitmap", "add", "ctl", "b")
        model = Model(SIZE)
        writer = Writer(daemon.uri("vda"), model, end=SIZE // 2)
        wait_for(lambda: writer.done > 100, "the writer")
        text = start_refused("disk=x=" + device, "state=state2")
        self.assertIn(device, text)
        self.assertIn("in use", text)
        daemon.kill()
        writer.stop()
        daemon.start()
        b = count("ctl")
        self.assertNotIn("inconsistent", b)
        self.assertGreater(b["count"], 0)
        self.assertLessEqual(b["count"], SIZE // 2 + 65536)
        daemon.stop()
        qemu_img_check("state/bitmaps.qcow2")
        sh("qemu-io", "-c", "write -P 3 40M 512", "state/bitmaps.qcow2")
        daemon.start()
        self.assertEqual(count("ctl")["count"], b["count"] + 65536)
        h = daemon.connect("vda")
        self.assertEqual(h.pread(512, 40 * MiB), b"\x03" * 512)
        h.zero(MiB, 41 * MiB)
        h.flush()
        h.shutdown()
        daemon.stop()

    # ---- broken ----

    def broken(self, path, data, *words):
        """With that in a file, the daemon does not start, and says so."""
        with open(path, "wb") as f:
            f.write(data)
        self.refused_alone(path, *words)

    def refused_alone(self, path, *words):
        before = tree("disk.raw", "disk.raw.ferry")
        text = start_refused("disk.raw")
        self.assertIn(path, text)
        for word in words:
            self.assertIn(word, text)
        text = refused("recover", "disk.raw")
        self.assertIn(path, text)
        self.assertEqual(tree("disk.raw", "disk.raw.ferry"), before, text)

    def prepare(self):
        daemon = Nbdkit("disk.raw", "control=ctl")
        run_nbdferry("bitmap", "add", "ctl", "b")
        run_nbdferry("bitmap", "add", "ctl", "c", "--granularity", 512)
        self.write(daemon, 0)
        daemon.stop()

    def test_broken_journal(self):
        self.prepare()
        path = "disk.raw.ferry/journal"
        with open(path, "rb") as f:
            good = f.read()
        slot = len(good) // 2
        advice = "restore the file"

        self.broken(path, b"\0" * len(good), advice)
        self.broken(path, good[:10], advice)
        self.broken(path, good[:slot][:40] + b"\0" * (len(good) - 40), advice)
        self.broken(path, random.Random(1).randbytes(len(good)), advice)
        both = bytearray(good)
        for at in 40, slot + 40:
            both[at] ^= 1
        self.broken(path, both, advice)
        # of the same sequence: either could be the last
        newer = max((0, slot), key=lambda at: good[at + 16:at + 24])
        self.broken(path, good[newer:newer + slot] * 2, advice)
        os.unlink(path)
        os.mkfifo(path)
        self.refused_alone(path)
        os.unlink(path)
        os.mkdir(path)
        self.refused_alone(path)
        os.rmdir(path)
        # One slot torn is nothing.
        torn = bytearray(good)
        older = slot - newer
        torn[older:older + slot] = random.Random(2).randbytes(slot)
        with open(path, "wb") as f:
            f.write(torn)
        run_nbdferry("recover", "disk.raw")

    def test_broken_sidecar(self):
        self.prepare()
        path = "disk.raw.ferry/bitmaps.qcow2"
        with open(path, "rb") as f:
            good = f.read()
        directory, = struct.unpack_from(">Q", good, 104 + 8 + 16)
        table, = struct.unpack_from(">Q", good, directory)

        def patched(*patches):
            data = bytearray(good)
            for fmt, at, value in patches:
                struct.pack_into(fmt, data, at, value)
            return data

        advice = "to start without bitmaps"
        cases = [
            (b"garbage" * 1000, advice),
            (good[:3], advice),
            (good[:103], advice),
            (good[:4 * KiB], advice),
            (good[:directory], advice),
            (good[:directory + 16], advice),
            (patched((">I", 0, 0)), advice),
            (patched((">I", 4, 7)), "version"),
            (patched((">I", 20, 3)), advice),
            (patched((">I", 20, 63)), advice),
            (patched((">I", 100, 1 << 31)), advice),
            # features, encryption, a backing file, snapshots
            (patched((">Q", 72, 4 | 1 << 40)), "feature"),
            (patched((">Q", 72, 4 | 2)), "qemu-img check"),
            (patched((">I", 32, 1)), "encrypted"),
            (patched((">Q", 8, 600), (">I", 16, 4)), ""),
            (patched((">I", 60, 3), (">Q", 64, 4 * MiB)), "snapshots"),
            (patched((">Q", 72, 0)), ""),
            # the directory
            (patched((">I", 112, 0)), advice),
            (patched((">I", 112, 0xffffffff)), advice),
            (patched((">Q", 120, 1 << 40)), advice),
            (patched((">Q", 120, 8)), advice),
            (patched((">Q", 128, 1 << 50)), advice),
            (patched((">Q", 128, 1)), advice),
            # an entry: table, size, type, granularity, lengths
            (patched((">Q", directory, 1 << 50)), advice),
            (patched((">Q", directory, 7)), advice),
            (patched((">I", directory + 8, 0xffffffff)), advice),
            (patched((">B", directory + 16, 9)), "type"),
            (patched((">B", directory + 17, 70)), advice),
            (patched((">H", directory + 18, 0)), advice),
            (patched((">H", directory + 18, 0xffff)), advice),
            (patched((">I", directory + 20, 0xfffffff0)), advice),
            # the bits: beyond the file, reserved bits
            (patched((">Q", table, 1 << 45)), advice),
            (patched((">Q", table, 5)), advice),
        ]
        for data, word in cases:
            self.broken(path, data, word)
        # A whole disk image in its place is not taken over.
        sh("qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE))
        self.refused_alone(path, "holds a disk of its own", "move it away")
        os.unlink(path)
        os.mkfifo(path)
        self.refused_alone(path)
        os.unlink(path)
        os.mkdir(path)
        self.refused_alone(path)
        os.rmdir(path)
        with open(path, "wb") as f:
            f.write(good)
        run_nbdferry("recover", "disk.raw")

    def test_cut_everywhere(self):
        """However much is left of the sidecar: refused and left alone, or
        opened and then whole."""
        self.prepare()
        path = "disk.raw.ferry/bitmaps.qcow2"
        shutil.copytree("disk.raw.ferry", "good")
        size = os.path.getsize(path)
        steps = 40 if os.environ.get("CHECK_LONG") else 12
        rng = random.Random(5)
        for i in range(steps):
            cut = rng.choice([rng.randrange(1, 4096), rng.randrange(1, size),
                              size - rng.randrange(1, 2 * MiB)])
            os.truncate(path, cut)
            before = tree("disk.raw", "disk.raw.ferry")
            p = run_nbdferry("recover", "disk.raw", check=False)
            if p.returncode == 0:
                qemu_img_check(path)
            else:
                self.assertIn(path, p.stderr)
                self.assertIn("without bitmaps", p.stderr)
                self.assertEqual(tree("disk.raw", "disk.raw.ferry"), before)
            shutil.rmtree("disk.raw.ferry")
            shutil.copytree("good", "disk.raw.ferry")


if __name__ == "__main__":
    unittest.main(verbosity=2)
