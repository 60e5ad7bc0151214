#!/usr/bin/python3
# nbdferry - what file systems say is free is not sent
# SPDX-License-Identifier: BSD-3-Clause
"""Migrations with hints=fs of disks that are full of rubbish, on which there
are ext2, ext3 and ext4 file systems of every kind.  dumpe2fs is the judge of
what is free: all else must arrive, and nothing of that may be sent.  e2fsck
and debugfs look at what has arrived."""

import json
import random
import re
import shutil

from ferrytest import *
from migratetest import *

os.environ["PATH"] += ":/usr/sbin:/sbin"
requires("nbdkit", "qemu-img", "mke2fs", "e2fsck", "debugfs", "dumpe2fs",
         "sfdisk")

KiB, MiB = 1 << 10, 1 << 20
CHUNK = 4096
FILES = {"small": b"x" * 700, "one": b"1" * 4096, "big": b"big " * 300000,
         "dir/inside": b"inside" * 9999}


def run(*argv, check=True):
    r = subprocess.run(argv, stdin=subprocess.DEVNULL, check=False,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if check and r.returncode != 0:
        raise AssertionError("%s: %s" % (argv, r.stdout.decode()))
    return r.stdout.decode()


def rubbish(path, size, seed=1):
    """Nowhere zero, and every 512 bytes differ."""
    block = random.Random(seed).randbytes(MiB).replace(b"\0", b"z")
    with open(path, "wb") as f:
        for at in range(0, size, MiB):
            f.write(block[at >> 20:] + block[:at >> 20])
        f.truncate(size)


def tree(path="tree"):
    for name, data in FILES.items():
        os.makedirs(os.path.dirname(os.path.join(path, name)), exist_ok=True)
        with open(os.path.join(path, name), "wb") as f:
            f.write(data)
    return path


def make_fs(path, size, *options):
    """A file system over rubbish, with files, some of them removed again."""
    rubbish(path, size)
    run("mke2fs", "-q", "-F", "-E", "nodiscard", "-d", tree(), *options, path)
    run("debugfs", "-w", "-R", "rm one", path)


def free_ranges(path):
    """What dumpe2fs says is free, in bytes."""
    text = run("dumpe2fs", path)
    block = int(re.search(r"^Block size: +(\d+)", text, re.M).group(1))
    # The last of a range is the first block of its cluster.
    cluster = re.search(r"^Cluster size: +(\d+)", text, re.M)
    unit = int(cluster.group(1)) if cluster else block
    size = os.path.getsize(path) // block * block
    ranges = []
    for line in re.findall(r"^  Free blocks: (.*)$", text, re.M):
        for part in line.split(","):
            if part.strip():
                first, _, last = part.strip().partition("-")
                start = int(first) * block
                end = min(int(last or first) * block + unit, size)
                if ranges and ranges[-1][1] == start:
                    ranges[-1] = ranges[-1][0], end
                else:
                    ranges.append((start, end))
    return ranges


def whole_chunks(ranges, offset):
    """The chunks of the disk that lie in these ranges of a file system."""
    for start, end in ranges:
        start = -(-(start + offset) // CHUNK) * CHUNK
        end = (end + offset) // CHUNK * CHUNK
        if start < end:
            yield start, end


def check_disk(left_out):
    """The destination has all, but for what was left out, which is zero."""
    with open("src.raw", "rb") as a, open("dst.raw", "rb") as b:
        src, dst = a.read(), b.read()
    assert len(src) == len(dst)
    at = 0
    for start, end in sorted(left_out) + [(len(src), len(src))]:
        assert src[at:start] == dst[at:start], "differs in %d-%d" % (at, start)
        assert not any(dst[start:end]), "sent: %d-%d" % (start, end)
        at = end


def check_fs(path, name="fs.raw", offset=0, size=None):
    """It is sound, and its files are there."""
    with open(path, "rb") as f:
        f.seek(offset)
        with open(name, "wb") as out:
            out.write(f.read(size if size else -1))
    run("e2fsck", "-f", "-n", name)
    for file, data in FILES.items():
        if file != "one":
            run("debugfs", "-R", "dump /%s dumped" % file, name)
            with open("dumped", "rb") as f:
                assert f.read() == data, file


class Mover:
    """Moves src.raw to dst.raw."""

    def __init__(self):
        for f in "dst.raw", "src.raw.ferry", "dst.raw.ferry":
            if os.path.isdir(f):
                shutil.rmtree(f)
            elif os.path.exists(f):
                os.unlink(f)
        self.src = Nbdkit("disk=vda=src.raw", "control=src.ctl", name="src")
        self.dst = Nbdkit("disk=vda=dst.raw", "incoming=on", "control=dst.ctl",
                          "size=%d" % os.path.getsize("src.raw"), name="dst")
        self.qmp = QMP("src.ctl")

    def query(self):
        info = self.qmp.command("query-migrate")
        assert info["status"] not in ("failed", "cancelled"), info
        return info

    def begin(self, **args):
        args.setdefault("x-ferry-hints", "fs")
        try:
            self.qmp.execute("migrate", dict(args, uri=self.dst.uri("vda")))
        except QMPError as e:
            if "without libext2fs" in str(e):
                skip("it was built without libext2fs")
            raise

    def finish(self):
        def there():
            info = self.query()
            return info if info["status"] == "completed" else None
        self.info = wait_for(there, "the end of the migration", 60)
        return self.info["x-ferry"].get("hints")

    def move(self, **args):
        self.begin(**args)
        return self.finish()

    def stop(self):
        self.qmp.close()
        self.src.stop()
        self.dst.stop()


def cleared(hint):
    assert hint["state"] == "used" and "reason" not in hint, hint
    return hint["cleared-bytes"]


KINDS = [
    ("ext2, 1 KiB", 20 * MiB + 512, "-t", "ext2", "-b", "1024"),
    ("ext2, 1 KiB, without checksums and resizing", 20 * MiB, "-t", "ext2",
     "-b", "1024", "-O", "none"),
    ("ext3", 20 * MiB, "-t", "ext3", "-b", "1024"),
    ("ext4", 40 * MiB, "-t", "ext4", "-b", "4096", "-g", "4096"),
    ("ext4, 1 KiB", 20 * MiB, "-t", "ext4", "-b", "1024"),
    ("ext4, 2 KiB, no flex_bg", 22 * MiB, "-t", "ext4", "-b", "2048", "-g",
     "4096", "-O", "^flex_bg"),
    ("ext4, lazy", 20 * MiB, "-t", "ext4", "-g", "2048", "-b", "4096", "-E",
     "nodiscard,lazy_itable_init=1"),
    ("ext4, uninit_bg", 20 * MiB, "-t", "ext4", "-b", "1024", "-O",
     "^metadata_csum,uninit_bg"),
    ("ext4, meta_bg", 20 * MiB, "-t", "ext4", "-b", "1024", "-O",
     "meta_bg,^resize_inode"),
    ("ext4, 32 bit", 20 * MiB, "-t", "ext4", "-b", "1024", "-O",
     "^64bit,^metadata_csum"),
    ("ext4, bigalloc", 20 * MiB, "-t", "ext4", "-b", "1024", "-O",
     "bigalloc", "-C", "16384"),
    ("ext4, bigalloc, odd end", 22 * MiB + 3072, "-t", "ext4", "-b", "1024",
     "-O", "bigalloc", "-C", "16384"),
    ("ext4, sparse_super2, no journal", 20 * MiB, "-t", "ext4", "-b", "1024",
     "-O", "sparse_super2,^resize_inode,^has_journal"),
    ("ext4, mmp, 64 KiB inodes", 20 * MiB, "-t", "ext4", "-b", "1024", "-O",
     "mmp", "-i", "65536"),
]


def test_kinds():
    for name, size, *options in KINDS:
        make_fs("src.raw", size, *options)
        free = list(whole_chunks(free_ranges("src.raw"), 0))
        m = Mover()
        hint, = m.move()
        m.stop()
        n = sum(end - start for start, end in free)
        print("%s: %d of %d bytes were not sent" % (name, cleared(hint), size))
        assert n > size // 3 and cleared(hint) == n, (hint, n)
        assert hint["offset"] == 0 and hint["size"] == size // 512 * 512
        assert m.info["disk"]["transferred"] < size - n + MiB
        check_disk(free)
        check_fs("dst.raw")


REFUSED = [
    ("journal needs recovery", "feature needs_recovery"),
    ("not unmounted cleanly", "ssv state 0"),
    ("has errors", "ssv state 3"),
    ("orphans", "ssv last_orphan 13"),
    ("block bitmap of its group 0 is damaged", "damage"),
    ("free, and not", "damage, no checksums"),
    ("table of partitions", "table"),
    ("larger than", "cut off"),
]


def test_refused():
    """What is mounted, dirty or damaged is sent whole, and it is said why."""
    size = 24 * MiB
    for reason, command in REFUSED:
        make_fs("src.raw", size, "-t", "ext4", "-b", "1024", "-O",
                "^flex_bg" + (",^metadata_csum,^uninit_bg"
                              if "no checksums" in command else ""))
        if command == "table":
            table("dos", ["start=2048, size=2048"])
        elif command == "cut off":
            os.truncate("src.raw", size - 512)
        elif command.startswith("damage"):
            text = run("dumpe2fs", "src.raw")
            block = re.findall(r"Block bitmap at (\d+)", text)[0]
            with open("src.raw", "r+b") as f:
                f.seek(int(block) * 1024 + 900)
                f.write(b"\x5a")
        else:
            run("debugfs", "-w", "-R", command, "src.raw")
        m = Mover()
        hint, = m.move()
        m.stop()
        assert hint["state"] == "refused" and reason in hint["reason"], hint
        assert hint["cleared-bytes"] == 0
        check_disk([])


def place(disk, offset, image):
    with open(image, "rb") as i, open(disk, "r+b") as d:
        d.seek(offset)
        shutil.copyfileobj(i, d)


def table(label, lines):
    run("sh", "-c", "printf '%%s\\n' 'label: %s' %s | sfdisk -q --no-reread "
        "src.raw" % (label, " ".join("'%s'" % line for line in lines)))


def test_partitions():
    """Several file systems on one disk, used or refused one by one."""
    part, at = 20 * MiB, [3 * MiB, 25 * MiB, 47 * MiB + 1536, 70 * MiB]
    for label in "gpt", "dos":
        make_fs("a", part, "-t", "ext4", "-b", "1024")
        make_fs("b", part, "-t", "ext2", "-b", "4096")
        make_fs("c", part, "-t", "ext3", "-b", "1024")
        run("debugfs", "-w", "-R", "feature needs_recovery", "c")
        rubbish("src.raw", 100 * MiB)
        with open("src.raw", "r+b") as f:
            f.write(bytes(MiB))
            f.seek(-MiB, 2)
            f.write(bytes(MiB))
            # Nothing is to be found in the fourth.
            f.seek(at[3])
            f.write(bytes(part))
        lines = ["start=%d, size=%d" % (a // 512, part // 512) for a in at]
        if label == "dos":
            # The first is primary, the others are logical ones.
            lines.insert(1, "start=%d, size=%d, type=5" % (
                24 * MiB // 512, 75 * MiB // 512))
            lines[2:] = ["start=%d, size=%d" % (a // 512, part // 512)
                         for a in at[1:]]
        table(label, lines)
        for image, offset in zip("abc", at):
            place("src.raw", offset, image)
        free = [r for image, offset in zip("ab", at)
                for r in whole_chunks(free_ranges(image), offset)]
        m = Mover()
        hints = {h["offset"]: h for h in m.move()}
        m.stop()
        assert sorted(hints) == at, hints
        assert [hints[a]["type"] for a in at] == ["ext4", "ext2", "ext3",
                                                   "unknown"], hints
        for image, offset in zip("ab", at):
            assert cleared(hints[offset]) == sum(
                e - s for s, e in whole_chunks(free_ranges(image), offset))
            check_fs("src.raw", "fs.raw", offset, part)
        assert "journal" in hints[at[2]]["reason"], hints
        assert "no file system" in hints[at[3]]["reason"], hints
        check_disk(free)
        for offset in at[:2]:
            check_fs("dst.raw", "fs.raw", offset, part)


def test_bitmaps():
    """Bits of what was not sent arrive all the same."""
    make_fs("src.raw", 30 * MiB, "-t", "ext4", "-b", "1024")
    free = list(whole_chunks(free_ranges("src.raw"), 0))
    start, end = max(free, key=lambda r: r[1] - r[0])
    m = Mover()
    m.qmp.command("block-dirty-bitmap-add", node="vda", name="daily",
                  granularity=4096, persistent=True)
    # Written as they are: the file system does not mind.
    with open("src.raw", "rb") as f:
        f.seek(start)
        data = f.read(end - start)
    h = m.src.connect("vda")
    for at in range(start, end, 64 * KiB):
        n = min(4096, end - at)
        h.pwrite(data[at - start:at - start + n], at)
    h.shutdown()
    hint, = m.move()
    m.stop()
    assert cleared(hint) == sum(e - s for s, e in free)
    want = [(at, min(at + 4096, end)) for at in range(start, end, 64 * KiB)]
    got = bitmap_ranges("dst.raw.ferry/bitmaps.qcow2", "daily")
    assert got == want, (got[:5], want[:5])


def test_writers():
    """Writes to free blocks after the maps were read are never lost, and none
    is if they make the hint be refused."""
    used = refused = 0
    for i in range(4):
        make_fs("src.raw", 30 * MiB, "-t", "ext4", "-b", "1024")
        with open("src.raw", "rb") as f:
            data = f.read()
        model = Model(len(data), data)
        free = list(whole_chunks(free_ranges("src.raw"), 0))
        start, end = max(free, key=lambda r: r[1] - r[0])
        m = Mover()
        m.qmp.command("migrate-set-parameters",
                      **{"max-bandwidth": 16 * MiB})
        writer = LoggingWriter(m.src.uri("vda"), model, start, end, seed=i,
                               pause=0.01 if i % 2 else 0.0002)
        settle(writer, 3)
        m.begin()
        hint, = wait_for(lambda: m.query()["x-ferry"].get("hints"),
                         "the hints")
        since = len(writer.touched)
        settle(writer, 20)
        m.finish()
        settle(writer, 3)
        writer.stop()
        assert writer.errors == 0 and writer.last_error is None
        if hint["state"] == "used":
            used += 1
        else:
            refused += 1
            since = 0
            assert "written to" in hint["reason"], hint
        # What was written before, and is free, is not to be had over there.
        known = Model(len(data))
        for a, b in writer.touched[since:]:
            known.set(a, b"\1" * (b - a))
        h = connect(m.dst.uri("vda"))
        got = h.pread(end - start, start)
        h.shutdown()
        m.stop()
        for at in range(0, end - start, 512):
            if known.data[start + at]:
                assert got[at:at + 512] == model.data[start + at:
                                                      start + at + 512], at
    print("%d used, %d refused" % (used, refused))


def test_unasked():
    """Nothing is left out unless that was asked for, each time anew."""
    make_fs("src.raw", 20 * MiB, "-t", "ext4", "-b", "1024")
    m = Mover()
    try:
        m.qmp.execute("migrate", {"uri": m.dst.uri("vda"),
                                  "x-ferry-hints": "all"})
        raise AssertionError("accepted")
    except QMPError as e:
        assert "x-ferry-hints" in str(e), e
    assert m.move(**{"x-ferry-hints": "none"}) is None
    m.stop()
    check_disk([])


def test_command():
    make_fs("src.raw", 20 * MiB, "-t", "ext4", "-b", "1024")
    m = Mover()
    r = run_nbdferry("migrate", "src.ctl", m.dst.uri("vda"), "--hints", "fs",
                     "--json")
    last = json.loads(r.stdout.splitlines()[-1])
    hint, = last["x-ferry"]["hints"]
    assert cleared(hint) > 0 and hint["type"] == "ext4", hint
    m.stop()
    check_fs("dst.raw")
    run("debugfs", "-w", "-R", "feature needs_recovery", "src.raw")
    m = Mover()
    r = run_nbdferry("migrate", "src.ctl", m.dst.uri("vda"), "--hints", "fs")
    m.stop()
    assert "refused, it is mounted" in r.stdout, r.stdout
    # Without a daemon, too.
    make_fs("src.raw", 20 * MiB, "-t", "ext4", "-b", "1024")
    free = list(whole_chunks(free_ranges("src.raw"), 0))
    m = Mover()
    uri = m.dst.uri("vda")
    m.src.stop()
    r = run_nbdferry("migrate", "src.raw", uri, "--hints", "fs",
                     "--compression", "zstd:3")
    m.dst.stop()
    assert "of it free, not sent" in r.stdout, r.stdout
    check_disk(free)
    r = run_nbdferry("migrate", "src.ctl", "nbd://nowhere", "--hints", "xfs",
                     check=False)
    assert r.returncode == 2 and "--hints" in r.stderr, r


def test_resumed():
    """What is free is not sent after a pause either, nor after a restart."""
    make_fs("src.raw", 40 * MiB, "-t", "ext4", "-b", "1024")
    with open("junk", "wb") as f:
        f.write(random.Random(1).randbytes(24 * MiB))
    with open("kept", "wb") as f:
        f.write(random.Random(2).randbytes(4 * MiB))
    for request in "write kept kept", "write junk junk", "rm junk":
        run("debugfs", "-w", "-R", request, "src.raw")
    m = Mover()
    m.qmp.command("migrate-set-parameters", **{"max-bandwidth": 2 * MiB})
    m.begin()
    wait_for(lambda: m.query()["disk"]["transferred"] > 3 * MiB, "some of it")
    m.src.kill()
    m.dst.kill()
    m.src.start()
    m.dst.start()
    m.qmp.close()
    m.qmp = QMP("src.ctl")
    m.qmp.command("migrate-set-parameters", **{"max-bandwidth": 0})
    m.finish()
    sent = m.info["disk"]["transferred"]
    m.stop()
    assert sent < 12 * MiB, sent
    check_fs("dst.raw")
    run("debugfs", "-R", "dump kept copy", "dst.raw")
    with open("kept", "rb") as a, open("copy", "rb") as b:
        assert a.read() == b.read()
    print("resumed: %.1f MiB" % (sent / MiB))


for test in (test_kinds, test_refused, test_partitions, test_bitmaps,
             test_writers, test_unasked, test_command, test_resumed):
    t = time.monotonic()
    test()
    print("%s: ok, %.1f s" % (test.__name__, time.monotonic() - t))
