#!/usr/bin/python3
# nbdferry - a destination's host that is gone without a word
# SPDX-License-Identifier: BSD-3-Clause
"""All that goes over the link is lost, and nobody says so: a migration pauses
after half a minute, and goes on when the link is there again.  CHECK_LONG=1,
and as root."""

import os
import shutil
import subprocess
import sys

# A network of its own, with only a loopback interface, which can be set down.
if os.environ.get("CHECK_LONG") and "FERRY_SILENCE" not in os.environ:
    command = ["unshare", "-n"]
    if (os.geteuid() == 0 and shutil.which("unshare") and shutil.which("ip")
            and subprocess.call([*command, "ip", "link", "set", "lo", "up"],
                                stderr=subprocess.DEVNULL) == 0):
        os.environ["FERRY_SILENCE"] = "1"
        os.execvp("unshare", [*command, sys.executable, *sys.argv])

from failuretest import *

requires("nbdkit", "qemu-img", "qemu-nbd")
if "FERRY_SILENCE" not in os.environ:
    skip("takes half a minute, and needs root: CHECK_LONG=1")


def lo(state):
    subprocess.run(["ip", "link", "set", "lo", state], check=True)


lo("up")
m = Move()
# What the writer says to the source does not go over the link.
m.writer.stop()
m.begin()
lo("down")
m.pair.wait("postcopy-paused", timeout=90)
print("paused: %s" % m.info()["error-desc"])
lo("up")
m.qmp.command("migrate-set-parameters", max_bandwidth=0)
m.pair.wait("completed")
m.touched += m.writer.touched
m.qmp.close()
m.pair.stop()
m.check()
