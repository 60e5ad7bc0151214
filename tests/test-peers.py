#!/usr/bin/python3
# nbdferry - who may bring a disk
# SPDX-License-Identifier: BSD-3-Clause
"""A migration from an address that is not loopback needs TLS, unless the
destination says incoming=insecure.  In a network of our own."""

import socket

if __name__ == "__main__":
    import os
    import subprocess
    import sys
    if "FERRY_TEST_NET" not in os.environ:
        for unshare in (["unshare", "-n"], ["unshare", "-rn"]):
            try:
                p = subprocess.run(unshare + ["ip", "link", "set", "lo", "up"],
                                   capture_output=True, text=True)
            except FileNotFoundError as e:
                print(e)
                sys.exit(77)
            if p.returncode == 0:
                os.execvpe("unshare", unshare + [sys.executable, __file__],
                           dict(os.environ, FERRY_TEST_NET="1"))
        print("no network of our own:", p.stderr.strip())
        sys.exit(77)

from ferrytest import *
from migratetest import *

requires("nbdkit", "ip", "psktool")

MiB = 1 << 20
SIZE = 2 * MiB
HERE, HERE6 = "10.9.8.7", "fd00::7"


def ip(*args):
    subprocess.run(["ip", *args], check=True)


ip("link", "set", "lo", "up")
ip("addr", "add", HERE + "/32", "dev", "lo")
try:
    ip("addr", "add", HERE6 + "/128", "dev", "lo", "nodad")
    with socket.socket(socket.AF_INET6) as s:
        s.bind((HERE6, 0))
    has_ip6 = True
except (subprocess.CalledProcessError, OSError):
    print("no IPv6 here")
    has_ip6 = False
subprocess.run(["psktool", "-u", "ferry", "-p", "keys.psk"], check=True,
               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
KEYS = os.path.join(TMPDIR, "keys.psk")


def port_of(address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as s:
        s.bind((address, 0))
        return s.getsockname()[1]


count = 0


def try_out(address, incoming="on", psk=False, listen=None, unix=False):
    """One migration to that address; its exit status, messages, and log."""
    global count
    count += 1
    name = "dst%d" % count
    src_disk = "src%d.raw" % count
    model = make_disk(src_disk, SIZE)
    src = Nbdkit("disk=d=" + src_disk, "control=%s.ctl" % src_disk,
                 name="src%d" % count)
    args = ("disk=d=%s.raw" % name, "size=%d" % SIZE, "incoming=" + incoming)
    options = []
    if psk:
        options = ["--tls=require", "--tls-psk=" + KEYS]
    if unix:
        dst = Nbdkit(*args, name=name, options=options)
        uri = "nbd+unix://?socket=" + dst.socket
    else:
        port = port_of(listen or address)
        dst = Nbdkit(*args, name=name, port=port,
                     options=options + ["-i", listen or address])
        host = "[%s]" % address if ":" in address else address
        uri = "nbd://%s:%d" % (host, port)
        if psk:
            uri = "nbds://ferry@%s:%d/?tls-psk-file=%s" % (host, port, KEYS)
    p = run_nbdferry("migrate", src_disk + ".ctl", uri, check=False,
                     timeout=30)
    print(uri, incoming, p.returncode, p.stderr.strip().split("\n")[-1])
    if p.returncode == 0:
        h = src.connect("d")   # forwarded, by the same rule
        h.pwrite(b"x" * 512, 512)
        model.set(512, b"x" * 512)
        h.shutdown()
        src.stop()
        compare(name + ".raw", model)
    else:
        with open(name + ".raw", "rb") as f:
            assert not any(f.read()), "data came all the same"
        assert read_all(src.uri("d")) == bytes(model.data)
        src.stop()
    log = dst.log_text()
    dst.stop()
    return p.returncode, p.stderr, log


def allowed(*args, **kwargs):
    code, said, log = try_out(*args, **kwargs)
    assert code == 0, (args, said, log)


def refused(address, **kwargs):
    code, said, log = try_out(address, **kwargs)
    assert code == 1, (address, said)
    assert "TLS" in said, said
    for text in ("refused a migration from " + address, "--tls=require",
                 "incoming=insecure"):
        assert text in log, (text, log)


refused(HERE)
allowed(HERE, incoming="insecure")
allowed(HERE, psk=True)
allowed("127.0.0.1")
allowed("127.9.9.9")
allowed(None, unix=True)
if has_ip6:
    refused(HERE6)
    allowed(HERE6, incoming="insecure")
    allowed("::1")

# Who is forwarded is as much a stranger as who migrates: started again
# without the word, the destination turns the source away, and with it again
# takes it.
model = make_disk("fwd.raw", SIZE)
src = Nbdkit("disk=d=fwd.raw", "control=fwd.ctl", name="fwd")
port = port_of(HERE)
there = Nbdkit("disk=d=there.raw", "size=%d" % SIZE, "incoming=insecure",
               name="there", port=port, options=["-i", HERE])
run_nbdferry("migrate", "fwd.ctl", "nbd://%s:%d" % (HERE, port))
there.stop()
there.args = ("disk=d=there.raw",)
there.start()
h = src.connect("d")
cookie = h.aio_pread(nbd.Buffer(512), 0)
wait_for(lambda: "refused a migration from " + HERE in there.log_text(),
         "the refusal")
assert not h.aio_command_completed(cookie)
there.stop()
there.args = ("disk=d=there.raw", "incoming=insecure")
there.start()
assert bytes(h.pread(SIZE, 0)) == bytes(model.data)
h.shutdown()
src.stop()
there.stop()

# ---- IPv4 through a socket of IPv6 ----


def mapped():
    """::ffff:127.0.0.1 is loopback, ::ffff:10.9.8.7 is not."""
    with socket.socket(socket.AF_INET6) as s:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        s.bind(("::", 0))
        s.listen()
        port = s.getsockname()[1]
        p = subprocess.Popen(
            ["sh", "-c", "exec 3<&%d; LISTEN_PID=$$ LISTEN_FDS=1 exec "
             'nbdkit -f "$@"' % s.fileno(), "sh", PLUGIN,
             "disk=d=mapped.raw", "size=%d" % SIZE, "incoming=on"],
            pass_fds=[s.fileno()], stdin=subprocess.DEVNULL)
    atexit.register(p.kill)
    h = connect("nbd://127.0.0.1:%d/d%%40incoming" % port)
    h.shutdown()
    try:
        connect("nbd://%s:%d/d%%40incoming" % (HERE, port))
    except nbd.Error:
        pass
    else:
        raise AssertionError("a stranger in IPv6's clothes")
    p.terminate()
    assert p.wait(TIMEOUT) == 0


if has_ip6 and not PRELOAD:
    mapped()
