#!/usr/bin/python3
# nbdferry - benchmark: a fast and long link
# SPDX-License-Identifier: BSD-3-Clause
"""A disk of random data over a link of 1 Gbit/s and 50 ms round trip
(wanlink.c, between two network namespaces): nbdferry with default settings
beside nbdcopy, QEMU's mirror to nbdkit, and plain TCP, in turn; and what the
line itself could carry.  Needs root, ip(8) and /dev/net/tun.  With --channels
nbdferry is also run with so many, e.g. 1,4; --cc says how TCP controls
congestion; --verbose 1 shows more of each migration.
"""

from ferrybench import *

TOOLS = ["nbdferry", "nbdcopy", "nbdcopy -C4 -T4", "TCP x 4"]
if QEMU:
    TOOLS.insert(3, "QEMU mirror")
HEADERS = 20 + 32  # of IP and TCP, with its timestamp
HOST = "10.99.17.2"

a = options(__doc__, rounds=(3, 1), size=(256, 32), rtt=(50.0, 50.0),
            rate=(1e9, 1e9), queue=(100, 100), mtu=(9000, 9000), cc=("", ""),
            tools=(",".join(TOOLS), "nbdferry,nbdcopy"), channels=("", ""),
            verbose=(0, 0))
size = a.size * MiB


# ---- the link ----

def sh(*argv):
    return subprocess.run(argv, check=True, capture_output=True,
                          text=True).stdout


need("ip", "nbdcopy")
if os.getuid() != 0 or not os.path.exists("/dev/net/tun"):
    print("skipped: this needs root and /dev/net/tun")
    sys.exit(0)
HERE, THERE = "ferryA%d" % os.getpid(), "ferryB%d" % os.getpid()


def remove_namespaces():
    for ns in (HERE, THERE):
        subprocess.run(["ip", "netns", "del", ns], capture_output=True)


def inside(ns):
    return ["ip", "netns", "exec", ns]


class Link:
    """Between the two namespaces."""

    def __init__(self):
        for ns in (HERE, THERE):
            sh("ip", "netns", "add", ns)
        self.process = subprocess.Popen(
            [os.path.join(BUILD, "bench/wanlink"), HERE, THERE, "wan0",
             "%d" % (a.rtt * 500), "%.0f" % a.rate, str(a.queue)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        keep(self)
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError(self.process.stderr.read())
        for ns, address in (HERE, "10.99.17.1"), (THERE, HOST):
            sh("ip", "-n", ns, "addr", "add", address + "/24", "dev", "wan0")
            sh("ip", "-n", ns, "link", "set", "wan0", "mtu", str(a.mtu),
               "txqueuelen", "5000", "up")
            sh("ip", "-n", ns, "link", "set", "lo", "up")
            sh(*inside(ns), "sysctl", "-qw", "net.ipv4.tcp_no_metrics_save=1")
            if a.cc:
                sh(*inside(ns), "sysctl", "-qw",
                   "net.ipv4.tcp_congestion_control=" + a.cc)

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            print("#", self.process.communicate()[1].strip())


# ---- the tools ----

def nbdkit():
    return Daemon("d", ["file", warm_file("dst.raw", size)], "tcp",
                  inside(THERE), HOST)


def ferry(*params):
    dst = warm_file("dst.raw", size)
    no_sidecars()
    s = Daemon("s", [PLUGIN, "disk=vda=" + src, "control=" + path("s.ctl")],
               prefix=inside(HERE))
    d = Daemon("d", [PLUGIN, "disk=vda=" + dst, "incoming=insecure"], "tcp",
               inside(THERE), HOST)
    cpu = s.cpu() + d.cpu()
    t, own, out = timed([NBDFERRY, "migrate", path("s.ctl"), d.uri("vda"),
                         "--json", *params])
    cpu = s.cpu() + d.cpu() - cpu + own
    if a.verbose:
        i = json.loads(out.splitlines()[-1])
        print("# %.3f s:" % t, {k: i.get(k) for k in (
            "setup-time", "total-time", "downtime", "x-ferry")})
        for p in s, d:
            with open("/proc/%d/status" % p.process.pid) as f:
                print("#", *[" ".join(x.split()) for x in f if "VmHWM" in x])
    s.stop()
    d.stop()
    same(src, dst)
    return t, cpu


def nbdcopy(*params):
    d = nbdkit()
    cpu = d.cpu()
    t, own, _ = timed([*inside(HERE), "nbdcopy", *params, src, d.uri()])
    cpu = d.cpu() - cpu + own
    d.stop()
    return t, cpu


def mirror():
    q, d = Qemu("q", src, inside(HERE)), nbdkit()
    cpu, began = q.cpu() + d.cpu(), time.monotonic()
    q.mirror(d)
    q.switch()
    t = time.monotonic() - began
    cpu = q.cpu() + d.cpu() - cpu
    q.stop()
    d.stop()
    return t, cpu


RECEIVE = """
import socket, sys, threading
def receive(c):
    buf = bytearray(1 << 20)
    while c.recv_into(buf):
        pass
    c.sendall(b"k")
l = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=64)
print("ready", flush=True)
ts = []
for i in range(int(sys.argv[3])):
    ts.append(threading.Thread(target=receive, args=(l.accept()[0],)))
    ts[-1].start()
for t in ts:
    t.join()
"""
SEND = """
import os, socket, sys, threading
f, n = os.open(sys.argv[3], os.O_RDONLY), int(sys.argv[4])
size = os.fstat(f).st_size
def send(i):
    s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
    at, end = size * i // n, size * (i + 1) // n
    while at < end:
        at += os.sendfile(s.fileno(), f, at, min(end - at, 1 << 22))
    s.shutdown(socket.SHUT_WR)
    s.recv(1)
ts = [threading.Thread(target=send, args=(i,)) for i in range(n)]
for t in ts:
    t.start()
for t in ts:
    t.join()
"""


def tcp(n):
    port = str(free_port())
    r = subprocess.Popen([*inside(THERE), sys.executable, "-c", RECEIVE, HOST,
                          port, str(n)], stdout=subprocess.PIPE, text=True)
    r.stdout.readline()
    t, own, _ = timed([*inside(HERE), sys.executable, "-c", SEND, HOST, port,
                       src, str(n)])
    before = os.times()
    r.wait()
    after = os.times()
    return t, own + after.children_user + after.children_system - \
        before.children_user - before.children_system


RUN = {"nbdferry": ferry,
       "nbdcopy": nbdcopy,
       "nbdcopy -C4 -T4": lambda: nbdcopy("-C", "4", "-T", "4"),
       "QEMU mirror": mirror,
       "TCP x 4": lambda: tcp(4),
       "TCP x 16": lambda: tcp(16)}


# ---- the runs ----

with open(path("src.raw"), "wb") as f:
    for _ in range(a.size):
        f.write(os.urandom(MiB))
src, tools = path("src.raw"), list(filter(None, a.tools.split(",")))
for n in filter(None, a.channels.split(",")):
    name = "nbdferry --channels " + n
    RUN[name] = lambda n=n: ferry("--channels", n)
    tools.append(name)
remove_namespaces()
try:
    link = Link()
    results = in_turn({t: RUN[t] for t in tools}, a.rounds)
    rows = []
    for t in tools:
        v = [r[0] for r in results[t]]
        rows.append([t, med(v), min(v), max(v), a.size / med(v),
                     med([r[1] for r in results[t]])])
    line = a.rate / 8 / MiB * (1 - HEADERS / a.mtu)
    rows.append(["the line", a.size / line, "", "", line, ""])
    table("moving %d MiB over %g Gbit/s with a round trip of %g ms (%d rounds, "
          "medians; %s)" % (a.size, a.rate / 1e9, a.rtt,
                            len(results[tools[0]]),
                            sh(*inside(HERE), "sysctl", "-n",
                               "net.ipv4.tcp_congestion_control").strip()),
          ["tool", "s", "min", "max", "MiB/s", "cpu s"], rows)
    link.stop()
    if "nbdferry" in tools:
        goal("WAN", "MiB/s with default settings",
             a.size / med([r[0] for r in results["nbdferry"]]), least=100)
    done()
finally:
    remove_namespaces()
