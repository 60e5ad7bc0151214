#!/usr/bin/python3
# nbdferry - commands that are interrupted leave the daemon alive
# SPDX-License-Identifier: BSD-3-Clause
"""nbdkit before 1.33.10 aborts if a client resets its connection between two
pieces of a reply.  Backups, syncs and comparisons that are ended by Ctrl-C
don't do that, however slowly the pieces come."""

from ferrytest import *

requires("nbdkit")
if os.environ.get("FERRY_PRELOAD"):
    skip("not with a sanitizer, which is preloaded itself")

SHIM = os.path.abspath("slow-send.so")
subprocess.run([*os.environ["FERRY_CC"].split(), "-shared", "-fPIC", "-o",
                SHIM, os.path.join(os.environ["srcdir"], "tests/slow-send.c"),
                "-ldl"], check=True)
SIZE = 32 << 20
model = make_disk("src.raw", SIZE, step=64 << 10)
src = Nbdkit("disk=vda=src.raw", "control=src.ctl", name="src",
             env={"LD_PRELOAD": SHIM})
dst = Nbdkit("disk=vda=dst.raw", "size=%d" % SIZE, name="dst")
rng = random.Random(1)

for what, args in (
        ("backup", ["backup", "src.ctl", "out.nbf"]),
        ("sync", ["sync", "src.ctl", dst.uri("vda"), "--bitmap", "standby",
                  "--full"]),
        ("verify", ["verify", src.uri("vda"), dst.uri("vda"),
                    "--block-size", "4K", "--connections", "1"])):
    ended = []
    for i in range(6):
        p = subprocess.Popen([NBDFERRY, *args], stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE)
        time.sleep(rng.uniform(0.05, 0.15))
        # It finds both, a piece of a reply and the signal.
        p.send_signal(signal.SIGSTOP)
        time.sleep(0.005)
        p.send_signal(signal.SIGINT)
        p.send_signal(signal.SIGCONT)
        p.communicate(timeout=TIMEOUT)
        ended.append(p.returncode)
        h = src.connect("vda")
        assert h.pread(512, 0) == bytes(model.data[:512])
        h.shutdown()
        assert src.is_running()
    print("%s: %s" % (what, ended))
    # Killed before it could catch the signal, or in good order, or done.
    assert set(ended) <= {0, 1, 130, -2}, ended
src.stop()
dst.stop()
