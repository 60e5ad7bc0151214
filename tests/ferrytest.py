# nbdferry - what Python tests share
# SPDX-License-Identifier: BSD-3-Clause
"""Real parts for tests: nbdkit with our plugin, QMP, writers with a model.

A test is a script that tests/run starts in a folder of its own; it ends well,
or with an exception, or by skip ().  Whatever was started here is killed when
it ends; logs of daemons are printed if it failed.
"""

import atexit
import collections
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

try:
    import nbd
except ImportError:
    nbd = None

SECTOR = 512
TIMEOUT = 20
TMPDIR = os.environ["TMPDIR"]
PLUGIN = os.environ["FERRY_PLUGIN"]
NBDFERRY = os.environ["NBDFERRY"]
PRELOAD = os.environ.get("FERRY_PRELOAD", "")
SANITIZER_SAYS = re.compile(r"ERROR: \w+Sanitizer|WARNING: ThreadSanitizer"
                            r"|runtime error:")


def skip(reason):
    """End the test without a result."""
    print(reason)
    sys.exit(77)


def requires(*programs):
    for program in programs:
        if not shutil.which(program):
            skip("%s is not installed" % program)
    if not nbd:
        skip("python3-libnbd is not installed")


def wait_for(condition, what, timeout=TIMEOUT):
    """Until condition () is true; returns what it returned."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise TimeoutError("waited too long for %s" % what)
        time.sleep(0.005)


def clear_folder():
    """Nothing is left in the current one."""
    for f in os.listdir("."):
        subprocess.run(["rm", "-rf", f], check=True)


def is_served(path):
    """Does anybody listen on that Unix socket, as it was given to him?  It is
    to be seen before that, and some servers end with their first client."""
    if not os.path.exists(path):
        return False
    with open("/proc/net/unix", errors="replace") as f:
        for line in f:
            fields = line.split(None, 7)
            if (fields[-1].strip().endswith(path)
                    and int(fields[3], 16) & 0x10000):
                return True
    return False


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def own_mounts():
    """Have mounts of one's own, which go with the last process of the test,
    however it ends; as root only.  False: there are none."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        return False
    if "FERRY_UNSHARED" in os.environ:
        return True
    command = ["unshare", "-m", "--propagation", "private"]
    if subprocess.call([*command, "true"], stderr=subprocess.DEVNULL) != 0:
        return False
    os.environ["FERRY_UNSHARED"] = "1"
    sys.stdout.flush()
    os.execvp("unshare", [*command, sys.executable, *sys.argv])


_loops = {}


def loop_device(path, *options):
    """A loop device on that file; None, and why is printed, if there is none.

    It goes when the last one closes it, however the test ends.  Nobody may
    detach it a second time: it could be another test's by then.
    """
    p = subprocess.run(["losetup", "--show", "-f", *options, path], text=True,
                       capture_output=True)
    if p.returncode != 0:
        print("no loop devices: " + p.stderr.strip())
        return None
    device = p.stdout.strip()
    _loops[device] = os.open(device, os.O_RDONLY)
    subprocess.run(["losetup", "-d", device], check=True)
    return device


def loop_detach(device):
    """Nobody else may have it open."""
    os.close(_loops.pop(device))
    wait_for(lambda: not os.path.exists("/sys/block/%s/loop" %
                                        os.path.basename(device)), device)


class Nbdkit:
    """A running nbdkit, by default with our plugin.

    Nbdkit ("disk.raw", "state=s", name="src") serves on src.sock, or with
    tcp=True on a free port of 127.0.0.1 (port= chooses it).  'options' stand
    before the plugin.  start () may be called again after stop () or kill ().
    """
    all = []

    def __init__(self, *args, name="nbdkit", plugin=PLUGIN, options=(),
                 tcp=False, port=None, env=None):
        self.args, self.plugin, self.options = args, plugin, options
        self.port = port or (free_port() if tcp else None)
        self.socket = None if self.port else self.path(name + ".sock")
        self.name, self.env, self.process = name, env or {}, None
        self.log, self.pidfile = self.path(name + ".log"), None
        Nbdkit.all.append(self)
        self.start()

    @staticmethod
    def path(name):
        return os.path.join(TMPDIR, name)

    def start(self):
        """Start it and wait until it serves."""
        self.pidfile = self.path(self.name + ".pid")
        for old in self.pidfile, self.socket:
            if old and os.path.exists(old):
                os.unlink(old)
        where = ["-U", self.socket]
        if self.port:
            where = ["-i", "127.0.0.1", "-p", str(self.port)]
        tsan = os.environ.get("TSAN_OPTIONS", "")
        env = dict(os.environ,
                   ASAN_OPTIONS="detect_leaks=0:verify_asan_link_order=0",
                   TSAN_OPTIONS=tsan + ":ignore_noninstrumented_modules=1")
        if PRELOAD:
            # A sanitizer loaded before p11-kit, which nbdkit needs for TLS,
            # unbalances a lock of glibc's, and the process hangs at its exit.
            env["LD_PRELOAD"] = "libp11-kit.so.0 " + PRELOAD
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                ["nbdkit", "-f", "-P", self.pidfile, *where, *self.options,
                 self.plugin, *self.args], stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, env=dict(env, **self.env))
        wait_for(self.ready_or_dead, "nbdkit (%s)" % self.name)
        if not self.ready():
            code = self.process.wait()
            self.process = None
            raise RuntimeError("nbdkit (%s) ended with %d: %s" % (
                self.name, code, self.log_text()[-1000:]))

    def ready(self):
        return (os.path.exists(self.pidfile)
                and os.path.getsize(self.pidfile) > 0)

    def ready_or_dead(self):
        return self.ready() or self.process.poll() is not None

    def log_text(self):
        with open(self.log, errors="replace") as f:
            return f.read()

    def uri(self, export=""):
        export = urllib.parse.quote(export, safe="")
        if self.port:
            return "nbd://127.0.0.1:%d/%s" % (self.port, export)
        return "nbd+unix:///%s?socket=%s" % (export, self.socket)

    def connect(self, export="", contexts=("base:allocation",)):
        """A libnbd handle."""
        return connect(self.uri(export), contexts)

    def terminate(self):
        self.process.terminate()

    def wait(self, timeout=TIMEOUT):
        """Until it has ended by itself or after terminate (); must be well."""
        code = self.process.wait(timeout)
        self.process = None
        if code != 0:
            raise RuntimeError("nbdkit (%s) ended with %d" % (self.name, code))
        if SANITIZER_SAYS.search(self.log_text()):
            raise RuntimeError("nbdkit (%s): see its log" % self.name)

    def stop(self, timeout=TIMEOUT):
        """Ask it to end; it must end well."""
        self.terminate()
        self.wait(timeout)

    def kill(self):
        """kill -9"""
        if self.process:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def is_running(self):
        return self.process is not None and self.process.poll() is None


def connect(uri, contexts=()):
    h = nbd.NBD()
    for context in contexts:
        h.add_meta_context(context)
    h.connect_uri(uri)
    return h


class QMPError(Exception):
    """An error reply; .cls is its class, the text its description."""

    def __init__(self, error):
        super().__init__(error["desc"])
        self.cls = error["class"]


class QMP:
    """A client of a control socket; capabilities are negotiated.

    Replies and events arrive in .command () and .event () only.
    """

    def __init__(self, path, timeout=TIMEOUT, negotiate=True):
        wait_for(lambda: os.path.exists(path), path)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        self.file = self.socket.makefile("r", encoding="utf-8")
        self.events = collections.deque()
        self.greeting = self.read()
        if negotiate:
            self.command("qmp_capabilities")

    def read(self):
        line = self.file.readline()
        if not line:
            raise EOFError("the control socket was closed")
        return json.loads(line)

    def send(self, message):
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def execute(self, command, arguments=None):
        """Send a command as it is; returns what it returned."""
        message = {"execute": command}
        if arguments is not None:
            message["arguments"] = arguments
        self.send(message)
        while True:
            reply = self.read()
            if "event" in reply:
                self.events.append(reply)
            elif "error" in reply:
                raise QMPError(reply["error"])
            elif "QMP" not in reply:    # QEMU that just starts greets twice
                return reply["return"]

    def command(self, command, **arguments):
        """The same with keywords: _ in their names stands for -."""
        return self.execute(command, {k.replace("_", "-"): v for k, v
                                      in arguments.items()} or None)

    def event(self, name):
        """The next event of that name; other events are kept."""
        for e in self.events:
            if e["event"] == name:
                self.events.remove(e)
                return e
        while True:
            e = self.read()
            if e["event"] == name:
                return e
            self.events.append(e)

    def close(self):
        self.file.close()
        self.socket.close()


def run_nbdferry(*args, check=True, timeout=60, **kwargs):
    """Run the command; returns subprocess.CompletedProcess, text."""
    p = subprocess.run([NBDFERRY, *map(str, args)], text=True, timeout=timeout,
                       stdin=subprocess.DEVNULL, capture_output=True, **kwargs)
    if check and p.returncode != 0:
        raise RuntimeError("nbdferry %s: exit status %d: %s%s" % (
            " ".join(map(str, args)), p.returncode, p.stdout, p.stderr))
    return p


def qemu_img_check(path):
    """qemu-img must find nothing wrong, nor anything leaked."""
    p = subprocess.run(["qemu-img", "check", "-f", "qcow2", path], text=True,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if p.returncode != 0:
        raise RuntimeError("qemu-img check: %s" % p.stdout)


def qemu_img_info(path):
    return json.loads(subprocess.check_output(
        ["qemu-img", "info", "-U", "--output=json", path]))


def status_ranges(h, context, wanted):
    """Sorted [(start, end)] of where wanted (flags) in a meta context."""
    ranges, offset, size = [], 0, h.get_size()

    def extent(metacontext, start, entries, error):
        nonlocal offset
        if metacontext != context:
            return
        for length, flags in zip(entries[::2], entries[1::2]):
            if wanted(flags):
                if ranges and ranges[-1][1] == start:
                    ranges[-1] = ranges[-1][0], start + length
                else:
                    ranges.append((start, start + length))
            start += length
        offset = start

    while offset < size:
        before = offset
        h.block_status(min(size - offset, 1 << 30), offset, extent)
        if offset == before:
            raise RuntimeError("no status of %s at %d" % (context, offset))
    return ranges


def bitmap_ranges(sidecar, name):
    """What is dirty in a bitmap of a qcow2 nobody has open, as QEMU sees it:
    qemu-nbd -r -B NAME."""
    context = "qemu:dirty-bitmap:" + name
    h = nbd.NBD()
    h.add_meta_context(context)
    h.connect_systemd_socket_activation(
        ["qemu-nbd", "-r", "-f", "qcow2", "-B", name, sidecar])
    ranges = status_ranges(h, context, lambda flags: flags & 1)
    h.shutdown()
    return ranges


class Model:
    """What a disk must hold.  Sectors of a write that failed are 'unsure':
    they may hold the old or the new until written again."""

    def __init__(self, size, data=None):
        self.data = bytearray(size) if data is None else bytearray(data)
        self.unsure = bytearray(-(-size // SECTOR))

    def set(self, offset, data):
        self.data[offset:offset + len(data)] = data
        self.set_unsure(offset, len(data), 0)

    def set_unsure(self, offset, length, value=1):
        first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
        self.unsure[first:last] = bytes([value]) * (last - first)


def make_disk(path, size, seed=1, step=1 << 20):
    """A file with random data and holes in turn; returns its Model."""
    rng, model = random.Random(seed), Model(size)
    with open(path, "wb") as f:
        f.truncate(size)
        for offset in range(0, size, 2 * step):
            data = rng.randbytes(min(step, size - offset))
            f.seek(offset)
            f.write(data)
            model.set(offset, data)
    return model


def read_all(uri):
    h, step = connect(uri), 1 << 20
    size = h.get_size()
    return b"".join(h.pread(min(step, size - offset), offset)
                    for offset in range(0, size, step))


def compare(file, model):
    """A file (path), or bytes, must hold what a Model says."""
    data = file
    if not isinstance(file, (bytes, bytearray)):
        with open(file, "rb") as f:
            data = f.read()
    if len(data) != len(model.data):
        raise AssertionError("%d bytes instead of %d" % (
            len(data), len(model.data)))
    if data == model.data:
        return
    bad = [s for s in range(len(model.unsure)) if not model.unsure[s] and
           data[s * SECTOR:(s + 1) * SECTOR] !=
           model.data[s * SECTOR:(s + 1) * SECTOR]]
    if bad:
        raise AssertionError("%d sectors differ, the first at byte %d" % (
            len(bad), bad[0] * SECTOR))


class Writer(threading.Thread):
    """Writes, zeroes and trims at random over a connection of its own.

    .done counts acknowledged requests, .errors failed ones, .longest is the
    longest time that one took, in seconds.  Several writers may share a model
    if each has an area [start, end) of its own.  It goes on until stop (), or
    until its connection is lost; with reconnect=True it makes a new one.
    """

    def __init__(self, uri, model, start=0, end=None, seed=1,
                 max_length=256 * 1024, pause=0.0, reconnect=False):
        super().__init__(daemon=True)
        self.uri, self.model, self.rng = uri, model, random.Random(seed)
        self.first = start // SECTOR
        self.last = (len(model.data) if end is None else end) // SECTOR
        self.max_sectors = max_length // SECTOR
        self.pause, self.reconnect = pause, reconnect
        self.done = self.errors = 0
        self.longest, self.last_error = 0.0, None
        self.ending = threading.Event()
        self.handle = h = connect(uri)
        self.kinds = (["write"] * 8 + ["zero"] * h.can_zero()
                      + ["trim"] * h.can_trim())
        self.start()

    def stop(self):
        """Ends after its present request; the model is final then."""
        self.ending.set()
        self.join(60)
        if self.is_alive():
            raise TimeoutError("a writer hangs in a request")

    def run(self):
        while not self.ending.is_set():
            first = self.rng.randrange(self.first, self.last)
            most = min(self.max_sectors, self.last - first)
            self.request(first * SECTOR, self.rng.randint(1, most) * SECTOR)
            if not self.handle.aio_is_ready() and not self.connect_again():
                break
            self.ending.wait(self.pause)
        if self.handle.aio_is_ready():
            self.handle.shutdown()

    def request(self, offset, length):
        kind = self.rng.choice(self.kinds)
        data = self.rng.randbytes(length) if kind == "write" else bytes(length)
        began = time.monotonic()
        try:
            if kind == "write":
                self.handle.pwrite(data, offset)
            elif kind == "zero":
                self.handle.zero(length, offset)
            else:
                self.handle.trim(length, offset)
            self.longest = max(self.longest, time.monotonic() - began)
            if kind == "trim":  # may leave anything, which then stays
                data = self.handle.pread(length, offset)
            self.model.set(offset, data)
            self.done += 1
        except nbd.Error as e:
            self.longest = max(self.longest, time.monotonic() - began)
            self.model.set_unsure(offset, length)
            self.errors += 1
            self.last_error = e

    def connect_again(self):
        while self.reconnect and not self.ending.wait(0.01):
            try:
                self.handle = connect(self.uri)
                return True
            except nbd.Error:
                pass
        return False


@atexit.register
def _clean_up():
    for daemon in Nbdkit.all:
        daemon.kill()


def _failed(kind, value, traceback):
    """What has failed comes last: who reads a part reads the end."""
    for daemon in {d.log: d for d in Nbdkit.all}.values():
        if os.path.exists(daemon.log):
            print("== %s.log\n%s" % (daemon.name, daemon.log_text()[-3000:]),
                  file=sys.stderr)
    sys.__excepthook__(kind, value, traceback)


sys.excepthook = _failed
