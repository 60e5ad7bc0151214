#!/usr/bin/python3
# nbdferry - what scripts/demo needs beside other people's tools
# SPDX-License-Identifier: BSD-3-Clause
"""Usage: demo-writer.py write URI EXPECTED REPORT
       demo-writer.py bitmap REPORT GRANULARITY < MAP

write   Writes to a disk over one connection until SIGTERM, and never makes a
        second one.  EXPECTED is a copy of the disk; what was acknowledged is
        written there as well, and what is read back is compared with it.
        REPORT is brought up to date again and again; at the end it also holds
        what was touched.  Exit status 0: no request failed, nothing that was
        read was wrong, and the connection was there to the end.

bitmap  Compares the bitmap that stands on standard input, as printed by
        "nbdinfo --json --map=...", with what was touched.
"""

import json
import os
import random
import signal
import sys
import time

SECTOR = 512
AREAS, AREA = 12, 2 << 20       # a guest's writes are here and there
MAX_SECTORS = 64                # of one request
PAUSE = 0.001                   # s, between two requests
REPORT_EVERY = 0.1              # s


class Client:
    """One connection, and all that is known of the disk."""

    def __init__(self, uri, expected, report):
        import nbd              # only this part needs it
        self.nbd = nbd
        self.handle = nbd.NBD()
        self.handle.connect_uri(uri)
        self.expected = open(expected, "r+b", buffering=0)
        self.size = self.handle.get_size()
        self.report, self.reported = report, 0.0
        self.requests = self.reads = self.bytes = 0
        self.longest, self.error = 0.0, None
        self.touched = bytearray(self.size // SECTOR)
        self.rng = random.Random()
        sectors = self.size // SECTOR
        self.areas = [self.rng.randrange(sectors - AREA // SECTOR)
                      for i in range(AREAS)] + [sectors - AREA // SECTOR]

    def a_range(self):
        """(offset, length) in bytes, within one of the areas."""
        first = self.rng.choice(self.areas) + self.rng.randrange(
            AREA // SECTOR)
        most = min(MAX_SECTORS, self.size // SECTOR - first)
        return first * SECTOR, self.rng.randint(1, most) * SECTOR

    def change(self, offset, length):
        """Write or zero; it counts once it was acknowledged."""
        first = offset // SECTOR
        self.touched[first:first + length // SECTOR] = (
            b"\1" * (length // SECTOR))
        if self.rng.random() < 0.1:
            data = bytes(length)
            self.handle.zero(length, offset)
        else:
            data = self.rng.randbytes(length)
            self.handle.pwrite(data, offset)
        os.pwrite(self.expected.fileno(), data, offset)
        self.bytes += length

    def look(self, offset, length):
        """Read, and compare."""
        self.reads += 1
        if (self.handle.pread(length, offset)
                != os.pread(self.expected.fileno(), length, offset)):
            raise ValueError("what was read at %d is not what was written"
                             % offset)

    def request(self):
        began = time.monotonic()
        try:
            if self.rng.random() < 0.2:
                self.look(*self.a_range())
            else:
                self.change(*self.a_range())
        except (self.nbd.Error, ValueError) as e:
            self.error = str(e)
        self.longest = max(self.longest, time.monotonic() - began)
        self.requests += 1

    def write_report(self, **more):
        text = json.dumps(dict(
            requests=self.requests, reads=self.reads, bytes=self.bytes,
            longest_ms=round(self.longest * 1e3, 1), error=self.error, **more))
        with open(self.report + ".new", "w") as f:
            f.write(text)
        os.rename(self.report + ".new", self.report)
        self.reported = time.monotonic()

    def ranges(self):
        """[start, end] in bytes of all that was touched."""
        ranges, end = [], 0
        while (start := self.touched.find(1, end)) >= 0:
            end = self.touched.find(0, start)
            if end < 0:
                end = len(self.touched)
            ranges.append([start * SECTOR, end * SECTOR])
        return ranges


def write(uri, expected, report):
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    client = Client(uri, expected, report)
    while not stop and not client.error:
        client.request()
        if time.monotonic() - client.reported > REPORT_EVERY:
            client.write_report()
        time.sleep(PAUSE)
    if not client.error:
        client.handle.shutdown()
    client.write_report(size=client.size, touched=client.ranges())
    if client.error:
        sys.exit("the client failed: " + client.error)


def granules(ranges, granularity, size):
    """What a bitmap of that granularity must have, as [start, end]."""
    result = []
    for start, end in ranges:
        start = start // granularity * granularity
        end = min(-(-end // granularity) * granularity, size)
        if result and start <= result[-1][1]:
            result[-1][1] = max(result[-1][1], end)
        else:
            result.append([start, end])
    return result


def bitmap(report, granularity):
    with open(report) as f:
        written = json.load(f)
    want = granules(written["touched"], granularity, written["size"])
    have = []
    for extent in json.load(sys.stdin):
        start, end = extent["offset"], extent["offset"] + extent["length"]
        if not extent["type"] & 1:
            continue
        if have and have[-1][1] == start:
            have[-1][1] = end
        else:
            have.append([start, end])
    if have != want:
        wrong = [r for r in have + want if (r in have) != (r in want)]
        sys.exit("%d ranges are dirty, %d should be; one that is not in both: "
                 "%d to %d" % (len(have), len(want), *min(wrong)))
    bits = sum(-(-(end - start) // granularity) for start, end in have)
    print("%d bits in %d ranges" % (bits, len(have)))


def main(argv):
    if len(argv) == 5 and argv[1] == "write":
        write(*argv[2:])
    elif len(argv) == 4 and argv[1] == "bitmap":
        bitmap(argv[2], int(argv[3]))
    else:
        sys.exit(__doc__)


main(sys.argv)
