#!/usr/bin/python3
# nbdferry - a destination that is a larger device
# SPDX-License-Identifier: BSD-3-Clause
"""A disk that comes to a larger block device keeps its size there: for
clients, bitmaps and sidecar, over restarts, and on its way onwards."""

from ferrytest import *
from migratetest import *

requires("nbdkit", "qemu-img", "qemu-nbd", "losetup")

MiB = 1 << 20
SIZE = 12 * MiB + 512
DEVICE = 20 * MiB


def loop(path, size):
    with open(path, "wb") as f:
        f.truncate(size)
        f.seek(SIZE)
        f.write(b"beyond")
    return loop_device(path) or skip("no loop devices here")


def beyond(path="under.raw"):
    with open(path, "rb") as f:
        f.seek(SIZE)
        return f.read(6)


def status(control):
    disk, = json.loads(run_nbdferry("status", control, "--json")
                       .stdout)["disks"]
    return disk


device = loop("under.raw", DEVICE)
model = make_disk("src.raw", SIZE)
src = Nbdkit("disk=d=src.raw", "control=src.ctl", name="src")
ARGS = "disk=d=" + device, "state=dst.state", "control=dst.ctl"
dst = Nbdkit(*ARGS, name="dst")
# A bitmap that was there before, and one that lasts as long as the daemon.
run_nbdferry("bitmap", "add", "dst.ctl", "old")
dst.stop()
dst = Nbdkit(*ARGS, "incoming=on", name="dst")
run_nbdferry("bitmap", "add", "dst.ctl", "brief", "--transient")
assert status("dst.ctl")["size"] == DEVICE

# What is refused after the size was changed leaves the device as it was.
qmp = QMP("src.ctl")
qmp.command("block-dirty-bitmap-add", node="d", name="old", persistent=True)
p = run_nbdferry("migrate", "src.ctl", dst.uri().rstrip("/"), check=False)
assert p.returncode == 1 and "Bitmap already exists" in p.stderr, p
qmp.command("block-dirty-bitmap-remove", node="d", name="old")
dst.stop()
dst = Nbdkit(*ARGS, name="dst")
assert status("dst.ctl")["size"] == DEVICE
assert status("dst.ctl")["mode"] == "active"
dst.stop()

qmp.command("block-dirty-bitmap-add", node="d", name="fine", persistent=True,
            granularity=512)
qmp.command("block-dirty-bitmap-add", node="d", name="b", persistent=True)
writer = LoggingWriter(src.uri("d"), model, pause=0.002)
dst = Nbdkit(*ARGS, "incoming=on", name="dst")
run_nbdferry("bitmap", "add", "dst.ctl", "brief", "--transient")
settle(writer, 5)
run_nbdferry("migrate", "src.ctl", dst.uri().rstrip("/"))
settle(writer, 20)              # forwarded: the pool checks the size


def check(daemon):
    s = status("dst.ctl")
    assert s["size"] == SIZE and s["device-size"] == DEVICE, s
    assert s["mode"] == "active", s
    h = daemon.connect("d")
    assert h.get_size() == SIZE, h.get_size()
    try:
        h.pread(512, SIZE)
    except nbd.Error:
        pass
    else:
        raise AssertionError("read beyond the end")
    h.shutdown()
    bitmaps = {b["name"]: b for b in json.loads(
        run_nbdferry("bitmap", "list", "dst.ctl", "--json").stdout)}
    old = -(-SIZE // 65536) * 65536
    assert bitmaps["old"]["count"] == old, bitmaps  # all of it, as it came
    return bitmaps


assert "brief" in check(dst)
for how in Nbdkit.stop, Nbdkit.kill:
    how(dst)
    dst.start()
    settle(writer, 5)
    assert "brief" not in check(dst)
assert writer.errors == 0, writer.last_error
writer.stop()
src.stop()
compare(read_all(dst.uri("d")), model)
assert beyond() == b"beyond"
dst.stop()
qemu_img_check("dst.state/bitmaps.qcow2")
assert qemu_img_info("dst.state/bitmaps.qcow2")["virtual-size"] == SIZE
for name, granularity in (("fine", 512), ("b", 65536)):
    assert bitmap_ranges("dst.state/bitmaps.qcow2", name) == \
        granules(writer.touched, granularity, SIZE), name

# It goes back to the file that it came from, of the same size.
dst = Nbdkit(*ARGS, name="dst")
src = Nbdkit("disk=d=src.raw", "incoming=on", "control=src.ctl", name="src")
run_nbdferry("migrate", "dst.ctl", src.uri().rstrip("/"))
src.stop()
compare("src.raw", model)
dst.stop()

# Then another disk comes, of another size: larger than the last one.
model = make_disk("two.raw", SIZE + MiB, seed=3)
two = Nbdkit("disk=d=two.raw", "control=two.ctl", name="two")
dst = Nbdkit(*ARGS, "incoming=on", name="dst")
run_nbdferry("migrate", "two.ctl", dst.uri().rstrip("/"))
two.stop()
assert status("dst.ctl")["size"] == SIZE + MiB
compare(read_all(dst.uri("d")), model)
dst.kill()

# What another NBD server holds may be larger, too.
store = Nbdkit("%d" % DEVICE, plugin="memory", name="store")
REMOTE = "disk=d=" + store.uri(), "state=remote.state", "control=far.ctl"
far = Nbdkit(*REMOTE, "incoming=on", name="far")
shutil.rmtree("two.raw.ferry")
two.start()
run_nbdferry("bitmap", "add", "two.ctl", "b")
run_nbdferry("migrate", "two.ctl", far.uri().rstrip("/"))
two.stop()
for how in Nbdkit.stop, Nbdkit.kill:
    how(far)
    far.start()
    s = status("far.ctl")
    assert s["size"] == SIZE + MiB and s["device-size"] == DEVICE, s
    compare(read_all(far.uri("d")), model)
far.stop()
qemu_img_check("remote.state/bitmaps.qcow2")
h = store.connect()
assert not any(h.pread(DEVICE - SIZE - MiB - 512, SIZE + MiB + 512))
# It bears something now, and is asked for it.
h.pwrite(b"LUKS\xba\xbe\x00\x01".ljust(512, b"\0"), 0)
h.shutdown()
shutil.rmtree("remote.state")
far = Nbdkit(*REMOTE, "incoming=on", name="far")
shutil.rmtree("two.raw.ferry")
two.start()
p = run_nbdferry("migrate", "two.ctl", far.uri().rstrip("/"), check=False)
assert p.returncode == 1 and "LUKS" in p.stderr, p
far.stop()
two.stop()
store.stop()

# A device that became too small for what is on it is not served.
loop_detach(device)
device = loop("small.raw", SIZE)
try:
    Nbdkit("disk=d=" + device, "state=dst.state", name="small")
except RuntimeError as e:
    assert str(SIZE + MiB) in str(e), e
else:
    raise AssertionError("a device that is too small is served")
