#!/usr/bin/python3
# nbdferry - what NBD clients see of a disk, and how disks are given
# SPDX-License-Identifier: BSD-3-Clause
"""Parameters, names and descriptions of exports; reads, writes, zeroes, trims,
extents, cache and flags, judged by nbdinfo, libnbd and the file itself."""

import errno
import urllib.parse

from ferrytest import *

requires("nbdkit", "nbdinfo", "qemu-img")

MiB = 1 << 20


def export(daemon, name):
    """The URI of a disk, whatever its name."""
    return daemon.uri().replace("///?", "///%s?" % urllib.parse.quote(
        name, safe=""))


def nbdinfo(*args):
    # Without file(1), what it says of the content is no JSON.
    return json.loads(subprocess.check_output(
        ["nbdinfo", "--json", "--no-content", *args]))


def refused(*args, says, **kwargs):
    """nbdkit must not start, and say why."""
    try:
        daemon = Nbdkit(*args, name="refused", **kwargs)
    except RuntimeError as e:
        text = daemon_log()
        for s in says:
            assert s in text, (args, s, text)
        os.unlink("refused.log")
        Nbdkit.all.pop()
        assert "ended with 1" in str(e), e
        return
    daemon.kill()
    raise AssertionError("%s was taken" % (args,))


def daemon_log():
    with open("refused.log") as f:
        return f.read()


def fails(code, function, *args):
    try:
        function(*args)
    except nbd.Error as e:
        assert e.errnum == code, e
        return
    raise AssertionError("it did not fail")


def blank(path, size):
    with open(path, "wb") as f:
        f.truncate(size)


# ---- names ----

names = {"vda": MiB, "Straße 1": 3 * 512, "b@c": 512, "v@incomin": 1024,
         "a b%2Fc?d#e": 4096, "\U0001F600": 5 * 512}
for i, size in enumerate(names.values()):
    blank("disk%d" % i, size)
d = Nbdkit(*["disk=%s=disk%d" % (n, i) for i, n in enumerate(names)])
listed = nbdinfo("--list", d.uri())["exports"]
assert [e["export-name"] for e in listed] == list(names), listed
for i, e in enumerate(listed):
    size = list(names.values())[i]
    assert e["export-size"] == size, e
    assert os.path.abspath("disk%d" % i) in e["description"], e
    assert not e["is_read_only"] and e["can_multi_conn"], e
for i, (name, size) in enumerate(names.items()):
    h = connect(export(d, name))
    assert h.get_size() == size, name
    h.pwrite(bytes([65 + i]) * 512, size - 512)
    h.shutdown()
    with open("disk%d" % i, "rb") as f:
        assert f.read()[-512:] == bytes([65 + i]) * 512, name
# The first one is also the default.
assert connect(d.uri()).pread(512, MiB - 512) == b"A" * 512
first, = nbdinfo(d.uri())["exports"]
assert first["export-size"] == MiB, first
assert os.path.abspath("disk0") in first["description"], first
for wrong in "nothing", "vda@", "vda@incoming@incoming", "@incoming", "VDA":
    try:
        connect(export(d, wrong))
        raise AssertionError("there is an export %r" % wrong)
    except nbd.Error:
        assert "'%s'" % wrong in d.log_text(), d.log_text()
d.stop()

# ---- parameters ----

blank("plain.raw", MiB)
blank("x=y", MiB)
os.mkdir("folder")
blank("folder/k=v", 2 * MiB)
d = Nbdkit("plain.raw", "./x=y", "folder/k=v", "disk=named=disk0",
           "state=elsewhere")
listed = nbdinfo("--list", d.uri())["exports"]
assert [e["export-name"] for e in listed] == [
    "plain.raw", "x=y", "k=v", "named"], listed
d.stop()
for state in "plain.raw.ferry", "x=y.ferry", "folder/k=v.ferry", "elsewhere":
    qemu_img_check(state + "/bitmaps.qcow2")
    qemu_img_info(state + "/bitmaps.qcow2")

before = sorted(os.listdir("."))
refused(says=["disk"])
refused("missing.raw", says=["missing.raw", "No such file"])
refused("folder", says=["folder"])
refused("incoming=on", says=["disk"])
refused("disk=x@incoming=plain.raw", says=["x@incoming"])
refused("disk=x=", says=["disk=x="])
refused("size=1M", "plain.raw", says=["size=", "disk="])
refused("state=s", "plain.raw", says=["state=", "disk="])
refused("plain.raw", "size=2M", says=["plain.raw", str(MiB), str(2 * MiB)])
refused("new.raw", "size=1000", says=["size=1000", "512"])
refused("new.raw", "size=0", says=["size=0"])
refused("new.raw", "size=-512", says=["-512"])
refused("new.raw", "size=large", says=["large"])
refused("plain.raw", "incoming=maybe", says=["maybe"])
refused("plain.raw", "colour=red", says=["colour"])
refused("disk==plain.raw", says=["name"])
refused("disk=x=", says=["path"])
refused("disk=a=plain.raw", "disk=a=disk0", says=["'a'"])
refused("plain.raw", "folder/../plain.raw", says=["plain.raw"])
refused("disk=a=plain.raw", "disk=b=plain.raw", says=["plain.raw"])
refused(b"disk=\xff\xfe=plain.raw", says=["UTF-8"])
refused("plain.raw", "control=" + "x" * 120, says=["control"])
blank("odd.raw", MiB + 100)
refused("odd.raw", says=["odd.raw", str(MiB + 100), "512"])
blank("empty.raw", 0)
for f in "odd.raw", "empty.raw":
    before.append(f)
left = set(os.listdir(".")) - set(before)
assert not {f for f in left if f.startswith("new")}, left

# size= makes a file, and later finds it.
for again in False, True:
    d = Nbdkit("disk=a=made.raw", "size=1000448", "disk=b=made2.raw",
               "size=3K", "state=of-b")
    assert connect(export(d, "a")).get_size() == 1000448
    assert connect(export(d, "b")).get_size() == 3072
    d.stop()
assert os.path.getsize("made.raw") == 1000448
assert os.stat("made.raw").st_blocks == 0
assert os.path.exists("of-b/bitmaps.qcow2")
assert not os.path.exists("made2.raw.ferry")
# Two daemons do not share a disk.
d = Nbdkit("plain.raw")
refused("plain.raw", "state=another", says=["plain.raw"])
d.stop()

# ---- requests ----

SIZE = 8 * MiB + 3 * 512
model = make_disk("vda.raw", SIZE, step=MiB)
d = Nbdkit("disk=vda=vda.raw", "control=src.ctl")
run_nbdferry("bitmap", "add", "src.ctl", "b", "--granularity", 512)
touched = []
h = d.connect("vda")
info = nbdinfo(d.uri("vda"))["exports"][0]
for flag in ("can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua",
             "can_multi_conn", "can_trim", "can_zero"):
    assert info[flag], flag
assert not info["is_read_only"] and not info["is_rotational"], info
assert "base:allocation" in info["contexts"], info


def change(function, offset, length, data, *args):
    function(*args)
    model.set(offset, data)
    touched.append((offset, offset + length))
    assert h.pread(length, offset) == data


def write(offset, length, flags=0):
    data = random.Random(offset).randbytes(length)
    change(h.pwrite, offset, length, data, data, offset, flags)


def zero(offset, length, flags=0):
    change(h.zero, offset, length, bytes(length), length, offset, flags)


FUA, HOLE = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE
write(0, 512)
write(SIZE - 512, 512, FUA)
write(123 * 512, 77 * 512)
write(MiB + 512, 2 * MiB, FUA)
# nbdkit allows what is no multiple of a sector.
write(100, 1)
write(5 * MiB + 511, 1026)
zero(512, 1024)
zero(2 * MiB + 512, 100 * 1024, FUA)
zero(3 * MiB, 512 * 1024, HOLE)
zero(4 * MiB + 77, 65536)
zero(SIZE - 70000, 70000)
zero(6 * MiB, MiB, nbd.CMD_FLAG_FAST_ZERO)
h.trim(64 * 1024, 2 * MiB)
touched.append((2 * MiB, 2 * MiB + 64 * 1024))
trimmed = h.pread(64 * 1024, 2 * MiB)
assert trimmed in (bytes(64 * 1024),
                   bytes(model.data[2 * MiB:2 * MiB + 64 * 1024]))
model.set(2 * MiB, trimmed)
h.trim(4096, 4096, FUA)
touched.append((4096, 8192))
model.set(4096, h.pread(4096, 4096))
h.cache(MiB, 512)
h.cache(SIZE, 0)
h.flush()
# Beyond the end; nothing of it is done.
for call in ((h.pread, 512, SIZE), (h.pread, 1024, SIZE - 512)):
    fails(errno.EINVAL, *call)
h.set_strict_mode(h.get_strict_mode() & ~nbd.STRICT_BOUNDS)
fails(errno.ENOSPC, h.pwrite, bytes(1024), SIZE - 512)
fails(errno.EINVAL, h.trim, 1024, SIZE - 512)
fails(errno.ENOSPC, h.zero, 1024, SIZE - 512)
h.set_strict_mode(nbd.STRICT_COMMANDS | nbd.STRICT_BOUNDS)
compare(read_all(d.uri("vda")), model)


# ---- extents ----

def holes(path):
    """[(start, end)] of what the file has no data for."""
    ranges, at = [], 0
    with open(path, "rb") as f:
        size = os.path.getsize(path)
        while at < size:
            hole = os.lseek(f.fileno(), at, os.SEEK_HOLE)
            if hole >= size:
                break
            try:
                at = os.lseek(f.fileno(), hole, os.SEEK_DATA)
            except OSError:
                at = size
            ranges.append((hole, at))
    return ranges


BOTH = nbd.STATE_HOLE | nbd.STATE_ZERO
want = holes("vda.raw")
assert len(want) > 3, want
got = status_ranges(h, "base:allocation", lambda f: f & BOTH == BOTH)
assert got == want, (got, want)
# What was zeroed with NO_HOLE is there.
assert not any(start < 3 * MiB + 512 * 1024 and end > 3 * MiB
               for start, end in want), want
# What was zeroed or trimmed otherwise is not, in whole pages.
for start, end in ((2 * MiB, 2 * MiB + 64 * 1024), (6 * MiB, 7 * MiB)):
    assert any(a <= start and end <= b for a, b in want), (start, want)
one = []
h.block_status(SIZE, 0, lambda m, o, e, err: one.append(e),
               nbd.CMD_FLAG_REQ_ONE)
assert len(one) == 1 and len(one[0]) == 2, one
h.shutdown()

# All of that, and nothing else, is dirty.
b, = json.loads(run_nbdferry("bitmap", "list", "src.ctl", "--json").stdout)
d.stop()
compare("vda.raw", model)
dirty = set()
for start, end in touched:
    dirty.update(range(start // 512, -(-end // 512)))
assert b["count"] == 512 * len(dirty), (b, len(dirty))
qemu_img_check("vda.raw.ferry/bitmaps.qcow2")

# ---- several connections ----

d = Nbdkit("disk=vda=vda.raw")
one, two = d.connect("vda"), d.connect("vda")
assert one.can_multi_conn()
for i in range(50):
    one.pwrite(bytes([i]) * 4096, i * 4096)
    assert two.pread(4096, i * 4096) == bytes([i]) * 4096
    model.set(i * 4096, bytes([i]) * 4096)
two.flush()
d.stop()
compare("vda.raw", model)

# ---- read only ----

d = Nbdkit("disk=vda=vda.raw", options=["-r"])
info = nbdinfo(d.uri("vda"))["exports"][0]
assert info["is_read_only"], info
h = d.connect("vda")
h.set_strict_mode(0)
fails(errno.EPERM, h.pwrite, bytes(512), 0)
compare(read_all(d.uri("vda")), model)
d.stop()
compare("vda.raw", model)


def unwritable():
    """A file that the daemon may only read, in a folder of the same kind."""
    os.mkdir("archive", 0o755)
    os.rename("vda.raw", "archive/vda.raw")
    os.chmod("archive/vda.raw", 0o444)
    os.chmod("archive", 0o555)
    if os.getuid() != 0:
        return []
    # Nothing is unwritable for root.
    os.chmod(".", 0o755)
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    if subprocess.run(user + ["test", "-r", PLUGIN, "-a", "-r",
                              os.path.abspath("archive/vda.raw")],
                      stderr=subprocess.DEVNULL).returncode != 0:
        return None
    return user


user = unwritable()
if user is None or PRELOAD:
    print("read only as another user: not tried here")
else:
    uri = "nbd://127.0.0.1:%d/" % (port := free_port())
    with open("user.log", "wb") as log:
        p = subprocess.Popen(
            user + ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), PLUGIN,
                    "disk=vda=archive/vda.raw"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        def there():
            assert p.poll() is None, open("user.log").read()
            try:
                return connect(uri)
            except nbd.Error:
                return None

        h = wait_for(there, "the read-only disk")
        assert h.is_read_only()
        compare(read_all(uri), model)
        h.shutdown()
    finally:
        p.terminate()
        assert p.wait(TIMEOUT) == 0, open("user.log").read()
    assert os.listdir("archive") == ["vda.raw"]
    p = subprocess.run(
        user + ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(free_port()),
                PLUGIN, "disk=vda=archive/vda.raw", "incoming=on"],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        timeout=TIMEOUT)
    assert p.returncode == 1 and "archive/vda.raw" in p.stderr, p
compare("archive/vda.raw", model)
os.chmod("archive", 0o755)
