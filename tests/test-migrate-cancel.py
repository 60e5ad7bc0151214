#!/usr/bin/python3
# nbdferry - migrations that are cancelled at any moment
# SPDX-License-Identifier: BSD-3-Clause
"""Cancelled while packets are being filled (which takes long, as they are
compressed), waited for or sent: each time it ends at once, and another one can
begin.  The same for a link that is cut just then."""

import random

from ferrytest import *
from linktest import Link
from migratetest import *

requires("nbdkit", "qemu-img", "qemu-nbd")

MiB = 1 << 20
ROUNDS = 24

rng = random.Random(4)
pair = Pair({"a": 12 * MiB, "b": 8 * MiB}, tcp=True, step=4096)
for name in "a", "b":
    with open("src-%s.raw" % name, "r+b") as f:
        data = b"".join(b"%d " % rng.randrange(10**9)
                        for i in range(pair.disks[name] // 12))
        f.write(data)
    pair.models[name].set(0, data)
link = Link(pair.dst.port)
uri = link.uri().rstrip("/")
writer = LoggingWriter(pair.src.uri("a"), pair.models["a"], seed=3,
                       pause=0.005, max_length=16384)
ends = []


def one(how, **params):
    pair.qmp.command("migrate-set-parameters", x_ferry_resume=False, **params)
    pair.qmp.command("migrate", uri=uri)
    pair.wait("active", "completed")
    time.sleep(rng.choice((0, 0.02, 0.1, 0.2)))    # any moment will do
    if how == "cancel":
        pair.qmp.command("migrate-cancel")
    else:
        link.command("cut")
    wait_for(lambda: pair.qmp.command("query-migrate")["status"] in
             ("cancelled", "failed"), "the end: %s" % pair.qmp.command(
                 "query-migrate"), 15)
    ends.append(pair.qmp.command("query-migrate")["status"])
    link.command("mend")
    settle(writer, 1)


for i in range(ROUNDS):
    one("cancel" if i % 3 else "cut", multifd_compression="zlib",
        multifd_zlib_level=9, copy_mode="write-blocking" if i % 2
        else "background", max_bandwidth=2 * MiB if i % 4 == 3 else 0,
        multifd_channels=1 + i % 3)
print(ends)
pair.qmp.command("migrate-set-parameters", multifd_compression="none",
                 max_bandwidth=0, copy_mode="background")
pair.qmp.command("migrate", uri=uri)
pair.wait("completed")
settle(writer, 3)
writer.stop()
assert writer.errors == 0, writer.last_error
pair.qmp.close()
pair.stop()
link.stop()
for name in "a", "b":
    pair.check_disk(name)
