#!/usr/bin/python3
# nbdferry - benchmark: how the figures grow
# SPDX-License-Identifier: BSD-3-Clause
"""How time, CPU time and memory of a migration grow with the size of a sparse
disk that always holds the same data, with the number of channels, and with the
rate at which a client writes; and how those of an incremental backup grow with
the granularity of its bitmap.  Over TCP on loopback, each kind in turn.
"""

from ferrybench import *

PARTS = "size,channels,granularity,rate"

a = options(__doc__, rounds=(5, 1), data=(1024, 32), parts=(PARTS,) * 2,
            sizes_gib=("2,64,1024,16384,65536", "2,65536"),
            channels=("1,2,4,8,16", "1,4"),
            granularities_kib=("4,16,64,256,1024,4096", "4,64,1024"),
            rates=("0,1000,2000,5000,10000,20000", "0,2000"))
nbd = need_nbd()
RUN = MiB  # the data is in runs of that
runs = a.data * MiB // RUN


def numbers(s):
    return [int(n) for n in s.split(",")]


def point(x, values):
    return [x, med(values), min(values), max(values)]


def size_name(gib):
    return "%d GiB" % gib if gib < 1024 else "%d TiB" % (gib // 1024)


class Pair:
    """A source with data in even steps over its disk, and a destination."""

    def __init__(self, size, bitmap=False):
        self.step, self.size = size // runs, size
        with open(path("src.raw"), "wb") as f:
            f.truncate(size)
            for i in range(runs):
                f.seek(i * self.step)
                f.write(data[i])
        warm(a.data * MiB + 128 * MiB)
        no_sidecars()
        self.s = Daemon("s", [PLUGIN, "disk=vda=" + path("src.raw"),
                              "control=" + path("s.ctl")])
        self.d = Daemon("d", [PLUGIN, "disk=vda=" + sparse_file(
            "dst.raw", size), "incoming=on"], "tcp")
        if bitmap:
            self.set_bits()

    def set_bits(self):
        """One in each run of data, in a persistent bitmap."""
        QMP(path("s.ctl")).command("block-dirty-bitmap-add", node="vda",
                                   name="b", granularity=65536,
                                   persistent=True)
        h = nbd.NBD()
        h.connect_uri(self.s.uri())
        for i in range(runs):
            h.pwrite(data[i][:4096], i * self.step)
        h.shutdown()

    def migrate(self, *more):
        """(s, CPU s, source's and destination's memory beyond the bitmaps)"""
        cpu = self.s.cpu() + self.d.cpu()
        t, own, _ = timed([NBDFERRY, "migrate", path("s.ctl"),
                           self.d.uri("vda"), *more])
        cpu = self.s.cpu() + self.d.cpu() - cpu + own
        (s, maps_s), (d, maps_d) = self.s.memory(), self.d.memory()
        self.stop()
        return (t, cpu, (s - maps_s) / MiB, (d - maps_d) / MiB, s / MiB,
                d / MiB)

    def stop(self):
        self.s.stop()
        self.d.stop()
        with open(path("dst.raw"), "rb") as f:
            for i in range(0, runs, 7):
                f.seek(i * self.step)
                if f.read(RUN) != data[i]:
                    raise RuntimeError("the copy differs")
        for f in ("src.raw", "dst.raw"):
            os.unlink(path(f))


HEAD = ["s", "min", "max", "CPU s", "source MiB", "destination MiB"]


def columns(v):
    return [med([x[0] for x in v]), min(x[0] for x in v),
            max(x[0] for x in v)] + [med([x[i] for x in v])
                                     for i in (1, 2, 3)]


def by_size():
    sizes = numbers(a.sizes_gib)
    kinds = {(gib, b): lambda gib=gib, b=b: Pair(gib * GiB, b).migrate()
             for gib in sizes for b in (False, True)}
    results = in_turn(kinds, a.rounds)
    rows = []
    for b in False, True:
        for gib in sizes:
            v = results[gib, b]
            rows.append([size_name(gib), "yes" if b else "no"] + columns(v)
                        + [ratio(results, (gib, b), (sizes[0], b)),
                           ratio(results, (gib, b), (sizes[0], b), 1)])
    table("growth with the disk's size: %d MiB of data, with or without a "
          "bitmap of 64 KiB (%d rounds, medians; memory: peak beyond the "
          "bitmaps)" % (a.data, a.rounds),
          ["size", "bitmap"] + HEAD + ["to " + size_name(sizes[0]), "CPU"],
          rows)
    for b in False, True:
        last, what = (sizes[-1], b), ", with a bitmap" if b else ""
        goal("growth", "time %s / %s%s" % (size_name(sizes[-1]),
                                           size_name(sizes[0]), what),
             ratio(results, last, (sizes[0], b)), most=1.2)
        goal("growth", "MiB of memory beyond the bitmaps, the most%s" % what,
             max(max(x[2], x[3]) for (_, with_b), v in results.items()
                 if with_b == b for x in v), most=64)
    ticks = [[gib, size_name(gib)] for gib in sizes]
    common = {"x": "size of the disk", "ticks": ticks, "log": True}
    names = {False: "no bitmap", True: "with a bitmap"}
    plot("size", panels=[
        dict(common, title="Moving %d MiB of data in a sparse disk" % a.data,
             y="seconds", series={
                 names[b]: [point(g, [x[0] for x in results[g, b]])
                            for g in sizes] for b in names}),
        dict(common, title="Memory beyond the bitmaps", y="MiB, at the most",
             line=[64, "the goal"], series={
                 "%s, %s" % (side, "bitmap" if b else "none"):
                 [point(g, [x[i] for x in results[g, b]]) for g in sizes]
                 for side, i in (("source", 2), ("destination", 3))
                 for b in names})])


def by_channels():
    channels = numbers(a.channels)
    results = in_turn({n: lambda n=n: Pair(a.data * MiB).migrate(
        "--channels", str(n)) for n in channels}, a.rounds)
    table("growth with the number of channels: %d MiB of data (%d rounds, "
          "medians)" % (a.data, a.rounds), ["channels"] + HEAD,
          [[n] + columns(results[n]) for n in channels])
    common = {"x": "channels", "ticks": [[n, str(n)] for n in channels],
              "log": True}
    plot("channels", panels=[
        dict(common, title="Moving %d MiB" % a.data, y="seconds", series={
            "time": [point(n, [x[0] for x in results[n]]) for n in channels],
            "CPU time of all processes":
            [point(n, [x[1] for x in results[n]]) for n in channels]}),
        dict(common, title="Memory", y="MiB, at the most", series={
            side: [point(n, [x[i] for x in results[n]]) for n in channels]
            for side, i in (("source", 2), ("destination", 3))})])


def backup(kib):
    """A few writes of 4 KiB to a sparse disk: (s, CPU s, MiB moved)."""
    size = a.data * 4 * MiB
    for f in ("src.raw", "dst.raw"):
        sparse_file(f, size)
    no_sidecars()
    s = Daemon("s", [PLUGIN, "disk=vda=" + path("src.raw"),
                     "control=" + path("s.ctl")])
    more = ["--bitmap", "b", "--format", "raw"]
    timed([NBDFERRY, "backup", path("s.ctl"), path("dst.raw"), *more,
           "--full", "--force", "--granularity", str(kib << 10)])
    rng, h = random.Random(5), nbd.NBD()
    h.connect_uri(s.uri())
    for i in range(0, size, size // (a.data * 4)):
        h.pwrite(data[0][:4096], i + rng.randrange(256) * 4096)
    h.shutdown()
    node = QMP(path("s.ctl")).command("query-named-block-nodes")[0]
    count = node["dirty-bitmaps"][0]["count"]
    warm(max(count, 64 * MiB))
    cpu = s.cpu()
    t, own, _ = timed([NBDFERRY, "backup", path("s.ctl"), path("dst.raw"),
                       *more])
    cpu = s.cpu() - cpu + own
    s.stop()
    same(path("src.raw"), path("dst.raw"))
    return t, cpu, count / MiB


def by_granularity():
    grans = numbers(a.granularities_kib)
    results = in_turn({g: lambda g=g: backup(g) for g in grans}, a.rounds)
    table("growth with granularity: incremental backup of %d random writes of "
          "4 KiB in %d MiB, in place (%d rounds, medians)"
          % (a.data * 4, a.data * 4, a.rounds),
          ["KiB", "s", "min", "max", "CPU s", "dirty MiB"],
          [[g, med([x[0] for x in results[g]]),
            min(x[0] for x in results[g]), max(x[0] for x in results[g]),
            med([x[1] for x in results[g]]), med([x[2] for x in results[g]])]
           for g in grans])
    common = {"x": "granularity", "log": True, "ticks": [
        [g, "%d KiB" % g if g < 1024 else "%d MiB" % (g >> 10)]
        for g in grans]}
    plot("granularity", panels=[
        dict(common, title="Incremental backup of %d writes of 4 KiB"
             % (a.data * 4), y="seconds", series={
                 "time": [point(g, [x[0] for x in results[g]])
                          for g in grans],
                 "CPU time of all processes":
                 [point(g, [x[1] for x in results[g]]) for g in grans]}),
        dict(common, title="What the bitmap has as dirty", y="MiB", series={
            "dirty": [point(g, [x[2] for x in results[g]])
                      for g in grans]})])


def live(rate):
    """(s, CPU s, ms held, p99 in us)"""
    pair = Pair(a.data * MiB)
    w = Writer(pair.s.uri(), a.data * MiB, rate) if rate else None
    time.sleep(0.5)
    qmp = QMP(path("s.ctl"))
    cpu, began = pair.s.cpu() + pair.d.cpu(), time.time()
    qmp.command("migrate", uri=pair.d.uri("vda"))
    while True:
        status = qmp.event("MIGRATION")["status"]
        if status in ("completed", "failed"):
            break
    ended = time.time()
    cpu = pair.s.cpu() + pair.d.cpu() - cpu
    info = qmp.command("query-migrate")
    if status != "completed":
        raise RuntimeError(info)
    us = [us for t, us in w.end() if began <= t <= ended] if w else []
    pair.s.stop()
    pair.d.stop()
    return (ended - began, cpu, info["x-ferry"]["hold-us"] / 1000,
            percentile(us, 99) / 1000)


def by_rate():
    rates = numbers(a.rates)
    results = in_turn({r: lambda r=r: live(r) for r in rates}, a.rounds)
    table("growth with the dirty rate: %d MiB of data (%d rounds, medians)"
          % (a.data, a.rounds),
          ["writes of 4 KiB/s", "s", "min", "max", "CPU s", "hold ms",
           "p99 ms"],
          [[r, med([x[0] for x in results[r]]),
            min(x[0] for x in results[r]), max(x[0] for x in results[r])]
           + [med([x[i] for x in results[r]]) for i in (1, 2, 3)]
           for r in rates])
    common = {"x": "random writes of 4 KiB a second", "ticks": [
        [r, str(r)] for r in rates if r == 0 or r > max(rates) / 12]}
    plot("rate", panels=[
        dict(common, title="Moving %d MiB in use" % a.data, y="seconds",
             series={"time": [point(r, [x[0] for x in results[r]])
                              for r in rates],
                     "CPU time of the daemons":
                     [point(r, [x[1] for x in results[r]]) for r in rates]}),
        dict(common, title="What the writer sees", y="milliseconds", series={
            "hold": [point(r, [x[2] for x in results[r]]) for r in rates],
            "p99 while it moves":
            [point(r, [x[3] for x in results[r]]) for r in rates if r]})])


data = [random.Random(i).randbytes(RUN) for i in range(runs)]
for part in a.parts.split(","):
    if part == "rate" and not shutil.which("fio"):
        print("skipped: %s: fio is not installed" % part)
        continue
    {"size": by_size, "channels": by_channels,
     "granularity": by_granularity, "rate": by_rate}[part]()
done()
