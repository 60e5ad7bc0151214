#!/usr/bin/python3
# nbdferry - the trust rule
# SPDX-License-Identifier: BSD-3-Clause
"""What happens to a disk between two daemons, and what becomes of its bitmaps.
What is harmless must leave them as they are; what changed the disk while
nobody tracked must make those that record inconsistent, and be named.
"""

import json
import os
import re
import shutil
import subprocess
import time

from ferrytest import (Model, Nbdkit, QMP, TMPDIR, Writer, loop_detach,
                       loop_device, requires, run_nbdferry)

requires("nbdkit", "qemu-img")
SIZE = 8 << 20
GRANULE = 65536
MODIFIED = r"^%s was modified at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC,? "
CLOSED = MODIFIED + r"while no daemon had it open$"
DIED = MODIFIED + r"after a daemon had died whose last write was at .* UTC$"
OTHER_BOOT = {"FERRY_TEST_BOOT_ID": "00000000-0000-4000-8000-000000000001"}


class Disk:
    """A disk with two bitmaps, 'on', of which two granules are dirty, and
    'off', which does not record, and one daemon after the other."""
    number = 0

    def __init__(self):
        Disk.number += 1
        self.dir = os.path.join(TMPDIR, "d%d" % Disk.number)
        os.mkdir(self.dir)
        self.path, self.state = self.file("vm.raw"), self.file("vm.raw.ferry")
        self.control, self.env = self.file("c"), {}
        with open(self.path, "wb") as f:
            f.write(os.urandom(SIZE))
        self.start()
        for name, disabled in ("on", False), ("off", True):
            self.qmp.command("block-dirty-bitmap-add", node="d", name=name,
                             persistent=True, disabled=disabled)
        h = self.daemon.connect("d")
        h.pwrite(b"x" * 512, GRANULE)
        h.pwrite(b"x" * 512, 5 * GRANULE)
        h.shutdown()

    def file(self, name):
        return os.path.join(self.dir, name)

    def start(self, **options):
        args = ["disk=d=" + self.path, "control=" + self.control]
        args += ["%s=%s" % o for o in {"state": self.state, **options}.items()]
        if os.path.exists(self.control):
            os.unlink(self.control)
        self.daemon = Nbdkit(*args, name="d%d" % self.number, env=self.env)
        self.qmp = QMP(self.control)
        return self

    def stop(self):
        self.qmp.close()
        self.daemon.stop()
        Nbdkit.all.remove(self.daemon)
        return self

    def kill(self):
        self.qmp.close()
        self.daemon.kill()
        Nbdkit.all.remove(self.daemon)
        return self

    def bitmaps(self):
        """{name: BlockDirtyInfo with what we know beyond it}"""
        node, = self.qmp.command("query-named-block-nodes")
        more, = self.qmp.command("x-ferry-query-bitmaps")
        assert more["node"] == "d" and more["trust"] == self.trust, more
        infos = {b["name"]: b for b in node.get("dirty-bitmaps", [])}
        for b in more["bitmaps"]:
            infos[b["name"]].update(b)
        return infos

    trust = "verified"

    def kept(self, count=2, note=None):
        """All is as it was."""
        b = self.bitmaps()
        on, off = b["on"], b["off"]
        assert "inconsistent" not in on and "inconsistent" not in off, b
        assert on["recording"] and not off["recording"], b
        assert on["count"] == count * GRANULE and off["count"] == 0, b
        if note:
            assert re.search(note, on["reason"]), b
            assert "reason-time" in on
        else:
            assert "reason" not in on, b
        assert "reason" not in off, b
        return self

    def given_up(self, reason):
        """The one that records is; and the reason is remembered."""
        for end in self.stop, self.kill, None:
            b = self.bitmaps()
            on, off = b["on"], b["off"]
            assert on["inconsistent"] and not on["recording"], b
            assert re.search(reason, on["reason"]), (reason, on)
            assert abs(time.time() - to_seconds(on["reason-time"])) < 60, on
            assert "inconsistent" not in off and off["count"] == 0, b
            assert "reason" not in off, b
            if end:
                end()
                self.start()
        return self

    def end(self):
        if self.daemon.process:
            self.stop()
        shutil.rmtree(self.dir)


def to_seconds(text):
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ"))


def overwrite(path, offset=0, length=512):
    subprocess.run(["dd", "if=/dev/urandom", "of=" + path, "bs=%d" % length,
                    "count=1", "seek=%d" % (offset // length), "conv=notrunc"],
                   check=True, stderr=subprocess.DEVNULL)


# ---- what is harmless ----

def nothing(d):
    pass


def change_owner(d):
    for path in d.path, d.file("vm.raw.ferry/bitmaps.qcow2"):
        if os.getuid() == 0:
            os.chown(path, 1, 1)
            os.chown(path, 0, 0)
        else:
            os.chown(path, -1, os.getgid())


def change_mode(d):
    for path in d.path, d.file("vm.raw.ferry/bitmaps.qcow2"):
        os.chmod(path, 0o640)


def relabel(d):
    for path in d.path, d.file("vm.raw.ferry/bitmaps.qcow2"):
        try:
            os.setxattr(path, "user.label", b"system_u:object_r:svirt_image_t")
        except OSError as e:
            print("no extended attributes here: %s" % e)


def move(d):
    new = d.file("elsewhere")
    os.mkdir(new)
    for path in d.path, d.state:
        os.rename(path, os.path.join(new, os.path.basename(path)))
    d.path = os.path.join(new, "vm.raw")
    d.state = os.path.join(new, "vm.raw.ferry")


def link(d):
    os.link(d.path, d.file("link"))
    os.unlink(d.path)
    d.path = d.file("link")


def read(d):
    os.utime(d.path, ns=(0, os.stat(d.path).st_mtime_ns))  # atime
    with open(d.path, "rb") as f:
        f.read()
    with open(d.path, "r+b"):  # opened for writing, and not written to
        pass
    subprocess.run(["qemu-img", "check", "-q",
                    os.path.join(d.state, "bitmaps.qcow2")], check=True)


def copy_state(d, how="-a"):
    new = d.file("copy")
    subprocess.run(["cp", how, d.state, new], check=True)
    shutil.rmtree(d.state)
    d.state = new


def copy_state_without_times(d):
    time.sleep(0.05)
    copy_state(d, "-r")


def copy_state_back(d):
    """What is made anew may get the inodes' numbers back."""
    time.sleep(0.05)
    state = d.state
    copy_state(d, "-r")
    subprocess.run(["cp", "-r", d.state, state], check=True)
    shutil.rmtree(d.state)
    d.state = state


def tar_state(d):
    """tar keeps whole seconds only."""
    new = d.file("copy")
    os.mkdir(new)
    subprocess.run("tar -C '%s' -c . | tar -C '%s' -x" % (d.state, new),
                   shell=True, check=True)
    shutil.rmtree(d.state)
    d.state = new


def reboot(d):
    d.env = OTHER_BOOT


def test_harmless():
    for end in Disk.stop, Disk.kill:
        for change in (nothing, change_owner, change_mode, relabel, move, link,
                       read, copy_state, copy_state_without_times,
                       copy_state_back, tar_state):
            print("%s, then %s" % (end.__name__, change.__name__), flush=True)
            d = Disk()
            end(d)
            change(d)
            if end is Disk.kill and change is nothing:
                time.sleep(0.1)
            d.start().kept()
            # and it stays so
            d.kill()
            d.start().kept().stop()
            d.start().kept().end()
    d = Disk().stop()
    reboot(d)
    d.start().kept().stop()
    d.env = {}
    d.start().kept().end()


def test_killed_while_writing():
    """No alarm, whatever was under way."""
    d = Disk()
    for i in range(5):
        w = [Writer(d.daemon.uri("d"), Model(SIZE), seed=10 * i + k)
             for k in range(3)]
        time.sleep(0.05 + i * 0.03)
        d.kill()
        for writer in w:
            writer.stop()
        time.sleep(0.03)
        d.start()
        b = d.bitmaps()["on"]
        assert "inconsistent" not in b and "reason" not in b, b
    d.end()


def test_power_loss():
    """Another boot after a crash: kept, perhaps with more bits, and with a
    note if so."""
    d = Disk().kill()
    reboot(d)
    d.start()
    b = d.bitmaps()["on"]
    assert "inconsistent" not in b and b["count"] >= 2 * GRANULE, b
    assert b["count"] == 2 * GRANULE or "dirty" in b["reason"], b
    d.end()


def test_resized():
    for end in Disk.stop, Disk.kill:
        for size in SIZE + 3 * GRANULE, 3 * GRANULE:
            d = Disk()
            end(d)
            time.sleep(0.05)
            os.truncate(d.path, size)
            grown = size > SIZE
            d.start().kept(5 if grown else 1, "%s was %s from %d to %d bytes" % (
                d.path, "extended" if grown else "cut", SIZE, size))
            d.stop()
            d.start().kept(5 if grown else 1, "bytes")
            d.qmp.command("block-dirty-bitmap-clear", node="d", name="on")
            d.kept(0).stop()
            d.start().kept(0).end()


# ---- what is not ----

def write(d):
    overwrite(d.path, 2 * GRANULE)


def cut_and_extend(d):
    os.truncate(d.path, 1 << 20)
    os.truncate(d.path, SIZE)


def replace(d):
    """By a copy that has the same times."""
    subprocess.run(["cp", "-p", d.path, d.path + ".new"], check=True)
    os.rename(d.path + ".new", d.path)


def put_back(d):
    """By the same file with older contents."""
    overwrite(d.path)
    os.utime(d.path, (0, 1500000000))


def use_older_sidecar(d):
    """Over the one that is there; with bits of another time."""
    sidecar = os.path.join(d.state, "bitmaps.qcow2")
    shutil.copyfile(sidecar, d.file("older"))
    time.sleep(0.05)
    shutil.copyfile(d.file("older"), sidecar)


def lose_times(d):
    os.unlink(os.path.join(d.state, "lastwrite"))


def damage_times(d):
    overwrite(os.path.join(d.state, "lastwrite"))


def lose_journal(d):
    os.unlink(os.path.join(d.state, "journal"))


def restore_state(d):
    """All of the state directory from yesterday's backup."""
    subprocess.run(["cp", "-a", d.state, d.file("backup")], check=True)
    d.start()
    h = d.daemon.connect("d")
    h.pwrite(b"y" * 512, 9 * GRANULE)
    h.shutdown()
    d.stop()
    shutil.rmtree(d.state)
    os.rename(d.file("backup"), d.state)


def write_after_reboot(d):
    d.env = dict(OTHER_BOOT, FERRY_TEST_BOOT_TIME=str(int(time.time()) - 1))
    time.sleep(0.1)
    overwrite(d.path)


def test_sidecar_gone():
    """There is no bitmap to give a reason for, so the log says it."""
    d = Disk()
    assert "missing" not in d.daemon.log_text()
    d.stop()
    os.unlink(os.path.join(d.state, "bitmaps.qcow2"))
    d.start()
    assert "bitmaps.qcow2 was missing, and any bitmaps" in d.daemon.log_text()
    before = d.daemon.log_text().count("missing")
    d.stop()
    d.start()
    assert d.daemon.log_text().count("missing") < before + 1
    d.stop()


def test_given_up():
    replaced = r"%s was replaced by another file \(inode \d+ instead of \d+\)"
    back = r"%s was put back to an older state, of 2017-07-14 02:40:00 UTC, "
    for end, change, reason in (
            (Disk.stop, write, CLOSED),
            (Disk.kill, write, DIED),
            (Disk.stop, cut_and_extend, CLOSED),
            (Disk.kill, cut_and_extend, DIED),
            (Disk.stop, replace, replaced),
            (Disk.kill, replace, replaced),
            (Disk.stop, put_back, back + "while no daemon had it open"),
            (Disk.kill, put_back, back + "after a daemon had died"),
            (Disk.stop, use_older_sidecar,
             "bitmaps.qcow2 is of .* UTC, and not of .* UTC, when it was"),
            (Disk.stop, restore_state, CLOSED),
            (Disk.kill, lose_times, "lastwrite is missing or damaged: "),
            (Disk.kill, damage_times, "lastwrite is missing or damaged: "),
            (Disk.kill, lose_journal, "journal is missing, and"),
            (Disk.kill, write_after_reboot, MODIFIED +
             "after the machine had been started again")):
        print("%s, then %s" % (end.__name__, change.__name__), flush=True)
        d = Disk()
        end(d)
        time.sleep(0.05)
        change(d)
        d.start().given_up(reason.replace("%s", re.escape(d.path))).end()


def test_same_tick():
    """A write right after the close is seen."""
    for _ in range(5):
        d = Disk().stop()
        with open(d.path, "r+b") as f:
            f.write(b"!")
        d.start().given_up(CLOSED % d.path).end()


def test_shown():
    """What people see, and what becomes of it."""
    d = Disk().stop()
    write(d)
    d.start()
    on, off = run_nbdferry("bitmap", "list", d.control).stdout.splitlines()[1:]
    assert re.search(r"inconsistent: %s was modified at \d{4}-.* UTC while no "
                     r"daemon had it open$" % re.escape(d.path), on), on
    assert off.endswith(" ok"), off
    listed = json.loads(run_nbdferry("bitmap", "list", "--json",
                                     d.control).stdout)
    assert [b["name"] for b in listed] == ["on", "off"]
    assert re.search(CLOSED % d.path, listed[0]["reason"]), listed
    assert listed[0]["trust"] == "verified" and "reason" not in listed[1]
    # A new one of the same name has no past.
    d.qmp.command("block-dirty-bitmap-remove", node="d", name="on")
    d.qmp.command("block-dirty-bitmap-add", node="d", name="on",
                  persistent=True)
    d.kept(0).stop()
    d.start().kept(0).end()


def test_many_reasons():
    """The journal has 16 KiB."""
    d = Disk()
    for i in range(40):
        d.qmp.command("block-dirty-bitmap-add", node="d", persistent=True,
                      name="%d-" % i + "n" * 1000, granularity=1 << 20)
    d.stop()
    write(d)
    d.start().given_up(CLOSED % d.path)
    b = d.bitmaps()
    assert len(b) == 42
    for name, info in b.items():
        if name != "off":
            assert info["inconsistent"] and re.search(
                CLOSED % d.path, info["reason"]), info
    d.end()


def test_block_device():
    """There is nothing to tell it by, which is said."""
    d = Disk()
    d.stop()
    loop = loop_device(d.path)
    if not loop:
        return
    try:
        d.path, d.state, d.trust = loop, d.file("state"), "unverifiable"
        d.start()
        d.qmp.command("block-dirty-bitmap-add", node="d", name="on",
                      persistent=True)
        d.qmp.command("block-dirty-bitmap-add", node="d", name="off",
                      persistent=True, disabled=True)
        d.kept(0).stop()
        overwrite(loop)
        d.start().kept(0).kill()
        d.start().kept(0)
        out = run_nbdferry("bitmap", "list", d.control).stdout
        assert out.count("ok, trust: unverifiable") == 2, out
        status, = d.qmp.command("x-ferry-status")["disks"]
        assert status["trust"] == "unverifiable", status
        d.stop()
    finally:
        loop_detach(loop)
    d.end()


def test_durability():
    d = Disk()
    for value in "power", "process":
        d.stop()
        d.start(durability=value)
        status, = d.qmp.command("x-ferry-status")["disks"]
        assert status["durability"] == value, status
        d.kept()
    d.stop()
    try:
        d.start(durability="always")
    except RuntimeError as e:
        assert "durability=always: must be power" in str(e), e
    else:
        raise AssertionError("durability=always was accepted")
    d.end()


os.environ["TZ"] = "UTC"
time.tzset()
for test in (test_harmless, test_killed_while_writing, test_power_loss,
             test_resized, test_sidecar_gone, test_given_up, test_same_tick,
             test_shown, test_many_reasons, test_block_device, test_durability):
    print("== %s" % test.__name__, flush=True)
    test()
