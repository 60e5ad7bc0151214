#!/usr/bin/python3
# nbdferry - what goes wrong by hand, and must not cost data
# SPDX-License-Identifier: BSD-3-Clause
"""A full backup over an earlier one that is broken off; a standby that is not
there; an archive restored onto itself; names that are not UTF-8; a link to
nothing; Ctrl-C where nobody answers."""

import json
import signal

from ferrytest import *
from chaintest import *
from linktest import Link

requires("nbdkit", "qemu-nbd")

MiB = 1 << 20
SIZE = 16 * MiB
disk = Disk(SIZE)
control = disk.control


def fails(*args, says=None, **kwargs):
    p = run_nbdferry(*args, check=False, **kwargs)
    assert p.returncode == 1, (args, p)
    assert says is None or says in p.stderr, (says, p.stderr)
    return p


def holds_data(path):
    with open(path, "rb") as f:
        return any(map(any, iter(lambda: f.read(MiB), b"")))


def broken_off(uri, stop):
    """A full backup to it, by the bitmap, which is slow, up to its middle."""
    p = subprocess.Popen([NBDFERRY, "backup", control, uri, "--bitmap=n",
                          "--full", "--force", "--connections=1"],
                         stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                         text=True)
    wait_for(lambda: holds_data("out.raw"), "the first data")
    p.send_signal(stop)
    errors = p.communicate(timeout=30)[1]
    assert p.returncode in (130, -signal.SIGKILL), (p.returncode, errors)
    disk.abandoned()
    return errors


def full_over_an_earlier_one():
    """What is half written is at no point: nothing may build upon it."""
    def empty():
        with open("out.raw", "wb") as f:
            f.truncate(SIZE)

    empty()
    s = Nbdkit("out.raw", plugin="file", name="out", tcp=True)
    uri = s.uri()
    link = Link(s.port, rate=4e6)
    backup(disk, uri, "--bitmap=n")
    for stop in signal.SIGINT, signal.SIGKILL:
        disk.write()
        # One that is refused, before anything was written, costs nothing.
        fails("backup", control, "/dev/null/x", "--bitmap=n", "--full")
        fails("backup", control, uri, "--bitmap=n", "--full", says="--force")
        backup(disk, uri, "--bitmap=n", "--incremental")
        compare("out.raw", disk.model)
        s.stop()
        empty()                         # another one, in its place
        s.start()
        errors = broken_off(link.uri(), stop)
        assert stop != signal.SIGINT or "full one" in errors, errors
        s.kill()
        s.start()
        fails("backup", control, uri, "--bitmap=n", "--incremental")
        fails("backup", control, uri, "--bitmap=n", says="--force")
        backup(disk, uri, "--bitmap=n", "--force")
        compare("out.raw", disk.model)
    s.stop()
    link.stop()
    # The same with a file, which is emptied.
    backup(disk, "o.raw", "--format=raw", "--bitmap=r")
    disk.write()
    for i in range(6):
        p = subprocess.Popen([NBDFERRY, "backup", control, "o.raw",
                              "--format=raw", "--bitmap=r", "--full",
                              "--force", "--connections=1"],
                             stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL)
        wait_for(lambda: disk.backups() != [] or p.poll() is not None,
                 "it to begin")
        time.sleep(0.002 * i)           # any moment will do
        p.kill()
        p.wait()
        disk.abandoned()
        p = run_nbdferry("backup", control, "o.raw", "--format=raw",
                         "--bitmap=r", check=False)
        if p.returncode != 0:
            assert "--force" in p.stderr, p.stderr
            backup(disk, "o.raw", "--format=raw", "--bitmap=r", "--force")
        compare("o.raw", disk.model)


def empty_at_both_ends():
    """Data in the middle is data, too."""
    open("mid.raw", "wb").close()
    os.truncate("mid.raw", SIZE)
    server = Nbdkit("mid.raw", plugin="file", name="mid")
    with open("mid.raw", "r+b") as f:
        f.seek(SIZE // 2 + 3 * 4096)
        f.write(b"x" * 4096)
    backup(disk, "m.nbf", "--bitmap=m")
    for command in (["backup", control, server.uri()],
                    ["restore", "m.nbf", server.uri()]):
        fails(*command, says="not empty")
    os.truncate("mid.raw", 0)
    os.truncate("mid.raw", SIZE)
    run_nbdferry("restore", "m.nbf", server.uri())
    compare("mid.raw", disk.model)
    server.stop()


def standby_is_not_there():
    backup(disk, "b.nbf", "--bitmap=s")
    fails("sync", control, "typo.raw", "--bitmap=s", "--adopt",
          says="does not exist")
    assert not os.path.exists("typo.raw")
    run_nbdferry("sync", control, "standby.raw", "--bitmap=t")
    compare("standby.raw", disk.model)
    os.unlink("standby.raw")
    disk.write(3)
    fails("sync", control, "standby.raw", "--bitmap=t",
          says="does not exist")
    assert not os.path.exists("standby.raw")
    run_nbdferry("sync", control, "standby.raw", "--bitmap=t", "--full")
    compare("standby.raw", disk.model)


def over_a_disk():
    """Whatever is forced: neither a disk nor what is kept of it goes."""
    state = "src.raw.ferry/"
    kept = ["src.raw", *(state + f for f in os.listdir(state))]
    os.link("src.raw", "hard.raw")
    open("q.raw", "wb").close()
    os.truncate("q.raw", MiB)
    qemu = subprocess.Popen(["qemu-nbd", "-f", "raw", "-k",
                             os.path.join(TMPDIR, "q.sock"), "-t", "q.raw"])
    wait_for(lambda: os.path.exists("q.sock"), "qemu-nbd")
    backup(disk, "o1.nbf", "--bitmap=o")
    for out in "src.raw", "hard.raw", "q.raw", *kept:
        fails("backup", control, out, "--bitmap=o", "--force")
        fails("archive", "merge", "b.nbf", out, "--force")
        fails("bitmap", "map", control, "o", "--svg", out)
        fails("restore", "--overwrite", "b.nbf", out)
    # (Not by its size: this disk is smaller than any of these files.)
    small = Disk(512, name="small")
    for out in kept[1:]:
        fails("sync", small.control, out, "--bitmap=z", "--full")
    small.stop()
    qemu.kill()
    qemu.wait()
    disk.stop()
    # Nor when nobody has it open.
    for out in kept:
        with open(out, "rb") as f:
            before = f.read()
        fails("archive", "merge", "b.nbf", out, "--force")
        with open(out, "rb") as f:
            assert f.read() == before, out
    disk.restart()
    compare("src.raw", disk.model)
    assert not [f for f in os.listdir(state) if f.endswith(".partial")]
    # What is nothing of that is replaced, also by what was made of it.
    run_nbdferry("archive", "merge", "o1.nbf", "q.raw", "--force")
    run_nbdferry("archive", "merge", "q.raw", "q.raw", "--force")
    restore(["q.raw"], disk.model)


def onto_itself():
    os.link("b.nbf", "link.nbf")
    os.symlink("b.nbf", "symlink.nbf")
    for out in "b.nbf", "link.nbf", "symlink.nbf":
        fails("restore", "--overwrite", "b.nbf", out, says="itself")
    run_nbdferry("archive", "verify", "b.nbf")


def names():
    """What JSON cannot say is shown as it would be on a terminal."""
    odd = b"x\xff.nbf"
    os.link("b.nbf", odd)
    for command in (["archive", "info"], ["archive", "verify"]):
        p = subprocess.run([NBDFERRY, *command, "--json", odd],
                           capture_output=True, check=True)
        entry, = json.loads(p.stdout)
        assert entry["file"].endswith(".nbf"), entry
    p = subprocess.run([NBDFERRY, "restore", "--json", b"\xfe.nbf", "out"],
                       capture_output=True)
    assert p.returncode == 1, p
    assert json.loads(p.stdout.splitlines()[-1])["status"] == "failed", p
    os.mkdir(b"folder\xff")
    os.link("b.nbf", b"folder\xff/b.nbf")
    p = subprocess.run([NBDFERRY, "archive", "list", "--json", b"folder\xff"],
                       capture_output=True, check=True)
    assert len(json.loads(p.stdout)) == 1, p
    os.symlink("nothing", "dangling")
    fails("backup", control, "dangling", says="symbolic link")
    fails("restore", "b.nbf", "dangling", says="symbolic link")
    fails("backup", control, "")


def blocks(pid, sig):
    with open("/proc/%d/status" % pid) as f:
        mask, = (line.split()[1] for line in f if line.startswith("SigBlk"))
    return int(mask, 16) >> sig - 1 & 1


def nobody_answers():
    """Neither a pipe into which nobody writes nor a server that does not
    answer keeps who has pressed Ctrl-C."""
    open("never.raw", "wb").close()
    os.truncate("never.raw", SIZE)
    server = Nbdkit("never.raw", "delay-open=40", plugin="file", name="never",
                    options=["--filter=delay"])
    for args in (["restore", "--json", "-", "new.raw"],
                 ["archive", "verify", "--json", "-"],
                 ["restore", "--json", "b.nbf", server.uri()]):
        p = subprocess.Popen([NBDFERRY, *args], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
        wait_for(lambda: blocks(p.pid, signal.SIGTERM), "it to begin")
        p.send_signal(signal.SIGTERM)
        assert p.wait(30) == 130, p.returncode
        lines = p.stdout.read().splitlines()
        if args[0] == "restore":
            assert json.loads(lines[-1])["status"] == "cancelled", lines
        p.stdin.close()
        p.stdout.close()
    assert not os.path.exists("new.raw")
    server.kill()


full_over_an_earlier_one()
empty_at_both_ends()
standby_is_not_there()
over_a_disk()
onto_itself()
names()
nobody_answers()
disk.stop()
