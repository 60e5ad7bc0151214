#!/usr/bin/python3
# nbdferry - backups that fail, and the chain that goes on
# SPDX-License-Identifier: BSD-3-Clause
"""Full targets, lost targets, clients and daemons killed, Ctrl-C: never is
there half an archive under its name, never does a bitmap lose a bit, and the
next backup is complete."""

import fcntl
import random
import resource
import socket as sockets

from ferrytest import *
from chaintest import *

requires("nbdkit", "qemu-img")

MiB = 1 << 20
SIZE = 20 * MiB + 512


def fail(disk, message, out, *args, **kwargs):
    p = refused(message, "backup", disk.control, out, "--bitmap=b", *args,
                **kwargs)
    if not out.startswith(("/dev", "nbd")):
        assert not os.path.exists(out), os.listdir(".")
        assert not os.path.exists(out + ".partial"), os.listdir(".")
    assert disk.backups() == [], disk.backups()
    return p


class Chain:
    """Archives that follow one another; .go_on () makes the next one, and it
    must be complete."""

    def __init__(self, disk):
        self.disk, self.archives, self.made = disk, [], 0

    def new_name(self):
        self.made += 1
        return "c%d.nbf" % (self.made - 1)

    def go_on(self):
        if len(self.archives) > 3:      # or it takes ever longer
            merged = self.new_name()
            run_nbdferry("archive", "merge", *self.archives, merged)
            self.archives = [merged]
        name = self.new_name()
        model = self.disk.snapshot()
        backup(self.disk, name, "--bitmap=b", "--incremental"
               if self.archives else "--full")
        self.archives.append(name)
        restore(self.archives, model)


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (300000, 300000))


def targets(disk, chain):
    chain.go_on()
    disk.write()
    fail(disk, "No space left", "/dev/full")
    fail(disk, "File too large", "big.nbf", preexec_fn=limit_file_size)
    fail(disk, "No such file", "no/folder/x.nbf")
    p = refused("exists already", "backup", disk.control, "c0.nbf",
                "--bitmap=b")
    assert os.path.getsize("c0.nbf") > 1024, p
    fail(disk, "does not exist", "none.raw", "--format=raw")
    with open("short.raw", "wb") as f:
        f.truncate(512)
    refused("not an image of it", "backup", disk.control, "short.raw",
            "--bitmap=b", "--format=raw")
    refused("exists already", "backup", disk.control, "short.raw",
            "--bitmap=b", "--format=raw", "--full")
    fail(disk, "nbd", "nbd+unix:///?socket=/none")
    chain.go_on()


def target_gone(disk, chain):
    """An NBD server that is killed under the copy."""
    disk.write()
    slow = Nbdkit("%d" % SIZE, "wdelay=50ms", plugin="memory",
                  options=("--filter=delay",), name="slow")
    b = Backup(disk, slow.uri(), "--bitmap=b", piped=False)
    h = disk.daemon.connect("vda")
    assert disk.bitmap("b")["busy"]
    h.pwrite(b"y" * 512, 0)
    disk.model.set(0, b"y" * 512)
    slow.kill()
    assert b.release(check=False) == 1, b.errors
    assert disk.backups() == []
    h.shutdown()
    chain.go_on()


def clients_killed(disk, chain):
    """At random moments; what they leave behind does not matter."""
    rng = random.Random(5)
    for i in range(6):
        disk.write(6)
        b = Backup(disk, "k.nbf", "--bitmap=b", piped=i % 2 == 0)
        end = time.monotonic() + rng.random() * 0.03
        while time.monotonic() < end and b.process.poll() is None:
            time.sleep(0.001)
        b.process.kill()
        b.process.wait()
        disk.abandoned()
        # It may have been through already; that one is part of the chain.
        if os.path.exists("k.nbf") and i % 2 == 1:
            if info("k.nbf")["complete"] and advanced(disk, "k.nbf"):
                chain.archives.append(chain.new_name())
                os.rename("k.nbf", chain.archives[-1])
        if os.path.exists("k.nbf"):
            os.unlink("k.nbf")
        assert not disk.bitmap("b")["busy"]
        chain.go_on()
        if os.path.exists("k.nbf.partial"):
            os.unlink("k.nbf.partial")


def advanced(disk, archive):
    for d in disk.qmp.command("x-ferry-query-bitmaps"):
        for b in d["bitmaps"]:
            if b["name"] == "b":
                return b.get("point") == info(archive)["point"]
    return False


def interrupted(disk, chain):
    for sig in signal.SIGINT, signal.SIGTERM:
        disk.write()
        before = disk.bitmap("b")["count"]
        # A pipe that nobody reads: its writer hangs.
        os.mkfifo("fifo")
        reader = os.open("fifo", os.O_RDWR)
        h = disk.daemon.connect("vda")
        data = random.Random(3).randbytes(16 * MiB)
        h.pwrite(data, 0)
        disk.model.set(0, data)
        h.shutdown()
        b = Backup(disk, "fifo", "--bitmap=b", piped=False)
        b.process.send_signal(sig)
        assert b.release(check=False) == 130, b.errors
        os.close(reader)
        os.unlink("fifo")
        disk.abandoned()
        assert disk.bitmap("b")["count"] >= before
        chain.go_on()


def does_not_answer(disk, chain):
    """Neither Ctrl-C waits for a daemon that hangs, nor for who never reads a
    FIFO."""
    disk.write()
    b = Backup(disk, "x", "--bitmap=b")
    assert b.process.stdout.read(10000)     # it is copying
    disk.daemon.process.send_signal(signal.SIGSTOP)
    try:
        b.process.send_signal(signal.SIGINT)
        assert b.release(check=False) == 130, b.errors
    finally:
        disk.daemon.process.send_signal(signal.SIGCONT)
    wait_for(lambda: disk.backups() == [], "the daemon to give it up")
    chain.go_on()
    os.mkfifo("fifo")
    # By default, and as a script's background job has it.
    for handler in signal.SIG_DFL, signal.SIG_IGN:
        before = signal.signal(signal.SIGINT, handler)
        p = subprocess.Popen([NBDFERRY, "backup", disk.control, "fifo",
                              "--bitmap=b"], stdin=subprocess.DEVNULL)
        signal.signal(signal.SIGINT, before)
        # Again and again: at first, an ignored one is lost.
        wait_for(lambda: p.send_signal(signal.SIGINT) or
                 p.poll() is not None, "it to end")
    os.unlink("fifo")
    disk.abandoned()


def descriptors_closed(disk, chain):
    """What is opened does not become standard output."""
    def run(closed, out):
        return subprocess.run(
            ["sh", "-c", 'exec "$@" ' + closed, "sh", NBDFERRY, "backup",
             disk.control, out, "--bitmap=b"], timeout=60).returncode

    for closed in ">&-", "<&- >&-":
        assert run(closed, "-") == 1
        assert advanced(disk, chain.archives[-1])
    disk.write()
    model = disk.snapshot()
    name = chain.new_name()
    assert run("<&- >&- 2>&-", name) == 0
    chain.archives.append(name)
    restore(chain.archives, model)
    chain.go_on()


def daemon_killed(disk, chain):
    disk.write()
    h = disk.daemon.connect("vda")
    data = random.Random(4).randbytes(16 * MiB)
    h.pwrite(data, 0)
    disk.model.set(0, data)
    b = Backup(disk, "d.nbf", "--bitmap=b")
    disk.daemon.kill()
    assert b.release(check=False) == 1, b.errors
    disk.restart()
    chain.go_on()


class Proxy(threading.Thread):
    """Before the control socket; cuts the connection in place of passing on
    the end of the backup, or its reply."""

    def __init__(self, path, control, pass_on):
        super().__init__(daemon=True)
        self.control, self.pass_on = control, pass_on
        self.listener = sockets.socket(sockets.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(1)
        self.start()

    def run(self):
        client, _ = self.listener.accept()
        server = sockets.socket(sockets.AF_UNIX)
        server.connect(self.control)

        def back():
            while True:
                data = server.recv(65536)
                if not data or self.ended:
                    break
                client.sendall(data)

        self.ended = False
        threading.Thread(target=back, daemon=True).start()
        for line in client.makefile("rb"):
            self.ended = b"backup-end" in line and b'"success":true' in line
            if not self.ended or self.pass_on:
                server.sendall(line)
            if self.ended:
                break
        if self.pass_on:        # until it has been done
            wait_for(lambda: not self.pass_on(), "the end of the backup")
        client.shutdown(sockets.SHUT_RDWR)
        server.shutdown(sockets.SHUT_RDWR)
        self.listener.close()


def end_lost(disk, chain):
    """OUT is complete, and the daemon never heard so, or its answer is lost."""
    disk.write()
    Proxy("p1.ctl", disk.control, None)
    p = refused("did not answer", "backup", "p1.ctl", "dead.nbf",
                "--bitmap=b")
    assert "restore it without this one" in p.stderr, p.stderr
    assert info("dead.nbf")["parent"] == info(chain.archives[-1])["point"]
    restore(chain.archives + ["dead.nbf"], disk.model)
    wait_for(lambda: not disk.backups(), "the backup to be given up")
    disk.write()
    point = info(chain.archives[-1])["point"]
    chain.go_on()
    assert info(chain.archives[-1])["parent"] == point
    refused("leave out dead.nbf", "restore", *chain.archives[:-1], "dead.nbf",
            chain.archives[-1], "x.raw")
    disk.write()
    Proxy("p2.ctl", disk.control, disk.backups)
    p = refused("did not answer", "backup", "p2.ctl", "alive.nbf",
                "--bitmap=b")
    assert info("alive.nbf")["point"] in p.stderr, p.stderr
    assert advanced(disk, "alive.nbf")
    chain.archives.append("alive.nbf")
    restore(chain.archives, disk.model)
    chain.go_on()


def first_one_fails(disk):
    """A bitmap that was made for a backup that failed is not left behind."""
    refused("No space", "backup", disk.control, "/dev/full", "--bitmap=new")
    assert disk.bitmap("new") is None
    refused("no bitmap 'new'", "backup", disk.control, "x.nbf",
            "--bitmap=new", "--incremental")
    disk.qmp.command("block-dirty-bitmap-add", node="vda", name="old",
                     persistent=True)
    refused("knows of no earlier backup", "backup", disk.control, "x.nbf",
            "--bitmap=old", "--incremental")
    result = backup(disk, "old.nbf", "--bitmap=old")
    assert result["backups"][0]["full"], result
    restore(["old.nbf"], disk.model)


def given_up_by_the_daemon(disk, chain):
    """The reason is the daemon's."""
    h = disk.daemon.connect("vda")
    data = random.Random(6).randbytes(16 * MiB)
    h.pwrite(data, 0)
    b = Backup(disk, "l.nbf", "--bitmap=b", "--scratch-limit=64K")
    data = bytes(16 * MiB)
    for offset in range(0, 16 * MiB, MiB):
        h.pwrite(data[:MiB], offset)
    disk.model.set(0, data)
    h.shutdown()
    assert b.release(check=False) == 1, b.errors
    assert "has given the backup of disk 'vda' up" in b.errors, b.errors
    chain.go_on()


def what_was_read_is_released(disk, chain):
    """The daemon need not keep what will not be read again."""
    h = disk.daemon.connect("vda")
    data = random.Random(7).randbytes(18 * MiB)
    h.pwrite(data, 0)
    disk.model.set(0, data)
    b = Backup(disk, "r.nbf", "--bitmap=b", "--compression=none")
    model = disk.snapshot()
    h.pwrite(bytes(4 * MiB), 0)
    disk.model.set(0, bytes(4 * MiB))
    archive = b.process.stdout.read(9 * MiB)
    wait_for(lambda: disk.backups()[0]["scratch-used"] == 0,
             "the scratch space to be released")
    assert b.release() == 0
    with open("r.nbf", "rb") as f:
        archive += f.read()
    with open("r.nbf", "wb") as f:
        f.write(archive)
    h.shutdown()
    chain.archives.append("r.nbf")
    restore(chain.archives, model)
    chain.go_on()


def locked():
    """Two that write the same file."""
    with open("x.nbf.partial", "wb") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        refused("being written by another", "backup", the_disk.control,
                "x.nbf", "--bitmap=b")
    assert os.path.exists("x.nbf.partial")


the_disk = Disk(SIZE)
the_chain = Chain(the_disk)
targets(the_disk, the_chain)
target_gone(the_disk, the_chain)
clients_killed(the_disk, the_chain)
interrupted(the_disk, the_chain)
does_not_answer(the_disk, the_chain)
descriptors_closed(the_disk, the_chain)
daemon_killed(the_disk, the_chain)
end_lost(the_disk, the_chain)
given_up_by_the_daemon(the_disk, the_chain)
what_was_read_is_released(the_disk, the_chain)
first_one_fails(the_disk)
locked()
the_disk.stop()
