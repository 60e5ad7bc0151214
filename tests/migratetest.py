# nbdferry - what tests of migrations share
# SPDX-License-Identifier: BSD-3-Clause
"""A source, a destination, and a writer that remembers where it wrote."""

import os
import time

from ferrytest import (Nbdkit, QMP, Writer, bitmap_ranges, compare,
                       make_disk, qemu_img_check, wait_for)


class LoggingWriter(Writer):
    """A writer that knows every range that it has touched."""

    def __init__(self, *args, **kwargs):
        self.touched = []
        super().__init__(*args, **kwargs)

    def request(self, offset, length):
        self.touched.append((offset, offset + length))
        super().request(offset, length)


def granules(touched, granularity, size):
    """The ranges that a bitmap must have: sorted, merged, cut at the end."""
    dirty = set()
    for start, end in touched:
        dirty.update(range(start // granularity, -(-end // granularity)))
    ranges = []
    for g in sorted(dirty):
        start, end = g * granularity, min((g + 1) * granularity, size)
        if ranges and ranges[-1][1] == start:
            ranges[-1] = ranges[-1][0], end
        else:
            ranges.append((start, end))
    return ranges


class Pair:
    """Two daemons with the disks given as {name: size}; tcp=True for TCP.

    The source's disks hold data, .models what they must hold.
    """

    def __init__(self, disks, tcp=False, step=1 << 20, dst_args=(),
                 dst_options=()):
        self.disks, self.models = disks, {}
        src_args, dst_args = [], ["incoming=on", *dst_args]
        for name, size in disks.items():
            self.models[name] = make_disk("src-%s.raw" % name, size,
                                          step=step)
            src_args += ["disk=%s=src-%s.raw" % (name, name)]
            dst_args += ["disk=%s=dst-%s.raw" % (name, name),
                         "size=%d" % size]
        self.src = Nbdkit(*src_args, "control=src.ctl", name="src", tcp=tcp)
        self.dst = Nbdkit(*dst_args, "control=dst.ctl", name="dst", tcp=tcp,
                          options=dst_options)
        self.qmp = QMP("src.ctl")

    def add(self, node, name, granularity=65536, **args):
        args.setdefault("persistent", True)
        self.qmp.command("block-dirty-bitmap-add", node=node, name=name,
                         granularity=granularity, **args)

    def migrate(self, export="", **params):
        if params:
            self.qmp.command("migrate-set-parameters", **params)
        self.qmp.command("migrate", uri=self.dst.uri(export).rstrip("/")
                         if not export else self.dst.uri(export))

    def wait(self, *wanted, timeout=60):
        """Until the migration has one of these states; returns its info."""
        def there():
            info = self.qmp.command("query-migrate")
            if info["status"] in wanted:
                return info
            if info["status"] in ("failed", "completed", "cancelled"):
                raise AssertionError("migration: %s" % info)
            return None
        return wait_for(there, "status " + " or ".join(wanted), timeout)

    def stop(self):
        self.src.stop()
        self.dst.stop()

    def check_disk(self, name):
        compare("dst-%s.raw" % name, self.models[name])
        qemu_img_check(self.sidecar(name))

    @staticmethod
    def sidecar(name, side="dst"):
        return "%s-%s.raw.ferry/bitmaps.qcow2" % (side, name)

    def check_bitmap(self, disk, name, want, side="dst"):
        got = bitmap_ranges(self.sidecar(disk, side), name)
        if got != want:
            raise AssertionError("bitmap %r of %s: %s... instead of %s..." % (
                name, disk, got[:5], want[:5]))


def pause_until(condition, timeout=20):
    wait_for(condition, "the test's condition", timeout)


def settle(writer, requests):
    """Let the writer do that many more requests."""
    until = writer.done + requests
    wait_for(lambda: writer.done >= until or not writer.is_alive(),
             "the writer")


__all__ = [n for n in dir() if not n.startswith("_")] + ["os", "time"]
