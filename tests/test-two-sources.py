#!/usr/bin/python3
# nbdferry - two disks on their way to one place
# SPDX-License-Identifier: BSD-3-Clause
"""A mistyped name ends nobody's migration: what is coming in is not taken by
another disk; and what is left of it, when it was cancelled, is overwritten
by another disk only if that is said.  The same disk may always begin anew."""

from ferrytest import *

requires("nbdkit", "mkfs.ext4")

SIZE = 4 << 20


def content(path):
    with open(path, "rb") as f:
        return f.read()


def ended(qmp, status):
    wait_for(lambda: qmp.command("query-migrate")["status"] == status, status)


def fails(control, *args, says):
    r = run_nbdferry("migrate", control, uri, *args, check=False)
    assert r.returncode == 1 and says in r.stderr, r


for name in "one", "two":
    make_disk(name + ".raw", SIZE, step=65536)
subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "nodiscard", "one.raw"],
               check=True)
sources = [Nbdkit("disk=a=%s.raw" % n, "control=%s.ctl" % n, name=n)
           for n in ("one", "two")]
dst = Nbdkit("disk=a=dst.raw", "size=%d" % SIZE, "incoming=on", name="dst")
uri = dst.uri("a")
one = QMP("one.ctl")

# Part of it has come, the file system's signature with it.
one.command("migrate-set-parameters", max_bandwidth=1 << 20,
            multifd_channels=1)
one.command("migrate", uri=uri)
wait_for(lambda: content("dst.raw")[0x438:0x43a] == b"\x53\xef",
         "the signature")
for args in (), ("--overwrite",):
    fails("two.ctl", *args, says="another disk is just coming in")
assert one.command("query-migrate")["status"] == "active"

one.command("migrate-cancel")
ended(one, "cancelled")
fails("two.ctl", says="ext4")
# The same one may; it comes again.
one.command("migrate", uri=uri)
ended(one, "active")
one.command("migrate-cancel")
ended(one, "cancelled")
run_nbdferry("migrate", "two.ctl", uri, "--overwrite")
assert content("dst.raw") == content("two.raw")
one.close()
for d in (*sources, dst):
    d.stop()
