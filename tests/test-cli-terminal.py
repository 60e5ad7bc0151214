#!/usr/bin/python3
# nbdferry - the command on a terminal, and what it does about signals
# SPDX-License-Identifier: BSD-3-Clause
"""Of a migration by a fake daemon: see clitest.py."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import termios
import threading
import time
import unittest

from clitest import Case, Migration, Refuse, finish, info, start
from ferrytest import NBDFERRY, wait_for


class Signals(Case):
    def begin(self, fake, *args):
        p = start("migrate", fake.path, "nbd://host", *args)
        wait_for(lambda: "query-migrate" in fake.names(), "the migration")
        return p

    def test_cancel(self):
        for number in signal.SIGINT, signal.SIGTERM:
            with Migration(info("active"), linger=3).fake() as fake:
                p = self.begin(fake)
                p.send_signal(number)
                self.expect(130, finish(p), out="",
                            err="the source is as it was")
                self.assertEqual(fake.names().count("migrate-cancel"), 1)

    def test_cancel_json(self):
        with Migration(info("active")).fake() as fake:
            p = self.begin(fake, "--json")
            p.send_signal(signal.SIGINT)
            got = finish(p)
            self.expect(130, got, out="", err="")
            last = got[1].splitlines()[-1]
            self.assertEqual(json.loads(last)["status"], "cancelled")

    def test_twice(self):
        with Migration(info("active"), linger=10 ** 6).fake() as fake:
            p = self.begin(fake)
            p.send_signal(signal.SIGINT)
            wait_for(lambda: "migrate-cancel" in fake.names(), "the cancel")
            self.assertIsNone(p.poll())
            p.send_signal(signal.SIGINT)
            self.expect(130, finish(p), out="", err="asked to cancel")
            self.assertEqual(fake.names().count("migrate-cancel"), 1)

    def test_daemon_hangs(self):
        hang = threading.Event()
        with Migration().fake(query_migrate=lambda _: hang.wait() or
                              info("cancelled")) as fake:
            p = self.begin(fake)
            p.send_signal(signal.SIGINT)
            time.sleep(0.2)
            self.assertIsNone(p.poll())
            p.send_signal(signal.SIGINT)
            self.expect(130, finish(p), err="leaving")
            hang.set()

    def test_too_late(self):
        m = Migration(info("active"), refuse_cancel="the disk has been let go")
        with m.fake() as fake:
            p = self.begin(fake)
            p.send_signal(signal.SIGINT)
            wait_for(lambda: "migrate-cancel" in fake.names(), "the cancel")
            time.sleep(0.3)
            self.assertIsNone(p.poll())
            m.infos = [info("completed")]
            self.expect(0, finish(p), out="completed in",
                        err="cannot be cancelled any more "
                        "(the disk has been let go)")
            self.assertEqual(fake.names().count("migrate-cancel"), 1)

    def slow_start(self, answer):
        """Ctrl-C while the daemon has not yet answered `migrate`."""
        asked, go_on = threading.Event(), threading.Event()

        def migrate(_):
            asked.set()
            go_on.wait(10)
            return answer()
        with Migration(info("active")).fake(migrate=migrate) as fake:
            p = start("migrate", fake.path, "nbd://host")
            self.assertTrue(asked.wait(10))
            p.send_signal(signal.SIGINT)
            self.assertIn("cancelling", p.stderr.readline())
            self.assertEqual(fake.names(), ["migrate-set-parameters",
                                            "migrate"])
            go_on.set()
            return finish(p), fake.names()

    def test_early(self):
        got, names = self.slow_start(lambda: {})
        self.expect(130, got, out="", err="cancelled")
        self.assertEqual(names.count("migrate-cancel"), 1)

    def test_not_ours(self):
        # What runs already was begun by somebody else.
        def refuse():
            raise Refuse("a migration is running already")
        got, names = self.slow_start(refuse)
        self.expect(1, got, err="running already")
        self.assertEqual(names, ["migrate-set-parameters", "migrate"])


class Terminal(Case):
    def on_terminal(self, columns, fake, typed=None, term="xterm"):
        """(status, all that was shown) of a migration on a terminal."""
        pid, fd = pty.fork()
        if pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ,
                        struct.pack("HHHH", 24, columns, 0, 0))
            os.environ["TERM"] = term
            os.execv(NBDFERRY, [NBDFERRY, "migrate", fake.path, "nbd://host"])
        shown = b""
        while True:
            try:
                data = os.read(fd, 4096)
            except OSError:  # as Linux says that nobody is there any more
                break
            if not data:
                break
            shown += data
            if typed and b"%" in shown:
                os.write(fd, typed)
                typed = None
        os.close(fd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return status, shown.decode()

    def bars(self, shown):
        """The lines that were drawn in place."""
        return re.findall(r"\r([^\r\n]*)\x1b\[K", shown)

    def test_bar(self):
        infos = [info("setup"), *[info("active")] * 4, info("completed")]
        for columns in 20, 40, 60, 80, 81, 120, 400:
            with Migration(*infos).fake() as fake:
                status, shown = self.on_terminal(columns, fake)
            self.assertEqual(status, 0, shown)
            bars = self.bars(shown)
            self.assertEqual(len(bars), len(infos), shown)
            for bar in bars:
                self.assertLess(len(bar), columns)
                self.assertTrue(bar.startswith(" 60%"), bar)
            # One line, that of the cursor, until it ends.
            head = shown[:shown.rindex("\x1b[K")]
            self.assertNotIn("\n", head)
            self.assertIn("completed in 12.345 s", shown)
            if columns >= 80:
                for piece in ("[=", ">", "6G/10G", "1G/s", "round 2", "left 4G",
                              "dirty 10M/s", "ETA 0:04"):
                    self.assertIn(piece, bars[2])
                self.assertIn("setup", bars[0])

    def test_ctrl_c(self):
        with Migration(info("active")).fake() as fake:
            status, shown = self.on_terminal(80, fake, typed=b"\x03")
            self.assertEqual(status, 130, shown)
            self.assertEqual(fake.names().count("migrate-cancel"), 1)
            # The message does not stand behind the bar.
            self.assertRegex(shown, r"\n(\^C)?nbdferry: cancelling")

    def test_failure(self):
        failed = info("failed", **{"error-desc": "no\x1b[2J"})
        with Migration(info("active"), failed).fake() as fake:
            status, shown = self.on_terminal(80, fake)
        self.assertEqual(status, 1)
        self.assertIn("\nnbdferry: the migration failed: no\\x1b[2J\r\n", shown)

    def test_dumb(self):
        with Migration(info("active"), info("completed")).fake() as fake:
            status, shown = self.on_terminal(80, fake, term="dumb")
        self.assertEqual(status, 0)
        self.assertNotIn("\x1b", shown)
        self.assertIn("active: 6 GiB of 10 GiB", shown)


if __name__ == "__main__":
    unittest.main()
