#!/usr/bin/python3
# nbdferry - a standby that is brought up to date again and again
# SPDX-License-Identifier: BSD-3-Clause
"""After each run the standby is the disk as it was at one point in time,
while a writer goes on; whatever was killed, nothing is lost; and a standby
that is not as it was left is refused."""

import unittest

from ferrytest import *

requires("nbdkit", "qemu-nbd", "qemu-img")

KiB, MiB = 1 << 10, 1 << 20
SIZE = 48 * MiB + 512
BLOCK = 16 * KiB


class Sequence(threading.Thread):
    """Writes block after block; each holds the number of its write all over,
    so what a disk holds says how many writes it has seen."""

    def __init__(self, uri, first=1, seed=9):
        super().__init__(daemon=True)
        self.uri, self.rng, self.ending = uri, random.Random(seed), False
        self.where = [None] * first     # of each write
        self.start()

    def run(self):
        h = connect(self.uri)
        while not self.ending:
            block = self.rng.randrange(SIZE // BLOCK)
            self.where.append(block)
            n = len(self.where) - 1
            h.pwrite(n.to_bytes(8, "big") * (BLOCK // 8), block * BLOCK)
        h.shutdown()

    def stop(self):
        self.ending = True
        self.join(60)
        assert not self.is_alive()

    def check(self, path, original):
        """The file is what the original is after some of the writes."""
        with open(path, "rb") as f:
            data = f.read()
        assert len(data) == SIZE, len(data)
        marks = {}
        for block in range(SIZE // BLOCK):
            piece = data[block * BLOCK:(block + 1) * BLOCK]
            n = int.from_bytes(piece[:8], "big")
            if 0 < n < len(self.where) and self.where[n] == block and \
                    piece == piece[:8] * (BLOCK // 8):
                marks[block] = n
            else:
                assert piece == original[block * BLOCK:(block + 1) * BLOCK], \
                    "block %d is torn" % block
        last = max(marks.values(), default=0)
        want = {self.where[n]: n for n in range(1, last + 1)}
        assert marks == want, "not a point in time: %d writes" % last
        return last


class Sync(unittest.TestCase):
    def setUp(self):
        self.original = bytes(make_disk("disk.raw", SIZE).data)
        self.daemon = Nbdkit("disk=vda=disk.raw", "control=ctl", name="src")
        self.standby = None

    def tearDown(self):
        for daemon in Nbdkit.all:
            daemon.kill()
        for name in os.listdir("."):
            subprocess.run(["rm", "-rf", name], check=True)

    def start_standby(self, *args, plugin="file", options=(), size=SIZE):
        """A standby on st.raw."""
        if not os.path.exists("st.raw"):
            with open("st.raw", "wb") as f:
                f.truncate(size)
        self.standby = Nbdkit("st.raw", *args, name="st", plugin=plugin,
                              options=options)
        self.uri = self.standby.uri()
        return self.uri

    def sync(self, *args, standby=None, bitmap="standby"):
        args = ["sync", "ctl", standby or self.uri, "--bitmap", bitmap,
                "--json", *args]
        p = run_nbdferry(*args, check=False)
        # nbdkit 1.32 may abort when a client vanishes, which is survived.
        if p.returncode and not self.daemon.is_running():
            self.assertEqual(self.daemon.process.wait(), -signal.SIGABRT,
                             self.daemon.log_text()[-2000:])
            self.daemon.start()
            p = run_nbdferry(*args, check=False)
        self.assertEqual(p.returncode, 0, p.stdout + p.stderr)
        return json.loads(p.stdout)

    def refused(self, *args, standby=None, bitmap="standby", status=1):
        p = run_nbdferry("sync", "ctl", standby or self.uri, "--bitmap",
                         bitmap, *args, check=False)
        self.assertEqual(p.returncode, status, p.stdout + p.stderr)
        return p.stderr

    def write(self, offset, length, value=0x5a):
        h = self.daemon.connect("vda")
        for at in range(offset, offset + length, 8 * MiB):
            h.pwrite(bytes([value]) * min(8 * MiB, offset + length - at), at)
        h.shutdown()

    def same(self, path="st.raw"):
        out = run_nbdferry("verify", self.daemon.uri("vda"), path, "--json",
                           check=False).stdout
        self.assertTrue(json.loads(out)["same"], out)

    def bitmap(self, name="standby"):
        listed = json.loads(run_nbdferry("bitmap", "list", "ctl",
                                         "--json").stdout)
        return {b["name"]: b for b in listed}[name]

    def bitmaps(self):
        return json.loads(run_nbdferry("bitmap", "list", "ctl",
                                       "--json").stdout)

    # ---- again and again ----

    def test_writer(self):
        self.start_standby()
        writer = Sequence(self.daemon.uri("vda"))
        seen, modes = [], []
        for i in range(6):
            before = len(writer.where)
            r = self.sync()
            modes.append(r["mode"])
            seen.append(writer.check("st.raw", self.original))
            self.assertGreaterEqual(seen[-1], before - 2)
            wait_for(lambda: len(writer.where) > before + 30, "writes")
        writer.stop()
        self.sync()
        self.assertEqual(writer.check("st.raw", self.original),
                         len(writer.where) - 1)
        self.assertEqual(modes, ["full"] + ["incremental"] * 5)
        self.assertEqual(seen, sorted(seen))
        self.same()

    def test_only_what_was_written(self):
        self.start_standby("statsfile=%s/stats" % os.getcwd(),
                           options=["--filter=stats"])
        self.assertEqual(self.sync()["mode"], "full")
        self.standby.stop()
        self.start_standby("statsfile=%s/stats" % os.getcwd(),
                           options=["--filter=stats"])
        self.write(5 * MiB, 256 * KiB)
        h = self.daemon.connect("vda")
        h.zero(128 * KiB, 10 * MiB)
        h.trim(MiB, 20 * MiB)
        h.shutdown()
        r = self.sync()
        self.assertEqual((r["mode"], r["data"]), ("incremental", 256 * KiB))
        self.assertEqual(r["zeros"] + r["zeros-kept"], MiB + 128 * KiB)
        self.same()
        self.assertEqual(self.bitmap()["count"], 0)
        r = self.sync()
        self.assertEqual((r["data"], r["zeros"]), (0, 0))
        self.standby.stop()
        with open("stats") as f:
            m = re.search(r"write: (\d+) ops, [0-9.]+ s, ([0-9.]+) KiB",
                          f.read())
        self.assertEqual(float(m[2]), 256)

    def test_restart(self):
        self.start_standby()
        self.sync()
        self.write(0, MiB)
        self.daemon.stop()
        self.daemon.start()
        self.write(2 * MiB, MiB)
        self.daemon.kill()
        self.daemon.start()
        r = self.sync()
        self.assertEqual((r["mode"], r["data"]), ("incremental", 2 * MiB))
        self.same()

    def test_kinds_of_standby(self):
        # a file that is made; a larger one; one of ours; a qcow2
        self.assertEqual(self.sync(standby="new.raw", bitmap="a")["mode"],
                         "full")
        self.same("new.raw")
        with open("large.raw", "wb") as f:
            f.truncate(SIZE + MiB)
        self.sync(standby="large.raw", bitmap="b")
        ours = Nbdkit("disk=ours.raw", "size=%d" % SIZE, name="ours")
        self.sync(standby=ours.uri(), bitmap="c")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "q.qcow2",
                        str(SIZE)], check=True)
        path = os.path.join(TMPDIR, "qemu.sock")
        q = subprocess.Popen(["qemu-nbd", "-f", "qcow2", "-k", path, "-x", "",
                              "--persistent", "--shared=8", "q.qcow2"])
        try:
            wait_for(lambda: is_served(path), "qemu-nbd")
            quri = "nbd+unix:///?socket=" + path
            self.sync(standby=quri, bitmap="d")
            self.write(7 * MiB + 512, MiB)
            for standby, bitmap in (("new.raw", "a"), ("large.raw", "b"),
                                    (ours.uri(), "c"), (quri, "d")):
                self.assertEqual(self.sync(standby=standby,
                                           bitmap=bitmap)["mode"],
                                 "incremental")
            for standby in "new.raw", ours.uri(), quri:
                self.same(standby)
        finally:
            q.kill()
            q.wait()
        with open("large.raw", "rb") as f, open("disk.raw", "rb") as g:
            self.assertEqual(f.read(SIZE), g.read())

    # ---- what goes wrong ----

    def begin(self, *args):
        return subprocess.Popen(
            [NBDFERRY, "sync", "ctl", self.uri, "--bitmap", "standby", *args],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True)

    def wait_for_run(self):
        qmp = QMP("ctl")
        wait_for(lambda: any(
            b["busy"] for b in qmp.command("query-named-block-nodes")[0]
            ["dirty-bitmaps"]), "the run")
        qmp.close()

    def test_killed(self):
        """kill -9 at any moment: the next run sends what was not confirmed,
        and the standby is accepted on its way between two points."""
        self.start_standby("wdelay=2ms", options=["--filter=delay"])
        writer = Sequence(self.daemon.uri("vda"))
        rng = random.Random(11)
        r = self.sync()
        for i in range(8):
            before = len(writer.where)
            wait_for(lambda: len(writer.where) > before + 200, "writes")
            p = self.begin()
            try:
                p.wait(rng.uniform(0, 0.15))
            except subprocess.TimeoutExpired:
                pass
            p.kill()
            p.communicate()
            if i % 3 == 2:
                r = self.sync()
                self.assertEqual(r["mode"], "incremental")
                writer.check("st.raw", self.original)
        writer.stop()
        self.sync()
        self.assertEqual(writer.check("st.raw", self.original),
                         len(writer.where) - 1)
        self.same()

    def test_first_copy_killed(self):
        """It is begun again, and if the standby has hashes, not all of it."""
        with open("ours.raw", "wb") as f:
            f.truncate(SIZE)
        ours = Nbdkit("disk=ours.raw", "wdelay=50ms", name="ours",
                      options=["--filter=delay"])
        self.uri = ours.uri()
        p = self.begin("--connections", "1")
        wait_for(lambda: os.stat("ours.raw").st_blocks > 8000, "data")
        p.kill()
        p.communicate()
        r = self.sync()
        self.assertEqual(r["mode"], "compare")
        self.assertLess(r["data"], 24 * MiB)
        self.same(ours.uri())
        self.write(0, MiB)
        self.assertEqual(self.sync()["mode"], "incremental")
        self.same(ours.uri())

    def test_signal(self):
        self.start_standby("wdelay=100ms", options=["--filter=delay"])
        self.sync()
        self.write(0, 20 * MiB)
        p = self.begin("--connections", "1")
        self.wait_for_run()
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=30)
        self.assertEqual(p.returncode, 130, err)
        self.assertIn("given up", err)
        b = self.bitmap()
        self.assertEqual((b["busy"], b["count"]), (False, 20 * MiB))
        self.sync()
        self.same()

    def test_daemon_killed(self):
        self.start_standby("wdelay=100ms", options=["--filter=delay"])
        self.sync()
        self.write(0, 20 * MiB)
        p = self.begin("--connections", "1")
        self.wait_for_run()
        self.daemon.kill()
        out, err = p.communicate(timeout=60)
        self.assertEqual(p.returncode, 1, err)
        self.daemon.start()
        self.assertEqual(self.bitmap()["count"], 20 * MiB)
        self.assertEqual(self.sync()["mode"], "incremental")
        self.same()

    def test_standby_lost(self):
        """kill -9 of the standby's server in the middle: the run waits for it,
        sends again what was not flushed, and ends well."""
        self.start_standby("wdelay=100ms", options=["--filter=delay"])
        self.sync()
        self.write(0, 30 * MiB)
        p = self.begin("--connections", "1", "--json")
        inode = os.stat("st.raw")
        wait_for(lambda: os.stat("st.raw").st_mtime_ns != inode.st_mtime_ns,
                 "a write")
        self.standby.kill()
        # What it had acknowledged and not flushed is lost with it.
        with open("st.raw", "r+b") as f:
            f.write(bytes(4 * MiB))
        self.standby.start()
        out, err = p.communicate(timeout=60)
        self.assertEqual(p.returncode, 0, err)
        self.assertGreater(json.loads(out)["sent-again"], 0)
        self.same()

    def test_flush_fails(self):
        """A server that lost at a flush what it had acknowledged: all of it is
        sent again."""
        path = os.path.abspath("st.raw")
        with open(path, "wb") as f:
            f.truncate(SIZE)
        self.standby = Nbdkit(
            "get_size=echo %d" % SIZE, "can_write=exit 0", "can_flush=exit 0",
            "can_zero=exit 0",
            "pread=dd if=%s skip=$4 count=$3 iflag=count_bytes,skip_bytes "
            "status=none" % path,
            "pwrite=dd of=%s seek=$4 conv=notrunc oflag=seek_bytes "
            "status=none" % path,
            "zero=fallocate -z -n -o $4 -l $3 %s" % path,
            "flush=if [ -e %s.lost ]; then sync -d %s; exit; fi; "
            "touch %s.lost; truncate -s 0 %s; truncate -s %d %s; "
            "echo EIO lost >&2; exit 1" % (path, path, path, path, SIZE, path),
            name="eval", plugin="eval", env={"LD_PRELOAD": ""})
        self.uri = self.standby.uri()
        r = self.sync()
        self.assertEqual(r["sent-again"], 1)
        self.same()

    def test_standby_gone(self):
        self.start_standby("wdelay=100ms", options=["--filter=delay"])
        self.sync()
        self.write(0, 30 * MiB)
        p = self.begin("--connections", "1", "--patience", "1")
        self.wait_for_run()
        self.standby.kill()
        out, err = p.communicate(timeout=60)
        self.assertEqual(p.returncode, 1, err)
        b = self.bitmap()
        self.assertEqual((b["busy"], b["count"]), (False, 30 * MiB))
        self.standby.start()
        self.sync()
        self.same()

    # ---- which standby ----

    def test_wrong_standby(self):
        self.start_standby()
        self.sync()
        # another name, same content; another disk under the same name
        subprocess.run(["cp", "--sparse=always", "st.raw", "copy.raw"],
                       check=True)
        text = self.refused(standby="copy.raw")
        self.assertIn("--adopt", text)
        self.standby.stop()
        with open("st.raw", "r+b") as f:
            f.write(os.urandom(SIZE))
        self.start_standby()
        self.write(0, 512)
        before = sha("st.raw")
        text = self.refused()
        for what in "not as it was left", "--compare", "--full":
            self.assertIn(what, text)
        self.assertIn("not as it was left", self.refused("--adopt"))
        self.assertEqual(sha("st.raw"), before)     # nothing was written
        self.assertFalse(self.bitmap()["busy"])
        # the renamed one goes on
        r = self.sync("--adopt", standby="copy.raw")
        self.assertEqual(r["mode"], "incremental")
        self.same("copy.raw")
        self.sync(standby="copy.raw")
        # other sizes
        self.assertIn("is in the state directory",
                      self.refused(standby="disk.raw.ferry/journal"))
        with open("short.raw", "wb") as f:
            f.write(bytes(512))
        self.assertIn("fewer", self.refused(standby="short.raw"))
        os.truncate("copy.raw", SIZE + MiB)
        self.assertIn("is not the standby", self.refused(standby="copy.raw"))

    def test_not_overwritten(self):
        """The disk itself, and a disk that holds something."""
        for export in "vda", "":
            self.uri = self.daemon.uri(export)
            self.assertIn("is the disk itself", self.refused("--full"))
            self.assertIn("is the disk itself", self.refused("--compare"))
            # The bitmap was made before that was known.
            self.assertEqual(self.bitmaps(), [])
        self.assertIn("lock", self.refused("--full", standby="disk.raw"))
        # One that was there stays.
        run_nbdferry("bitmap", "add", "ctl", "standby")
        self.uri = self.daemon.uri("vda")
        self.assertIn("is the disk itself", self.refused("--full"))
        self.assertEqual(len(self.bitmaps()), 1)
        run_nbdferry("bitmap", "remove", "ctl", "standby")
        with open("st.raw", "wb") as f:
            f.truncate(SIZE)
        subprocess.run(["mkfs.ext4", "-q", "-F", "st.raw"], check=True)
        self.start_standby()
        before = sha("st.raw")
        text = self.refused()
        for what in "ext4", "--full", "--compare":
            self.assertIn(what, text)
        with open("st.raw", "r+b") as f:
            f.write(bytes(64 * KiB))
            f.truncate(0)
            f.truncate(SIZE)
            f.seek(5000)
            f.write(b"x")
        self.assertIn("holds something", self.refused())
        self.assertEqual(self.bitmaps(), [])    # nothing was begun
        self.assertEqual(self.sync("--compare")["mode"], "compare")
        self.same()
        self.assertNotEqual(sha("st.raw"), before)
        self.assertEqual(self.sync()["mode"], "incremental")

    def test_moved(self):
        """The disk moves to another host, and its bitmaps with it; there the
        standby is adopted, and gets only what was written since."""
        self.start_standby()
        self.sync()
        self.write(MiB, MiB)
        dest = Nbdkit("disk=vda=moved.raw", "size=%d" % SIZE, "incoming=on",
                      "control=ctl2", name="dest")
        run_nbdferry("migrate", "ctl", dest.uri().replace("///", "///vda"))
        text = self.refused()
        self.assertIn("not active", text)
        h = dest.connect("vda")
        h.pwrite(b"m" * MiB, 5 * MiB)
        h.shutdown()
        p = run_nbdferry("sync", "ctl2", self.uri, "--bitmap", "standby",
                         check=False)
        self.assertEqual(p.returncode, 1)
        self.assertIn("--adopt", p.stderr)
        p = run_nbdferry("sync", "ctl2", self.uri, "--bitmap", "standby",
                         "--adopt", "--json")
        r = json.loads(p.stdout)
        self.assertEqual((r["mode"], r["data"]), ("incremental", 2 * MiB))
        run_nbdferry("verify", dest.uri("vda"), "st.raw")
        run_nbdferry("sync", "ctl2", self.uri, "--bitmap", "standby")

    def test_rolled_back(self):
        self.start_standby()
        self.sync()
        for value in 1, 2:
            subprocess.run(["cp", "st.raw", "old.raw"], check=True)
            self.write(3 * MiB, 64 * KiB, value)    # one granule
            self.sync()
            self.standby.stop()
            os.rename("st.raw", "new.raw")
            os.rename("old.raw", "st.raw")
            self.standby.start()
            self.assertIn("not as it was left", self.refused())
            self.standby.stop()
            os.rename("new.raw", "st.raw")
            self.standby.start()
            self.sync()
        # A rollback of what was made zero
        h = self.daemon.connect("vda")
        subprocess.run(["cp", "st.raw", "old.raw"], check=True)
        h.zero(64 * KiB, 3 * MiB)
        h.shutdown()
        self.sync()
        self.standby.stop()
        os.rename("old.raw", "st.raw")
        self.standby.start()
        self.assertIn("not as it was left", self.refused())

    def test_somebody_elses_bitmap(self):
        self.start_standby()
        self.sync()
        qmp = QMP("ctl")
        uuid = "12345678-1234-4234-8234-1234567890%02x"
        self.write(0, MiB)

        def backup(i, bitmap, **kwargs):
            qmp.command("x-ferry-backup-begin", node="vda", id=uuid % i,
                        bitmap=bitmap, **kwargs)
            qmp.command("x-ferry-backup-end", node="vda", id=uuid % i,
                        success=True)
        backup(1, "standby")
        text = self.refused()
        self.assertIn("used for something else", text)
        r = self.sync("--compare")
        self.assertEqual((r["mode"], r["data"]), ("compare", MiB))
        self.same()
        # a bitmap of backups
        run_nbdferry("bitmap", "add", "ctl", "daily")
        backup(2, "daily", full=True)
        self.assertIn("bitmap of its own", self.refused(bitmap="daily"))
        # cleared: it has no point any more
        self.write(2 * MiB, 64 * KiB)
        run_nbdferry("bitmap", "clear", "ctl", "standby")
        self.assertIn("was cleared", self.refused())
        qmp.close()

    def test_adopt(self):
        """A standby that was seeded otherwise: by a copy made at the point of
        a full backup."""
        run_nbdferry("bitmap", "add", "ctl", "seed")
        self.start_standby()
        self.assertIn("nothing to adopt", self.refused("--adopt",
                                                       bitmap="seed"))
        qmp = QMP("ctl")
        uuid = "12345678-1234-4234-8234-123456789012"
        qmp.command("x-ferry-backup-begin", node="vda", id=uuid, bitmap="seed",
                    full=True)
        self.write(MiB, MiB)
        subprocess.run(["nbdcopy", self.daemon.uri("vda@backup/" + uuid),
                        self.uri], check=True)
        qmp.command("x-ferry-backup-end", node="vda", id=uuid, success=True)
        qmp.close()
        r = self.sync("--adopt", bitmap="seed")
        self.assertEqual((r["mode"], r["data"]), ("incremental", MiB))
        self.same()
        self.assertEqual(self.sync(bitmap="seed")["mode"], "incremental")

    def test_inconsistent(self):
        self.start_standby()
        self.sync()
        self.daemon.stop()
        with open("disk.raw", "r+b") as f:
            f.seek(4 * MiB)
            f.write(b"behind its back")
        self.daemon.start()
        self.assertTrue(self.bitmap()["inconsistent"])
        text = self.refused()
        self.assertIn("inconsistent: ", text)
        r = self.sync("--compare")
        self.assertEqual((r["mode"], r["differing"]), ("compare", 64 * KiB))
        self.same()
        self.assertNotIn("inconsistent", self.bitmap())
        self.assertEqual(self.sync()["mode"], "incremental")

    # ---- comparing ----

    def test_compare(self):
        ours = Nbdkit("disk=ours.raw", "size=%d" % SIZE, name="ours")
        self.uri = ours.uri()
        writer = None
        r = self.sync("--compare")      # makes the bitmap
        self.assertEqual(r["mode"], "compare")
        self.same(self.uri)
        h = ours.connect()
        h.pwrite(b"\1" * 512, 2 * MiB)
        h.pwrite(b"\1" * 512, SIZE - 512)
        h.trim(128 * KiB, 4 * MiB)
        h.shutdown()
        self.write(8 * MiB, 192 * KiB)
        r = self.sync("--compare")
        self.assertEqual(r["compared"], SIZE)
        self.assertEqual(r["differing"], 7 * 64 * KiB)
        self.assertLessEqual(r["data"] + r["zeros"], 7 * 64 * KiB)
        self.same(self.uri)
        # with a writer, and a server that knows no hashes
        ours.stop()
        os.rename("ours.raw", "st.raw")
        self.start_standby()
        writer = Sequence(self.daemon.uri("vda"))
        for i in range(3):
            r = self.sync("--compare")
            self.assertEqual(r["mode"], "compare")
        self.sync()
        writer.stop()
        self.sync()
        self.same()
        # without a bitmap
        self.write(9 * MiB, 64 * KiB, 0x77)
        r = json.loads(run_nbdferry("sync", "ctl", self.uri, "--compare",
                                    "--json").stdout)
        self.assertEqual(r["differing"], 64 * KiB)
        self.assertNotIn("bitmap", r)
        self.same()
        # that was not recorded: the bitmap has it still
        self.assertEqual(self.bitmap()["count"], 64 * KiB)

    def test_usage(self):
        self.uri = "st.raw"
        for args, what in ((["--compare", "--full"], "exclude"),
                           (["--connections", "0"], "1 to 64"),
                           (["--patience", "x"], "0 to 86400")):
            self.assertIn(what, self.refused(*args, status=2))
        p = run_nbdferry("sync", "ctl", "st.raw", check=False)
        self.assertEqual(p.returncode, 2)
        self.assertIn("--bitmap is missing", p.stderr)
        self.assertIn("connect", self.refused(
            standby="nbd+unix:///?socket=/nonexistent"))
        self.assertFalse(os.path.exists("st.raw"))
        qmp = QMP("ctl")
        qmp.command("block-dirty-bitmap-add", node="vda", name="b")
        good = {"standby": "x", "size": 10, "from": None, "to": None,
                "from-samples": [], "to-samples": []}
        qmp.command("x-ferry-sync-record", node="vda", name="b", record=good)
        self.assertEqual(qmp.command("x-ferry-query-sync", node="vda",
                                     name="b"), {"record": good})
        for change in ({"standby": 1}, {"from": "x"}, {"size": -1},
                       {"to-samples": [[0, 512, "x"]]},
                       {"to-samples": [[0, 5, "0123456789abcdeg"]]},
                       {"to-samples": [[0, 11, "0123456789abcdef"]]},
                       {"to-samples": [[0, 1, "0123456789abcdef"]] * 65}):
            with self.assertRaisesRegex(QMPError, "no sense"):
                qmp.command("x-ferry-sync-record", node="vda", name="b",
                            record=dict(good, **change))
        with self.assertRaisesRegex(QMPError, "not found"):
            qmp.command("x-ferry-query-sync", node="vda", name="no")
        qmp.command("x-ferry-sync-record", node="vda", name="b")
        self.assertEqual(qmp.command("x-ferry-query-sync", node="vda",
                                     name="b"), {"record": None})
        qmp.close()


def sha(path):
    return subprocess.run(["sha256sum", path], check=True,
                          stdout=subprocess.PIPE).stdout.split()[0]


if __name__ == "__main__":
    unittest.main()
