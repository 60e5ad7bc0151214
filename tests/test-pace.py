#!/usr/bin/python3
# nbdferry - the limit of the bandwidth
# SPDX-License-Identifier: BSD-3-Clause
"""max-bandwidth, counted on the wire by a relay between the two daemons: with
one channel and with several, with compression, and changed while it runs.
The limits of this test are wide, for machines with other things to do;
bench/bench-pace.py looks closely."""

from ferrytest import *
from linktest import Link
from migratetest import *

requires("nbdkit")

MiB = 1 << 20
SIZE = 96 * MiB


def fresh():
    Nbdkit.all.clear()
    clear_folder()
    return Pair({"vda": SIZE}, tcp=True, step=SIZE)


def rate_of(link, seconds):
    """Bytes a second, over about so long a time."""
    began, before = time.monotonic(), link.bytes()[0]
    wait_for(lambda: time.monotonic() - began >= seconds, "the clock")
    n = link.bytes()[0] - before
    return n / (time.monotonic() - began)


def measure(link, seconds, least, most):
    """A host that stands still for a moment makes it slow, and then fast; but
    not three times."""
    rates = []
    while not rates or not least < rates[-1] < most:
        assert len(rates) < 3, (least, most, rates)
        rates.append(rate_of(link, seconds))
    return rates


def one(limit, channels, compression):
    pair = fresh()
    link = Link(pair.dst.port)
    pair.qmp.command("migrate-set-parameters", max_bandwidth=limit,
                     multifd_channels=channels,
                     multifd_compression=compression)
    pair.qmp.command("migrate", uri=link.uri("vda"))
    pair.wait("active")
    wait_for(lambda: link.bytes()[0] > limit / 10, "the first bytes")
    rates = measure(link, 1, limit * 0.7, limit * 1.1)
    # At once, also for those who wait for their turn.
    pair.qmp.command("migrate-set-parameters", max_bandwidth=limit // 4)
    slow = measure(link, 0.7, 0, limit / 4 * 1.15)[-1]
    began = time.monotonic()
    pair.qmp.command("migrate-set-parameters", max_bandwidth=0)
    info = pair.wait("completed")
    print("%d MiB/s, %d channels, %s: %s, a quarter: %.2f, then %.1f s" % (
        limit / MiB, channels, compression,
        " ".join("%.2f" % (r / MiB) for r in rates), slow / MiB,
        time.monotonic() - began))
    assert info["x-ferry"]["handover-cost-us"] > 0, info
    link.stop()
    pair.qmp.close()
    pair.stop()
    compare("dst-vda.raw", pair.models["vda"])


one(16 * MiB, 4, "none")
one(10 * MiB, 1, "zstd")
one(2 * MiB, 8, "none")
