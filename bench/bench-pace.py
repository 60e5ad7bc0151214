#!/usr/bin/python3
# nbdferry - benchmark: the limit of the bandwidth, and long links
# SPDX-License-Identifier: BSD-3-Clause
"""How exactly max-bandwidth is held over each second, counted on the wire;
and how far several channels fill a link of 50 ms round trip, where one is
bound by its window.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../tests"))

from ferrybench import *
from linktest import Link

a = options(__doc__, seconds=(5, 1), size=(256, 16))


class Move:
    """A migration of random data over a link."""

    def __init__(self, size, params, **link):
        self.src = path("src.raw")
        with open(self.src, "wb") as f:
            for _ in range(size // MiB):
                f.write(os.urandom(MiB))
        for f in ("src.raw.ferry", "dst.raw.ferry"):
            subprocess.run(["rm", "-rf", path(f)], check=True)
        dst = warm_file("dst.raw", size)
        self.s = Daemon("s", [PLUGIN, "disk=vda=" + self.src,
                              "control=" + path("s.ctl")], "unix")
        self.d = Daemon("d", [PLUGIN, "disk=vda=" + dst, "incoming=on"],
                        "tcp")
        self.link = Link(self.d.port, **link)
        self.process = subprocess.Popen(
            [NBDFERRY, "migrate", path("s.ctl"), self.link.uri("vda"),
             "--json", *params], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def end(self):
        out = self.process.communicate()[0]
        self.s.stop()
        self.d.stop()
        self.link.stop()
        return json.loads(out.splitlines()[-1])


def seconds(move):
    """Bytes of each second of the sliding kind, ten a second."""
    samples, end = [], time.monotonic() + a.seconds + 1
    while time.monotonic() < end:
        samples.append((time.monotonic(), move.link.bytes()[0]))
        time.sleep(0.1)
    return [(n2 - n1) / (t2 - t1) for (t1, n1), (t2, n2)
            in zip(samples[3:], samples[13:])]


LIMITS = [(200, 4, 0, "none"), (50, 1, 0, "none"), (20, 4, 25, "none"),
          (5, 8, 0, "zstd"), (1, 4, 0, "none")]

rows = []
for limit, channels, delay, compression in LIMITS[:2 if a.short else 5]:
    m = Move(int(limit * (a.seconds + 3)) * MiB,
             ["--max-bandwidth", "%dM" % limit, "--channels", str(channels),
              "--compression", compression], delay=delay)
    wait_for(lambda: m.link.bytes()[0] > limit * MiB / 10, "data")
    r = [x / limit / MiB for x in seconds(m)]
    m.process.terminate()
    m.end()
    rows.append(["%d MiB/s, %d channels, %s" % (limit, channels, compression),
                 2 * delay, min(r), med(r), max(r)])
table("rate / max-bandwidth over any second",
      ["limit", "RTT ms", "least", "median", "most"], rows)

rows, base = [], None
for channels, window in ((1, 1), (4, 1), (8, 1), (1, 0), (4, 0)):
    link = {"delay": 25, "rate": 119e6}
    if window:
        link["window"] = window * MiB
    size = a.size * (1 if channels > 1 or not window else 0.25)
    m = Move(int(size) * MiB, ["--channels", str(channels)], **link)
    info = m.end()
    speed = size / info["total-time"] * 1e3
    base = base or speed
    rows.append(["%d channels" % channels,
                 "%d MiB" % window if window else "-", speed, speed / base,
                 info["downtime"]])
table("1 Gbit/s, 50 ms round trip", ["channels", "window", "MiB/s",
                                     "x one channel", "hold ms"], rows)
done()
