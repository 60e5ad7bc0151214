# nbdferry - what benchmarks share
# SPDX-License-Identifier: BSD-3-Clause
"""Daemons with their CPU time, medians, tables.

Runs of ours and of the peers alternate, because these machines drift; quote
medians and ratios of one run.  Files go to $BENCH_DIR (default: a folder in
/dev/shm) and are removed at the end.  Memory of a new file is touched before
it is timed: a virtual machine may have to ask its host for it.
"""

import atexit
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time

MiB = 1 << 20
BUILD = os.environ.get("builddir", os.getcwd())
PLUGIN = os.path.join(BUILD, "plugin/nbdkit-ferry-plugin.so")
NBDFERRY = os.path.join(BUILD, "cli/nbdferry")
DIR = tempfile.mkdtemp(prefix="ferry-bench-",
                       dir=os.environ.get("BENCH_DIR", "/dev/shm"))
HZ = os.sysconf("SC_CLK_TCK")
_daemons = []


def keep(daemon):
    """To be stopped at the end."""
    _daemons.append(daemon)


def path(name):
    return os.path.join(DIR, name)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition, what, timeout=20):
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.002)


class Daemon:
    """A process that serves NBD; .uri ("export"), .cpu () in seconds."""

    def __init__(self, name, argv, kind="unix"):
        self.port = free_port() if kind == "tcp" else None
        self.socket = path(name + ".sock")
        pid = path(name + ".pid")
        for f in (pid, self.socket):
            if os.path.exists(f):
                os.unlink(f)
        where = ["-i", "127.0.0.1", "-p", str(self.port)] if self.port \
            else ["-U", self.socket]
        with open(path(name + ".log"), "wb") as log:
            self.process = subprocess.Popen(
                ["nbdkit", "-f", "-P", pid, *where, *argv],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        keep(self)
        wait_for(lambda: os.path.exists(pid) and os.path.getsize(pid), name)

    def uri(self, export=""):
        if self.port:
            return "nbd://127.0.0.1:%d/%s" % (self.port, export)
        return "nbd+unix:///%s?socket=%s" % (export, self.socket)

    def cpu(self):
        with open("/proc/%d/stat" % self.process.pid) as f:
            v = f.read().rsplit(")", 1)[1].split()
        return (int(v[11]) + int(v[12])) / HZ

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGKILL)
                self.process.wait()


class QMP:
    """One client of a control socket."""

    def __init__(self, where):
        wait_for(lambda: os.path.exists(where), where)
        s = socket.socket(socket.AF_UNIX)
        s.connect(where)
        self.file = s.makefile("rw")
        self.events = []
        self.file.readline()
        self.command("qmp_capabilities")

    def command(self, name, /, **arguments):
        json.dump({"execute": name, "arguments": arguments}, self.file)
        self.file.write("\n")
        self.file.flush()
        while True:
            r = json.loads(self.file.readline())
            if "error" in r:
                raise RuntimeError("%s: %s" % (name, r["error"]))
            if "return" in r:
                return r["return"]
            self.events.append(r)

    def event(self, name):
        """Its data, once it has come."""
        while True:
            for i, e in enumerate(self.events):
                if e["event"] == name:
                    del self.events[i]
                    return e.get("data")
            self.events.append(json.loads(self.file.readline()))


class Qemu:
    """qemu-storage-daemon with a raw file as its node d0, exported as ""."""

    def __init__(self, name, disk):
        self.socket = path(name + ".sock")
        node = {"driver": "raw", "node-name": "d0",
                "file": {"driver": "file", "filename": disk}}
        for f in (self.socket, path(name + ".qmp")):
            if os.path.exists(f):
                os.unlink(f)
        self.process = subprocess.Popen(
            ["qemu-storage-daemon", "--blockdev", json.dumps(node),
             "--nbd-server", "addr.type=unix,addr.path=" + self.socket,
             "--export", "type=nbd,id=e0,node-name=d0,name=,writable=on",
             "--chardev", "socket,id=c,server=on,wait=off,path=" +
             path(name + ".qmp"), "--monitor", "chardev=c"],
            stdin=subprocess.DEVNULL)
        keep(self)
        wait_for(lambda: os.path.exists(self.socket), name)
        self.qmp = QMP(path(name + ".qmp"))

    def uri(self):
        return "nbd+unix:///?socket=" + self.socket

    cpu, stop = Daemon.cpu, Daemon.stop


def server_address(daemon):
    """As QEMU's nbd driver wants it."""
    if daemon.port:
        return {"type": "inet", "host": "127.0.0.1", "port": str(daemon.port)}
    return {"type": "unix", "path": daemon.socket}


def timed(argv):
    """Run a command; (seconds, its CPU seconds, its output)."""
    before = os.times()
    t = time.monotonic()
    p = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True,
                       text=True)
    t = time.monotonic() - t
    after = os.times()
    if p.returncode != 0:
        raise RuntimeError("%s: %s%s" % (argv[0], p.stdout, p.stderr))
    cpu = (after.children_user + after.children_system -
           before.children_user - before.children_system)
    return t, cpu, p.stdout


def warm_file(name, size):
    """An empty sparse file whose memory has been touched just now."""
    block = bytes(MiB)
    with open(path(name), "wb") as f:
        for _ in range(-(-size // MiB)):
            f.write(block)
        f.truncate(0)
        f.truncate(size)
    return path(name)


def med(values):
    return statistics.median(values)


def table(title, head, rows):
    print("\n" + title)
    cells = [head] + [["%.3g" % c if isinstance(c, float) else str(c)
                       for c in row] for row in rows]
    width = [max(len(r[i]) for r in cells) for i in range(len(head))]
    for r in cells:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w)
                        for i, (c, w) in enumerate(zip(r, width))))


@atexit.register
def _clean_up():
    for d in _daemons:
        d.stop()
    shutil.rmtree(DIR, ignore_errors=True)
