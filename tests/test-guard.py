#!/usr/bin/python3
# nbdferry - the destination's guard
# SPDX-License-Identifier: BSD-3-Clause
"""Whatever is recognised on a destination's disk is not overwritten unasked;
what the system uses is not overwritten at all.  Nothing has moved then."""

import struct
import uuid
import zlib

from ferrytest import *
from migratetest import *

requires("nbdkit", "qemu-img", "qemu-nbd", "mkfs.ext4", "mkswap", "sfdisk")
own_mounts()

MiB = 1 << 20
SIZE = 24 * MiB


def quiet(*command, **kwargs):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.PIPE, **kwargs)


def sparse(path, size=SIZE):
    with open(path, "wb") as f:
        f.truncate(size)
    return path


def patch(path, offset, data):
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(data)


# ---- what may be on a disk ----

def ext4(path):
    quiet("mkfs.ext4", "-q", "-E", "nodiscard", "-L", "ro'ot", path)


def swap(path):
    quiet("mkswap", path)


def table(kind):
    def make(path):
        quiet("sfdisk", path,
              input=b"label: %s\nsize=2048\n" % kind.encode())
    return make


def gpt4k(path):
    """A GPT in sectors of 4 KiB, which nothing in the first one announces."""
    entries = bytes(128 * 128)
    last = SIZE // 4096 - 1

    def header(crc):
        return struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92,
                           crc, 0, 1, last, 6, last - 6, uuid.uuid4().bytes,
                           2, 128, 128, zlib.crc32(entries))
    block = bytearray(header(0))
    struct.pack_into("<I", block, 16, zlib.crc32(block))
    patch(path, 4096, block)


def end_of_gpt(path):
    """The copy at the end is all that is left."""
    table("gpt")(path)
    patch(path, 0, bytes(34 * 512))


def luks(path):
    patch(path, 0, b"LUKS\xba\xbe\x00\x01")
    patch(path, 168, str(uuid.uuid4()).encode())


def lvm(path):
    """A physical volume's label, in the second sector."""
    rest = struct.pack("<I8s", 32, b"LVM2 001") + b"x" * 32
    rest = rest.ljust(512 - 20, b"\0")
    crc = 0xf597a6cf
    for byte in rest:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xedb88320 if crc & 1 else 0)
    patch(path, 512, struct.pack("<8sQI", b"LABELONE", 1, crc) + rest)


def raid(path):
    """A member of a Linux RAID, metadata 1.0: near the end of the disk."""
    at = (SIZE // 512 - 16) & ~7
    block = bytearray(256)
    struct.pack_into("<II", block, 0, 0xa92b4efc, 1)
    block[16:32] = uuid.uuid4().bytes
    struct.pack_into("<Q", block, 144, at)
    patch(path, at * 512, block)


def two(path):
    """A file system, and somebody else's signature."""
    ext4(path)
    luks(path)


KINDS = {
    "ext4": (ext4, r"an ext4 file system 'ro\?ot' \(UUID [-0-9a-f]{36}\)"),
    "swap": (swap, r"swap space"),
    "dos": (table("dos"), r"a dos partition table"),
    "gpt": (table("gpt"), r"a gpt partition table \(UUID"),
    "gpt4k": (gpt4k, r"a gpt partition table"),
    "gptend": (end_of_gpt, r"a gpt partition table"),
    "luks": (luks, r"a LUKS encrypted volume \(UUID"),
    "lvm": (lvm, r"an LVM physical volume"),
    "raid": (raid, r"a member of a Linux software RAID"),
    "two": (two, r"ext4 file system .* and a LUKS|LUKS .* and an ext4 file"),
}

# ---- a source with the disk of that name ----

make_disk("src.raw", SIZE)
src = Nbdkit("disk=d=src.raw", "control=src.ctl", name="src")
qmp = QMP("src.ctl")


def content(path):
    with open(path, "rb") as f:
        return f.read()


def refuse(path, *says, overwrite=False, state=()):
    """The migration is refused, for these reasons; the disk is as it was."""
    before = content(path)
    d = Nbdkit("disk=d=" + path, *state, "incoming=on", name="dst")
    args = ["--overwrite"] if overwrite else []
    p = run_nbdferry("migrate", "src.ctl", d.uri().rstrip("/"), *args,
                     check=False, timeout=20)
    print(path, p.returncode, p.stderr.strip())
    assert p.returncode == 1, p
    for text in says + (path,):
        assert re.search(text, p.stderr), (text, p.stderr)
    assert qmp.command("x-ferry-status")["disks"][0]["mode"] == "active"
    assert content(path) == before, path
    d.stop()


for kind, (make, says) in KINDS.items():
    path = sparse(kind + ".raw")
    make(path)
    refuse(path, says, "--overwrite", "disk 'd'")
    # A refusal leaves nothing that would make the next one pass.
    if kind == "ext4":
        refuse(path, says)

# ---- a disk that the system uses ----


def held(device):
    """Does somebody have it exclusively?  Another program that has just made a
    mount name space of its own keeps what was mounted for a moment."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError as e:
        return e.errno == 16
    return False


def system():
    """As far as loop devices and mounts are to be had here."""
    sparse("under.raw")
    device = loop_device("under.raw")
    if not device:
        return
    # The file, while the device stands upon it.
    refuse("under.raw", "in use", device, overwrite=True)
    ext4(device)
    os.mkdir("mnt")
    try:
        quiet("mount", "-o", "ro", device, "mnt")
    except subprocess.CalledProcessError as e:
        print("no mounts:", e.stderr)
        return
    where = os.path.abspath("mnt")
    try:
        for overwrite in False, True:
            refuse(device, "in use", "mounted on " + where,
                   state=("state=loop.state",), overwrite=overwrite)
            refuse("under.raw", "in use", device, "mounted on " + where,
                   overwrite=overwrite)
    finally:
        quiet("umount", "mnt")
    wait_for(lambda: not held(device), "the device")
    refuse(device, "ext4", state=("state=loop.state",))
    # Somebody has it exclusively, as mkfs or mdadm would.
    fd = os.open(device, os.O_RDONLY | os.O_EXCL)
    refuse(device, "in use", "exclusively", overwrite=True,
           state=("state=loop.state",))
    os.close(fd)
    partition(device)
    # Once data has come, nobody can mount it any more.
    ext4(device)
    d = Nbdkit("disk=d=" + device, "state=loop.state", "incoming=on",
               name="dst")
    fd = os.open(device, os.O_RDONLY | os.O_EXCL)  # so far it is free
    os.close(fd)
    qmp.command("migrate-set-parameters", max_bandwidth=MiB)
    qmp.command("migrate", uri=d.uri().rstrip("/"), x_ferry_overwrite=True)
    wait_for(lambda: qmp.command("x-ferry-status")["migration"]
             .get("disk", {}).get("transferred", 0) > 0, "data")

    wait_for(lambda: held(device), "the claim")
    qmp.command("migrate-cancel")
    wait_for(lambda: qmp.command("query-migrate")["status"] == "cancelled",
             "the cancel")
    qmp.command("migrate-set-parameters", max_bandwidth=0)
    d.stop()
    assert not held(device)


def partition(device):
    """A whole disk of which a partition is mounted."""
    table("dos")(device)
    subprocess.run(["partx", "-a", device], stderr=subprocess.DEVNULL)
    part = device + "p1"
    if not os.path.exists(part):
        print("no partitions here")
        return
    try:
        quiet("mkfs.ext4", "-q", part)
        quiet("mount", "-o", "ro", part, "mnt")
        refuse(device, "in use", "its partition \\w+p1 is mounted on",
               overwrite=True, state=("state=loop.state",))
        quiet("umount", "mnt")
        wait_for(lambda: not held(device), "the device")
    finally:
        subprocess.run(["partx", "-d", device], stderr=subprocess.DEVNULL)


system()

# ---- what came by a migration is ours to overwrite ----

src.stop()
qmp.close()
random.seed(5)
patch("src.raw", 0, random.randbytes(SIZE))
ext4("src.raw")                 # it has a signature of its own now
src = Nbdkit("disk=d=src.raw", "control=src.ctl", name="src")
qmp = QMP("src.ctl")


def under_way(path):
    """As if a write had been under way when the daemon was killed."""
    with open(path + ".ferry/lastwrite", "rb") as f:
        page = f.read()
    slot = len(page) - 64       # the last thread's: when, and how many writes
    patch(path + ".ferry/lastwrite", slot + 8, struct.pack("<I", 1))


def begin_only():
    """Part of the source's disk comes to part.raw; then all stops."""
    sparse("part.raw")
    d = Nbdkit("disk=d=part.raw", "incoming=on", "control=dst.ctl",
               name="dst")
    qmp.command("migrate-set-parameters", max_bandwidth=2 * MiB,
                multifd_channels=1)
    qmp.command("migrate", uri=d.uri().rstrip("/"))
    wait_for(lambda: any(content("part.raw")[:MiB]), "the first data")
    # Nothing is under way when it is killed: then it is clear who wrote last.
    qmp.command("migrate-pause")
    wait_for(lambda: qmp.command("query-migrate")["status"]
             == "postcopy-paused", "the pause")
    wait_for(lambda: time.time() - os.stat("part.raw").st_mtime > 0.3,
             "the last write")
    d.kill()
    return d


def give_up():
    qmp.command("migrate-cancel")
    wait_for(lambda: qmp.command("query-migrate")["status"]
             in ("cancelled", "failed"), "the end of the migration")
    qmp.command("migrate-set-parameters", max_bandwidth=0)


begin_only()
give_up()
# ... but not if somebody has made something else of it meanwhile.
ext4("part.raw")
under_way("part.raw")           # that it was does not excuse it
refuse("part.raw", "ext4")
refuse("part.raw", "ext4")      # and that is not forgotten
shutil.rmtree("part.raw.ferry")
refuse("part.raw", "ext4")
os.unlink("part.raw")

# The very session may go on, but what it has sent is not there any more.
dst = begin_only()
patch("part.raw", 0, bytes(SIZE))
under_way("part.raw")
dst.start()
qmp.command("migrate-set-parameters", max_bandwidth=0)
qmp.command("migrate-recover", uri=dst.uri().rstrip("/"))
wait_for(lambda: qmp.command("query-migrate")["status"] == "completed",
         "the migration")
assert content("part.raw") == content("src.raw")
src.stop()
qmp.close()
dst.stop()
shutil.rmtree("src.raw.ferry")
shutil.rmtree("part.raw.ferry")
src = Nbdkit("disk=d=src.raw", "control=src.ctl", name="src")
qmp = QMP("src.ctl")

dst = begin_only()
give_up()
dst.start()
run_nbdferry("migrate", "src.ctl", dst.uri().rstrip("/"))
want = content("src.raw")
assert content("part.raw") == want

# ---- and so is the old copy of the disk that comes back ----

src.stop()
qmp.close()
back = Nbdkit("disk=d=src.raw", "incoming=on", name="src")
run_nbdferry("migrate", "dst.ctl", back.uri().rstrip("/"))
back.stop()
dst.stop()

# ... not if another disk comes in its place.
make_disk("other.raw", SIZE, seed=9)
other = Nbdkit("disk=d=other.raw", "control=src.ctl", name="other")
qmp = QMP("src.ctl")
refuse("part.raw", "ext4")
# With --overwrite it may.
dst = Nbdkit("disk=d=part.raw", "incoming=on", name="dst")
run_nbdferry("migrate", "src.ctl", dst.uri().rstrip("/"), "--overwrite")
assert content("part.raw") == content("other.raw")
other.stop()
dst.stop()

# ---- a server that is not ours is looked at in the same way ----

ext4(sparse("plain.raw"))
make_disk("plain-src.raw", SIZE, seed=4)
server = Nbdkit("plain.raw", plugin="file", name="plain")
before = content("plain.raw")
p = run_nbdferry("migrate", "plain-src.raw", server.uri(), "--data-only",
                 check=False)
print(p.stderr)
assert p.returncode == 1 and "bears an ext4 file system" in p.stderr, p
assert content("plain.raw") == before
run_nbdferry("migrate", "plain-src.raw", server.uri(), "--data-only",
             "--overwrite")
server.stop()
assert content("plain.raw") == content("plain-src.raw")
