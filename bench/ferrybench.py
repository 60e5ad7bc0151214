# nbdferry - what benchmarks share
# SPDX-License-Identifier: BSD-3-Clause
"""Options, daemons with their CPU time, medians, tables, goals.

Runs of ours and of the peers alternate, because these machines drift; quote
medians and ratios of one run.  Files go to $BENCH_DIR (default: a folder in
/dev/shm) and are removed at the end.  Memory of a new file is touched before
it is timed: a virtual machine may have to ask its host for it.

A script reads like this:

    a = options(__doc__, rounds=(5, 1), size=(2048, 256))
    results = in_turn({"ours": run_ours, "peer": run_peer}, a.rounds)
    table("title", ["tool", "s", ...], rows)
    goal("copy", "time / peer's", 0.57, most=0.6)
    done()
"""

import argparse
import atexit
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

MiB, GiB = 1 << 20, 1 << 30
BUILD = os.environ.get("builddir", os.getcwd())
PLUGIN = os.path.join(BUILD, "plugin/nbdkit-ferry-plugin.so")
NBDFERRY = os.path.join(BUILD, "cli/nbdferry")
DIR = tempfile.mkdtemp(prefix="ferry-bench-",
                       dir=os.environ.get("BENCH_DIR", "/dev/shm"))
QEMU = shutil.which("qemu-storage-daemon") is not None
_daemons = []
_report = {"tables": [], "goals": []}
_began = time.monotonic()
_a = None


def options(doc, **what):
    """The options of a script: NAME=(default, what it is with --short)."""
    ap = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--short", action="store_true",
                    help="a run of seconds, to see that it works")
    ap.add_argument("--json", metavar="FILE",
                    help="write the tables and goals there as well")
    ap.add_argument("--max-seconds", type=float, default=600,
                    help="begin no new round after that")
    for name, (long, short) in what.items():
        ap.add_argument("--" + name.replace("_", "-"), type=type(long),
                        metavar="N" if type(long) is not str else "A,B,...",
                        help=("%s; %s with --short"
                              % (long or "''", short or "''")).replace(
                                  "%", "%%"))
    global _a
    _a = ap.parse_args()
    for name, (long, short) in what.items():
        if getattr(_a, name) is None:
            setattr(_a, name, short if _a.short else long)
    _report["options"] = {name: getattr(_a, name) for name in what}
    if not QEMU:
        print("(no rows of QEMU: qemu-storage-daemon is not installed)")
    return _a


def need_nbd():
    """libnbd's Python module."""
    try:
        import nbd
    except ImportError:
        print("skipped: libnbd has no module for this Python")
        sys.exit(0)
    return nbd


def need(*tools):
    """Without these there is nothing to measure."""
    for t in tools:
        if not shutil.which(t):
            print("skipped: %s is not installed" % t)
            sys.exit(0)


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
    """A process that serves NBD; .uri ("export"), .cpu () in seconds.
    'prefix' runs it, such as in a network namespace that has 'host'.
    """

    def __init__(self, name, argv, kind="unix", prefix=(), host="127.0.0.1"):
        self.port = free_port() if kind == "tcp" else None
        self.host = host
        self.socket = path(name + ".sock")
        pid = path(name + ".pid")
        for f in (pid, self.socket):
            if os.path.exists(f):
                os.unlink(f)
        where = ["-i", host, "-p", str(self.port)] if self.port \
            else ["-U", self.socket]
        with open(path(name + ".log"), "wb") as log:
            self.process = subprocess.Popen(
                [*prefix, "nbdkit", "-f", "-P", pid, *where, *argv],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        keep(self)
        wait_for(lambda: os.path.exists(pid) and os.path.getsize(pid), name)

    def uri(self, export=""):
        if self.port:
            return "nbd://%s:%d/%s" % (self.host, self.port, export)
        return "nbd+unix:///%s?socket=%s" % (export, self.socket)

    def cpu(self):
        """clock_getcpuclockid(3) of it: nanoseconds, not ticks."""
        return time.clock_gettime(~self.process.pid << 3 | 2)

    def memory(self):
        """Peak bytes, and how many of a sidecar's pages are among them."""
        pid, sidecar, ours = self.process.pid, 0, False
        with open("/proc/%d/smaps" % pid) as f:
            for line in f:
                key, _, value = line.partition(":")
                if "-" in key and " " in key:
                    ours = "/bitmaps.qcow2" in line
                elif key == "Rss" and ours:
                    sidecar += int(value.split()[0]) * 1024
        with open("/proc/%d/status" % pid) as f:
            peak = [int(line.split()[1]) * 1024 for line in f
                    if line.startswith("VmHWM:")][0]
        return peak, sidecar

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

    def __init__(self, name, disk, prefix=()):
        self.socket = path(name + ".sock")
        node = {"driver": "raw", "node-name": "d0",
                "file": {"driver": "file", "filename": disk}}
        for f in (self.socket, path(name + ".qmp")):
            if os.path.exists(f):
                os.unlink(f)
        self.process = subprocess.Popen(
            [*prefix, "qemu-storage-daemon", "--blockdev", json.dumps(node),
             "--nbd-server", "addr.type=unix,addr.path=" + self.socket,
             "--export", "type=nbd,id=e0,node-name=d0,name=,writable=on",
             "--chardev", "socket,id=c,server=on,wait=off,path=" +
             path(name + ".qmp"), "--monitor", "chardev=c"],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        keep(self)
        wait_for(lambda: os.path.exists(self.socket), name)
        self.qmp = QMP(path(name + ".qmp"))

    def mirror(self, to, discard=None, copy_mode="background"):
        """Begin to mirror the disk to a daemon; returns once it is ready."""
        how = {"discard": discard} if discard else {}
        self.qmp.command("blockdev-add", **{
            "driver": "raw", "node-name": "t", **how,
            "file": {"driver": "nbd", "server": server_address(to), **how}})
        self.qmp.command("blockdev-mirror", **{
            "job-id": "m", "device": "d0", "target": "t", "sync": "full",
            "copy-mode": copy_mode})
        self.qmp.event("BLOCK_JOB_READY")

    def switch(self):
        """End it: the target is the disk now."""
        self.qmp.command("block-job-complete", device="m")
        self.qmp.event("BLOCK_JOB_COMPLETED")

    def uri(self):
        return "nbd+unix:///?socket=" + self.socket

    cpu, stop = Daemon.cpu, Daemon.stop


def server_address(daemon):
    """As QEMU's nbd driver wants it."""
    if daemon.port:
        return {"type": "inet", "host": daemon.host, "port": str(daemon.port)}
    return {"type": "unix", "path": daemon.socket}


def own_cpu(who=(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)):
    """Of this process and of those that it has waited for."""
    r = [resource.getrusage(w) for w in who]
    return sum(x.ru_utime + x.ru_stime for x in r)


def timed(argv):
    """Run a command; (seconds, its CPU seconds, its output)."""
    before, t = own_cpu([resource.RUSAGE_CHILDREN]), time.monotonic()
    p = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True,
                       text=True)
    t = time.monotonic() - t
    if p.returncode != 0:
        raise RuntimeError("%s: %s%s" % (argv[0], p.stdout, p.stderr))
    return t, own_cpu([resource.RUSAGE_CHILDREN]) - before, p.stdout


class Writer:
    """fio, which writes 4 KiB at random at a rate."""

    def __init__(self, uri, size, iops, depth=8):
        self.log = path("lat")
        self.process = subprocess.Popen(
            ["fio", "--name=w", "--ioengine=nbd", "--uri=" + uri,
             "--rw=randwrite", "--bs=4k", "--size=%d" % size, "--norandommap",
             "--rate_iops=%d" % iops, "--iodepth=%d" % depth, "--thread",
             "--time_based", "--runtime=120", "--write_lat_log=" + self.log,
             "--log_unix_epoch=1", "--disable_slat=1", "--disable_clat=1"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=DIR)

    def end(self):
        """When each write ended, s since 1970, and how long it took, us."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)
        lines = []
        for f in os.listdir(DIR):
            if f.startswith("lat_"):
                with open(path(f)) as log:
                    lines += [line.split(",") for line in log]
                os.unlink(path(f))
        return [(int(v[0]) / 1000, int(v[1]) / 1000) for v in lines]


def percentile(v, p):
    return sorted(v)[min(len(v) - 1, int(len(v) * p / 100))] if v else 0.0


def warm(nr_bytes):
    """Have that much of free memory touched just now."""
    warm_file("warm", nr_bytes)
    os.unlink(path("warm"))


def sparse_file(name, size):
    with open(path(name), "wb") as f:
        f.truncate(size)
    return path(name)


def warm_file(name, size):
    """An empty sparse file whose memory has been touched just now."""
    block = bytes(MiB)
    with open(path(name), "wb") as f:
        for _ in range(-(-size // MiB)):
            f.write(block)
        f.truncate(0)
        f.truncate(size)
    return path(name)


def random_runs(name, size, data=50, zeros=25, seed=1):
    """A disk of runs of 0.5 to 1.5 MiB: that many percent of random data, of
    written zeros, the rest holes.  Its path and the runs of data.
    """
    rng, offset, runs = random.Random(seed), 0, []
    with open(path(name), "wb") as f:
        f.truncate(size)
        while offset < size:
            n = min(rng.randrange(8, 25) * 65536, size - offset)
            kind = rng.random() * 100
            if kind < data + zeros:
                f.seek(offset)
                f.write(rng.randbytes(n) if kind < data else bytes(n))
            if kind < data:
                runs.append((offset, n))
            offset += n
    return path(name), runs


def no_sidecars():
    """Neither of the disks src.raw and dst.raw."""
    for f in ("src.raw.ferry", "dst.raw.ferry"):
        shutil.rmtree(path(f), ignore_errors=True)


def same(a, b):
    if subprocess.run(["cmp", "-s", a, b]).returncode:
        raise RuntimeError("%s and %s differ" % (a, b))


def in_turn(tools, rounds):
    """Call each of these in every round, there and back; all they returned."""
    results = {name: [] for name in tools}
    for i in range(rounds):
        if i and time.monotonic() - _began > _a.max_seconds:
            print("(ended after %d rounds)" % i)
            break
        for name in list(tools)[::-1 if i % 2 else 1]:
            results[name].append(tools[name]())
    return results


def med(values):
    return statistics.median(values)


def ratio(results, name, base, column=0):
    """The median of the rounds' ratios."""
    return med([x[column] / y[column]
                for x, y in zip(results[name], results[base])])


def time_rows(results, *bases):
    """For each tool: s, min, max, CPU s, then time and CPU to each base.  The
    results begin with (seconds, CPU seconds).
    """
    rows = []
    for name, v in results.items():
        t = [x[0] for x in v]
        rows.append([name, med(t), min(t), max(t), med([x[1] for x in v])])
        for base in bases:
            for column in 0, 1:
                rows[-1].append(ratio(results, name, base, column)
                                if base in results else "-")
    return rows


def number(x):
    if not isinstance(x, float):
        return str(x)
    return "%.0f" % x if abs(x) >= 100 else "%.3g" % x


def table(title, head, rows):
    _report["tables"].append({"title": title, "head": head, "rows": rows})
    print("\n" + title)
    cells = [head] + [[number(c) for c in row] for row in rows]
    width = [max(len(r[i]) for r in cells) for i in range(len(head))]
    for r in cells:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w)
                        for i, (c, w) in enumerate(zip(r, width))))
    sys.stdout.flush()


def goal(row, what, value, most=None, least=None):
    """What was asked for, and what it is: both in one unit."""
    reached = value <= most if least is None else value >= least
    _report["goals"].append({"row": row, "what": what, "value": value,
                             "most": most, "least": least,
                             "reached": bool(reached)})


def plot(name, **what):
    """A picture for the report: what svgplot.line_plot wants."""
    _report.setdefault("plots", {})[name] = what


def _version(*argv):
    try:
        p = subprocess.run(argv, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return p.stdout.split("\n")[0].strip()


def _machine():
    with open("/proc/cpuinfo") as f:
        model = [line.split(":")[1].strip() for line in f
                 if line.startswith("model name")][:1]
    return {"cpu": (model or ["?"])[0], "cpus": os.cpu_count(),
            "kernel": platform.release(),
            "tools": [_version("nbdkit", "--version"),
                      _version("nbdcopy", "--version"),
                      _version("qemu-storage-daemon", "--version")]}


def done():
    """The goals, and the report."""
    goals = _report["goals"]
    if goals:
        tables = list(_report["tables"])
        table("goals" + (" (a short run shows nothing)" if _a.short else ""),
              ["row", "what", "is", "goal", ""],
              [[g["row"], g["what"], float(g["value"]),
                ("<= %g" % g["most"]) if g["least"] is None
                else (">= %g" % g["least"]),
                "reached" if g["reached"] else "not reached"] for g in goals])
        _report["tables"] = tables
    if _a.json:
        _report.update(when=time.strftime("%Y-%m-%d %H:%M"), short=_a.short,
                       machine=_machine())
        with open(_a.json, "w") as f:
            json.dump(_report, f, indent=1)
            f.write("\n")


@atexit.register
def _clean_up():
    for d in _daemons:
        d.stop()
    shutil.rmtree(DIR, ignore_errors=True)


# By the end of a script all is gone, however it ends.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
