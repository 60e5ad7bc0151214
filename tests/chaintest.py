# nbdferry - what tests of backup chains share
# SPDX-License-Identifier: BSD-3-Clause
"""A disk with a writer that can be held, and backups that are slow enough for
clients to write meanwhile."""

import json
import os
import signal
import subprocess
import threading

from ferrytest import (NBDFERRY, QMP, Model, Nbdkit, Writer, compare,
                       make_disk, run_nbdferry, wait_for)


class Disk:
    """A daemon with one disk, vda; .model is what the disk must hold."""

    def __init__(self, size, name="src", step=256 * 1024, **kwargs):
        self.size = size
        self.model = make_disk("%s.raw" % name, size, step=step)
        self.control = "%s.ctl" % name
        self.daemon = Nbdkit("disk=vda=%s.raw" % name,
                             "control=" + self.control, name=name, **kwargs)
        self.qmp = QMP(self.control)
        self.seed = 0

    def write(self, requests=40, max_length=64 * 1024):
        """So many requests, then the model is final."""
        w = self.writer(max_length)
        wait_for(lambda: w.done + w.errors >= requests, "the writer")
        w.stop()
        assert w.errors == 0, w.last_error

    def writer(self, max_length=64 * 1024, **kwargs):
        self.seed += 1
        return Writer(self.daemon.uri("vda"), self.model, seed=self.seed,
                      max_length=max_length, **kwargs)

    def snapshot(self):
        return Model(self.size, self.model.data)

    def bitmap(self, name):
        """What query-named-block-nodes says of it; None: there is none."""
        for node in self.qmp.command("query-named-block-nodes"):
            for b in node.get("dirty-bitmaps", ()):
                if b["name"] == name:
                    return b
        return None

    def backups(self):
        return self.qmp.command("x-ferry-query-backups")

    def abandoned(self):
        """Whoever made a backup was killed: the daemon gives it up.  nbdkit
        before 1.33.10 may abort when a client vanishes; that is survived."""
        try:
            wait_for(lambda: self.backups() == [], "the backup to be given up")
        except (OSError, EOFError):
            code = self.daemon.process.wait(TIMEOUT)
            log = self.daemon.log_text()
            if code != -signal.SIGABRT or "raw_send_socket" not in log:
                raise
            self.restart()

    def restart(self):
        self.daemon.start()
        self.qmp = QMP(self.control)

    def stop(self):
        self.qmp.close()
        self.daemon.stop()


class Backup:
    """A backup under way.  By default it is an archive, which goes through a
    pipe to the file 'out' and is held back there until .release ()."""

    def __init__(self, disk, out, *args, piped=True, nr=1, **kwargs):
        self.out, self.piped = out, piped
        before = len(disk.backups())
        self.process = subprocess.Popen(
            [NBDFERRY, "backup", disk.control, "-" if piped else out, *args],
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=False,
            stdout=subprocess.PIPE, **kwargs)
        wait_for(lambda: len(disk.backups()) >= before + nr or
                 self.process.poll() is not None, "the backup to begin")

    def release(self, check=True):
        """Let it go on to its end; returns the exit status."""
        with open(self.out if self.piped else os.devnull, "wb") as f:
            while True:
                data = self.process.stdout.read(1 << 16)
                if not data:
                    break
                f.write(data)
        self.errors = self.process.stderr.read().decode()
        status = self.process.wait(60)
        if check and status != 0:
            raise AssertionError("backup: exit status %d: %s" % (
                status, self.errors))
        return status


def backup(disk, out, *args, **kwargs):
    """A whole backup; returns the object of its --json's last line."""
    p = run_nbdferry("backup", disk.control, out, "--json", *args, **kwargs)
    return json.loads(p.stdout.splitlines()[-1])


def restore(archives, model, out="restored.raw"):
    """The archives must give what the model says."""
    if os.path.exists(out):
        os.unlink(out)
    run_nbdferry("restore", *archives, out)
    compare(out, model)
    os.unlink(out)


def refused(message, *args, **kwargs):
    """The command must fail, and say that."""
    p = run_nbdferry(*args, check=False, **kwargs)
    if p.returncode != 1 or message not in p.stderr:
        raise AssertionError("%s: exit status %d: %s" % (
            " ".join(map(str, args)), p.returncode, p.stderr))
    return p


def info(archive):
    return json.loads(run_nbdferry("archive", "info", "--json",
                                   archive).stdout)[0]


__all__ = [n for n in dir() if not n.startswith("_")]
